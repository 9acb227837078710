"""Batches as a pure function of (seed, step, global batch size).

Each step's batch holds examples of one task, drawn from the mixture's rates by a
counter-based generator; a task's examples come in a new pseudo-random order every
epoch. Grain reads ahead in threads or worker processes; neither their number nor
that of data shards changes which examples a step sees or their order.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from embgemma.data import packing
from embgemma.data.cache import CachedTask, Example, decode_example
from embgemma.data.tasks import digest
from embgemma.errors import ConfigError, DataError

_BLOCK = 4096  # steps drawn from one counter of the generator
_MAX_STEPS = 2**40


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


@dataclasses.dataclass(frozen=True)
class StepBatch:
  """The batch of one step.

  Attributes:
    step: From 0.
    task: Name of the task.
    pairs: The packed examples, numpy.
    real_tokens: Tokens of texts in it.
  """

  step: int
  task: str
  pairs: packing.PackedPairs
  real_tokens: int


@contextlib.contextmanager
def _damage(task: CachedTask) -> Iterator[None]:
  try:
    yield
  except (DataError, RuntimeError) as error:  # RuntimeError: ArrayRecord's checksums
    raise DataError(f"{task.directory}: {error}; delete it to rebuild it") from error


class StepSource:
  """The batch of any step.

  Args:
    tasks: Complete caches.
    batch_size: B, examples of the global batch.
    seed: Of the run.
    num_shards: Data shards of the mesh; divides batch_size.
    vocabulary_size: Rows of the model's table, against which caches are checked.

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
    self._tasks = list(tasks)
    self._batch_size = batch_size
    self._seed = seed
    self._num_shards = num_shards
    self._rates = tuple(float(task.rate) for task in tasks)
    self._sources = []
    for task in tasks:
      with _damage(task):
        self._sources.append(grain.sources.ArrayRecordDataSource(task.paths))

  def batch(self, step: int) -> StepBatch:
    """The batch of a step, from 0."""
    index, earlier = scheduled_task(self._rates, self._seed, step)
    task = self._tasks[index]
    indices = self._example_indices(index, earlier)
    with _damage(task):
      records = self._sources[index].__getitems__(indices)
      examples = [decode_example(record) for record in records]
    pairs = self._pack(examples, task.statistics["max_negatives"])
    return StepBatch(step, task.name, pairs, int(pairs.texts.lengths.sum()))

  def _example_indices(self, index: int, earlier: int) -> list[int]:
    """Records of a task's `earlier`-th batch (from 0); an epoch ends on a batch."""
    size = self._tasks[index].statistics["examples"]
    epoch, batch = divmod(earlier, size // self._batch_size)
    key = int(digest([self._seed, self._tasks[index].name, epoch])[:8], 16)
    start = batch * self._batch_size
    return [
      int(grain.experimental.index_shuffle(i, max_index=size - 1, seed=key, rounds=4))
      for i in range(start, start + self._batch_size)
    ]

  def _pack(self, examples: Sequence[Example], negatives: int) -> packing.PackedPairs:
    empty = np.zeros(0, np.int32)
    size = self._batch_size // self._num_shards
    shards = []
    for start in range(0, self._batch_size, size):
      part = examples[start : start + size]
      texts = [e.tokens[0] for e in part] + [e.tokens[1] for e in part]
      for example in part:
        own = example.tokens[2 : 2 + negatives]
        texts.extend([*own, *[empty] * (negatives - len(own))])
      shards.append(texts)
    longest = max(len(text) for shard in shards for text in shard)
    counts = np.array([len(e.tokens) - 2 for e in examples])
    return packing.PackedPairs(
      texts=packing.pack_texts(shards, packing.row_length(longest)),
      query_hash=packing.hash_words(np.array([e.hashes[0] for e in examples])),
      positive_hash=packing.hash_words(np.array([e.hashes[1] for e in examples])),
      negative_mask=np.arange(negatives)[None, :] < counts[:, None],
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
  source: StepSource, start_step: int, num_threads: int, num_workers: int
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
