"""Sources whose examples lie in files of records: JSONL, text, Parquet."""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.data import files, parquet, record_formats
from embgemma.data.bad_records import SkipLog, leave_out
from embgemma.data.files import read_lines
from embgemma.data.fingerprints import source_fingerprint
from embgemma.data.jsonl import check_object, decode_line, parse_json
from embgemma.data.record_formats import text_example
from embgemma.errors import ConfigError, DataError

Shard = tuple[str, ...]
"""Files read in order; of the built-in corpus, a split."""

_TEXT_LINE = '{"text": "…"}'


def check_limit(limit: Any) -> None:
  """Returns nothing if it is a number of examples, or None.

  Raises:
    ConfigError: it is something else.
  """
  if limit is not None and (type(limit) is not int or limit < 0):
    raise ConfigError(f"limit {limit!r}: give a number of examples, or None for all")


@dataclasses.dataclass(frozen=True)
class FileSource(abc.ABC):
  """Examples in files of records; each file is a shard, unless there is a limit."""

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
    return source_fingerprint(self._format.lower(), settings, stamps)

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
class JsonlSource(FileSource):
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
class TextFileSource(FileSource):
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
class ParquetSource(FileSource):
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
