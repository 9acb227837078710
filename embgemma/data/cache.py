"""The cache: each task tokenised once into ArrayRecord.

A task's directory holds `examples-SSSSS.array_record`, `lengths.npy` and `index.json`,
and appears under its name only when complete. An example is a pair with its negatives,
or a segment of a document. `lengths.npy` holds the lengths of every example's texts, 0
where there is none: batches are planned from it without reading texts. `manifest` and
reading need no TensorFlow; `build` does.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from embgemma.data import tokenization
from embgemma.data.records import Example, encode_example
from embgemma.data.tasks import (
  CACHE_FORMAT,
  CachedData,
  DataConfig,
  TextDataConfig,
  digest,
)
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import DataError

_SHARD_EXAMPLES = 1 << 18
_STATISTICS = ("examples", "tokens", "max_text_tokens", "max_token_id")
_PAIR_STATISTICS = ("max_negatives", "truncated")


@dataclasses.dataclass(frozen=True)
class CachedTask:
  """A complete cache of one task.

  Attributes:
    name: The task's.
    rate: Its weight in the mixture.
    directory: Where its files lie.
    statistics: What `index.json` says: examples, tokens, max_token_id,
      max_text_tokens, skipped; of pairs max_negatives and truncated; of documents
      documents, and short: those of fewer tokens than a segment has at least.
  """

  name: str
  rate: float
  directory: pathlib.Path
  statistics: dict[str, Any]

  @property
  def paths(self) -> list[str]:
    return sorted(str(p) for p in self.directory.glob("*.array_record"))

  @property
  def texts(self) -> int:
    """Texts of an example: 2 + max_negatives; 1 of segments."""
    return 2 + self.statistics.get("max_negatives", -1)

  def lengths(self) -> np.ndarray:
    """Tokens of each example's texts [examples, texts], memory-mapped.

    Raises:
      DataError: they are missing, or not those of the examples.
    """
    path = self.directory / "lengths.npy"
    expected = (self.statistics["examples"], self.texts)
    try:
      lengths = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
      raise DataError(f"{path.name} cannot be read ({error})") from error
    if lengths.shape != expected:
      raise DataError(f"{path.name} is {lengths.shape}, its examples are {expected}")
    return lengths


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Complete caches of a mixture, and its vocabulary's file."""

  tasks: tuple[CachedTask, ...]
  vocabulary: pathlib.Path


def _read_index(directory: pathlib.Path) -> dict[str, Any] | None:
  """The index of a complete task cache; None if there is none.

  Raises:
    DataError: the cache is there but damaged.
  """
  if not directory.is_dir():
    return None
  try:
    index = json.loads((directory / "index.json").read_text())
    files, _ = index["files"], index["statistics"]
    sizes = {name: (directory / name).stat().st_size for name in files}
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise DataError(
      f"{directory}: damaged cache ({error}); delete the directory to rebuild it"
    ) from error
  for name, size in files.items():
    if sizes[name] != size:
      raise DataError(
        f"{directory / name}: {sizes[name]} bytes where the index says {size}; "
        "delete the directory to rebuild it"
      )
  return index


def manifest(config: CachedData) -> Manifest | None:
  """The complete caches of a configuration; None if `build` must run first.

  Raises:
    DataError: a cache is damaged.
  """
  path = config.manifest_path()
  if not path.is_file():
    return None
  try:
    entries = json.loads(path.read_text())["tasks"]
    listed = [(task["name"], task["rate"], task["directory"]) for task in entries]
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise DataError(f"{path}: damaged ({error}); delete it to rebuild it") from error
  tasks = []
  for name, rate, relative in listed:
    directory = config.cache_root / relative
    index = _read_index(directory)
    if index is None:
      return None
    tasks.append(CachedTask(name, rate, directory, index["statistics"]))
  return Manifest(tuple(tasks), config.vocabulary_path())


@contextlib.contextmanager
def _finished_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory that becomes `target` when the block ends, and vanishes if it fails."""
  target.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
  try:
    yield work
    try:
      os.rename(work, target)
    except OSError:
      # Another process finished the same content first: its result serves.
      if not target.is_dir():
        raise
  finally:
    shutil.rmtree(work, ignore_errors=True)


def write_examples(
  directory: pathlib.Path, examples: Iterable[Example], limits: Sequence[int] | None
) -> dict[str, Any]:
  """Writes a task's shards and lengths; returns the statistics.

  Args:
    directory: Of the task.
    examples: In order.
    limits: Tokens at which queries, positives and negatives are cut; None of segments.
  """
  names = _STATISTICS if limits is None else (*_STATISTICS, *_PAIR_STATISTICS)
  statistics = dict.fromkeys(names, 0)
  examples = iter(examples)
  lengths: list[np.ndarray] = []
  while (first := next(examples, None)) is not None:
    part = itertools.islice(examples, _SHARD_EXAMPLES - 1)
    path = str(directory / f"examples-{len(lengths):05d}.array_record")
    own = []
    # group_size 1: every example can be read alone.
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    with contextlib.closing(writer):
      for example in itertools.chain([first], part):
        writer.write(encode_example(example))
        own.append([len(tokens) for tokens in example.tokens])
        _count(statistics, example, limits)
    lengths.append(_table(own))
  _write_lengths(directory / "lengths.npy", lengths, statistics)
  return statistics


def _table(rows: Sequence[Sequence[int]]) -> np.ndarray:
  """Rows of unequal length as an array, filled up with zeros."""
  return np.array(list(itertools.zip_longest(*rows, fillvalue=0)), np.uint32).T


def _write_lengths(
  path: pathlib.Path, tables: Sequence[np.ndarray], statistics: dict[str, int]
) -> None:
  shape = (statistics["examples"], 2 + statistics.get("max_negatives", -1))
  small = statistics["max_text_tokens"] < 2**16
  out = np.zeros(shape, np.uint16 if small else np.uint32)
  start = 0
  for table in tables:
    out[start : start + len(table), : table.shape[1]] = table
    start += len(table)
  np.save(path, out)


def _count(
  statistics: dict[str, int], example: Example, limits: Sequence[int] | None
) -> None:
  lengths = [len(tokens) for tokens in example.tokens]
  statistics["examples"] += 1
  statistics["tokens"] += sum(lengths)
  largest = {
    "max_text_tokens": max(lengths),
    "max_token_id": max(int(tokens.max()) for tokens in example.tokens),
  }
  if limits is not None:
    largest["max_negatives"] = len(lengths) - 2
    # A text of exactly its limit counts as cut: no text is encoded twice to know.
    statistics["truncated"] += sum(
      length == limits[min(role, 2)] for role, length in enumerate(lengths)
    )
  for name, value in largest.items():
    statistics[name] = max(statistics[name], value)


def _write_records(
  directory: pathlib.Path,
  examples: Iterator[dict[str, Any]],
  kind: str | None,
  vocabulary: SentencePieceVocabulary,
  config: CachedData,
) -> dict[str, Any]:
  """Writes what examples of the configuration's kind give; returns the statistics."""
  if isinstance(config, TextDataConfig):
    counts = collections.Counter(documents=0, short=0)
    segments = tokenization.segments(examples, vocabulary, config.longest, counts)
    return write_examples(directory, segments, None) | counts
  assert isinstance(config, DataConfig)
  limits = [config.lengths[feature] for feature in config.features]
  pairs = tokenization.pairs(examples, kind, vocabulary, config)
  return write_examples(directory, pairs, limits)


def build(config: CachedData, log: Callable[[str], None]) -> Manifest:
  """Builds what is missing of the configuration's caches.

  Args:
    config: The mixture.
    log: Takes lines of progress.

  Raises:
    DataError: a bad record, an empty task or an unreadable source. Caches of
      finished tasks stay; nothing unfinished is left.
    ConfigError: a mixture, module or prompt that does not exist.
  """
  config.manifest_path()  # Refuses files and modules that are not there, at once.
  # Tens of seconds and a gigabyte: paid here, in the process that caches.
  from embgemma.data import seqio_registry

  rated = seqio_registry.register(config)
  kinds = {task.name: task.kind for task in config.tasks}
  _ensure_vocabulary(config, rated, kinds, log)
  vocabulary = SentencePieceVocabulary(config.vocabulary_path())
  fingerprints = {task.name: task.fingerprint() for task in config.tasks}
  entries = []
  for task, rate in rated:
    key = digest(
      [
        CACHE_FORMAT,
        fingerprints.get(task.name, [task.name, config.corpus_fingerprint()]),
        *config.record_key(),
        config.on_bad_record,
        vocabulary.fingerprint,
      ]
    )
    relative = pathlib.Path("tasks", f"{task.name}-{key}")
    if _read_index(config.cache_root / relative) is None:
      _build_task(task, kinds.get(task.name), vocabulary, config, relative, log)
    entries.append({"name": task.name, "rate": rate, "directory": str(relative)})
  path = config.manifest_path()
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(f".{os.getpid()}.tmp")
  unfinished.write_text(json.dumps({"tasks": entries}, indent=1))
  os.replace(unfinished, path)
  built = manifest(config)
  assert built is not None
  return built


def _build_task(
  task: Any,
  kind: str | None,
  vocabulary: SentencePieceVocabulary,
  config: CachedData,
  relative: pathlib.Path,
  log: Callable[[str], None],
) -> None:
  """Builds the cache of one seqio task.

  Raises:
    DataError: see `build`.
  """
  from embgemma.data import seqio_registry

  examples = seqio_registry.examples(task, "train", config.content)
  with (
    _finished_directory(config.cache_root / relative) as work,
    contextlib.closing(examples),  # and TensorFlow's iterator: see there
  ):
    statistics = _write_records(work, examples, kind, vocabulary, config)
    if not statistics["examples"]:
      raise DataError(f"task {task.name!r} has no examples")
    skips = seqio_registry.skipped(task)
    statistics["skipped"] = skips.count
    files = {p.name: p.stat().st_size for p in work.iterdir()}
    index = {
      "format": CACHE_FORMAT,
      "task": task.name,
      "files": files,
      "statistics": statistics,
      "skipped": skips.listed,
    }
    (work / "index.json").write_text(json.dumps(index, indent=1))
  line = (
    f"cached {task.name}: {statistics['examples']:,} examples, "
    f"{statistics['tokens']:,} tokens"
  )
  if "documents" in statistics:
    line += f", of {statistics['documents']:,} documents"
  log(line)
  if skips.count:
    log(f"skipped {skips.count} bad records of {task.name}:")
    for listed in skips.listed:
      log(f"  {listed}")


def _ensure_vocabulary(
  config: CachedData,
  rated: list[tuple[Any, float]],
  kinds: dict[str, str | None],
  log: Callable[[str], None],
) -> None:
  """Trains the mixture's own vocabulary unless it has one."""
  path = config.vocabulary_path()
  if path.is_file():
    return
  from embgemma.data import seqio_registry

  def texts() -> Iterator[str]:
    for task, _ in rated:
      for example in seqio_registry.examples(task, "train", config.content):
        if config.content == "text":
          yield example["text"]
        else:
          yield from tokenization.pair_texts(example, kinds.get(task.name))[0]

  assert config.vocabulary_size is not None  # or the file would be there
  log(f"training a vocabulary of {config.vocabulary_size:,} pieces")
  path.parent.mkdir(parents=True, exist_ok=True)
  train_vocabulary(
    texts(), config.vocabulary_size, path, sentinels=config.sentinels_trained
  )
