"""The vectors that a teacher gave to the texts of a cached task.

TASK_DIRECTORY/teacher-NAME/
  rows.npy     int64 [examples, T]: of each text of each record in the store; -1 none
  index.json   the store, its segments in the order of rows, width, dtype, whose
"""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from embgemma.data.vector_store import VectorStore
from embgemma.errors import DataError
from embgemma.typing import Bool, Int

_FORMAT = 1


def directory(task_directory: os.PathLike[str], name: str) -> pathlib.Path:
  """Where it is said which vectors NAME the texts of a cached task have."""
  return pathlib.Path(task_directory) / f"teacher-{name}"


class TeacherVectors:
  """Vectors of a cached task's texts, by record; can be pickled.

  Args:
    task_directory: Of the cached task.
    name: NAME, as given to `embgemma teach`.

  Attributes:
    width: W.
    dtype: "float16" or "float32".
    fingerprint: Of the teacher.
    taught: Whether the task was among those to teach; if not, no text has a vector.
    segments: Of the store, that rows count through.

  Raises:
    DataError: they are not there, or damaged.
  """

  def __init__(self, task_directory: os.PathLike[str], name: str):
    self._directory = directory(task_directory, name)
    self._name = name
    index = self._read_index()
    try:
      if index["format"] != _FORMAT:
        raise ValueError(f"format {index['format']}")
      self.width = int(index["width"])
      self.dtype: str = index["dtype"]
      self.fingerprint: str = index["fingerprint"]
      self.taught = bool(index["taught"])
      self.segments: tuple[str, ...] = tuple(index["segments"])
      self._shape = tuple(index["shape"])
      self._store_path = (self._directory / index["store"]).resolve()
    except (KeyError, TypeError, ValueError) as error:
      raise self._damaged(f"index.json: {error!r}") from error
    self._open()

  def _read_index(self) -> dict[str, Any]:
    path = self._directory / "index.json"
    if not path.is_file():
      raise DataError(
        f"{self._directory.parent}: no vectors of a teacher {self._name!r}; make them: "
        f"embgemma teach --gin_file=… --gin.TEACHER='\"{self._name}\"' --teacher=…"
      )
    try:
      return json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise self._damaged(f"index.json: {error}") from error

  def _open(self) -> None:
    try:
      self._rows = np.load(self._directory / "rows.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
      raise self._damaged(f"rows.npy: {error}") from error
    if self._rows.shape != self._shape or self._rows.dtype != np.int64:
      raise self._damaged(f"rows.npy is {self._rows.dtype}{list(self._rows.shape)}")
    self._store: VectorStore | None = None

  def __getstate__(self) -> dict[str, Any]:
    # A worker process maps the files for itself; a pickle would hold them all.
    return {k: v for k, v in self.__dict__.items() if k not in ("_rows", "_store")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  @property
  def texts(self) -> int:
    """T, texts of a record."""
    return self._shape[1]

  def __len__(self) -> int:
    return self._shape[0]

  def gather(
    self, records: Int[np.ndarray, " n"]
  ) -> tuple[np.ndarray, Bool[np.ndarray, "n T"]]:
    """The vectors of records, and which texts have one.

    Args:
      records: Of the cached task.

    Returns:
      Vectors [n, T, W] in the store's dtype, unit norm, zeros where there is none; and
      where there is one.

    Raises:
      DataError: the store is damaged.
    """
    rows = np.asarray(self._rows[records])
    present = rows >= 0
    vectors = np.zeros((*rows.shape, self.width), self.dtype)
    if present.any():
      vectors[present] = self._opened().gather(rows[present])
    return vectors, present

  def _opened(self) -> VectorStore:
    if self._store is None:
      try:
        store = VectorStore(self._store_path, self.segments)
      except DataError as error:
        raise self._damaged(str(error)) from error
      if (store.width, store.fingerprint) != (self.width, self.fingerprint):
        raise self._damaged(f"{self._store_path} is of another teacher")
      self._store = store
    return self._store

  def _damaged(self, reason: str) -> DataError:
    return DataError(
      f"{self._directory}: cannot be used ({reason}); delete it and run the same "
      "`embgemma teach` again, which keeps the vectors it has"
    )


def write(
  task_directory: os.PathLike[str],
  name: str,
  store: VectorStore,
  shape: tuple[int, int],
  blocks: Iterable[Int[np.ndarray, "_ _"]] | None,
  part: int = 0,
) -> None:
  """Writes which vectors a cached task's texts have.

  A task that was not to be taught is marked so only where nothing is: another process
  may have taught it meanwhile.

  Args:
    task_directory: Of the cached task.
    name: NAME.
    store: On the task's file system.
    shape: Examples and texts, T.
    blocks: Rows of the store, int64 [n, T], of one block of examples after another; -1
      is none. None is a task that was not to be taught.
    part: Of the work, held by `store.writing`.

  Raises:
    DataError: the disk is full.
  """
  path = directory(task_directory, name)
  index = {
    "format": _FORMAT,
    "store": os.path.relpath(store.directory.resolve(), path.resolve()),
    "segments": list(store.segments) if blocks is not None else [],
    "width": store.width,
    "dtype": store.dtype,
    "fingerprint": store.fingerprint,
    "shape": list(shape),
    "taught": blocks is not None,
  }
  try:
    with store.scratch(part) as work:
      made = work / "made"
      made.mkdir(0o755)
      if blocks is None:
        blocks = [np.full((1, shape[1]), -1, np.int64)] * shape[0]
      _save_rows(made / "rows.npy", shape, blocks)
      (made / "index.json").write_text(json.dumps(index, indent=1))
      _put(made, path, work if index["taught"] else None)
  except OSError as error:
    raise DataError(
      f"{path}: cannot be written: {error.strerror or error}; the vectors are kept"
    ) from error


def _put(made: pathlib.Path, path: pathlib.Path, aside: pathlib.Path | None) -> None:
  """Renames a directory to where others may put theirs at the same time.

  Args:
    made: That is renamed.
    path: Its new name.
    aside: Where what is there goes; None leaves it there, and `made` where it is.
  """
  for turn in itertools.count():
    if aside is not None:
      with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside / f"replaced-{turn}")
    try:
      os.rename(made, path)
      return
    except OSError:
      if not path.is_dir():
        raise
      if aside is None:
        return


def _save_rows(
  path: pathlib.Path, shape: tuple[int, int], blocks: Iterable[Int[np.ndarray, "_ _"]]
) -> None:
  """`np.save` of an array that comes in blocks."""
  header = {"descr": "<i8", "fortran_order": False, "shape": shape}
  with open(path, "wb") as file:
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
      file.write(block.astype("<i8").data)
