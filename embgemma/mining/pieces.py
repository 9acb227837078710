"""Finished pieces of work: files and directories that a killed run finds again.

A piece has a name that says what it was made of and from (`fingerprints.digest`), and
gets it when it is whole. So what is there is right, and what other options made is left
alone.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator

import numpy as np

from embgemma.errors import DataError
from embgemma.outputs import new_path


def save_arrays(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """Writes named arrays as one piece."""
  with new_path(path) as made, open(made, "wb") as file:
    np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a piece.

  Raises:
    DataError: the file is damaged.
  """
  try:
    with open(path, "rb") as file, np.load(file) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise DataError(f"{path}: damaged ({error}); delete it and run again") from error


def map_array(path: pathlib.Path) -> np.ndarray:
  """One array of a piece that is a directory, memory-mapped.

  Raises:
    DataError: the file is missing or damaged.
  """
  try:
    # numpy maps no empty file.
    return np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)
  except (OSError, ValueError, EOFError) as error:
    raise DataError(
      f"{path}: damaged ({error}); delete {path.parent} and run again"
    ) from error


@contextlib.contextmanager
def new_piece(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory that becomes a piece when the block ends, and vanishes if it fails."""
  directory.parent.mkdir(parents=True, exist_ok=True)
  made = tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent)
  try:
    yield pathlib.Path(made)
    os.rename(made, directory)
  except BaseException:
    shutil.rmtree(made, ignore_errors=True)
    raise
