"""Packing: texts of any length laid into rows of few lengths, several a row."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from embgemma.errors import DataError
from embgemma.typing import Array, ArrayLike, Float, Int, Leaf, PackedTexts, Shaped

# Short texts do not pay the attention of long rows; few lengths, few compilations.
ROW_LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 2048)


def row_length(longest: int, row_lengths: Sequence[int] = ROW_LENGTHS) -> int:
  """The shortest row length of the ladder that holds a text of `longest` tokens.

  Raises:
    DataError: none does.
  """
  for length in sorted(row_lengths):
    if longest <= length:
      return length
  raise DataError(
    f"a text of {longest} tokens is longer than the longest row ({max(row_lengths)})"
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each text lies.

  Attributes:
    row: int [N]; -1 for a text that has no place.
    offset: int [N], first token in the row.
    rows: Rows used.
  """

  row: np.ndarray
  offset: np.ndarray
  rows: int


class _Rows:
  """Rows by the tokens that are free in them.

  Attributes:
    opened: Rows so far.
  """

  def __init__(self, capacity: int, max_rows: int | None):
    self.opened = 0
    self._capacity = capacity
    self._max_rows = max_rows
    # Row numbers by free tokens; bit f of `available`: some have f.
    self._by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    self._available = 0

  def take(self, length: int, texts: int) -> tuple[int, list[int]]:
    """The fullest rows that hold a text, as many as `texts` can fill; their free."""
    fitting = self._available >> length
    free = self._capacity
    if fitting:
      free = length + (fitting & -fitting).bit_length() - 1
    wanted = -(-texts // (free // length))
    if fitting:
      rows = self._by_free[free]
      taken = rows[-wanted:]
      del rows[-wanted:]
      if not rows:
        self._available &= ~(1 << free)
      return free, taken
    if self._max_rows is not None:
      wanted = min(wanted, self._max_rows - self.opened)
    self.opened += wanted
    return free, list(range(self.opened - wanted, self.opened))

  def give(self, free: int, rows: list[int]) -> None:
    """Puts rows back with other free tokens."""
    if rows:
      self._by_free[free] += rows
      self._available |= 1 << free


def best_fit(
  lengths: Int[np.ndarray, " N"], capacity: int, max_rows: int | None = None
) -> Layout:
  """The layout by best-fit decreasing.

  Each text, longest first, goes to the fullest row that still holds it. Ties keep
  the input's order, so the result depends on the lengths only. Texts of one length
  fill a row together: the row that took one is the fullest for the next.

  Args:
    lengths: Tokens of each text; 0 is none.
    capacity: Tokens a row holds, at least the longest text.
    max_rows: Texts that fit into no more rows than these get no place; None opens
      as many as it takes.
  """
  order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
  distinct, counts = np.unique(-lengths[order], return_counts=True)
  rows = _Rows(capacity, max_rows)
  row_of: list[int] = []
  offset_of: list[int] = []
  for length, left in zip((-distinct).tolist(), counts.tolist(), strict=True):
    while left:
      free, taken = rows.take(length, left)
      if not taken:
        break
      each = free // length
      placed = min(left, each * len(taken))
      row_of += [row for row in taken for _ in range(each)][:placed]
      offsets = range(capacity - free, capacity - free + each * length, length)
      offset_of += (list(offsets) * len(taken))[:placed]
      full, part = divmod(placed, each)
      rows.give(free - each * length, taken[:full])
      rows.give(free - part * length, taken[full:])
      left -= placed
    row_of += [-1] * left
    offset_of += [0] * left
  row = np.full(len(lengths), -1)
  offset = np.zeros(len(lengths), int)
  row[order], offset[order] = row_of, offset_of
  return Layout(row, offset, rows.opened)


@dataclasses.dataclass(frozen=True)
class GroupShape:
  """What the rows of one length in a shard's batch are made of.

  Attributes:
    length: Tokens of a row.
    microbatches: K.
    rows: Of one microbatch.
    slots: Texts that one microbatch has room for.
  """

  length: int
  microbatches: int
  rows: int
  slots: int

  @property
  def tokens(self) -> int:
    """Token slots of all microbatches."""
    return self.length * self.microbatches * self.rows

  @property
  def vectors(self) -> int:
    """Text slots of all microbatches."""
    return self.microbatches * self.slots


@dataclasses.dataclass(frozen=True)
class Placement:
  """Texts in a group of one shard.

  Attributes:
    texts: int [n], indices of the texts that have a place.
    row: int [n], counted over all microbatches.
    offset: int [n], first token in the row.
    slot: int [n], counted over all microbatches.
  """

  texts: np.ndarray
  row: np.ndarray
  offset: np.ndarray
  slot: np.ndarray


def crowding(layout: Layout, microbatches: int) -> int:
  """Most texts of any microbatch when `deal` deals out a layout's rows."""
  return int(np.bincount(_microbatch(layout, microbatches)[0]).max(initial=0))


def _microbatch(layout: Layout, microbatches: int) -> tuple[np.ndarray, ...]:
  """Of each placed text: its microbatch, the row there, and the text's index."""
  texts = np.flatnonzero(layout.row >= 0)
  row = layout.row[texts]
  if microbatches == 1:
    return np.zeros_like(row), row, texts
  counts = np.bincount(row, minlength=layout.rows)
  # Rows of most texts first, back and forth over the microbatches: like sums.
  rank = np.empty(layout.rows, int)
  rank[np.argsort(-counts, kind="stable")] = np.arange(layout.rows)
  turn, place = divmod(rank, microbatches)
  place = np.where(turn % 2, microbatches - 1 - place, place)
  return place[row], turn[row], texts


def deal(layout: Layout, shape: GroupShape) -> Placement:
  """The placement of a layout whose rows are dealt out over the microbatches.

  Texts beyond a microbatch's slots get no place: those that came last into a row,
  which with `best_fit` are the shortest.

  Args:
    layout: Of at most shape.microbatches * shape.rows rows.
    shape: Of the group.
  """
  microbatch, row, texts = _microbatch(layout, shape.microbatches)
  order = np.lexsort((layout.offset[texts], microbatch))
  starts = np.searchsorted(microbatch[order], np.arange(shape.microbatches))
  slot = np.empty_like(order)
  slot[order] = np.arange(len(order)) - starts[microbatch[order]]
  kept = slot < shape.slots
  texts, microbatch = texts[kept], microbatch[kept]
  return Placement(
    texts,
    microbatch * shape.rows + row[kept],
    layout.offset[texts],
    microbatch * shape.slots + slot[kept],
  )


def place_texts(
  texts: Sequence[np.ndarray],
  placements: Sequence[Placement],
  shape: GroupShape,
) -> PackedTexts:
  """The arrays of one group: tokens [K, S * R, L], starts and lengths [K, S * N].

  Args:
    texts: int32 token arrays, those of all shards in the order of the placements'
      `texts`, a shard's after another.
    placements: Of each of S shards; `texts` is not looked at.
    shape: Of the group, the same in all shards.
  """
  k, r, n, length = shape.microbatches, shape.rows, shape.slots, shape.length
  shards = len(placements)
  shard = np.repeat(np.arange(shards), [len(p.row) for p in placements])
  microbatch, row = divmod(np.concatenate([p.row for p in placements]), r)
  slot = np.concatenate([p.slot for p in placements]) % n
  start = row * length + np.concatenate([p.offset for p in placements])
  block = microbatch * shards + shard
  begin = block * r * length + start
  sizes = np.fromiter(map(len, texts), int, len(texts))
  order = np.argsort(begin)
  # Gaps and texts in turn, from the first row to the last.
  begin, total = begin[order], k * shards * r * length
  spans, ids, origin = np.zeros((3, 2 * len(texts) + 1), np.int32)
  spans[1::2], ids[1::2], origin[1::2] = sizes[order], slot[order], begin
  spans[::2] = np.append(begin, total) - np.insert(begin + sizes[order], 0, 0)
  ids[::2] = n
  text_ids = np.repeat(ids, spans)
  real = text_ids < n
  positions = np.arange(total, dtype=np.int32) - np.repeat(origin, spans)
  positions[~real] = 0
  tokens = np.zeros(total, np.int32)
  if len(texts):
    tokens[real] = np.concatenate([texts[i] for i in order.tolist()])
  starts, lengths = np.zeros((2, k * shards * n), np.int32)
  starts[block * n + slot], lengths[block * n + slot] = start, sizes
  by_row, by_text = (k, shards * r, length), (k, shards * n)
  return PackedTexts(
    tokens=tokens.reshape(by_row),
    positions=positions.reshape(by_row),
    text_ids=text_ids.reshape(by_row),
    starts=starts.reshape(by_text),
    lengths=lengths.reshape(by_text),
  )


# A prefix of its tree, such as one of shardings, is no batch: fields are not checked.
@no_type_check
@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "groups",
    "slots",
    "query_hash",
    "positive_hash",
    "negative_mask",
    "teacher",
    "teacher_mask",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedPairs:
  """A batch of B examples with M negatives each, on S data shards of b = B / S.

  A group holds the rows of one length in K microbatches: tokens [K, S * R, L],
  starts and lengths [K, S * N]. A shard's vectors are its groups' [K * N] end to end.

  Attributes:
    groups: A tuple of PackedTexts, shorter rows first.
    slots: int32 [S * b * (2 + M)], for each shard the places of b queries, b
      positives and b * M negatives (example by example) among its vectors; one past
      the last for an absent negative.
    query_hash: uint32 [B, 2], content hashes (JAX has no uint64 by default).
    positive_hash: Likewise.
    negative_mask: bool [B, M], False where an example has fewer than M negatives.
    teacher: float16 or float32 [S * b * (2 + M), W], teacher vectors of the texts in
      the order of `slots`; None without a teacher.
    teacher_mask: bool [S * b * (2 + M)], False where a text has none; or None.
  """

  groups: Leaf
  slots: Leaf
  query_hash: Leaf
  positive_hash: Leaf
  negative_mask: Leaf
  teacher: Leaf = None
  teacher_mask: Leaf = None


def split_roles(
  vectors: Float[ArrayLike, "T E"], slots: Int[ArrayLike, " n"], examples: int
) -> tuple[Float[Array, "b E"], Float[Array, "b E"], Float[Array, "b M E"]]:
  """Query, positive and negative vectors of one shard; zeros for what is absent.

  Args:
    vectors: Of the shard's groups, end to end.
    slots: See `PackedPairs`.
    examples: b.
  """
  return by_role(jnp.take(vectors, slots, axis=0, mode="fill", fill_value=0), examples)


def by_role(
  texts: Shaped[ArrayLike, "n *rest"],  # noqa: F821 (a shape, not a product)
  examples: int,
) -> tuple[
  Shaped[Array, "b *rest"],  # noqa: F821
  Shaped[Array, "b *rest"],  # noqa: F821
  Shaped[Array, "b M *rest"],
]:
  """What queries, positives and negatives of one shard have, of values in their order.

  Args:
    texts: In the order of `PackedPairs.slots`.
    examples: b.
  """
  texts = jnp.asarray(texts)
  query, positive, negatives = jnp.split(texts, [examples, 2 * examples])
  each = texts.shape[0] // examples - 2
  return query, positive, negatives.reshape(examples, each, *texts.shape[1:])


def abstract_pairs(
  shapes: Sequence[GroupShape],
  batch_size: int,
  negatives: int,
  num_shards: int,
  teacher_width: int | None = None,
) -> PackedPairs:
  """Shapes and dtypes of a global batch, as ShapeDtypeStruct.

  Args:
    shapes: Groups of one shard.
    batch_size: B.
    negatives: M.
    num_shards: S.
    teacher_width: W, of vectors in half precision; None is without a teacher.
  """
  texts = batch_size * (2 + negatives)

  def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

  def group(shape: GroupShape) -> PackedTexts:
    by_row = array(shape.microbatches, num_shards * shape.rows, shape.length)
    by_text = array(shape.microbatches, num_shards * shape.slots)
    return PackedTexts(by_row, by_row, by_row, by_text, by_text)

  teacher = teacher_mask = None
  if teacher_width is not None:
    teacher = array(texts, teacher_width, dtype="float16")
    teacher_mask = array(texts, dtype="bool")
  return PackedPairs(
    groups=tuple(group(shape) for shape in shapes),
    slots=array(texts),
    query_hash=array(batch_size, 2, dtype="uint32"),
    positive_hash=array(batch_size, 2, dtype="uint32"),
    negative_mask=array(batch_size, negatives, dtype="bool"),
    teacher=teacher,
    teacher_mask=teacher_mask,
  )
