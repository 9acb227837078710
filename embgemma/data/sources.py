"""Where examples come from: built-in corpus, files, TFDS, TFRecord.

An example is a pair, or the text of a document: a source's `content` says which.

Sources are frozen dataclasses: gin builds them, their fingerprint keys the cache. A
source in Python has shards, which are groups of files and can be read each by itself,
in order; the TensorFlow ones are opened by `embgemma.data.seqio_registry`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.data import beir, builtin_corpus, files
from embgemma.data.bad_records import SkipLog
from embgemma.data.file_sources import (
  JsonlSource,
  ParquetSource,
  Shard,
  TextFileSource,
  check_limit,
)
from embgemma.data.fingerprints import source_fingerprint
from embgemma.data.record_formats import pair_example
from embgemma.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class BeirSource:
  """Queries with the documents judged relevant to them, in the layout of BEIR.

  One example for each relevant document, in the order of the judgements; documents
  judged irrelevant (grade 0 or less) are the negatives of their query.

  Attributes:
    path: The folder, local or remote, with corpus.jsonl and queries.jsonl (plain or
      compressed) and qrels/SPLIT.tsv.
    split: Of the judgements.
    limit: Read only the first so many examples; None is all of them.
  """

  path: str
  split: str = "train"
  limit: int | None = None

  content = "pairs"

  def __post_init__(self):
    check_limit(self.limit)

  def shards(self) -> tuple[Shard, ...]:
    """One shard: corpus, queries and judgements.

    Raises:
      DataError: one of them is missing.
    """
    names = ("corpus.jsonl", "queries.jsonl")
    found = [beir.collection_file(self.path, name) for name in names]
    return ((*found, beir.qrels_file(self.path, self.split)),)

  def fingerprint(self) -> str:
    """Changes when a file is replaced or written to."""
    stamps = [files.fingerprint(path) for path in self.shards()[0]]
    return source_fingerprint("beir", self.limit, stamps)

  def read(
    self, shard: Shard, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples of the shard; see `beir.read_pairs` for the memory it takes.

    Args:
      shard: Of `shards`.
      on_bad_record: "fail" or "skip".
      skipped: Takes the records that are left out.

    Raises:
      DataError: the first bad record, unless `on_bad_record` is "skip"; a damaged
        file.
    """
    corpus, queries, qrels = shard
    found = beir.read_pairs(corpus, queries, qrels, on_bad_record, skipped)
    yield from itertools.islice(found, self.limit)


@dataclasses.dataclass(frozen=True)
class BuiltinSource:
  """A task of the corpus drawn from the installed Python standard library.

  Its shard is the split ("train",); ("validation",) can be read too.
  """

  task: str

  def __post_init__(self):
    names = sorted([*builtin_corpus.TASKS, *builtin_corpus.TEXT_TASKS])
    if self.task not in names:
      raise ConfigError(f"unknown built-in task {self.task!r}; there are {names}")

  @property
  def content(self) -> str:
    return "text" if self.task in builtin_corpus.TEXT_TASKS else "pairs"

  def shards(self) -> tuple[Shard, ...]:
    """One shard: the training split."""
    return (("train",),)

  def fingerprint(self) -> str:
    return source_fingerprint("builtin", self.task, builtin_corpus.fingerprint())

  def read(
    self, shard: Shard, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples of a split; the corpus holds no bad records."""
    del on_bad_record, skipped
    (split,) = shard
    if self.content == "text":
      yield from builtin_corpus.documents(self.task, split)
      return
    for index, record in enumerate(builtin_corpus.examples(self.task, split)):
      yield pair_example(record, f"builtin:{self.task}[{index}]")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A TFDS dataset whose features are renamed to ours.

  Attributes:
    name: TFDS name with version, such as "beir/msmarco:1.0.0".
    fields: Our feature name to the dataset's, such as {"query": "question"}; {"text":
      "article"} for documents.
    data_dir: TFDS data directory; None is TFDS's default.
    split: The split to train on.
  """

  name: str
  fields: Mapping[str, str]
  data_dir: str | None = None
  split: str = "train"

  @property
  def content(self) -> str:
    return "text" if "text" in self.fields else "pairs"

  def fingerprint(self) -> str:
    own = (self.name, dict(self.fields), self.data_dir, self.split)
    return source_fingerprint("tfds", *own)


@dataclasses.dataclass(frozen=True)
class TfrecordSource:
  """tf.Example records; features are byte strings, `negatives` may repeat.

  Attributes:
    pattern: File pattern, such as "/data/pairs-*.tfrecord"; files that end in .gz are
      compressed by TensorFlow's GZIP.
    fields: Our feature name to the record's; {"text": "article"} for documents.
  """

  pattern: str
  fields: Mapping[str, str]

  @property
  def content(self) -> str:
    return "text" if "text" in self.fields else "pairs"

  def fingerprint(self) -> str:
    found = files.match(self.pattern)
    if not found:
      raise DataError(f"{self.pattern}: no such TFRecord file")
    stamps = [files.fingerprint(path) for path in found]
    return source_fingerprint("tfrecord", stamps, dict(self.fields))


PythonSource = JsonlSource | TextFileSource | ParquetSource | BeirSource | BuiltinSource
Source = PythonSource | TfdsSource | TfrecordSource
