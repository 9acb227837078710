"""Writing the shards of a task's cache, in parts.

A shard of the source becomes one or more parts, each a file of records and one that
says what it holds. A part is written whole or not at all and never again: a build that
was stopped goes on after the last one. `task_index` makes a task of them.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from embgemma.data import cache, tokenization
from embgemma.data.bad_records import SkipLog
from embgemma.data.config import CachedData, DataConfig, TextDataConfig
from embgemma.data.executors import Count
from embgemma.data.files import new_file, writing
from embgemma.data.records import Example, encode_example
from embgemma.data.task_examples import TaskExamples
from embgemma.data.vocabularies import SentencePieceVocabulary

PART_EXAMPLES = 1 << 18
# Of the statistics of parts: what adds up, and of what the largest counts.
SUMS = ("examples", "tokens", "truncated", "documents", "short")
LARGEST = ("max_text_tokens", "max_token_id", "texts")


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


def part_path(directory: epath.Path, shard: int, part: int) -> epath.Path:
  """Of what says what a part of a shard holds."""
  return directory / f"part-{shard:05d}-{part:05d}.npz"


def read_part(path: epath.Path) -> Part | None:
  """A part; None where it is not there, or not whole with its records."""
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
    self.statistics = dict.fromkeys((*SUMS, *LARGEST), 0)
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
    for name, value in zip(LARGEST, (max(lengths), highest, len(lengths)), strict=True):
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


def write_shard(job: ShardJob, count: Count) -> None:
  """Writes the parts of a shard that are not there yet.

  Args:
    job: The shard.
    count: Takes how many of its examples are read.

  Raises:
    DataError: a bad record, or one that cannot be read; earlier parts stay.
  """
  directory, part, start = epath.Path(job.directory), 0, 0
  while (done := read_part(part_path(directory, job.shard, part))) is not None:
    if done.facts["last"]:
      return
    part, start = part + 1, done.facts["read"]
  skipped = SkipLog()
  with contextlib.closing(_items(job, start, skipped)) as items:
    first = (job.shard, part)
    write_parts(directory, first, items, limits(job.config), skipped, count)


def write_parts(
  directory: epath.Path,
  first: tuple[int, int],
  items: Iterator[tuple[int, list[Example]]],
  cut_at: Sequence[int] | None,
  skipped: SkipLog,
  count: Count,
) -> None:
  """Writes the last parts of a shard, one at least.

  Args:
    directory: Of the task.
    first: Numbers of the shard, and of the first part to write.
    items: Places in the shard behind an example of the source, and its records.
    cut_at: Tokens at which queries, positives and negatives are cut; None of segments.
    skipped: What the source left out, complete when items are at their end.
    count: Takes the places.
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
        count(read)
        following = next(items, None)
    facts = {
      "files": {records.name: own.size},
      "statistics": own.statistics,
      "read": read,
      "last": following is None,
      "skipped": dataclasses.asdict(skipped),
    }
    with writing(part_path(directory, shard, part)) as file:
      np.savez(
        file,
        lengths=own.lengths,
        hashes=own.hashes,
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
      )
    part += 1
