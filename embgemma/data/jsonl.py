"""JSON lines: records and their fields, and what is said of bad ones."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.data.files import read_lines
from embgemma.errors import DataError

_PAIR_LINE = '{"query": "…", "positive": "…"}'


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


def parse_json(path: str | os.PathLike[str], number: int, line: bytes) -> Any:
  """The value on one line.

  Raises:
    DataError: empty line, invalid UTF-8 or malformed JSON.
  """
  where = f"{path}:{number}"
  text = decode_line(path, number, line)
  if not text.strip():
    raise DataError(f"{where}: empty line; each line must hold one JSON object")
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:  # ValueError: thousands of digits
    raise DataError(f"{where}: malformed JSON: {error}") from error


def check_object(value: Any, where: str, like: str = _PAIR_LINE) -> dict:
  """The value, if it is a JSON object.

  Args:
    value: Of one line.
    where: File and line, for messages.
    like: An object as it should be, for messages.

  Raises:
    DataError: it is something else.
  """
  if not isinstance(value, dict):
    raise DataError(
      f"{where}: expected a JSON object, got {type(value).__name__}; one object "
      f"like {like} a line"
    )
  return value


def parse_json_line(path: str | os.PathLike[str], number: int, line: bytes) -> dict:
  """The object on one JSONL line.

  Raises:
    DataError: see `parse_json` and `check_object`.
  """
  return check_object(parse_json(path, number, line), f"{path}:{number}")


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict]]:
  """Line numbers and objects of a JSONL file; see `files` for what it may be.

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
