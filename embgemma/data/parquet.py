"""Rows of Parquet files, a few at a time."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.data import files
from embgemma.errors import DataError

# Few: a row may hold megabytes.
_ROWS = 128
_BUFFER = 1 << 20


def _steps(schema: Any, column: str, path: str) -> tuple[str, ...]:
  """The names that lead to a column, from the outermost structure in.

  Raises:
    DataError: there is no such column.
  """
  import pyarrow as pa

  if column in schema.names:
    return (column,)
  steps = column.split(".")
  fields = {field.name: field.type for field in schema}
  for i, step in enumerate(steps):
    if step not in fields:
      inside = f" in {'.'.join(steps[:i])!r}" if i else ""
      raise DataError(
        f"{path}: no column {step!r}{inside}; there are {sorted(fields)}; check the "
        "task's fields"
      )
    own = fields[step]
    nested = own if pa.types.is_struct(own) else ()
    fields = {field.name: field.type for field in nested}
  return tuple(steps)


def _value(row: Any, steps: tuple[str, ...]) -> Any:
  for step in steps:
    row = None if row is None else row[step]
  return row


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
  """The rows of a batch; in place of one that is not UTF-8, the error."""
  try:
    yield from batch.to_pylist()
  except UnicodeDecodeError:
    # Parquet does not check strings; which row it is, is known only one by one.
    for i in range(batch.num_rows):
      try:
        row = batch.slice(i, 1).to_pylist()[0]
      except UnicodeDecodeError as error:
        row = error
      yield row


def read_rows(
  path: str, fields: Mapping[str, str] | None
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
  """Row numbers (from 1) and rows of a Parquet file, local or remote.

  Memory holds `_ROWS` rows and the pages that they lie in.

  Args:
    path: Of the file.
    fields: Name in the rows to the column, with dots into structures; only these
      columns are read. None reads all under their names.

  Yields:
    In place of a row whose text is not UTF-8, a DataError that says so.

  Raises:
    DataError: the file is missing, damaged or lacks a column.
    ConfigError: see `files.opened`.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  number = 0
  try:
    with files.opened(path) as stream:
      table = pq.ParquetFile(stream, buffer_size=_BUFFER)
      names = fields or {name: name for name in table.schema_arrow.names}
      steps = {
        ours: _steps(table.schema_arrow, theirs, path) for ours, theirs in names.items()
      }
      columns = sorted({".".join(own) for own in steps.values()})
      batches = table.iter_batches(_ROWS, columns=columns)
      rows = itertools.chain.from_iterable(_rows(batch) for batch in batches)
      for number, row in enumerate(rows, 1):
        if isinstance(row, UnicodeDecodeError):
          yield number, DataError(f"{path}:{number}: a text is invalid UTF-8")
        else:
          yield number, {ours: _value(row, own) for ours, own in steps.items()}
  except pa.ArrowException as error:
    said = " ".join(str(error).split())
    raise DataError(f"{path}: cannot be read as Parquet: {said}") from error
  except Exception as error:
    raised = files.read_error(path, error, number + 1)
    if raised is error:
      raise
    raise raised from error
