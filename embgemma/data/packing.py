"""Packing: texts of any length laid into rows of one length, several a row."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from embgemma.errors import DataError
from embgemma.typing import ArrayLike, Bool, PackedTexts, UInt32

# Short texts do not pay the attention of long rows; few lengths, few compilations.
ROW_LENGTHS = (64, 128, 256, 512, 1024, 2048)


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


def round_up_rows(rows: int) -> int:
  """The next row count of the ladder: multiples of an eighth of the octave.

  At most 12.5 % padding rows, 8 shapes between powers of two.
  """
  quantum = max(1, 1 << max(0, rows.bit_length() - 4))
  return -(-rows // quantum) * quantum


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each text lies.

  Attributes:
    row: Of each text; 0 for an empty one.
    offset: Of each text in its row.
    rows: Rows used.
  """

  row: list[int]
  offset: list[int]
  rows: int


def best_fit(lengths: Sequence[int], capacity: int) -> Layout:
  """The layout by best-fit decreasing.

  Each text, longest first, goes to the fullest row that still holds it. Ties keep
  the input's order, so the result depends on the lengths only.

  Args:
    lengths: Tokens of each text, 0 for an empty slot.
    capacity: Tokens a row holds, at least the longest text.
  """
  row_of = [0] * len(lengths)
  offset_of = [0] * len(lengths)
  # open_rows[f]: rows with f free tokens; bit f of `available`: it is not empty.
  open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
  available = 0
  rows = 0
  for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    length = lengths[text]
    if length == 0:
      break
    fitting = available >> length
    if fitting:
      free = length + (fitting & -fitting).bit_length() - 1
      row = open_rows[free].pop()
      if not open_rows[free]:
        available &= ~(1 << free)
    else:
      row, free = rows, capacity
      rows += 1
    row_of[text] = row
    offset_of[text] = capacity - free
    left = free - length
    open_rows[left].append(row)
    available |= 1 << left
  return Layout(row_of, offset_of, rows)


def place_texts(
  texts: Sequence[Sequence[np.ndarray]],
  layouts: Sequence[Layout],
  length: int,
  rows: int,
  slots: int,
) -> PackedTexts:
  """The packed arrays of texts with given layouts.

  Args:
    texts: For each data shard, at most `slots` int32 token arrays.
    layouts: Of each shard.
    length: Row length.
    rows: Rows of a shard.
    slots: Text slots of a shard.
  """
  num_shards = len(texts)
  tokens = np.zeros((num_shards, rows * length), np.int32)
  positions = np.zeros_like(tokens)
  text_ids = np.full_like(tokens, slots)
  starts = np.zeros((num_shards, slots), np.int32)
  lengths = np.zeros_like(starts)
  ramp = np.arange(length, dtype=np.int32)
  for shard, layout in enumerate(layouts):
    for slot, text in enumerate(texts[shard]):
      size = len(text)
      if not size:
        continue
      start = layout.row[slot] * length + layout.offset[slot]
      tokens[shard, start : start + size] = text
      positions[shard, start : start + size] = ramp[:size]
      text_ids[shard, start : start + size] = slot
      starts[shard, slot] = start
      lengths[shard, slot] = size
  by_row = (num_shards * rows, length)
  return PackedTexts(
    tokens=tokens.reshape(by_row),
    positions=positions.reshape(by_row),
    text_ids=text_ids.reshape(by_row),
    starts=starts.reshape(-1),
    lengths=lengths.reshape(-1),
    num_shards=num_shards,
  )


def pack_texts(texts: Sequence[Sequence[np.ndarray]], length: int) -> PackedTexts:
  """Texts of each data shard packed into the fewest rows of the ladder.

  Args:
    texts: For each shard, the same number of int32 token arrays; an empty array is
      an empty slot.
    length: Row length, at least the longest text.
  """
  layouts = [best_fit([len(t) for t in shard], length) for shard in texts]
  rows = round_up_rows(max([1, *(layout.rows for layout in layouts)]))
  return place_texts(texts, layouts, length, rows, len(texts[0]))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["texts", "query_hash", "positive_hash", "negative_mask"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedPairs:
  """A batch of B examples with M negatives each.

  Within a shard of b = B / S examples the text slots are b queries, b positives,
  then b * M negatives, example by example.

  Attributes:
    texts: B * (2 + M) packed texts.
    query_hash: Content hashes, two uint32 each (JAX has no uint64 by default).
    positive_hash: Likewise.
    negative_mask: False where an example has fewer than M negatives.
  """

  texts: PackedTexts
  query_hash: UInt32[ArrayLike, "B 2"]
  positive_hash: UInt32[ArrayLike, "B 2"]
  negative_mask: Bool[ArrayLike, "B M"]


def split_roles(embeddings: ArrayLike, num_shards: int, batch_size: int):
  """Query [B, E], positive [B, E] and negative [B, M, E] of a `PackedPairs` batch.

  Args:
    embeddings: [B * (2 + M), E] in slot order.
    num_shards: S.
    batch_size: B.
  """
  width = embeddings.shape[-1]
  b = batch_size // num_shards
  by_shard = embeddings.reshape(num_shards, -1, width)
  negatives = by_shard.shape[1] // b - 2
  return (
    by_shard[:, :b].reshape(batch_size, width),
    by_shard[:, b : 2 * b].reshape(batch_size, width),
    by_shard[:, 2 * b :].reshape(batch_size, negatives, width),
  )


def hash_words(hashes: np.ndarray) -> UInt32[np.ndarray, "B 2"]:
  """uint64 [B] as two uint32 words [B, 2]."""
  return np.ascontiguousarray(hashes, "<u8").view("<u4").reshape(-1, 2)
