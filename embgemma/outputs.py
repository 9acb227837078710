"""Files and directories that a command leaves whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from embgemma.errors import DataError

# What a directory must hold for --overwrite to delete it.
_MODEL_FILES = ("model.json", "config.json", "modules.json")


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """A file that becomes `path` when the block ends, and vanishes if it fails.

  Raises:
    DataError: it cannot be written.
  """
  with new_path(path) as made, open(made, "wb") as file:
    yield file


@contextlib.contextmanager
def new_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """`new_file` for what opens files itself: the path of an empty one."""
  with _write_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    made = pathlib.Path(name)
    try:
      yield made
      os.chmod(made, 0o644)
      os.replace(made, path)
    except BaseException:
      made.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def new_directory(path: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
  """A directory that becomes `path` when the block ends, and vanishes if it fails.

  Args:
    path: May exist if it is empty, or with `overwrite`: it is replaced at the end.
    overwrite: Whether to replace what is there.

  Raises:
    DataError: `path` exists, or cannot be written.
  """
  check_vacant(path, overwrite)
  with _write_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
      os.chmod(made, 0o755)
      yield made
      _replace(made, path)
    except BaseException:
      shutil.rmtree(made, ignore_errors=True)
      raise


def check_vacant(path: pathlib.Path, overwrite: bool) -> None:
  """Refuses an output path that holds something.

  Raises:
    DataError: it exists, and `overwrite` is not given or it is no model's directory.
  """
  if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
    return
  if overwrite:
    if path.is_dir() and not any((path / name).exists() for name in _MODEL_FILES):
      raise DataError(
        f"{path}: holds no model (no {', '.join(_MODEL_FILES)}), so --overwrite does "
        "not delete it; choose another --output"
      )
    return
  raise DataError(
    f"{path}: exists already; choose another --output, or replace it with --overwrite"
  )


def _replace(made: pathlib.Path, path: pathlib.Path) -> None:
  """Puts a directory in another's place; what was there goes last."""
  if not path.is_dir() or path.is_symlink():
    path.unlink(missing_ok=True)
    os.rename(made, path)
    return
  aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  os.rename(path, aside)  # onto an empty directory
  try:
    os.rename(made, path)
  except OSError:
    os.rename(aside, path)
    raise
  shutil.rmtree(aside)


@contextlib.contextmanager
def _write_errors(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DataError(
      f"{path}: cannot be written: {error.strerror or error}; nothing was changed"
    ) from error
