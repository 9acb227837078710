"""Which examples a step sees: a pure function of (seed, step, global batch size).

A task's examples come in a new pseudo-random order every epoch. Batches are slices of
that order, within which examples are exchanged so that no batch has a text twice. Any
process computes any step alone.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from embgemma.data import distinct
from embgemma.data.cache import CachedTask
from embgemma.data.denoising import philox
from embgemma.data.fingerprints import digest
from embgemma.data.mixture import scheduled_task, steps_before
from embgemma.data.records import Records, decode_records
from embgemma.errors import ConfigError, DataError
from embgemma.typing import Bool, Int

_PLANNED_EXAMPLES = 16_384  # whose lengths a task's shapes are planned from
_ROUNDS = 6  # of the Feistel network
# Among which duplicates are exchanged; fewer batches leave nowhere to go.
_EXCHANGED_EXAMPLES = 1 << 19
_LEAST_BATCHES = 8
_KEPT_PLACES = 1 << 22  # of exchanges, 64 MiB


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


@contextlib.contextmanager
def damage(task: CachedTask) -> Iterator[None]:
  """Says which cache it is where what is read of one turns out to be damaged."""
  try:
    yield
  except (DataError, RuntimeError) as error:  # RuntimeError: ArrayRecord's checksums
    raise DataError(f"{task.directory}: {error}; delete it to rebuild it") from error


def swapped(array: np.ndarray, where: Bool[np.ndarray, " B"]) -> np.ndarray:
  """A copy of [B, T, …] whose first two texts have changed places in some examples."""
  array = array.copy()
  array[where, :2] = array[where, 1::-1]
  return array


@dataclasses.dataclass(frozen=True)
class ScheduledBatch:
  """Which examples a step sees.

  Attributes:
    index: Of the task.
    epoch: Of the task, from 0.
    records: int64 [B], in the order of the batch.
    lengths: int [B, T], tokens of their texts; 0 is none.
    swapped: bool [B], where query and positive have changed places: in `lengths` too.
    duplicates: Examples that share a text with one before them, an id that tells
      texts apart included; None is not counted.
  """

  index: int
  epoch: int
  records: np.ndarray
  lengths: np.ndarray
  swapped: np.ndarray
  duplicates: int | None


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """Some batches of an epoch, after exchanges among them.

  Attributes:
    places: int [n], ascending, of the epoch's order that have another example.
    sources: int [n], the places that these examples come from.
    conflicts: int [c], ascending, places of examples that share a text of their batch.
  """

  places: np.ndarray
  sources: np.ndarray
  conflicts: np.ndarray


class _Chunks:
  """The chunks that were used last; for several threads."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    # Of a task, an epoch of it and a number in that.
    self._chunks: dict[tuple[int, int, int], _Chunk] = {}
    self._places = 0

  def get(self, key: tuple[int, int, int], make: Callable[[], _Chunk]) -> _Chunk:
    """The chunk of a key, made unless it is there."""
    # While one thread makes a chunk, others mostly need the same.
    with self._lock:
      if key in self._chunks:
        chunk = self._chunks.pop(key)
      else:
        chunk = make()
        self._places += self._size(chunk)
      self._chunks[key] = chunk  # last, as what was used last
      while self._places > _KEPT_PLACES and len(self._chunks) > 1:
        self._places -= self._size(self._chunks.pop(next(iter(self._chunks))))
      return chunk

  def _size(self, chunk: _Chunk) -> int:
    return 64 + len(chunk.places) + len(chunk.conflicts)


class RecordSchedule:
  """Which examples of which task a step sees, and reading them; can be pickled.

  Args:
    tasks: Complete caches.
    batch_size: B, examples of the global batch.
    seed: Of the run.
    vocabulary_size: Rows of the model's table, against which caches are checked.
    avoid_duplicates: Whether examples are exchanged between batches so that no batch
      has a query or a positive twice; of symmetric tasks, no text at all; where ids
      tell texts apart, no example. What occurs more often than there are batches to
      exchange among stays.

  Attributes:
    tasks: As given.
    batch_size: As given.
    seed: As given.
    avoid_duplicates: As given.

  Raises:
    ConfigError: batch_size is larger than a task.
    DataError: a cache holds token ids outside the table, or cannot be read.
  """

  def __init__(
    self,
    tasks: Sequence[CachedTask],
    batch_size: int,
    seed: int,
    vocabulary_size: int,
    avoid_duplicates: bool = False,
  ):
    if batch_size < 1:
      raise ConfigError(f"BATCH_SIZE must be at least 1, got {batch_size}")
    for task in tasks:
      _check_task(task, batch_size, vocabulary_size)
    self.tasks = list(tasks)
    self.batch_size = batch_size
    self.seed = seed
    self.avoid_duplicates = avoid_duplicates
    self._rates = tuple(float(task.rate) for task in tasks)
    self._sources = []
    for task in tasks:
      with damage(task):
        self._sources.append(grain.sources.ArrayRecordDataSource(task.paths))
    self._open()

  def _open(self) -> None:
    self._lengths: list[np.ndarray] = []
    self._hashes: list[np.ndarray] = []
    for task in self.tasks:
      with damage(task):
        self._lengths.append(task.lengths())
        if self.avoid_duplicates:
          self._hashes.append(task.hashes())
    self._chunks = _Chunks()

  def __getstate__(self):
    # A worker process maps the files for itself; a pickle would hold them all.
    dropped = ("_lengths", "_hashes", "_chunks")
    return {k: v for k, v in self.__dict__.items() if k not in dropped}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()

  def sample(self, index: int) -> Int[np.ndarray, "n T"]:
    """Lengths of some examples, from all over a task."""
    lengths = self._lengths[index]
    count = min(len(lengths), _PLANNED_EXAMPLES)
    records = np.sort(shuffled(np.arange(count), len(lengths), 0))
    swaps = self._swaps(index, 0, records)
    return swapped(lengths[records].astype(int), swaps)

  def at(self, step: int) -> ScheduledBatch:
    """The examples of a step, from 0; an epoch of a task ends on a batch."""
    index, earlier = scheduled_task(self._rates, self.seed, step)
    epoch, batch = divmod(earlier, self._epoch_batches(index))
    start = batch * self.batch_size
    places = np.arange(start, start + self.batch_size)
    duplicates = None
    if self.avoid_duplicates:
      chunk = self._chunk(index, epoch, batch)
      own = slice(*np.searchsorted(chunk.places, [start, start + self.batch_size]))
      places[chunk.places[own] - start] = chunk.sources[own]
      left = np.searchsorted(chunk.conflicts, [start, start + self.batch_size])
      duplicates = int(left[1] - left[0])
    records = self._in_order(index, epoch, places)
    swaps = self._swaps(index, epoch, records)
    lengths = swapped(self._lengths[index][records].astype(int), swaps)
    return ScheduledBatch(index, epoch, records, lengths, swaps, duplicates)

  def epochs(self, step: int) -> dict[str, float]:
    """Of each task, the epochs that the steps before this one took."""
    counts = steps_before(self._rates, self.seed, step).tolist()
    return {
      task.name: count / self._epoch_batches(index)
      for index, (task, count) in enumerate(zip(self.tasks, counts, strict=True))
    }

  def read(self, batch: ScheduledBatch, own: Int[np.ndarray, " b"]) -> Records:
    """Some examples of a batch.

    Args:
      batch: Scheduled.
      own: Their places in it.

    Raises:
      DataError: the cache is damaged.
    """
    with damage(self.tasks[batch.index]):
      read = self._sources[batch.index].__getitems__(batch.records[own].tolist())
      records = decode_records(read, batch.lengths.shape[1])
      fields = ("starts", "lengths", "hashes")
      moved = {f: swapped(getattr(records, f), batch.swapped[own]) for f in fields}
      records = dataclasses.replace(records, **moved)
      if not np.array_equal(records.lengths, batch.lengths[own]):
        raise DataError("lengths.npy is not of these examples")
    return records

  def _epoch_batches(self, index: int) -> int:
    return self.tasks[index].statistics["examples"] // self.batch_size

  def _key(self, index: int, epoch: int, *what: str) -> int:
    return int(digest([self.seed, self.tasks[index].name, epoch, *what]), 16)

  def _in_order(
    self, index: int, epoch: int, places: Int[np.ndarray, " n"]
  ) -> Int[np.ndarray, " n"]:
    """Records at places of an epoch's order."""
    size = self.tasks[index].statistics["examples"]
    return shuffled(places, size, self._key(index, epoch))

  def _swaps(
    self, index: int, epoch: int, records: Int[np.ndarray, " n"]
  ) -> Bool[np.ndarray, " n"]:
    """Where query and positive change places."""
    if not self.tasks[index].symmetric:
      return np.zeros(len(records), bool)
    zeros = np.zeros_like(records)
    counters = (zeros, zeros, records & 0xFFFFFFFF, records >> 32)
    return philox(counters, self._key(index, epoch, "roles"))[:, 0] % 2 == 1

  def _chunk(self, index: int, epoch: int, batch: int) -> _Chunk:
    """That of a batch: an epoch's batches, divided evenly."""
    batches = self._epoch_batches(index)
    most = max(_LEAST_BATCHES, _EXCHANGED_EXAMPLES // self.batch_size)
    chunks = -(-batches // min(most, distinct.MOST_BATCHES))
    number = batch * chunks // batches
    first, end = (-(-i * batches // chunks) for i in (number, number + 1))
    return self._chunks.get(
      (index, epoch, number), lambda: self._exchanged(index, epoch, first, end)
    )

  def _exchanged(self, index: int, epoch: int, first: int, end: int) -> _Chunk:
    """The chunk from a batch to another."""
    start = first * self.batch_size
    places = np.arange(start, end * self.batch_size)
    hashes = self._hashes[index][self._in_order(index, epoch, places), :2]
    if self.tasks[index].unique_ids:
      texts = distinct.repeated_examples(hashes)
    else:
      texts = distinct.repeated_texts(hashes, self.tasks[index].symmetric)
    found = distinct.exchanged(texts, end - first)
    moved = np.flatnonzero(found.order != np.arange(len(places)))
    return _Chunk(start + moved, start + found.order[moved], start + found.conflicts)


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
