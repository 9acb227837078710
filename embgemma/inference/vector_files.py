"""Vectors to .npy or .parquet, as they come, in any of `vector_formats`."""

import os
import pathlib
from collections.abc import Iterable
from typing import IO

import numpy as np

from embgemma.errors import ConfigError
from embgemma.typing import Float
from embgemma.vector_formats import VectorFormat

SUFFIXES = (".npy", ".parquet")


def check_name(path: pathlib.Path) -> None:
  """Refuses a file name whose format is unknown.

  Raises:
    ConfigError: the suffix is neither .npy nor .parquet.
  """
  if path.suffix not in SUFFIXES:
    raise ConfigError(f"--output={path}: the name must end in {' or '.join(SUFFIXES)}")


def write(
  file: IO[bytes],
  path: pathlib.Path,
  chunks: Iterable[Float[np.ndarray, "N E"]],
  width: int,
  kept: VectorFormat = VectorFormat("float32"),
) -> int:
  """Writes rows in order and returns their number; memory is one chunk's.

  Args:
    file: Open for writing and seekable.
    path: Its final name, which tells the format of the file.
    chunks: float32 [N, width].
    width: E.
    kept: The format of the vectors.
  """
  writer = _write_npy if path.suffix == ".npy" else _write_parquet
  return writer(file, map(kept.codes, chunks), kept.columns(width), kept.dtype)


def _npy_header(rows: int, columns: int, dtype: str) -> dict:
  return {"descr": dtype, "fortran_order": False, "shape": (rows, columns)}


def _write_npy(
  file: IO[bytes], chunks: Iterable[np.ndarray], columns: int, dtype: str
) -> int:
  # NumPy leaves room in the header for the first axis to grow.
  np.lib.format.write_array_header_1_0(file, _npy_header(0, columns, dtype))
  start, rows = file.tell(), 0
  for chunk in chunks:
    file.write(np.ascontiguousarray(chunk, dtype).tobytes())
    rows += len(chunk)
  file.seek(0)
  np.lib.format.write_array_header_1_0(file, _npy_header(rows, columns, dtype))
  if file.tell() != start:
    raise RuntimeError(f".npy header of {rows} rows does not fit its place")
  file.seek(0, os.SEEK_END)
  return rows


def _write_parquet(
  file: IO[bytes], chunks: Iterable[np.ndarray], columns: int, dtype: str
) -> int:
  import pyarrow as pa
  import pyarrow.parquet as pq

  kind = pa.from_numpy_dtype(np.dtype(dtype))
  schema = pa.schema([("embedding", pa.list_(kind, columns))])
  rows = 0
  with pq.ParquetWriter(file, schema) as writer:
    for chunk in chunks:
      flat = pa.array(np.ascontiguousarray(chunk, dtype).reshape(-1))
      column = pa.FixedSizeListArray.from_arrays(flat, columns)
      writer.write_table(pa.table([column], schema=schema))
      rows += len(chunk)
  return rows
