"""Files and directories that a command leaves whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

from embgemma.errors import DataError


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
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory that becomes `path` when the block ends, and vanishes if it fails.

  Args:
    path: See `check_directory`; what is there is replaced at the end.

  Raises:
    DataError: `path` cannot be written.
  """
  target = path.resolve()  # what a symbolic link names, not the link
  with _write_errors(path):
    target.parent.mkdir(parents=True, exist_ok=True)
    # An empty directory may be a mounted volume or where the shell is: kept, filled.
    empty = target.is_dir() and not any(target.iterdir())
    parent = target if empty else target.parent
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    try:
      os.chmod(made, 0o755)
      yield made
      _replace(made, target)
    except BaseException:
      shutil.rmtree(made, ignore_errors=True)
      raise


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: Callable[[], None]) -> Iterator[int]:
  """Holds a lock file against other processes, until this one ends, however it does.

  Children that are given the file's descriptor, which it yields, hold it as well.

  A file system without locks counts as free: what is guarded must bear two processes
  that do the same work.

  Args:
    path: Of the lock; it stays.
    busy: Called where another process holds it; raises, or returns to wait for that.
  """
  with open(path, "ab") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      busy()
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      pass
    yield file.fileno()


def check_file(path: pathlib.Path, overwrite: bool) -> None:
  """Refuses the path of a new file where something is.

  Raises:
    DataError: it exists and `overwrite` is not given, or it is a directory.
  """
  if path.is_dir():
    raise DataError(f"{path}: is a directory; give the path of a file")
  if os.path.lexists(path) and not overwrite:
    raise _exists(path)


def check_directory(
  path: pathlib.Path, overwrite: bool, source: str | os.PathLike[str]
) -> None:
  """Refuses the path of a new directory where something is.

  Args:
    path: Free, an empty directory or, with `overwrite`, one that holds a model.
    overwrite: Whether a model there may be replaced.
    source: What is read, which must survive.

  Raises:
    DataError: something else is there.
  """
  if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
    return
  target, read = path.resolve(), pathlib.Path(source).resolve()
  if target == read or target in read.parents:
    raise DataError(f"{path}: holds what is read, {source}; choose another --output")
  if not path.is_dir():
    raise DataError(f"{path}: is a file; choose another --output")
  if not overwrite:
    raise _exists(path)
  if not _holds_model(target) or target.is_mount():
    raise DataError(
      f"{path}: holds something else than a model of embgemma or Hugging Face, so "
      "--overwrite does not delete it; choose another --output"
    )


def _exists(path: pathlib.Path) -> DataError:
  return DataError(
    f"{path}: exists already; choose another --output, or replace it with --overwrite"
  )


def _holds_model(path: pathlib.Path) -> bool:
  if (path / "model.json").exists():
    return (path / "checkpoints").is_dir()
  weights = [
    file
    for pattern in ("*.safetensors", "onnx/*.onnx", "*.tflite")
    for file in path.glob(pattern)
  ]
  return (path / "config.json").exists() and bool(weights)


def _replace(made: pathlib.Path, path: pathlib.Path) -> None:
  """Puts a directory in a place, or its content; what was there goes last."""
  if made.parent == path:
    for child in list(made.iterdir()):
      os.rename(child, path / child.name)
    made.rmdir()
    return
  if not path.exists():
    os.rename(made, path)
    return
  aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  try:
    os.rename(path, aside)
  except OSError:
    aside.rmdir()
    raise
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
