"""Where pairs come from: built-in corpus, JSONL files, TFDS, TFRecord.

Sources are frozen dataclasses: gin builds them, their fingerprint keys the cache.
Built-in and JSONL sources yield examples in pure Python; the TensorFlow ones are
opened by `embgemma.data.tasks`, which hands all of them to seqio.
"""

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


def parse_json_line(path: str | os.PathLike[str], number: int, line: bytes) -> dict:
  """The object on one JSONL line.

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
      'like {"query": "…", "positive": "…"} a line'
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


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
  if record.get(key) is None:
    raise DataError(
      f'{where}: no "{key}"; a record needs "query" and "positive", has '
      f"{sorted(record)}"
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


def _fingerprint(*parts: Any) -> str:
  encoded = json.dumps(parts, sort_keys=True, default=str).encode()
  return hashlib.blake2b(encoded, digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class JsonlSource:
  """Pairs in JSONL files: one path, a glob, or several; plain or .gz.

  Attributes:
    path: The training file or files.
    limit: Read only the first so many records; None is all of them.
  """

  path: str | tuple[str, ...]
  limit: int | None = None

  splits = ("train",)

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
        raise DataError(f"{pattern}: no such file; check the path of the JSONL task")
      found.extend(matches)
    return found

  def fingerprint(self) -> str:
    """Changes when a file is replaced or written to."""
    stats = [(os.path.abspath(f), os.stat(f)) for f in self.files()]
    return _fingerprint(
      "jsonl", self.limit, [(f, s.st_size, s.st_mtime_ns) for f, s in stats]
    )

  def examples(
    self, split: str, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples in file order; see `pair_example`.

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
          record = parse_json_line(path, number, line)
          example = pair_example(record, f"{path}:{number}")
        except DataError as error:
          if on_bad_record != "skip":
            raise DataError(
              f"{error} (or pass --on_bad_record=skip to leave bad records out)"
            ) from error
          skipped.add(error)
          continue
        count += 1
        yield example


@dataclasses.dataclass(frozen=True)
class BuiltinSource:
  """A task of the corpus drawn from the installed Python standard library."""

  task: str

  splits = ("train", "validation")

  def __post_init__(self):
    if self.task not in builtin_corpus.TASKS:
      raise ConfigError(
        f"unknown built-in task {self.task!r}; there are {sorted(builtin_corpus.TASKS)}"
      )

  def fingerprint(self) -> str:
    return _fingerprint("builtin", self.task, builtin_corpus.fingerprint())

  def examples(
    self, split: str, on_bad_record: str, skipped: SkipLog
  ) -> Iterator[dict[str, Any]]:
    """Examples of the split; the corpus holds no bad records."""
    del on_bad_record, skipped
    for index, record in enumerate(builtin_corpus.examples(self.task, split)):
      yield pair_example(record, f"builtin:{self.task}[{index}]")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A TFDS dataset whose features are renamed to ours.

  Attributes:
    name: TFDS name with version, such as "natural_questions_open:1.0.0".
    fields: Our feature name to the dataset's, such as {"query": "question"}.
    data_dir: TFDS data directory; None is TFDS's default.
    split: The split to train on.
  """

  name: str
  fields: Mapping[str, str]
  data_dir: str | None = None
  split: str = "train"

  splits = ("train",)

  def fingerprint(self) -> str:
    return _fingerprint("tfds", self.name, dict(self.fields), self.data_dir, self.split)


@dataclasses.dataclass(frozen=True)
class TfrecordSource:
  """tf.Example records; features are byte strings, `negatives` may repeat.

  Attributes:
    pattern: File pattern, such as "/data/pairs-*.tfrecord".
    fields: Our feature name to the record's.
  """

  pattern: str
  fields: Mapping[str, str]

  splits = ("train",)

  def fingerprint(self) -> str:
    files = sorted(glob.glob(self.pattern))
    if not files:
      raise DataError(f"{self.pattern}: no such TFRecord file")
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    return _fingerprint("tfrecord", stats, dict(self.fields))


Source = JsonlSource | BuiltinSource | TfdsSource | TfrecordSource


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
