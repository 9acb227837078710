"""Packed batches of pairs, as a pure function of (seed, step, global batch size).

`embgemma.data.schedule` says which examples a step sees. Here they are read, packed and
joined by their teacher vectors, in threads or worker processes ahead of the trainer.
Neither their number nor that of data shards, processes or microbatches changes which
examples a step sees.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from embgemma.data import packing, shape_plan
from embgemma.data.cache import CachedTask
from embgemma.data.executors import begin_worker
from embgemma.data.records import Records
from embgemma.data.schedule import RecordSchedule, ScheduledBatch, swapped
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.errors import ConfigError, DataError
from embgemma.typing import Bool, Float, Int, PackedTexts, PyTree

_MAX_STEPS = 2**40


@dataclasses.dataclass(frozen=True)
class StepBatch:
  """The batch of one step.

  Attributes:
    step: From 0.
    task: Name of the task.
    epoch: Of the task, from 0.
    records: int64 [B], which examples of the task's cache, in the order of the batch.
    arrays: The packed examples of this process's shards, numpy: PackedPairs or
      PackedSequences.
    real_tokens: Tokens of texts in the whole batch.
    slots: Tokens that the whole batch has room for.
    duplicates: Examples of the whole batch that share a query or a positive with one
      before them; None is not counted.
  """

  step: int
  task: str
  epoch: int
  records: np.ndarray
  arrays: PyTree
  real_tokens: int
  slots: int
  duplicates: int | None = None


@runtime_checkable
class BatchSource(Protocol):
  """The batch of any step, as a function of the step alone; can be pickled."""

  @property
  def settings(self) -> dict[str, Any]:
    """What batches depend on beside seed, size and mixture: a run resumes with these.

    Values of JSON.
    """
    ...

  def batch(self, step: int) -> StepBatch:
    """The batch of a step, from 0."""
    ...

  def epochs(self, step: int) -> dict[str, float]:
    """Of each task, the epochs that the steps before this one took."""
    ...


@dataclasses.dataclass(frozen=True)
class Shards:
  """How a batch is split over data shards, and which of them this process reads.

  Attributes:
    count: Data shards of the mesh, S.
    own: Those that this process reads and packs, in the order in which their arrays lie
      end to end; None is all.
  """

  count: int = 1
  own: Sequence[int] | None = None

  @property
  def indices(self) -> list[int]:
    """Of this process's shards."""
    return list(range(self.count) if self.own is None else self.own)

  def check(self, batch_size: int) -> None:
    """Returns nothing if batches can be split.

    Raises:
      ConfigError: they cannot, evenly.
    """
    if batch_size % self.count:
      raise ConfigError(
        f"BATCH_SIZE {batch_size} must be a positive multiple of the mesh's "
        f"{self.count} data shards"
      )


class StepSource:
  """The batch of pairs of any step.

  Args:
    schedule: Which examples a step sees.
    shards: Of the mesh.
    microbatch_tokens: Token slots of one shard's microbatch; None is all at once.
    row_lengths: That tasks' batches may use.
    teachers: Teacher vectors of each task; None for a task, and all together, is
      without. If one has them all batches have arrays of them, zeros where none are.

  Attributes:
    plans: Shapes of each task's batches.

  Raises:
    ConfigError: the batch size is not divided by the shards, or teacher vectors are of
      different widths.
    DataError: a text is longer than the longest row, or teacher vectors are not of
      the tasks' examples.
  """

  def __init__(
    self,
    schedule: RecordSchedule,
    shards: Shards = Shards(),
    microbatch_tokens: int | None = None,
    row_lengths: Sequence[int] = packing.ROW_LENGTHS,
    teachers: Sequence[TeacherVectors | None] | None = None,
    one_shape: bool = False,
  ):
    shards.check(schedule.batch_size)
    self._schedule = schedule
    self._shards = shards
    self._teachers = None
    if teachers is not None and any(teacher is not None for teacher in teachers):
      self._teachers = _Teachers(schedule.tasks, teachers)
    self.plans = tuple(
      shape_plan.plan_shapes(
        schedule.sample(index),
        schedule.batch_size,
        shards.count,
        microbatch_tokens,
        row_lengths,
        task.statistics["max_text_tokens"],
        one_shape,
      )
      for index, task in enumerate(schedule.tasks)
    )

  @property
  def settings(self) -> dict[str, Any]:
    """See `BatchSource`."""
    return {
      "avoid_duplicates": self._schedule.avoid_duplicates,
      "teacher": [] if self._teachers is None else self._teachers.fingerprints,
    }

  def epochs(self, step: int) -> dict[str, float]:
    """Of each task, the epochs that the steps before this one took."""
    return self._schedule.epochs(step)

  def batch(self, step: int) -> StepBatch:
    """The batch of a step, from 0."""
    scheduled = self._schedule.at(step)
    lengths = scheduled.lengths
    shards = shape_plan.deal_examples(lengths, self._shards.count)
    texts = [shape_plan.shard_texts(lengths[shard]) for shard in shards]
    shapes, placements = self.plans[scheduled.index].lay_out(texts)
    own = np.concatenate([shards[shard] for shard in self._shards.indices])
    records = self._schedule.read(scheduled, own)
    own_placements = [placements[shard] for shard in self._shards.indices]
    pairs = _packed(records, shapes, own_placements)
    if self._teachers is not None:
      vectors, mask = self._teachers.gather(scheduled, own, len(own_placements))
      pairs = dataclasses.replace(pairs, teacher=vectors, teacher_mask=mask)
    return StepBatch(
      step=step,
      task=self._schedule.tasks[scheduled.index].name,
      epoch=scheduled.epoch,
      records=scheduled.records,
      arrays=pairs,
      real_tokens=int(lengths.sum()),
      slots=self._shards.count * sum(shape.tokens for shape in shapes),
      duplicates=scheduled.duplicates,
    )


class _Teachers:
  """Teacher vectors of a mixture's tasks, of one width and dtype.

  Args:
    tasks: Of the mixture.
    teachers: Of each task; at least one is not None.

  Attributes:
    fingerprints: Of what made them, sorted.

  Raises:
    ConfigError: widths differ.
    DataError: vectors are of other examples than the task's.
  """

  def __init__(
    self, tasks: Sequence[CachedTask], teachers: Sequence[TeacherVectors | None]
  ):
    widths = {}
    for task, found in zip(tasks, teachers, strict=True):
      if found is None:
        continue
      widths[task.name] = found.width
      if (len(found), found.texts) != (task.statistics["examples"], task.texts):
        raise DataError(
          f"{task.directory}: teacher vectors are not of these examples; run "
          "`embgemma teach` again"
        )
    first = next(iter(widths))
    for name, width in widths.items():
      if width != widths[first]:
        raise ConfigError(
          f"teacher vectors of task {name!r} have width {width}, those of task "
          f"{first!r} {widths[first]}; run `embgemma teach` for both with one width, "
          "under a new name"
        )
    self._teachers = list(teachers)
    self.fingerprints = sorted({t.fingerprint for t in teachers if t is not None})
    self._width = widths[first]
    # A run's arrays have one dtype, or each would be compiled for.
    self._dtype = np.result_type(*(t.dtype for t in teachers if t is not None))

  def gather(
    self, batch: ScheduledBatch, own: Int[np.ndarray, " n"], num_shards: int
  ) -> tuple[Float[np.ndarray, "N W"], Bool[np.ndarray, " N"]]:
    """Vectors of some shards' texts in the order of `PackedPairs.slots`, and which are.

    Args:
      batch: Scheduled.
      own: Places of the shards' examples in it, a shard's after another.
      num_shards: As many in each.
    """
    lengths = batch.lengths[own]
    teacher = self._teachers[batch.index]
    if teacher is None:
      return (
        np.zeros((lengths.size, self._width), self._dtype),
        np.zeros(lengths.size, bool),
      )
    vectors, mask = teacher.gather(batch.records[own])
    vectors = swapped(vectors.astype(self._dtype, copy=False), batch.swapped[own])
    mask = swapped(mask, batch.swapped[own]) & (lengths > 0)
    return _by_role(vectors, num_shards), _by_role(mask, num_shards)


def _by_role(texts: np.ndarray, num_shards: int) -> np.ndarray:
  """Values of shards' texts [n, T, …] as `PackedPairs.slots` has them, [n * T, …]."""
  parts: list[np.ndarray] = []
  for shard in np.split(texts, num_shards):
    negatives = shard[:, 2:].reshape(-1, *shard.shape[2:])
    parts += [shard[:, 0], shard[:, 1], negatives]
  return np.concatenate(parts)


def _packed(
  records: Records,
  shapes: Sequence[packing.GroupShape],
  placements: Sequence[Sequence[packing.Placement]],
) -> packing.PackedPairs:
  """The arrays of shards.

  Args:
    records: The shards' examples, a shard's after another.
    shapes: Of the groups.
    placements: Of each shard, in each group.
  """
  by_shard = (len(placements), -1, records.starts.shape[1])
  starts = [shape_plan.shard_texts(s) for s in records.starts.reshape(by_shard)]
  lengths = [shape_plan.shard_texts(n) for n in records.lengths.reshape(by_shard)]
  groups: list[PackedTexts] = []
  slots = np.full(np.shape(starts), sum(shape.vectors for shape in shapes), np.int32)
  base = 0
  for shape, placed in zip(shapes, zip(*placements, strict=True), strict=True):
    texts = []
    for shard, placement in enumerate(placed):
      slots[shard, placement.texts] = base + placement.slot
      begin = starts[shard][placement.texts]
      end = begin + lengths[shard][placement.texts]
      spans = zip(begin.tolist(), end.tolist(), strict=True)
      texts += [records.words[a:b] for a, b in spans]
    groups.append(packing.place_texts(texts, placed, shape))
    base += shape.vectors
  return packing.PackedPairs(
    groups=tuple(groups),
    slots=slots.reshape(-1),
    query_hash=records.hashes[:, 0],
    positive_hash=records.hashes[:, 1],
    negative_mask=records.lengths[:, 2:] > 0,
  )


def read_batches(
  source: BatchSource, start_step: int, num_threads: int, num_workers: int
) -> Iterator[StepBatch]:
  """Batches of steps start_step, start_step + 1, …, read ahead.

  Args:
    source: The batches.
    start_step: First step; a resumed run passes its own.
    num_threads: Threads that read and pack ahead.
    num_workers: Worker processes; 0 is none.
  """
  # Steps, not examples, are Grain's elements: reading from a step on is a slice.
  dataset = grain.MapDataset.range(start_step, _MAX_STEPS).map(source.batch)
  iterator = dataset.to_iter_dataset(
    grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=max(2, 2 * num_threads)
    )
  )
  if num_workers:
    # Grain's workers read absl flags, which nobody here parses.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    iterator = iterator.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers),
      worker_init_fn=begin_worker,
    )
  return iter(iterator)
