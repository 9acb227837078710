"""Packing on two sides: examples of inputs and targets laid into rows, several a row.

An example lies in the same row on both sides and has the same id there, so that the
targets of a row attend to the inputs of their own example.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from embgemma.data.denoising import Examples
from embgemma.data.packing import best_fit
from embgemma.data.shape_plan import deal_examples, microbatched, multiple
from embgemma.errors import DataError
from embgemma.typing import Int, PackedSequences

_PLANNED_EXAMPLES = 8192  # of which the batches that a plan is made from have as many
_PLANNED_SHARDS = 4
_TOGETHER = 2048  # examples among which rows are filled: time grows with the square


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
  """Where each of n examples lies.

  Attributes:
    row: int [n].
    number: int [n], 1 for the first example of a row, and so on.
    offset: int [n, 2], first token of inputs and targets in the row.
    rows: Rows used.
  """

  row: np.ndarray
  number: np.ndarray
  offset: np.ndarray
  rows: int


@dataclasses.dataclass(frozen=True)
class SequenceShape:
  """What one shard's batch is made of.

  Attributes:
    inputs: Tokens of a row of inputs; 0 of a decoder alone.
    targets: Tokens of a row of targets.
    microbatches: K.
    rows: Of one microbatch.
  """

  inputs: int
  targets: int
  microbatches: int
  rows: int

  @property
  def tokens(self) -> int:
    """Token slots of all microbatches, both sides."""
    return (self.inputs + self.targets) * self.microbatches * self.rows


def lay_out(sizes: Int[np.ndarray, "n 2"], capacity: tuple[int, int]) -> SequenceLayout:
  """The layout of examples; a function of their sizes alone.

  Of a decoder alone, by best-fit decreasing. On two sides, row after row: the next
  example of a row is the one whose size is most like the room that is left, by the
  dot product of both, sides weighted by the demand for them; long inputs meet long
  targets (Panigrahy et al., "Heuristics for vector bin packing", 2011, section 3).
  Takes some 2 % fewer rows than best-fit by the sum of both.

  Args:
    sizes: Tokens of inputs and targets of each example.
    capacity: Of a row; 0 inputs for a decoder alone.

  Raises:
    DataError: an example is larger than a row.
  """
  if (sizes > capacity).any():
    worst = sizes[np.argmax((sizes > capacity).any(axis=1))].tolist()
    raise DataError(f"an example of {worst} tokens is larger than a row, {capacity}")
  if not capacity[0]:
    layout = best_fit(sizes[:, 1], capacity[1])
    order, row, rows = np.argsort(layout.offset, kind="stable"), layout.row, layout.rows
  else:
    parts = np.array_split(sizes, max(1, -(-len(sizes) // _TOGETHER)))
    order, row, rows = _joined([_fill_rows(part, capacity) for part in parts])
  # By row, in the order in which they came into it.
  order = order[np.argsort(row[order], kind="stable")]
  first = np.searchsorted(row[order], np.arange(rows))[row[order]]
  ends = np.cumsum(sizes[order], axis=0)
  begins = ends - sizes[order]
  number = np.empty(len(sizes), int)
  offset = np.empty((len(sizes), 2), int)
  number[order] = 1 + np.arange(len(sizes)) - first
  offset[order] = begins - begins[first]
  return SequenceLayout(row, number, offset, rows)


def _fill_rows(
  sizes: Int[np.ndarray, "n 2"], capacity: tuple[int, int]
) -> tuple[Int[np.ndarray, " n"], list[int]]:
  """The examples in the order in which rows take them, and how many each takes."""
  shares = sizes / capacity
  left = np.argsort(-shares.sum(axis=1), kind="stable")
  inputs, targets = sizes[left].T.copy()
  gains = shares[left] * (shares.mean(axis=0) / capacity if len(sizes) else 0.0)
  input_gain, target_gain = gains.T.copy()
  order: list[int] = []
  counts: list[int] = []
  taken = capacity[0] + 1  # Fits nowhere.
  while len(left):
    room, before = list(capacity), len(order)
    while True:
      gain = input_gain * room[0] + target_gain * room[1]
      gain[(inputs > room[0]) | (targets > room[1])] = -1.0
      best = int(gain.argmax())
      if gain[best] < 0:
        break
      order.append(int(left[best]))
      room[0] -= int(inputs[best])
      room[1] -= int(targets[best])
      inputs[best] = taken
    counts.append(len(order) - before)
    if len(counts) % 8 == 0 or len(order) == len(sizes):
      kept = inputs < taken
      left, inputs, targets = left[kept], inputs[kept], targets[kept]
      input_gain, target_gain = input_gain[kept], target_gain[kept]
  return np.array(order, int), counts


def _joined(
  parts: Sequence[tuple[Int[np.ndarray, " p"], list[int]]],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], int]:
  """Order, rows of the examples, and the number of rows of all parts together."""
  sizes = [len(order) for order, _ in parts]
  starts = np.cumsum([0, *sizes[:-1]])
  order = np.concatenate([o + at for (o, _), at in zip(parts, starts, strict=True)])
  counts = [count for _, own in parts for count in own]
  row = np.empty(len(order), int)
  row[order] = np.repeat(np.arange(len(counts)), counts)
  return order, row, len(counts)


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """The shapes of one task's batches.

  The number of rows goes up in steps of about one standard deviation, to a multiple
  of a power of two: a run sees few shapes.

  Attributes:
    capacity: Tokens of a row of inputs and of one of targets.
    least_rows: Of a shard.
    step_rows: Between one shape and the next.
    typical_rows: Expected.
    microbatch_tokens: Token slots, of both sides, of one microbatch at most; None is
      one microbatch.
  """

  capacity: tuple[int, int]
  least_rows: int
  step_rows: int
  typical_rows: int
  microbatch_tokens: int | None

  @property
  def typical(self) -> SequenceShape:
    """Of a batch as it is expected."""
    return self.shape(self.typical_rows)

  def shape(self, rows: int) -> SequenceShape:
    """The first shape of the ladder with as many rows."""
    rows = max(multiple(rows, self.step_rows), self.least_rows)
    microbatches, rows = microbatched(rows, sum(self.capacity), self.microbatch_tokens)
    return SequenceShape(*self.capacity, microbatches, rows)


def plan_rows(
  sizes: Int[np.ndarray, "n 2"],
  capacity: tuple[int, int],
  batch_size: int,
  num_shards: int = 1,
  microbatch_tokens: int | None = None,
) -> RowPlan:
  """The plan for batches of examples like those given; the same for the same.

  Args:
    sizes: Tokens of inputs and targets of examples.
    capacity: Of a row.
    batch_size: B, examples of the global batch.
    num_shards: S, which divides B.
    microbatch_tokens: See `RowPlan`.
  """
  rng = np.random.default_rng(0)
  needed = []
  for _ in range(min(8, max(2, _PLANNED_EXAMPLES // batch_size))):
    drawn = sizes[rng.integers(len(sizes), size=batch_size)]
    shards = deal_examples(drawn, num_shards)[:_PLANNED_SHARDS]
    needed.append([lay_out(drawn[shard], capacity).rows for shard in shards])
  typical = float(np.mean(np.max(needed, axis=1)))
  shares = (sizes / np.maximum(capacity, 1)).max(axis=1)
  deviation = max(float(shares.std() * np.sqrt(batch_size) / num_shards), 1.0)
  step = 1 << int(np.ceil(np.log2(deviation)))
  return RowPlan(
    capacity=capacity,
    least_rows=multiple(max(1, typical - deviation), step),
    step_rows=step,
    typical_rows=int(np.ceil(typical)),
    microbatch_tokens=microbatch_tokens,
  )


def place(
  examples: Examples, layouts: Sequence[SequenceLayout], shape: SequenceShape
) -> PackedSequences:
  """The arrays of S shards, [K, S * R, L].

  Args:
    examples: Those of all shards, a shard's after another.
    layouts: Of the shards.
    shape: Of a shard's batch.
  """
  shards = len(layouts)
  shard = np.repeat(np.arange(shards), [len(layout.row) for layout in layouts])
  microbatch, row = divmod(
    np.concatenate([layout.row for layout in layouts]), shape.rows
  )
  row += (microbatch * shards + shard) * shape.rows
  number = np.concatenate([layout.number for layout in layouts])
  offset = np.concatenate([layout.offset for layout in layouts])
  by_row = (shape.microbatches, shards * shape.rows)

  def side(index: int, lengths: np.ndarray, width: int, *tokens: np.ndarray):
    """Token arrays of one side as they lie, positions and ids."""
    first = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(first, lengths)
    at = np.repeat(row * width + offset[:, index], lengths) + position
    values = (*tokens, position, np.repeat(number, lengths))
    laid = np.zeros((len(values), by_row[0] * by_row[1] * width), np.int32)
    for array, value in zip(laid, values, strict=True):
      array[at] = value
    return laid.reshape(-1, *by_row, width)

  inputs = input_positions = input_ids = None
  if shape.inputs:
    inputs, input_positions, input_ids = side(
      0, examples.input_lengths, shape.inputs, examples.inputs
    )
  targets, decoder_inputs, target_positions, target_ids = side(
    1,
    examples.target_lengths,
    shape.targets,
    examples.targets,
    examples.decoder_inputs,
  )
  return PackedSequences(
    inputs=inputs,
    input_positions=input_positions,
    input_ids=input_ids,
    targets=targets,
    decoder_inputs=decoder_inputs,
    target_positions=target_positions,
    target_ids=target_ids,
    weights=(target_ids > 0).astype(np.float32),
  )


def abstract_sequences(shape: SequenceShape, num_shards: int) -> PackedSequences:
  """Shapes and dtypes of a global batch, as ShapeDtypeStruct.

  Args:
    shape: Of a shard's batch.
    num_shards: S.
  """

  def array(length: int, dtype: str = "int32") -> jax.ShapeDtypeStruct | None:
    by_row = (shape.microbatches, num_shards * shape.rows, length)
    return jax.ShapeDtypeStruct(by_row, np.dtype(dtype)) if length else None

  inputs, targets = array(shape.inputs), array(shape.targets)
  return PackedSequences(
    inputs=inputs,
    input_positions=inputs,
    input_ids=inputs,
    targets=targets,
    decoder_inputs=targets,
    target_positions=targets,
    target_ids=targets,
    weights=array(shape.targets, "float32"),
  )
