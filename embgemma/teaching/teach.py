"""Vectors of a teacher for all texts of a run's cache.

    CACHE_DIR/teachers/NAME/            the vectors, each distinct input once
    CACHE_DIR/tasks/TASK/teacher-NAME/  which of them each record's texts have

Sources are read twice: for the keys of inputs, which say what there is to do and what
it costs, and for the texts of those that are not embedded yet.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from embgemma.data import cache, teacher_vectors
from embgemma.data.cache import CachedTask
from embgemma.data.config import DataConfig
from embgemma.data.files import is_remote
from embgemma.data.records import content_hash
from embgemma.data.task_examples import TaskExamples, open_tasks
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.tokenization import pair_texts, passages
from embgemma.data.vector_store import VectorStore
from embgemma.errors import ConfigError, DataError
from embgemma.teaching.embedding import embed_missing
from embgemma.teaching.teachers import BYTES_PER_TOKEN, Input, Metered, Teacher
from embgemma.typing import UInt64

_BLOCK = 1 << 14  # examples whose keys are looked at together
_COUNTED = 1 << 24  # keys among which distinct ones are counted together

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What is to embed: distinct inputs of the shard that the store lacks.

  Attributes:
    texts: Their number.
    tokens: As an API counts them, roughly.
    usd: At the teacher's price; 0 of one that costs nothing.
  """

  texts: int
  tokens: int
  usd: float


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """A task after `teach`.

  Attributes:
    name: The task's.
    texts: Of its records, negatives included.
    ready: Whether a run can read it: all have a vector, or none was to have one.
    remark: What there is to know beside; "" is nothing.
  """

  name: str
  texts: int
  ready: bool
  remark: str = ""


@dataclasses.dataclass(frozen=True)
class TeachReport:
  """What `teach` did.

  Attributes:
    tasks: Of the run.
    estimate: What there was to embed.
    embedded: Distinct inputs that were.
    stored: Vectors that the store has.
  """

  tasks: tuple[TaskReport, ...]
  estimate: Estimate
  embedded: int
  stored: int


@dataclasses.dataclass(frozen=True)
class _Work:
  """A task to teach.

  Attributes:
    cached: Its cache.
    examples: Its source.
    keys: uint64 [examples, T], of the inputs that its texts are; 0 is no text.
    sizes: uint32 [examples, T], their bytes of UTF-8.
  """

  cached: CachedTask
  examples: TaskExamples
  keys: np.ndarray
  sizes: np.ndarray

  def blocks(self) -> Iterator[UInt64[np.ndarray, "_ _"]]:
    """The keys of some examples after others."""
    for start in range(0, len(self.keys), _BLOCK):
      yield self.keys[start : start + _BLOCK]


def teach(
  config: DataConfig,
  teacher: Teacher,
  name: str,
  dtype: str,
  log: Log,
  shard: tuple[int, int] = (0, 1),
  tasks: Sequence[str] | None = None,
  max_cost: float | None = None,
) -> TeachReport:
  """Gives the texts of a run's cached tasks the vectors of a teacher.

  Run again it goes on where it was. Several shards may run at once or one after
  another: the one that finds all vectors of a task completes it.

  Args:
    config: Of a complete cache.
    teacher: That embeds.
    name: Of its vectors, TEACHER.
    dtype: Of the vectors kept, "float16" or "float32".
    log: Takes lines of progress.
    shard: (i, n): embeds only inputs whose key is i modulo n.
    tasks: Names of those to teach; others get no vectors. None is all.
    max_cost: Most USD that this call may cost, as estimated before it embeds.

  Raises:
    ConfigError: no such task or shard, a cache that is not on this machine's file
      systems, or a cost above `max_cost`.
    DataError: the cache is missing, a source changed since it was cached, the name has
      vectors of another teacher, another process works on this shard, or the teacher
      failed: what was embedded before is kept.
  """
  index, count = shard
  if not 0 <= index < count:
    raise ConfigError(f"shard {index} of {count}: shards are 0..{count - 1}")
  cached = _cached_tasks(config, tasks)
  chosen = [task for task in cached if tasks is None or task.name in tasks]
  store = _open_store(config, teacher, name, dtype)
  with store.writing(index), store.scratch(index) as scratch:
    todo = [task for task in chosen if not _is_ready(task, name, store, taught=True)]
    # May import TensorFlow: not where there is nothing to read.
    sources = {task.name: task for task in (open_tasks(config) if todo else ())}
    works = [_scan(config, teacher, task, sources[task.name], scratch) for task in todo]
    estimate = _estimate(works, store, teacher, shard)
    _check_cost(estimate, teacher, max_cost, log)
    embedded = 0
    for work in works:
      if _count_missing(work, store, shard):
        inputs = _inputs(config, teacher, work)
        embedded += embed_missing(store, teacher, inputs, log, shard)
      _complete(work, name, store, index)
    for work in works:
      # Other shards may have added meanwhile what was missing.
      _complete(work, name, store, index)
    for task in cached:
      if task not in chosen and not _is_ready(task, name, store, taught=False):
        teacher_vectors.write(task.directory, name, store, _shape(task), None, index)
    reports = [_report(task, name, store, task in chosen) for task in cached]
  return TeachReport(tuple(reports), estimate, embedded, len(store))


def _cached_tasks(config: DataConfig, tasks: Sequence[str] | None) -> list[CachedTask]:
  if is_remote(config.cache_root):
    raise ConfigError(
      f"{config.cache_root}: vectors are memory-mapped, and this is no file system of "
      "this machine; give a local CACHE_DIR"
    )
  manifest = cache.manifest(config)
  if manifest is None:
    raise DataError(
      "these tasks are not cached yet: run `embgemma cache` with the same flags first"
    )
  names = [task.name for task in manifest.tasks]
  unknown = sorted(set(tasks or ()) - set(names))
  if unknown:
    raise ConfigError(f"no task {', '.join(unknown)} in the run; there are {names}")
  return list(manifest.tasks)


def _open_store(
  config: DataConfig, teacher: Teacher, name: str, dtype: str
) -> VectorStore:
  directory = pathlib.Path(config.cache_root) / "teachers" / name
  return VectorStore.create_or_open(
    directory, teacher.width, dtype, teacher.fingerprint
  )


def _shape(task: CachedTask) -> tuple[int, int]:
  return task.statistics["examples"], task.texts


def _is_ready(task: CachedTask, name: str, store: VectorStore, taught: bool) -> bool:
  """Whether the task says which of the store's vectors its texts have.

  Args:
    task: Of the run.
    name: Of the vectors.
    store: That has them.
    taught: Whether it must have some.
  """
  try:
    found = TeacherVectors(task.directory, name)
  except DataError:
    return False
  if not set(found.segments) <= set(store.segments):
    store.refresh()  # of another shard, which may just have completed the task
  return (
    found.fingerprint == store.fingerprint
    and (len(found), found.texts) == _shape(task)
    and set(found.segments) <= set(store.segments)
    and (found.taught or not taught)
  )


def _example_inputs(
  config: DataConfig, teacher: Teacher, examples: TaskExamples
) -> Iterator[tuple[list[Input], list[str]]]:
  """Of each cached example, the teacher's inputs and the texts that they are."""
  for example in cache.kept_examples(config, examples):
    kind = examples.kind or example.get("task") or None
    contents = pair_texts(example, examples.kind, config.prompt_table).contents
    inputs = [teacher.query(example["query"], kind)]
    inputs += [
      teacher.document(text, title or None, kind) for title, text in passages(example)
    ]
    yield inputs, contents


def _scan(
  config: DataConfig,
  teacher: Teacher,
  cached: CachedTask,
  examples: TaskExamples,
  scratch: pathlib.Path,
) -> _Work:
  """Reads a task's source for the keys of its inputs.

  Raises:
    DataError: its texts are not those that were cached.
  """
  shape, hashes = _shape(cached), cached.hashes()
  numbers = (
    (
      [each.key() for each in inputs],
      [len(each.text.encode()) for each in inputs],
      [content_hash(text) for text in contents],
    )
    for inputs, contents in _example_inputs(config, teacher, examples)
  )
  paths = [scratch / f"{what}-{cached.name}" for what in ("keys", "sizes")]
  start = 0
  with open(paths[0], "wb") as keys, open(paths[1], "wb") as sizes:
    while block := list(itertools.islice(numbers, _BLOCK)):
      # A text more than the cache has room for.
      longer = [i for i, row in enumerate(block) if len(row[2]) > shape[1]]
      if longer:
        raise _changed(cached.name, start + longer[0])
      contents = _padded([row[2] for row in block], shape[1], np.uint64)
      expected = hashes[start : start + len(block)]
      if not np.array_equal(contents, expected):
        same = (contents[: len(expected)] == expected).all(axis=1)
        raise _changed(cached.name, start + int(np.argmin(np.append(same, False))))
      keys.write(_padded([row[0] for row in block], shape[1], np.uint64).data)
      sizes.write(_padded([row[1] for row in block], shape[1], np.uint32).data)
      start += len(block)
  if start < shape[0]:
    raise _changed(cached.name, start)
  return _Work(
    cached,
    examples,
    np.memmap(paths[0], np.uint64, "r", shape=shape),
    np.memmap(paths[1], np.uint32, "r", shape=shape),
  )


def _padded(
  rows: Sequence[Sequence[int]], width: int, dtype: type[np.generic]
) -> np.ndarray:
  out = np.zeros((len(rows), width), dtype)
  for place, row in zip(out, rows, strict=True):
    place[: len(row)] = row
  return out


def _changed(task: str, example: int) -> DataError:
  return DataError(
    f"task {task!r}: example {example} is not the one that was cached; its source "
    "changed meanwhile: run `embgemma cache` and then this again"
  )


def _inputs(config: DataConfig, teacher: Teacher, work: _Work) -> Iterator[Input]:
  """The inputs of a task.

  Raises:
    DataError: they are not those that were read before.
  """
  rows = _example_inputs(config, teacher, work.examples)
  for example, (inputs, _) in enumerate(rows):
    own = work.keys[example] if example < len(work.keys) else ()
    if [each.key() for each in inputs] != [int(key) for key in own if key]:
      raise _changed(work.cached.name, example)
    yield from inputs


def _count_missing(
  work: _Work, store: VectorStore, shard: tuple[int, int] = (0, 1)
) -> int:
  """Texts of a task, of a shard, that have no vector."""
  missing = 0
  for block in work.blocks():
    keys = block[block != 0]
    own = keys[keys % np.uint64(shard[1]) == shard[0]]
    missing += int(np.count_nonzero(store.missing(own)))
  return missing


def _estimate(
  works: Sequence[_Work], store: VectorStore, teacher: Teacher, shard: tuple[int, int]
) -> Estimate:
  """Counts what is to embed: keys in a range of hashes at a time."""
  total = sum(work.keys.size for work in works)
  bits = max(0, math.ceil(math.log2(max(1, total / _COUNTED))))
  texts = size = 0
  for passed in range(1 << bits):
    found = [_range(work, passed, bits, shard) for work in works]
    if not found:
      break
    keys, first = np.unique(
      np.concatenate([keys for keys, _ in found]), return_index=True
    )
    missing = store.missing(keys)
    texts += int(np.count_nonzero(missing))
    sizes = np.concatenate([sizes for _, sizes in found])[first]
    size += int(sizes[missing].sum(dtype=np.int64))
  tokens = -(-size // BYTES_PER_TOKEN)
  price = teacher.price if isinstance(teacher, Metered) else 0.0
  return Estimate(texts, tokens, tokens * price / 1e6)


def _range(
  work: _Work, passed: int, bits: int, shard: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Keys of a shard whose first bits are the number of a pass, and their sizes."""
  keys, sizes = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
  for start, block in zip(range(0, len(work.keys), _BLOCK), work.blocks(), strict=True):
    own = (block != 0) & (block % np.uint64(shard[1]) == shard[0])
    if bits:
      own &= block >> np.uint64(64 - bits) == passed
    keys.append(block[own])
    sizes.append(work.sizes[start : start + _BLOCK][own])
  return np.concatenate(keys), np.concatenate(sizes)


def _check_cost(
  estimate: Estimate, teacher: Teacher, max_cost: float | None, log: Log
) -> None:
  """Says what there is to do.

  Raises:
    ConfigError: it costs more than it may.
  """
  line = f"{teacher.name}: {estimate.texts:,} distinct texts to embed"
  if isinstance(teacher, Metered):
    line += (
      f", some {estimate.tokens:,} tokens: about ${estimate.usd:,.2f} at "
      f"${teacher.price:g} a million ({teacher.price_source})"
    )
    if estimate.texts and (max_cost is None or estimate.usd > max_cost):
      given = (
        "no --max_cost was given" if max_cost is None else f"--max_cost={max_cost:g}"
      )
      enough = math.ceil(100 * estimate.usd) / 100
      raise ConfigError(f"{line}, and {given}; to go on give --max_cost={enough:.2f}")
  log(line)


def _complete(work: _Work, name: str, store: VectorStore, part: int) -> None:
  """Says which vectors a task's texts have, if all have one."""
  if _is_ready(work.cached, name, store, taught=True):
    return
  store.refresh()
  if _count_missing(work, store):
    return
  # No text has the key 0, so nothing is found for it.
  rows = (store.locate(block.ravel()).reshape(block.shape) for block in work.blocks())
  shape = _shape(work.cached)
  teacher_vectors.write(work.cached.directory, name, store, shape, rows, part)


def _report(
  task: CachedTask, name: str, store: VectorStore, chosen: bool
) -> TaskReport:
  texts = int(np.count_nonzero(task.hashes()))
  if not _is_ready(task, name, store, taught=False):
    remark = "some texts have no vector yet: run the other shards"
    if not chosen:
      stale = teacher_vectors.directory(task.directory, name)
      remark = f"not among --tasks, and {stale} is of other vectors: teach it, too"
    return TaskReport(task.name, texts, ready=False, remark=remark)
  taught = TeacherVectors(task.directory, name).taught
  remark = ""
  if not chosen:
    kept = "the vectors of an earlier call" if taught else "no vectors"
    remark = f"not among --tasks: has {kept}"
  return TaskReport(task.name, texts, ready=True, remark=remark)
