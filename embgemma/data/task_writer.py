"""Writing one task's cache: parts of its shards, then what all of them make.

A shard of the source becomes one or more parts, each a file of records and one that
says what it holds. A part is written whole or not at all and never again: a build that
was stopped goes on after the last one.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from embgemma.data import cache, tokenization
from embgemma.data.files import new_file, writing
from embgemma.data.records import Example, encode_example
from embgemma.data.sources import MAX_LISTED_SKIPS, SkipLog
from embgemma.data.task_examples import TaskExamples
from embgemma.data.tasks import (
  CACHE_FORMAT,
  CachedData,
  DataConfig,
  TextDataConfig,
)
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import DataError

PART_EXAMPLES = 1 << 18
_HISTOGRAM = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_DISTINCT_AT_ONCE = 1 << 26  # hashes sorted together
_SUMS = ("examples", "tokens", "truncated", "documents", "short")
_LARGEST = ("max_text_tokens", "max_token_id", "texts")

STATISTICS = """\
examples, tokens, max_text_tokens, max_token_id; lengths: by role, how many texts have
up to 8, 16, … 2,048 tokens, and more; duplicates: examples whose texts are those of an
earlier one; skipped: bad records left out, of which empty had an empty text; unused: by
reason, sound records that give no example; dropped: by cleaner, examples left out. Of
pairs max_negatives and truncated texts; of documents documents, and short: those of
fewer tokens than a segment has at least."""


@dataclasses.dataclass(frozen=True)
class ShardJob:
  """One shard of a task to write.

  Attributes:
    config: Of the mixture.
    task: Whose examples.
    shard: Of them.
    directory: Of the task's cache.
    vocabulary: The path of its file.
    decisions: Directory of what cleaning decided of the task; None without cleaning.
    num_threads: That tokenise; -1 is one a core.
  """

  config: CachedData
  task: TaskExamples
  shard: int
  directory: str
  vocabulary: str
  decisions: str | None = None
  num_threads: int = -1


@dataclasses.dataclass(frozen=True)
class Part:
  """What a file of records holds.

  Attributes:
    lengths: uint32 [examples, texts], tokens; 0 is none.
    hashes: uint64 [examples, texts], of contents; 0 where there is none.
    facts: statistics, the records' file with its size, what of the source was read and
      whether that is all of the shard.
  """

  lengths: np.ndarray
  hashes: np.ndarray
  facts: dict[str, Any]


def _part_path(directory: epath.Path, shard: int, part: int) -> epath.Path:
  return directory / f"part-{shard:05d}-{part:05d}.npz"


def _read_part(path: epath.Path) -> Part | None:
  """None where it is not there, or not whole with its records."""
  if not path.exists():
    return None
  try:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
      facts = json.loads(arrays["facts"].tobytes())
      part = Part(arrays["lengths"], arrays["hashes"], facts)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  if cache.damaged_files(path.parent, facts["files"]):
    return None
  return part


@functools.lru_cache(maxsize=1)
def _vocabulary(path: str) -> SentencePieceVocabulary:
  return SentencePieceVocabulary(cache.local_copy(epath.Path(path)))


class _PartWriter:
  """Writes records as they come, and collects what is known of them.

  Args:
    path: Of the file of records.
    limits: Tokens at which queries, positives and negatives are cut; None of segments.

  Attributes:
    statistics: Sums and largest values.
    size: Bytes, once closed.
  """

  def __init__(self, path: pathlib.Path, limits: Sequence[int] | None):
    # group_size 1: every example can be read alone.
    self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    self._path = path
    self._limits = limits
    self._lengths: list[list[int]] = []
    self._hashes: list[np.ndarray] = []
    self.statistics = dict.fromkeys((*_SUMS, *_LARGEST), 0)
    self.size = 0

  def __len__(self) -> int:
    return len(self._lengths)

  @property
  def lengths(self) -> np.ndarray:
    return _table(self._lengths, np.uint32)

  @property
  def hashes(self) -> np.ndarray:
    return _table(self._hashes, np.uint64)

  def add(self, examples: Sequence[Example]) -> None:
    """Adds what one example of the source became."""
    self.statistics["documents"] += 1
    self.statistics["short"] += not examples
    for example in examples:
      self._add(example)

  def _add(self, example: Example) -> None:
    self._writer.write(encode_example(example))
    lengths = [len(tokens) for tokens in example.tokens]
    self._lengths.append(lengths)
    contents = example.hashes if example.contents is None else example.contents
    self._hashes.append(contents)
    own = self.statistics
    own["examples"] += 1
    own["tokens"] += sum(lengths)
    if self._limits is not None:
      # A text of exactly its limit counts as cut: no text is encoded twice to know.
      own["truncated"] += sum(
        length == self._limits[min(role, 2)] for role, length in enumerate(lengths)
      )
    highest = max(int(tokens.max()) for tokens in example.tokens)
    for name, value in zip(
      _LARGEST, (max(lengths), highest, len(lengths)), strict=True
    ):
      own[name] = max(own[name], value)

  def close(self) -> None:
    self._writer.close()
    self.size = self._path.stat().st_size


def _table(rows: Sequence[Any], dtype: Any) -> np.ndarray:
  """Rows of unequal length as an array, filled up with zeros."""
  sizes = np.fromiter(map(len, rows), int, len(rows))
  out = np.zeros((len(rows), sizes.max(initial=0)), dtype)
  if len(rows):
    out[np.arange(out.shape[1]) < sizes[:, None]] = np.concatenate(rows)
  return out


def limits(config: CachedData) -> list[int] | None:
  """Tokens at which queries, positives and negatives are cut; None of segments."""
  if not isinstance(config, DataConfig):
    return None
  return [config.lengths[feature] for feature in config.features]


def _encoded(
  job: ShardJob, examples: Iterable[dict[str, Any]]
) -> Iterator[list[Example]]:
  """What each example becomes: one record, or the segments of a document."""
  config = job.config
  vocabulary = _vocabulary(job.vocabulary)
  if isinstance(config, TextDataConfig):
    documents = (example["text"] for example in examples)
    return tokenization.segments(documents, vocabulary, config.longest, job.num_threads)
  assert isinstance(config, DataConfig)
  kind, unique_ids, table = job.task.kind, job.task.unique_ids, config.prompt_table
  texts = (
    tokenization.pair_texts(example, kind, table, unique_ids) for example in examples
  )
  pairs = tokenization.pairs(
    texts, vocabulary, config.lengths, config.max_negatives, job.num_threads
  )
  return ([pair] for pair in pairs)


def _items(
  job: ShardJob, start: int, skipped: SkipLog
) -> Generator[tuple[int, list[Example]], None, None]:
  """What the examples of a shard become, each with its place behind it in the shard.

  Args:
    job: The shard.
    start: Place of the first one wanted.
    skipped: Takes what the source leaves out.
  """
  places: collections.deque[int] = collections.deque()

  def unread() -> Generator[dict[str, Any], None, None]:
    decisions = None if job.decisions is None else epath.Path(job.decisions)
    with contextlib.closing(
      cache.kept(job.config, job.task, job.shard, skipped, decisions)
    ) as kept:
      for index, example in kept:
        if index >= start:
          places.append(index + 1)
          yield example

  with contextlib.closing(unread()) as examples:
    for records in _encoded(job, examples):
      yield places.popleft(), records


def write_shard(job: ShardJob) -> None:
  """Writes the parts of a shard that are not there yet.

  Raises:
    DataError: a bad record, or one that cannot be read; earlier parts stay.
  """
  directory, part, start = epath.Path(job.directory), 0, 0
  while (done := _read_part(_part_path(directory, job.shard, part))) is not None:
    if done.facts["last"]:
      return
    part, start = part + 1, done.facts["read"]
  skipped = SkipLog()
  with contextlib.closing(_items(job, start, skipped)) as items:
    write_parts(directory, (job.shard, part), items, limits(job.config), skipped)


def write_parts(
  directory: epath.Path,
  first: tuple[int, int],
  items: Iterator[tuple[int, list[Example]]],
  cut_at: Sequence[int] | None,
  skipped: SkipLog,
) -> None:
  """Writes the last parts of a shard, one at least.

  Args:
    directory: Of the task.
    first: Numbers of the shard, and of the first part to write.
    items: Places in the shard behind an example of the source, and its records.
    cut_at: Tokens at which queries, positives and negatives are cut; None of segments.
    skipped: What the source left out, complete when items are at their end.
  """
  shard, part = first
  following = next(items, None)
  while following is not None or part == first[1]:
    read = 0
    records = directory / f"examples-{shard:05d}-{part:05d}.array_record"
    with (
      new_file(records) as path,
      contextlib.closing(_PartWriter(path, cut_at)) as own,
    ):
      while following is not None and len(own) < PART_EXAMPLES:
        read, examples = following
        own.add(examples)
        following = next(items, None)
    facts = {
      "files": {records.name: own.size},
      "statistics": own.statistics,
      "read": read,
      "last": following is None,
      "skipped": dataclasses.asdict(skipped),
    }
    with writing(_part_path(directory, shard, part)) as file:
      np.savez(
        file,
        lengths=own.lengths,
        hashes=own.hashes,
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
      )
    part += 1


def write_examples(
  directory: pathlib.Path, examples: Iterable[Example], cut_at: Sequence[int] | None
) -> dict[str, Any]:
  """Writes a complete cache of examples at hand; returns its statistics.

  Args:
    directory: Of the task.
    examples: In order.
    cut_at: Tokens at which queries, positives and negatives are cut; None of segments.
  """
  root = epath.Path(directory)
  items = ((place, [example]) for place, example in enumerate(examples, 1))
  write_parts(root, (0, 0), items, cut_at, SkipLog())
  index = finish_task(root, root.name, 1, {}, pairs=cut_at is not None)
  return index["statistics"]


def finish_task(
  directory: epath.Path,
  task: str,
  num_shards: int,
  dropped: dict[str, int],
  pairs: bool,
) -> dict[str, Any]:
  """Puts the parts of all shards together, and marks the cache as complete.

  Args:
    directory: Of the task's cache.
    task: Its name.
    num_shards: Of the source.
    dropped: Examples left out, by cleaner.
    pairs: Whether its examples are pairs.

  Returns:
    The index.

  Raises:
    DataError: there is no example.
  """
  paths, facts = _all_parts(directory, num_shards)
  statistics = _statistics(facts, pairs)
  if not statistics["examples"]:
    raise DataError(
      f"task {task!r} has no examples" + (" left by cleaning" if dropped else "")
    )
  files: dict[str, int] = {}
  for fact in facts:
    if fact["statistics"]["examples"]:
      files |= fact["files"]
  shape = (statistics["examples"], 2 + statistics["max_negatives"] if pairs else 1)
  small = np.uint16 if statistics["max_text_tokens"] < 2**16 else np.uint32
  with new_file(directory / "lengths.npy") as made:
    _write_table(made, shape, small, (_part(path).lengths for path in paths))
    files["lengths.npy"] = made.stat().st_size
    statistics["lengths"] = _histogram(np.load(made, mmap_mode="r"), pairs)
  with new_file(directory / "hashes.npy") as made:
    _write_table(made, shape, np.uint64, (_part(path).hashes for path in paths))
    files["hashes.npy"] = made.stat().st_size
    hashes = np.load(made, mmap_mode="r")
    statistics["duplicates"] = _duplicates(hashes) if pairs else 0
  statistics["dropped"] = dropped
  listed = [
    line for fact in facts if fact["last"] for line in fact["skipped"]["listed"]
  ]
  index = {
    "format": CACHE_FORMAT,
    "task": task,
    "files": files,
    "statistics": statistics,
    "skipped": listed[:MAX_LISTED_SKIPS],
  }
  for fact in facts:
    if not fact["statistics"]["examples"]:  # no reader should open such a file
      (directory / next(iter(fact["files"]))).unlink(missing_ok=True)
  with new_file(directory / "index.json") as made:
    made.write_text(json.dumps(index, indent=1))
  for path in paths:
    path.unlink()
  return index


def _all_parts(
  directory: epath.Path, num_shards: int
) -> tuple[list[epath.Path], list[dict[str, Any]]]:
  """Paths of the parts of all shards in order, and their facts."""
  paths, facts = [], []
  for shard in range(num_shards):
    for number in itertools.count():
      paths.append(_part_path(directory, shard, number))
      facts.append(_part(paths[-1]).facts)
      if facts[-1]["last"]:
        break
  return paths, facts


def _part(path: epath.Path) -> Part:
  """A part that has been written.

  Raises:
    DataError: something took it away.
  """
  part = _read_part(path)
  if part is None:
    raise DataError(f"{path}: gone or damaged meanwhile; run the command again")
  return part


def _write_table(
  path: pathlib.Path, shape: tuple[int, int], dtype: Any, tables: Iterable[np.ndarray]
) -> None:
  """Writes tables one under another as one .npy, narrower ones filled up with zeros."""
  header = {
    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
    "fortran_order": False,
    "shape": shape,
  }
  with path.open("wb") as file:
    np.lib.format.write_array_header_1_0(file, header)
    for table in tables:
      out = np.zeros((len(table), shape[1]), dtype)
      out[:, : table.shape[1]] = table
      file.write(out.tobytes())


def _statistics(facts: Sequence[dict[str, Any]], pairs: bool) -> dict[str, Any]:
  """Over all parts."""
  own = [part["statistics"] for part in facts]
  total: dict[str, Any] = {name: sum(part[name] for part in own) for name in _SUMS}
  total |= {name: max(part[name] for part in own) for name in _LARGEST}
  texts = total.pop("texts")
  # A log counts from its shard's beginning: the last part's is the shard's.
  ends = [part["skipped"] for part in facts if part["last"]]
  total["skipped"] = sum(end["count"] for end in ends)
  total["empty"] = sum(end["empty"] for end in ends)
  unused: collections.Counter[str] = collections.Counter()
  for end in ends:
    unused.update(end["unused"])
  total["unused"] = dict(unused)
  if pairs:
    total["max_negatives"] = max(0, texts - 2)
  for name in ("documents", "short") if pairs else ("truncated",):
    del total[name]
  return total


def _blocks(table: np.ndarray) -> Iterator[np.ndarray]:
  """Rows of a memory-mapped table, a part's number at a time."""
  for start in range(0, len(table), PART_EXAMPLES):
    yield np.asarray(table[start : start + PART_EXAMPLES])


def _histogram(lengths: np.ndarray, pairs: bool) -> dict[str, list[int]]:
  """Texts by length: up to 8 tokens, 16, …, and longer than the last."""
  edges = (1, *(edge + 1 for edge in _HISTOGRAM), 2**32)
  roles = {"query": slice(0, 1), "positive": slice(1, 2), "negatives": slice(2, None)}
  counts = {
    name: np.zeros(len(edges) - 1, int) for name in (roles if pairs else ("text",))
  }
  for block in _blocks(lengths):
    for name, count in counts.items():
      count += np.histogram(block[:, roles.get(name, slice(None))], edges)[0]
  return {name: count.tolist() for name, count in counts.items()}


def _duplicates(hashes: np.ndarray) -> int:
  """Rows whose query and positive are those of an earlier row."""
  passes = np.uint64(-(-len(hashes) // _DISTINCT_AT_ONCE))
  distinct = 0
  for number in range(int(passes)):
    own = []
    for block in _blocks(hashes):
      # One odd multiple: (a, b) and (b, a) differ.
      mixed = block[:, 0] * np.uint64(0x9E3779B97F4A7C15) + block[:, 1]
      own.append(mixed[mixed % passes == number])
    distinct += len(np.unique(np.concatenate(own)))
  return len(hashes) - distinct
