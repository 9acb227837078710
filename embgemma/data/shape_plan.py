"""Shape plans: the row lengths a task's batches use, and how many rows of each.

Everything here is a function of lengths alone, so that each process knows the shapes
of the global batch without reading its texts.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from embgemma.data.packing import (
  ROW_LENGTHS,
  GroupShape,
  Placement,
  best_fit,
  crowding,
  deal,
  row_length,
)
from embgemma.typing import Int

# Attention over rows of this length costs as much as the rest of the model.
_ATTENTION_LENGTH = 1024
_LEAST_SHARE = 1 / 16  # of all tokens, that makes a row length worth compiling
_REAL_TOKENS = 0.95
_WORTH_A_CLASS = 1.03
_ROOM = 3  # standard deviations of a batch's tokens, of a plan of one shape
_SAMPLE_TEXTS = 4096
_SAMPLE_EXAMPLES = 4096
_SAMPLE_SHARDS = 4
_PLANNED = 4  # sets of row lengths, of each kind


@dataclasses.dataclass(frozen=True)
class _Cost:
  """Token slots, and what they cost."""

  slots: int = 0
  cost: float = 0.0

  def plus(self, length: int, rows: int) -> "_Cost":
    slots = length * rows
    return _Cost(
      self.slots + slots, self.cost + slots * (1 + length / _ATTENTION_LENGTH)
    )


@dataclasses.dataclass(frozen=True)
class ShapePlan:
  """The shapes of one task's batches.

  All row lengths but the longest have a fixed number of rows, a little below what
  their texts need: full practically always. What does not fit there goes into longer
  rows, whose holes it fills. The longest rows' number goes up in steps of about one
  standard deviation, to a multiple of a power of two: a run sees few shapes, and
  tasks of like length see the same.

  Attributes:
    short: Groups of fixed shape, shorter rows first.
    length: Of the longest rows.
    least_rows: Of that length, in a shard.
    step_rows: Between one shape and the next.
    typical_rows: Expected.
    crowding: Texts a row of that length.
    texts: Of a shard, at most.
    microbatch_tokens: Token slots of one microbatch at most; None is one microbatch.
  """

  short: tuple[GroupShape, ...]
  length: int
  least_rows: int
  step_rows: int
  typical_rows: int
  crowding: float
  texts: int
  microbatch_tokens: int | None

  @property
  def typical(self) -> tuple[GroupShape, ...]:
    """Groups of one shard in a batch as it is expected."""
    return (*self.short, self.longest(self.typical_rows))

  def longest(self, rows: int) -> GroupShape:
    """The group of longest rows: the first of its ladder with as many rows."""
    rows = max(multiple(rows, self.step_rows), self.least_rows)
    microbatches, rows = microbatched(rows, self.length, self.microbatch_tokens)
    slots = min(multiple(self.crowding * rows, 8), self.texts)
    if microbatches == 1 and not self.short:
      slots = self.texts
    return GroupShape(self.length, microbatches, rows, slots)

  def lay_out(
    self, shards: Sequence[Int[np.ndarray, " N"]]
  ) -> tuple[tuple[GroupShape, ...], list[tuple[Placement, ...]]]:
    """The groups' shapes, and the placements in each shard's groups.

    Args:
      shards: Lengths of each shard's texts; 0 is none.
    """
    placed, layouts = [], []
    for lengths in shards:
      placements, left = fill(lengths, self.short)
      placed.append(placements)
      layouts.append(best_fit(left, self.length))
    shape = self.longest(max(layout.rows for layout in layouts))
    most = max(crowding(layout, shape.microbatches) for layout in layouts)
    while shape.slots < most:
      shape = dataclasses.replace(shape, slots=min(2 * shape.slots, self.texts))
    for placements, layout in zip(placed, layouts, strict=True):
      placements.append(deal(layout, shape))
    return (*self.short, shape), [tuple(placements) for placements in placed]


def multiple(number: int | float, step: int) -> int:
  """The least multiple of `step` that is no less."""
  return step * math.ceil(number / step)


def microbatched(rows: int, length: int, tokens: int | None) -> tuple[int, int]:
  """The number of microbatches and the rows of each that hold `rows`, few in vain."""
  most = rows if tokens is None else max(1, tokens // length)
  if rows <= most:
    return 1, rows
  sizes = range(most, most // 2, -1)
  waste = [multiple(rows, size) - rows for size in sizes]
  # The largest with next to no padding.
  bound = max(min(waste), 0.02 * rows)
  each = next(s for s, w in zip(sizes, waste, strict=True) if w <= bound)
  return -(-rows // each), each


def fill(
  lengths: Int[np.ndarray, " N"], shapes: Sequence[GroupShape]
) -> tuple[list[Placement], Int[np.ndarray, " N"]]:
  """Placements in groups of fixed shape, and the lengths of the texts left over.

  Args:
    lengths: Of the texts; 0 is none.
    shapes: Shorter rows first; what does not fit into one may go into the next.
  """
  left = lengths.copy()
  placements = []
  for shape in shapes:
    fitting = np.where(left <= shape.length, left, 0)
    layout = best_fit(fitting, shape.length, shape.microbatches * shape.rows)
    placements.append(deal(layout, shape))
    left[placements[-1].texts] = 0
  return placements, left


def deal_examples(
  lengths: Int[np.ndarray, "B T"], num_shards: int
) -> Int[np.ndarray, "S b"]:
  """The examples of each shard: equal numbers, nearly equal tokens.

  In rounds of S, longest first, in which the shard that has least gets most. Within
  a shard examples keep the order of the batch.
  """
  if num_shards == 1:
    return np.arange(len(lengths))[None]
  tokens = lengths.sum(axis=1)
  order = np.argsort(-tokens, kind="stable").reshape(-1, num_shards)
  sums = np.zeros(num_shards, int)
  for examples in order:
    least_first = np.argsort(sums, kind="stable")
    sums[least_first] += tokens[examples]
    examples[least_first] = examples.copy()
  return np.sort(order.T, axis=1)


def shard_texts(lengths: Int[np.ndarray, "b T"]) -> Int[np.ndarray, " N"]:
  """Lengths of a shard's texts: queries, positives, then negatives by example."""
  return np.concatenate([lengths[:, 0], lengths[:, 1], lengths[:, 2:].ravel()])


def row_classes(
  texts: Int[np.ndarray, " N"],
  row_lengths: Sequence[int] = ROW_LENGTHS,
  longest: int = 0,
) -> tuple[int, ...]:
  """The row lengths that texts like these cost least with, ascending.

  Cost is that of all token slots, attention growing with the row. Choices of at least
  95 % real tokens come first, and among those within 3 % of the cheapest the one of
  fewest lengths.

  Args:
    texts: Lengths; 0 is none.
    row_lengths: To choose from.
    longest: Tokens of the longest text there may be, if these have none such.

  Raises:
    DataError: no row length holds the longest text.
  """
  trials = {c: _trial(texts, c) for c in _candidates(texts, row_lengths, longest)}
  return _cheapest(trials, int(texts.sum()))


def _candidates(
  texts: np.ndarray, row_lengths: Sequence[int], longest: int
) -> Iterator[tuple[int, ...]]:
  """Sets of row lengths of which each is worth compiling."""
  ladder = sorted(row_lengths)
  first = ladder.index(row_length(max(longest, int(texts.max())), ladder))
  # Rows longer than the longest text waste less at their ends.
  for top in range(first, min(first + 3, len(ladder))):
    for count in range(top + 1):
      for short in itertools.combinations(ladder[:top], count):
        classes = (*short, ladder[top])
        if all(_shares(texts, classes)[:-1] >= _LEAST_SHARE):
          yield classes


def _promising(
  trials: dict[tuple[int, ...], _Cost], real: int
) -> list[tuple[int, ...]]:
  """The cheapest, the cheapest of few slots, and those of one length."""
  cheap = sorted(trials, key=lambda classes: trials[classes].cost)
  dense = [c for c in cheap if real >= _REAL_TOKENS * trials[c].slots]
  single = [c for c in cheap if len(c) == 1]
  return list(dict.fromkeys([*dense[:_PLANNED], *cheap[:_PLANNED], *single]))


def _cheapest(trials: dict[tuple[int, ...], _Cost], real: int) -> tuple[int, ...]:
  """Of trials with as many real tokens, the choice that `row_classes` describes."""
  dense = {c: t for c, t in trials.items() if real >= _REAL_TOKENS * t.slots}
  costs = {c: t.cost for c, t in (dense or trials).items()}
  bound = _WORTH_A_CLASS * min(costs.values())
  near = [classes for classes, cost in costs.items() if cost <= bound]
  return min(near, key=lambda classes: (len(classes), costs[classes]))


def _shares(texts: np.ndarray, classes: Sequence[int]) -> np.ndarray:
  """Of the tokens, the share whose texts belong to each class."""
  tokens = np.bincount(np.searchsorted(classes, texts), texts, len(classes))
  return tokens / max(1, tokens.sum())


def _trial(texts: np.ndarray, classes: Sequence[int]) -> _Cost:
  tokens = _shares(texts, classes) * texts.sum()
  left, cost = texts, _Cost()
  for length, own in zip(classes[:-1], tokens[:-1], strict=True):
    fitting = np.where(left <= length, left, 0)
    layout = best_fit(fitting, length, int(0.95 * own / length))
    left = np.where(layout.row >= 0, 0, left)
    cost = cost.plus(length, layout.rows)
  return cost.plus(classes[-1], best_fit(left, classes[-1]).rows)


def plan_shapes(
  lengths: Int[np.ndarray, "n T"],
  batch_size: int,
  num_shards: int = 1,
  microbatch_tokens: int | None = None,
  row_lengths: Sequence[int] = ROW_LENGTHS,
  longest: int = 0,
  one_shape: bool = False,
) -> ShapePlan:
  """The plan for batches of examples like those given; the same for the same.

  Row lengths that do well on a sample are planned in full and tried on whole batches;
  the plan is then chosen as `row_classes` does.

  Args:
    lengths: Tokens of query, positive and negatives of examples; 0 is none.
    batch_size: B, examples of the global batch.
    num_shards: S, which divides B.
    microbatch_tokens: Token slots of one shard's microbatch; None is all at once.
    row_lengths: To choose from.
    longest: Tokens of the longest text there may be, if `lengths` is a sample.
    one_shape: Whether the plan's least shape has room for nearly all batches, so that
      one program is compiled and not four or so, with more padding.

  Raises:
    DataError: no row length holds the longest text.
  """
  lengths = np.asarray(lengths, int)
  batches = list(_batches(lengths, batch_size, num_shards))
  sample = np.concatenate([shard for batch in batches for shard in batch])
  sample = sample[:: max(1, len(sample) // _SAMPLE_TEXTS)]
  longest = max(longest, int(lengths.max()))
  trials = {c: _trial(sample, c) for c in _candidates(sample, row_lengths, longest)}
  plans, costs = {}, {}
  for classes in _promising(trials, int(sample.sum())):
    short = _short_shapes(lengths, classes, batch_size // num_shards, microbatch_tokens)
    deviation = lengths.sum(axis=1).std() * math.sqrt(batch_size) / num_shards
    plan = _plan(batches, short, classes[-1], deviation, microbatch_tokens, one_shape)
    kept = tuple(shape.length for shape in plan.typical)
    plans[kept] = plan
    costs[kept] = _Cost()
    for batch in batches:
      for shape in plan.lay_out(batch)[0]:
        rows = len(batch) * shape.microbatches * shape.rows
        costs[kept] = costs[kept].plus(shape.length, rows)
  real = sum(int(shard.sum()) for batch in batches for shard in batch)
  return plans[_cheapest(costs, real)]


def _batches(
  lengths: np.ndarray, batch_size: int, num_shards: int
) -> Iterator[list[np.ndarray]]:
  """Random batches, the texts of some of their shards."""
  rng = np.random.default_rng(0)
  for _ in range(min(8, max(2, _SAMPLE_EXAMPLES // batch_size))):
    drawn = lengths[rng.integers(len(lengths), size=batch_size)]
    shards = deal_examples(drawn, num_shards)[:_SAMPLE_SHARDS]
    yield [shard_texts(drawn[shard]) for shard in shards]


def _short_shapes(
  lengths: np.ndarray, classes: Sequence[int], size: int, tokens: int | None
) -> list[GroupShape]:
  """Fixed shapes of all classes but the longest, two deviations below the mean."""
  of_class = np.searchsorted(classes, lengths)
  shapes = []
  for index, length in enumerate(classes[:-1]):
    own = np.where(of_class == index, lengths, 0).sum(axis=1)
    rows = int((size * own.mean() - 2 * math.sqrt(size) * own.std()) / length)
    if rows >= 1:
      microbatches, each = microbatched(rows, length, tokens)
      each = rows // microbatches
      shapes.append(GroupShape(length, microbatches, each, each * length))
  return shapes


def _plan(
  batches: Sequence[Sequence[np.ndarray]],
  short: Sequence[GroupShape],
  length: int,
  deviation: float,
  microbatch_tokens: int | None,
  one_shape: bool,
) -> ShapePlan:
  """The plan with these rows, its slots and longest rows as the batches need them.

  Args:
    batches: Texts of shards.
    short: Fixed shapes, with slots to spare.
    length: Of the longest rows.
    deviation: Of a shard's tokens.
    microbatch_tokens: See `ShapePlan`.
    one_shape: See `plan_shapes`.
  """
  crowds = np.zeros(len(short) + 1)
  needed = []
  for batch in batches:
    most = 1
    for texts in batch:
      placements, left = fill(texts, short)
      layout = best_fit(left, length)
      most = max(most, layout.rows)
      microbatches, rows = microbatched(max(1, layout.rows), length, microbatch_tokens)
      crowd = [_crowd(texts, p, s) for p, s in zip(placements, short, strict=True)]
      crowds = np.maximum(crowds, [*crowd, crowding(layout, microbatches) / rows])
    needed.append(most)
  typical = float(np.mean(needed))
  if one_shape:
    typical += _ROOM * deviation / length
  step = 1 << max(0, round(math.log2(max(deviation / length, 1))))
  return ShapePlan(
    short=tuple(
      dataclasses.replace(shape, slots=multiple(1.1 * crowd * shape.rows + 4, 8))
      for shape, crowd in zip(short, crowds[:-1], strict=True)
    ),
    length=length,
    least_rows=(
      math.ceil(typical)
      if one_shape
      else multiple(max(1, typical - deviation / length), step)
    ),
    step_rows=step,
    typical_rows=math.ceil(typical),
    crowding=1.1 * max(float(crowds[-1]), 1.0),
    texts=len(batches[0][0]),
    microbatch_tokens=microbatch_tokens,
  )


def _crowd(texts: np.ndarray, placement: Placement, shape: GroupShape) -> float:
  """Texts a row in the microbatch that has most.

  Or as many as the rows' share of all texts that fit: in a batch of fewer tokens, all
  of the shortest find a place too.
  """
  most = np.bincount(placement.slot // shape.slots).max(initial=0) / shape.rows
  fitting = texts[(texts > 0) & (texts <= shape.length)]
  return max(float(most), shape.length * len(fitting) / max(1, int(fitting.sum())))
