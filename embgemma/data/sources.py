"""Where examples come from: built-in corpus, files, TFDS, TFRecord.

An example is a pair, or the text of a document: a source's `content` says which.

Sources are frozen dataclasses: gin builds them, their fingerprint keys the cache.
Built-in and file sources yield examples in pure Python; the TensorFlow ones are
opened by `embgemma.data.seqio_registry`, which hands all of them to seqio.
"""

import abc
import dataclasses
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.data import builtin_corpus
from embgemma.errors import ConfigError, DataError

BAD_RECORD_POLICIES = ("fail", "skip")
# A run that skips names this many records; the rest are counted.
MAX_LISTED_SKIPS = 20


@dataclasses.dataclass
class SkipLog:
  """Records left out under `on_bad_record=skip`, by reason."""

  count: int = 0
  listed: list[str] = dataclasses.field(default_factory=list)

  def add(self, error: DataError) -> None:
    self.count += 1
    if len(self.listed) < MAX_LISTED_SKIPS:
      self.listed.append(str(error))


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
  """Line numbers (from 1) and lines, without line ends, of a plain or .gz file.

  Raises:
    DataError: the file is missing, unreadable or a damaged gzip stream.
  """
  opener = gzip.open if str(path).endswith(".gz") else open
  number = 0
  try:
    with opener(path, "rb") as file:
      for number, line in enumerate(file, 1):
        yield number, line.rstrip(b"\r\n")
  except FileNotFoundError as error:
    raise DataError(f"{path}: no such file") from error
  except (OSError, EOFError, zlib.error) as error:
    raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from error


def decode_line(path: str | os.PathLike[str], number: int, line: bytes) -> str:
  """A line's text.

  Raises:
    DataError: invalid UTF-8.
  """
  try:
    return line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise DataError(
      f"{path}:{number}: invalid UTF-8 at byte {error.start}; save the file as UTF-8"
    ) from error


_PAIR_LINE = '{"query": "…", "positive": "…"}'
_TEXT_LINE = '{"text": "…"}'


def parse_json_line(
  path: str | os.PathLike[str], number: int, line: bytes, like: str = _PAIR_LINE
) -> dict:
  """The object on one JSONL line.

  Args:
    path: Of the file.
    number: Of the line.
    line: Without its end.
    like: An object as it should be, for the message.

  Raises:
    DataError: empty line, invalid UTF-8, malformed JSON or not an object.
  """
  where = f"{path}:{number}"
  text = decode_line(path, number, line)
  if not text.strip():
    raise DataError(f"{where}: empty line; each line must hold one JSON object")
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:  # ValueError: thousands of digits
    raise DataError(f"{where}: malformed JSON: {error}") from error
  if not isinstance(value, dict):
    raise DataError(
      f"{where}: expected a JSON object, got {type(value).__name__}; one object "
      f"like {like} a line"
    )
  return value


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict]]:
  """Line numbers and objects of a JSONL file, plain or .gz.

  Raises:
    DataError: see `read_lines` and `parse_json_line`.
  """
  for number, line in read_lines(path):
    yield number, parse_json_line(path, number, line)


def string_field(
  record: Mapping[str, Any], key: str, where: str, default: str | None = None
) -> str:
  """The string under a key; the default where it is absent or null.

  Raises:
    DataError: no such key and no default, not a string, or a lone surrogate,
      which no tokenizer can encode.
  """
  value = record.get(key)
  value = default if value is None else value
  if value is None:
    raise DataError(f'{where}: no "{key}"; the record has {sorted(record)}')
  if not isinstance(value, str):
    raise DataError(f'{where}: "{key}" must be a string, got {type(value).__name__}')
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise DataError(
      f'{where}: "{key}" holds a lone surrogate at character {error.start}; '
      "write the text as valid UTF-8"
    ) from error
  return value


def _text(
  record: Mapping[str, Any],
  key: str,
  where: str,
  needs: str = '"query" and "positive"',
) -> str:
  if record.get(key) is None:
    raise DataError(
      f'{where}: no "{key}"; a record needs {needs}, has {sorted(record)}'
    )
  value = string_field(record, key, where)
  if not value.strip():
    raise DataError(f'{where}: "{key}" is empty; give it text or drop the record')
  return value


def pair_example(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  """One record as the features that every task has.

  Args:
    record: {"query", "positive", "negatives"? (or "negative", one string),
      "title"?, "task"?, "label"?}; other keys are ignored.
    where: File and line, for messages.

  Returns:
    query, positive, title, task, label: str ("" where absent); negatives: list[str].

  Raises:
    DataError: a field is missing, empty or not of its type.
  """
  negatives = record.get("negatives")
  if negatives is None:
    single = record.get("negative")
    negatives = [] if single is None else [single]
  if not isinstance(negatives, list | tuple):
    raise DataError(
      f'{where}: "negatives" must be a list of strings, got {type(negatives).__name__}'
    )
  indexed = {f"negatives[{i}]": text for i, text in enumerate(negatives)}
  optional = {
    key: _text(record, key, where) if record.get(key) not in (None, "") else ""
    for key in ("title", "task", "label")
  }
  return {
    "query": _text(record, "query", where),
    "positive": _text(record, "positive", where),
    "negatives": [_text(indexed, key, where) for key in indexed],
    **optional,
  }


def text_example(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  """One record as the feature that every task of documents has.

  Args:
    record: {"text"}; other keys are ignored.
    where: File and line, for messages.

  Returns:
    text: str.

  Raises:
    DataError: the text is missing, empty or no string.
  """
  return {"text": _text(record, "text", where, needs='"text"')}


def _fingerprint(*parts: Any) -> str:
  encoded = json.dumps(parts, sort_keys=True, default=str).encode()
  return hashlib.blake2b(encoded, digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class _FileSource(abc.ABC):
  """Examples in files, one a line."""

  path: str | tuple[str, ...]
  limit: int | None = None

  splits = ("train",)
  content = "pairs"
  _format = "JSONL"

  @abc.abstractmethod
  def _example(self, path: str, number: int, line: bytes) -> dict[str, Any] | None:
    """The example on a line; None if there is none."""

  def files(self) -> list[str]:
    """Matching files, sorted.

    Raises:
      DataError: nothing matches.
    """
    patterns = (self.path,) if isinstance(self.path, str) else tuple(self.path)
    found = []
    for pattern in patterns:
      # A plain path may hold glob characters.
      matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
      if not matches:
        raise DataError(
          f"{pattern}: no such file; check the path of the {self._format} task"
        )
      found.extend(matches)
    return found

  def fingerprint(self) -> str:
    """Changes when a file is replaced or written to."""
    stats = [(os.path.abspath(f), os.stat(f)) for f in self.files()]
    return _fingerprint(
      self._format.lower(),
      self.limit,
      [(f, s.st_size, s.st_mtime_ns) for f, s in stats],
    )

  def examples(
    self, split: str, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples in file order.

    Raises:
      DataError: the first bad record, unless `on_bad_record` is "skip".
    """
    del split  # one split
    count = 0
    for path in self.files():
      for number, line in read_lines(path):
        if count == self.limit:
          return
        try:
          example = self._example(path, number, line)
        except DataError as error:
          if on_bad_record != "skip":
            raise DataError(
              f"{error} (or pass --on_bad_record=skip to leave bad records out)"
            ) from error
          skipped.add(error)
          continue
        if example is not None:
          count += 1
          yield example


@dataclasses.dataclass(frozen=True)
class JsonlSource(_FileSource):
  """Pairs in JSONL files: one path, a glob, or several; plain or .gz.

  Attributes:
    path: The training file or files.
    limit: Read only the first so many records; None is all of them.
  """

  def _example(self, path: str, number: int, line: bytes) -> dict[str, Any] | None:
    return pair_example(parse_json_line(path, number, line), f"{path}:{number}")


@dataclasses.dataclass(frozen=True)
class TextFileSource(_FileSource):
  """Documents in files: one path, a glob, or several; plain or .gz.

  A .jsonl file has an object with "text" a line; a .txt file a document a line, and
  its blank lines are none.

  Attributes:
    path: The training file or files.
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
      if not path.removesuffix(".gz").endswith((".jsonl", ".txt")):
        raise DataError(
          f"{path}: neither .jsonl ({_TEXT_LINE} a line) nor .txt (a document a line), "
          "perhaps with .gz; rename or convert it"
        )
    return found

  def _example(self, path: str, number: int, line: bytes) -> dict[str, Any] | None:
    where = f"{path}:{number}"
    if path.removesuffix(".gz").endswith(".jsonl"):
      return text_example(parse_json_line(path, number, line, _TEXT_LINE), where)
    text = decode_line(path, number, line)
    return {"text": text} if text.strip() else None


@dataclasses.dataclass(frozen=True)
class BuiltinSource:
  """A task of the corpus drawn from the installed Python standard library."""

  task: str

  splits = ("train", "validation")

  def __post_init__(self):
    names = sorted([*builtin_corpus.TASKS, *builtin_corpus.TEXT_TASKS])
    if self.task not in names:
      raise ConfigError(f"unknown built-in task {self.task!r}; there are {names}")

  @property
  def content(self) -> str:
    return "text" if self.task in builtin_corpus.TEXT_TASKS else "pairs"

  def fingerprint(self) -> str:
    return _fingerprint("builtin", self.task, builtin_corpus.fingerprint())

  def examples(
    self, split: str, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples of the split; the corpus holds no bad records."""
    del on_bad_record, skipped
    if self.content == "text":
      yield from builtin_corpus.documents(self.task, split)
      return
    for index, record in enumerate(builtin_corpus.examples(self.task, split)):
      yield pair_example(record, f"builtin:{self.task}[{index}]")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A TFDS dataset whose features are renamed to ours.

  Attributes:
    name: TFDS name with version, such as "natural_questions_open:1.0.0".
    fields: Our feature name to the dataset's, such as {"query": "question"}; {"text":
      "article"} for documents.
    data_dir: TFDS data directory; None is TFDS's default.
    split: The split to train on.
  """

  name: str
  fields: Mapping[str, str]
  data_dir: str | None = None
  split: str = "train"

  splits = ("train",)

  @property
  def content(self) -> str:
    return _content(self.fields)

  def fingerprint(self) -> str:
    return _fingerprint("tfds", self.name, dict(self.fields), self.data_dir, self.split)


@dataclasses.dataclass(frozen=True)
class TfrecordSource:
  """tf.Example records; features are byte strings, `negatives` may repeat.

  Attributes:
    pattern: File pattern, such as "/data/pairs-*.tfrecord".
    fields: Our feature name to the record's; {"text": "article"} for documents.
  """

  pattern: str
  fields: Mapping[str, str]

  splits = ("train",)

  @property
  def content(self) -> str:
    return _content(self.fields)

  def fingerprint(self) -> str:
    files = sorted(glob.glob(self.pattern))
    if not files:
      raise DataError(f"{self.pattern}: no such TFRecord file")
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    return _fingerprint("tfrecord", stats, dict(self.fields))


def _content(fields: Mapping[str, str]) -> str:
  return "text" if "text" in fields else "pairs"


PythonSource = JsonlSource | TextFileSource | BuiltinSource
Source = PythonSource | TfdsSource | TfrecordSource


def module_fingerprint(name: str) -> str:
  """Hash of a Python module's file, found without importing it.

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
  return _fingerprint("module", name, pathlib.Path(spec.origin).read_bytes().hex())
