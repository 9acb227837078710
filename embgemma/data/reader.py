"""Batches as a pure function of (seed, step, global batch size).

Each step's batch holds examples of one task, drawn from the mixture's rates by a
counter-based generator; a task's examples come in a new pseudo-random order every
epoch. Grain reads ahead in threads or worker processes. Neither their number nor
that of data shards, processes or microbatches changes which examples a step sees.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from embgemma.data import packing, shape_plan
from embgemma.data.cache import CachedTask
from embgemma.data.records import Records, decode_records
from embgemma.data.tasks import digest
from embgemma.errors import ConfigError, DataError
from embgemma.typing import Int, PackedTexts, PyTree

_BLOCK = 4096  # steps drawn from one counter of the generator
_MAX_STEPS = 2**40
_PLANNED_EXAMPLES = 16_384  # whose lengths a task's shapes are planned from
_ROUNDS = 6  # of the Feistel network


@functools.cache
def _drawn(rates: tuple[float, ...], seed: int, block: int) -> np.ndarray:
  """Task indices of the steps of one block."""
  generator = np.random.Generator(np.random.Philox(key=seed, counter=block << 64))
  edges = np.cumsum(rates)
  return np.searchsorted(edges, generator.random(_BLOCK) * edges[-1], side="right")


@functools.cache
def _drawn_before(rates: tuple[float, ...], seed: int, block: int) -> np.ndarray:
  """Steps of each task in all earlier blocks."""
  counts = np.zeros(len(rates), np.int64)
  for earlier in range(block):
    counts += np.bincount(_drawn(rates, seed, earlier), minlength=len(rates))
  return counts


def scheduled_task(rates: tuple[float, ...], seed: int, step: int) -> tuple[int, int]:
  """The index of a step's task, and how many earlier steps had the same task.

  Args:
    rates: Mixture weights, any positive scale.
    seed: Of the run.
    step: From 0.
  """
  block, offset = divmod(step, _BLOCK)
  drawn = _drawn(rates, seed, block)
  task = int(drawn[offset])
  earlier = int(np.count_nonzero(drawn[:offset] == task))
  return task, int(_drawn_before(rates, seed, block)[task]) + earlier


def shuffled(
  positions: Int[np.ndarray, " n"], size: int, key: int
) -> Int[np.ndarray, " n"]:
  """Where a pseudo-random permutation of range(size) takes the positions.

  A Feistel network on the next power of four, walked again from what falls outside
  (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 4):
  any part of the permutation costs only itself.

  Args:
    positions: In range(size).
    size: Of the range.
    key: Of the permutation, 64 bits.
  """
  half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
  mask = (np.uint64(1) << half) - np.uint64(1)
  keys = np.random.Generator(np.random.Philox(key=key)).integers(
    2**64, size=_ROUNDS, dtype=np.uint64
  )
  values = positions.astype(np.uint64)
  outside = np.arange(len(values))
  while len(outside):
    walked = values[outside]
    left, right = walked >> half, walked & mask
    for round_key in keys:
      # The finaliser of MurmurHash3; unsigned products wrap around.
      mixed = right ^ round_key
      mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
      mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
      left, right = right, left ^ ((mixed >> np.uint64(33)) & mask)
    values[outside] = left << half | right
    outside = outside[values[outside] >= size]
  return values.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class StepBatch:
  """The batch of one step.

  Attributes:
    step: From 0.
    task: Name of the task.
    arrays: The packed examples of this process's shards, numpy: PackedPairs or
      PackedSequences.
    real_tokens: Tokens of texts in the whole batch.
    slots: Tokens that the whole batch has room for.
  """

  step: int
  task: str
  arrays: PyTree
  real_tokens: int
  slots: int


@runtime_checkable
class BatchSource(Protocol):
  """The batch of any step, as a function of the step alone; can be pickled."""

  def batch(self, step: int) -> StepBatch: ...


@contextlib.contextmanager
def _damage(task: CachedTask) -> Iterator[None]:
  try:
    yield
  except (DataError, RuntimeError) as error:  # RuntimeError: ArrayRecord's checksums
    raise DataError(f"{task.directory}: {error}; delete it to rebuild it") from error


@dataclasses.dataclass(frozen=True)
class ScheduledBatch:
  """Which examples a step sees.

  Attributes:
    index: Of the task.
    epoch: Of the task, from 0.
    records: int [B], in the order of the batch.
    lengths: int [B, T], tokens of their texts; 0 is none.
  """

  index: int
  epoch: int
  records: np.ndarray
  lengths: np.ndarray


class RecordSchedule:
  """Which examples of which task a step sees, and reading them.

  Args:
    tasks: Complete caches.
    batch_size: B, examples of the global batch.
    seed: Of the run.
    num_shards: Data shards of the mesh; divides batch_size.
    vocabulary_size: Rows of the model's table, against which caches are checked.

  Attributes:
    tasks: As given.

  Raises:
    ConfigError: batch_size is larger than a task, or not divided by num_shards.
    DataError: a cache holds token ids outside the table, or cannot be read.
  """

  def __init__(
    self,
    tasks: Sequence[CachedTask],
    batch_size: int,
    seed: int,
    num_shards: int,
    vocabulary_size: int,
  ):
    if batch_size < 1 or batch_size % num_shards:
      raise ConfigError(
        f"BATCH_SIZE {batch_size} must be a positive multiple of the mesh's "
        f"{num_shards} data shards"
      )
    for task in tasks:
      _check_task(task, batch_size, vocabulary_size)
    self.tasks = list(tasks)
    self._batch_size = batch_size
    self._seed = seed
    self._rates = tuple(float(task.rate) for task in tasks)
    self._sources = []
    for task in tasks:
      with _damage(task):
        self._sources.append(grain.sources.ArrayRecordDataSource(task.paths))
    self._open_lengths()

  def _open_lengths(self) -> None:
    self._lengths = []
    for task in self.tasks:
      with _damage(task):
        self._lengths.append(task.lengths())

  def __getstate__(self):
    # A worker process maps the lengths for itself; a pickle would hold them all.
    return {k: v for k, v in self.__dict__.items() if k != "_lengths"}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open_lengths()

  def sample(self, index: int) -> Int[np.ndarray, "n T"]:
    """Lengths of some examples, from all over a task."""
    lengths = self._lengths[index]
    count = min(len(lengths), _PLANNED_EXAMPLES)
    return lengths[np.sort(shuffled(np.arange(count), len(lengths), 0))].astype(int)

  def at(self, step: int) -> ScheduledBatch:
    """The examples of a step, from 0; an epoch of a task ends on a batch."""
    index, earlier = scheduled_task(self._rates, self._seed, step)
    size = self.tasks[index].statistics["examples"]
    epoch, batch = divmod(earlier, size // self._batch_size)
    key = int(digest([self._seed, self.tasks[index].name, epoch]), 16)
    start = batch * self._batch_size
    records = shuffled(np.arange(start, start + self._batch_size), size, key)
    lengths = self._lengths[index][records].astype(int)
    return ScheduledBatch(index, epoch, records, lengths)

  def read(self, batch: ScheduledBatch, own: Int[np.ndarray, " b"]) -> Records:
    """Some examples of a batch.

    Args:
      batch: Scheduled.
      own: Their places in it.

    Raises:
      DataError: the cache is damaged.
    """
    with _damage(self.tasks[batch.index]):
      read = self._sources[batch.index].__getitems__(batch.records[own].tolist())
      records = decode_records(read, batch.lengths.shape[1])
      if not np.array_equal(records.lengths, batch.lengths[own]):
        raise DataError("lengths.npy is not of these examples")
    return records


class StepSource:
  """The batch of pairs of any step.

  Args:
    tasks: Complete caches.
    batch_size: B, examples of the global batch.
    seed: Of the run.
    num_shards: Data shards of the mesh; divides batch_size.
    vocabulary_size: Rows of the model's table, against which caches are checked.
    own_shards: Shards that this process reads and packs, in the order in which their
      arrays lie end to end; None is all.
    microbatch_tokens: Token slots of one shard's microbatch; None is all at once.
    row_lengths: That tasks' batches may use.

  Attributes:
    plans: Shapes of each task's batches.

  Raises:
    ConfigError: batch_size is larger than a task, or not divided by num_shards.
    DataError: a cache holds token ids outside the table, or cannot be read, or a text
      is longer than the longest row.
  """

  def __init__(
    self,
    tasks: Sequence[CachedTask],
    batch_size: int,
    seed: int,
    num_shards: int,
    vocabulary_size: int,
    own_shards: Sequence[int] | None = None,
    microbatch_tokens: int | None = None,
    row_lengths: Sequence[int] = packing.ROW_LENGTHS,
  ):
    self._schedule = RecordSchedule(
      tasks, batch_size, seed, num_shards, vocabulary_size
    )
    self._num_shards = num_shards
    self._own_shards = list(range(num_shards) if own_shards is None else own_shards)
    self.plans = tuple(
      shape_plan.plan_shapes(
        self._schedule.sample(index),
        batch_size,
        num_shards,
        microbatch_tokens,
        row_lengths,
        task.statistics["max_text_tokens"],
      )
      for index, task in enumerate(tasks)
    )

  def batch(self, step: int) -> StepBatch:
    """The batch of a step, from 0."""
    scheduled = self._schedule.at(step)
    lengths = scheduled.lengths
    shards = shape_plan.deal_examples(lengths, self._num_shards)
    texts = [shape_plan.shard_texts(lengths[shard]) for shard in shards]
    shapes, placements = self.plans[scheduled.index].lay_out(texts)
    own = np.concatenate([shards[shard] for shard in self._own_shards])
    records = self._schedule.read(scheduled, own)
    pairs = _packed(records, shapes, [placements[shard] for shard in self._own_shards])
    slots = self._num_shards * sum(shape.tokens for shape in shapes)
    name = self._schedule.tasks[scheduled.index].name
    return StepBatch(step, name, pairs, int(lengths.sum()), slots)


def _check_task(task: CachedTask, batch_size: int, vocabulary_size: int) -> None:
  if task.statistics["examples"] < batch_size:
    raise ConfigError(
      f"BATCH_SIZE {batch_size} is larger than task {task.name!r} "
      f"({task.statistics['examples']} examples), and a batch holds one task "
      "only; lower BATCH_SIZE or drop the task"
    )
  if task.statistics["max_token_id"] >= vocabulary_size:
    raise DataError(
      f"task {task.name!r} holds token id {task.statistics['max_token_id']}, the "
      f"model's table has {vocabulary_size} rows; the vocabulary is not the model's"
    )


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


def _begin_worker(index: int, count: int) -> None:
  """Leaves signals to the trainer, and ends with it even if it is killed."""
  del index, count
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
  trainer = multiprocessing.parent_process()
  assert trainer is not None

  def follow() -> None:
    trainer.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


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
      worker_init_fn=_begin_worker,
    )
  return iter(iterator)
