"""Where examples come from: built-in corpus, files, TFDS, TFRecord.

An example is a pair, or the text of a document: a source's `content` says which.

Sources are frozen dataclasses: gin builds them, their fingerprint keys the cache. A
source in Python has shards, which are groups of files and can be read each by itself,
in order; the TensorFlow ones are opened by `embgemma.data.seqio_registry`.
"""

import abc
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.data import beir, builtin_corpus, files, parquet, record_formats
from embgemma.data.bad_records import (
  BAD_RECORD_POLICIES,
  MAX_LISTED_SKIPS,
  SkipLog,
  leave_out,
)
from embgemma.data.files import read_lines
from embgemma.data.jsonl import (
  check_object,
  decode_line,
  parse_json,
  parse_json_line,
  read_jsonl,
  string_field,
)
from embgemma.data.record_formats import pair_example, text_example
from embgemma.errors import ConfigError, DataError

__all__ = [
  "BAD_RECORD_POLICIES",
  "MAX_LISTED_SKIPS",
  "BeirSource",
  "BuiltinSource",
  "JsonlSource",
  "ParquetSource",
  "PythonSource",
  "Shard",
  "SkipLog",
  "Source",
  "TextFileSource",
  "TfdsSource",
  "TfrecordSource",
  "decode_line",
  "module_fingerprint",
  "pair_example",
  "parse_json_line",
  "read_jsonl",
  "read_lines",
  "string_field",
  "text_example",
]

Shard = tuple[str, ...]
"""Files read in order; of the built-in corpus, a split."""

_TEXT_LINE = '{"text": "…"}'


def _fingerprint(*parts: Any) -> str:
  encoded = json.dumps(parts, sort_keys=True, default=str).encode()
  return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def check_limit(limit: Any) -> None:
  """Returns nothing if it is a number of examples, or None.

  Raises:
    ConfigError: it is something else.
  """
  if limit is not None and (type(limit) is not int or limit < 0):
    raise ConfigError(f"limit {limit!r}: give a number of examples, or None for all")


@dataclasses.dataclass(frozen=True)
class _FileSource(abc.ABC):
  """Examples in files of records."""

  path: str | tuple[str, ...]
  limit: int | None = None

  content = "pairs"
  _format = "JSONL"

  def __post_init__(self):
    check_limit(self.limit)

  @abc.abstractmethod
  def _units(self, path: str) -> Iterator[tuple[int, Any]]:
    """Numbers from 1 and what a record is made of: lines or rows."""

  @abc.abstractmethod
  def _record(self, path: str, number: int, unit: Any) -> Any:
    """What a record format takes."""

  @abc.abstractmethod
  def _reader(self, path: str, skipped: SkipLog) -> record_formats.RecordFormat:
    """Makes examples of the records of a file."""

  def files(self) -> list[str]:
    """Matching files, sorted.

    Raises:
      DataError: nothing matches.
    """
    patterns = (self.path,) if isinstance(self.path, str) else tuple(self.path)
    found = []
    for pattern in patterns:
      matches = files.match(pattern)
      if not matches:
        raise DataError(
          f"{pattern}: no such file; check the path of the {self._format} task"
        )
      found.extend(matches)
    twice = sorted({path for path in found if found.count(path) > 1})
    if twice:
      raise DataError(
        f"{twice[0]}: named twice by the paths of the {self._format} task; drop one"
      )
    return found

  def shards(self) -> tuple[Shard, ...]:
    """The files, each by itself; all of them together where there is a limit.

    Raises:
      DataError: see `files`.
    """
    found = self.files()
    return tuple((path,) for path in found) if self.limit is None else (tuple(found),)

  def fingerprint(self) -> str:
    """Changes when a file is replaced or written to."""
    settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
    stamps = [files.fingerprint(path) for path in self.files()]
    return _fingerprint(self._format.lower(), settings, stamps)

  def read(
    self, shard: Shard, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples of a shard, in order.

    Args:
      shard: One of `shards`.
      on_bad_record: "fail" or "skip".
      skipped: Takes the records that are left out.

    Raises:
      DataError: the first bad record, unless `on_bad_record` is "skip"; a damaged
        file.
    """
    each = (self._read_file(path, on_bad_record, skipped) for path in shard)
    yield from itertools.islice(itertools.chain.from_iterable(each), self.limit)

  def _read_file(
    self, path: str, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    reader = self._reader(path, skipped)
    for number, unit in self._units(path):
      try:
        record = self._record(path, number, unit)
        examples = reader.add(record, f"{path}:{number}")
      except DataError as error:
        leave_out(error, on_bad_record, skipped)
        continue
      yield from examples
    yield from reader.finish()


def _check_format(name: str) -> None:
  if name not in record_formats.FORMATS:
    raise ConfigError(
      f"unknown format {name!r} of records; there are {sorted(record_formats.FORMATS)}"
    )


@dataclasses.dataclass(frozen=True)
class JsonlSource(_FileSource):
  """Pairs in JSONL files: one path, a glob, or several; plain or compressed.

  Attributes:
    path: The training file or files, local or remote; see `files`.
    limit: Read only the first so many examples; None is all of them.
    format: Of the records, a key of `record_formats.FORMATS`.
  """

  format: str = "pairs"

  def __post_init__(self):
    super().__post_init__()
    _check_format(self.format)

  def _units(self, path: str) -> Iterator[tuple[int, bytes]]:
    return read_lines(path)

  def _record(self, path: str, number: int, unit: bytes) -> Any:
    return parse_json(path, number, unit)

  def _reader(self, path: str, skipped: SkipLog) -> record_formats.RecordFormat:
    return record_formats.FORMATS[self.format](skipped)


def _documents(record: Any, where: str) -> list[dict[str, Any]]:
  return [text_example(check_object(record, where, _TEXT_LINE), where)]


def _lines_of_text(record: str, where: str) -> list[dict[str, Any]]:
  del where
  return [{"text": record}] if record.strip() else []


@dataclasses.dataclass(frozen=True)
class TextFileSource(_FileSource):
  """Documents in files: one path, a glob, or several; plain or compressed.

  A .jsonl file has an object with "text" a line; a .txt file a document a line, and
  its blank lines are none.

  Attributes:
    path: The training file or files, local or remote; see `files`.
    limit: Read only the first so many documents; None is all of them.
  """

  content = "text"
  _format = "text"

  def files(self) -> list[str]:
    """Matching files, sorted.

    Raises:
      DataError: nothing matches, or a file is of another kind.
    """
    found = super().files()
    for path in found:
      if not files.plain_name(path).endswith((".jsonl", ".txt")):
        raise DataError(
          f"{path}: neither .jsonl ({_TEXT_LINE} a line) nor .txt (a document a line), "
          f"perhaps with {', '.join(files.COMPRESSED)}; rename or convert it"
        )
    return found

  def _units(self, path: str) -> Iterator[tuple[int, bytes]]:
    return read_lines(path)

  def _record(self, path: str, number: int, unit: bytes) -> Any:
    if files.plain_name(path).endswith(".jsonl"):
      return parse_json(path, number, unit)
    return decode_line(path, number, unit)

  def _reader(self, path: str, skipped: SkipLog) -> record_formats.RecordFormat:
    del skipped
    is_jsonl = files.plain_name(path).endswith(".jsonl")
    return record_formats.Each(_documents if is_jsonl else _lines_of_text)


@dataclasses.dataclass(frozen=True)
class ParquetSource(_FileSource):
  """Pairs or documents in Parquet files: one path, a glob, or several.

  Attributes:
    path: The training file or files, local or remote; see `files`.
    limit: Read only the first so many examples; None is all of them.
    fields: Our field to the column, with dots into structures, such as {"query":
      "question", "positive": "answer.text"}; {"text": "article"} for documents. None
      takes the columns by their names.
    format: Of the rows, a key of `record_formats.FORMATS`.
  """

  fields: Mapping[str, str] | None = None
  format: str = "pairs"

  _format = "Parquet"

  def __post_init__(self):
    super().__post_init__()
    _check_format(self.format)

  @property
  def content(self) -> str:  # type: ignore[override]
    return "text" if set(self.fields or ()) == {"text"} else "pairs"

  def _units(self, path: str) -> Iterator[tuple[int, Any]]:
    return parquet.read_rows(path, self.fields)

  def _record(self, path: str, number: int, unit: Any) -> Any:
    if isinstance(unit, DataError):
      raise unit
    return unit

  def _reader(self, path: str, skipped: SkipLog) -> record_formats.RecordFormat:
    if self.content == "text":
      return record_formats.Each(_documents)
    return record_formats.FORMATS[self.format](skipped)


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
    return _fingerprint("beir", self.limit, stamps)

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
    return _fingerprint("builtin", self.task, builtin_corpus.fingerprint())

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
    return _fingerprint("tfds", self.name, dict(self.fields), self.data_dir, self.split)


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
    return _fingerprint("tfrecord", stamps, dict(self.fields))


PythonSource = JsonlSource | TextFileSource | ParquetSource | BeirSource | BuiltinSource
Source = PythonSource | TfdsSource | TfrecordSource


def module_fingerprint(name: str) -> str:
  """Hash of a Python module's file, or of all of a package's, found without importing.

  What the module reads or imports beside is not watched.

  Raises:
    ConfigError: no such module.
  """
  try:
    spec = importlib.util.find_spec(name)
  except ModuleNotFoundError:
    spec = None
  if spec is None or not spec.origin:
    raise ConfigError(
      f"module {name!r}, named in MODULES, cannot be found; put it on PYTHONPATH"
    )
  own = pathlib.Path(spec.origin)
  paths = [own] if spec.submodule_search_locations is None else own.parent.rglob("*.py")
  contents = {str(p.relative_to(own.parent)): p.read_bytes().hex() for p in paths}
  return _fingerprint("module", name, contents)
