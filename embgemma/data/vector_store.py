"""Vectors by content hash: a directory that grows by whole segments.

    DIRECTORY/
      meta.json               width, dtype, fingerprint of what made them, format
      segment-PPPP-NNNNNN/    hashes.npy: uint64 [n], ascending
                              vectors.npy: float16 or float32 [n, W]

A segment is written under another name and renamed, so that it is whole or not there,
and is never changed. PPPP is the writer's part of the work; several may write at once.
A hash that two writers added is there twice, and either vector serves.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from embgemma.data import scratch
from embgemma.errors import DataError
from embgemma.outputs import locked, new_file
from embgemma.typing import Bool, Float, Int, UInt64

STORE_FORMAT = 1
DTYPES = ("float16", "float32")
_SEGMENT = re.compile(r"segment-\d{4,}-\d{6,}")
_OPEN_SEGMENTS = 4096  # mapped at a time: a process may have some 65,000 maps
_MERGED_IN_MEMORY = 1 << 20  # hashes; runs of more lie in files
_BLOCK = 1 << 18  # hashes merged at a time


class VectorStore:
  """Vectors of one teacher, found by the hash of what they are vectors of.

  A row number counts through the segments in the order of `segments`. It holds for
  this object, and for another that is given the same segments.

  Args:
    directory: Of a store that is there.
    segments: Names of those to read, in order; None is all there are.

  Attributes:
    directory: As given.
    width: W, of its vectors.
    dtype: "float16" or "float32".
    fingerprint: Of what made the vectors.

  Raises:
    DataError: there is no store, or it or a segment is damaged.
  """

  def __init__(self, directory: pathlib.Path, segments: Sequence[str] | None = None):
    self.directory = pathlib.Path(directory)
    path = self.directory / "meta.json"
    try:
      meta = json.loads(path.read_text())
      if meta["format"] != STORE_FORMAT or meta["dtype"] not in DTYPES:
        raise ValueError(f"format {meta['format']}, dtype {meta['dtype']}")
      self.width = int(meta["width"])
      self.dtype: str = meta["dtype"]
      self.fingerprint: str = meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise DataError(
        f"{path}: no store of vectors ({error}); delete {self.directory} and make it "
        "again"
      ) from error
    self._names: list[str] = []
    self._starts = np.zeros(1, np.int64)  # first row of each segment, and of the next
    self._index: _Index | None = None
    self._vectors = functools.lru_cache(_OPEN_SEGMENTS)(self._open_vectors)
    self._append(self._on_disk() if segments is None else segments)

  @classmethod
  def create_or_open(
    cls, directory: pathlib.Path, width: int, dtype: str, fingerprint: str
  ) -> "VectorStore":
    """The store in a directory, made if there is none.

    Args:
      directory: Of the store.
      width: W.
      dtype: "float16" or "float32".
      fingerprint: Of what makes the vectors.

    Raises:
      DataError: it holds vectors of something else, or is damaged.
    """
    expected = {
      "format": STORE_FORMAT,
      "width": width,
      "dtype": dtype,
      "fingerprint": fingerprint,
    }
    path = pathlib.Path(directory) / "meta.json"
    if not path.exists():
      with new_file(path) as file:
        file.write(json.dumps(expected, indent=1).encode())
    store = cls(directory)
    for name in ("width", "dtype", "fingerprint"):
      own = getattr(store, name)
      if own != expected[name]:
        raise DataError(
          f"{directory}: holds vectors of another teacher ({name} {own!r}, this one "
          f"has {expected[name]!r}); give this one another name, or delete the "
          "directory"
        )
    return store

  @property
  def segments(self) -> tuple[str, ...]:
    """Names of the segments, in the order of rows."""
    return tuple(self._names)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def refresh(self) -> None:
    """Takes in what others have added since.

    Raises:
      DataError: a segment is damaged.
    """
    known = set(self._names)
    self._append([name for name in self._on_disk() if name not in known])

  def missing(self, hashes: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which hashes have no vector."""
    return self.locate(hashes) < 0

  def locate(self, hashes: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The rows of hashes, int64; -1 where there is none."""
    if self._index is None:
      self._index = _Index(self.directory)
      for number in range(len(self._names)):
        self._index.add(self._hashes(number), int(self._starts[number]))
    return self._index.locate(hashes)

  def gather(self, rows: Int[np.ndarray, " n"]) -> np.ndarray:
    """The vectors [n, W] of rows, in the store's dtype.

    Args:
      rows: From `locate`, none of them -1.
    """
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(
        f"rows are in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}"
      )
    out = np.empty((len(rows), self.width), self.dtype)
    order = np.argsort(rows, kind="stable")
    numbers = np.searchsorted(self._starts, rows[order], side="right") - 1
    touched, first = np.unique(numbers, return_index=True)
    for number, own in zip(touched.tolist(), np.split(order, first[1:]), strict=False):
      out[own] = self._vectors(number)[rows[own] - self._starts[number]]
    return out

  def add(
    self,
    hashes: UInt64[np.ndarray, " n"],
    vectors: Float[np.ndarray, "n _"],
    part: int = 0,
  ) -> None:
    """Keeps vectors as one new segment, on disk when this returns.

    Args:
      hashes: Of what they are vectors of; of equal ones the first counts.
      vectors: [n, W].
      part: Of the work, which the segment's name begins with.

    Raises:
      DataError: a vector has another width, is zero or is not finite, or the disk is
        full; nothing is kept.
    """
    check_vectors(vectors, self.width)
    hashes, first = np.unique(hashes, return_index=True)
    if not len(hashes):
      return
    try:
      name = self._write(hashes, vectors[first].astype(self.dtype), part)
    except OSError as error:
      raise DataError(
        f"{self.directory}: cannot be written: {error.strerror or error}; what it had "
        "is kept"
      ) from error
    self._append([name])

  @contextlib.contextmanager
  def writing(self, part: int) -> Iterator[None]:
    """Holds a part of the work for this process; removes what a killed one left of it.

    On a file system without locks another process may hold it, too; see `scratch`.

    Raises:
      DataError: another process holds it.
    """

    def busy() -> None:
      raise DataError(
        f"{self.directory}: another process writes part {part} of it; wait for that "
        "one, or share the work: --shard_index and --shard_count"
      )

    with locked(self.directory / f".part-{part:04d}.lock", busy):
      scratch.clear(self.directory, part)
      yield

  def scratch(self, part: int) -> contextlib.AbstractContextManager[pathlib.Path]:
    """A directory on the store's file system that vanishes when the block ends."""
    return scratch.scratch(self.directory, part)

  def _write(self, hashes: np.ndarray, vectors: np.ndarray, part: int) -> str:
    own = [name for name in self._names if name.startswith(f"segment-{part:04d}-")]
    number = 1 + max((int(name.rsplit("-", 1)[1]) for name in own), default=-1)
    with self.scratch(part) as unfinished:
      work = unfinished / "segment"
      work.mkdir(0o755)
      for array, name in ((hashes, "hashes.npy"), (vectors, "vectors.npy")):
        with open(work / name, "wb") as file:
          np.save(file, array)
          file.flush()
          os.fsync(file.fileno())
      while True:
        name = f"segment-{part:04d}-{number:06d}"
        try:
          os.rename(work, self.directory / name)
          return name
        except OSError:
          # Another process took the number; segments are never empty directories.
          if not (self.directory / name).is_dir():
            raise
        number += 1

  def _on_disk(self) -> list[str]:
    entries = (entry.name for entry in os.scandir(self.directory))
    return sorted(name for name in entries if _SEGMENT.fullmatch(name))

  def _append(self, names: Sequence[str]) -> None:
    starts = [len(self)]
    for name in names:
      self._names.append(name)
      hashes = self._hashes(len(self._names) - 1)
      if self._index is not None:
        self._index.add(hashes, starts[-1])
      starts.append(starts[-1] + len(hashes))
    self._starts = np.append(self._starts, starts[1:]).astype(np.int64)

  def _hashes(self, number: int) -> np.ndarray:
    return self._load(number, "hashes.npy", np.dtype(np.uint64), 1)

  def _open_vectors(self, number: int) -> np.ndarray:
    vectors = self._load(number, "vectors.npy", np.dtype(self.dtype), 2)
    rows = self._starts[number + 1] - self._starts[number]
    if vectors.shape != (rows, self.width):
      raise self._damaged(number, f"vectors are {vectors.shape}, hashes {rows}")
    return vectors

  def _load(self, number: int, file: str, dtype: np.dtype, rank: int) -> np.ndarray:
    path = self.directory / self._names[number] / file
    try:
      array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
      raise self._damaged(number, str(error)) from error
    if array.dtype != dtype or array.ndim != rank:
      raise self._damaged(number, f"{file} is {array.dtype} of rank {array.ndim}")
    return array

  def _damaged(self, number: int, reason: str) -> DataError:
    return DataError(
      f"{self.directory / self._names[number]}: damaged ({reason}); delete it, and the "
      "command that made it makes it again"
    )


def check_vectors(
  vectors: Float[np.ndarray, "n _"],
  width: int,
  describe: Callable[[int], str] = "vector {}".format,
) -> None:
  """Returns nothing if vectors can be kept.

  Args:
    vectors: [n, W].
    width: W.
    describe: The name of a vector in a message.

  Raises:
    DataError: they have another width, or one is zero or not finite.
  """
  if vectors.shape[1] != width:
    raise DataError(f"{describe(0)} has width {vectors.shape[1]}, expected {width}")
  bad = np.flatnonzero(~have_directions(vectors))
  if len(bad):
    zero = not vectors[bad[0]].any()
    what = "is zero" if zero else "holds NaN or an infinity"
    raise DataError(f"{describe(int(bad[0]))} {what}")


def have_directions(vectors: Float[np.ndarray, "n _"]) -> Bool[np.ndarray, " n"]:
  """Which vectors are finite and not zero."""
  # Of float64: squares of float16 overflow, and sums of float32 may.
  norms = np.einsum("nw,nw->n", vectors, vectors, dtype=np.float64)
  return np.isfinite(norms) & (norms > 0)


_Run = tuple[np.ndarray, np.ndarray]  # ascending hashes, and their rows


class _Index:
  """Rows by hash: sorted runs, of which each is at most half as long as the one before.

  As in a log-structured merge tree; so there are few runs, however many segments. Long
  runs lie in files without a name: the memory they take can be had back.

  Args:
    directory: For the files.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._runs: list[_Run] = []

  def add(self, hashes: np.ndarray, first_row: int) -> None:
    """Takes in ascending hashes of consecutive rows."""
    run = (hashes, np.arange(first_row, first_row + len(hashes)))
    while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
      run = self._merge(self._runs.pop(), run)
    self._runs.append(run)

  def locate(self, hashes: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Rows; -1 where there is none."""
    rows = np.full(len(hashes), -1)
    for keys, places in self._runs:
      at = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
      found = keys[at] == hashes
      rows[found] = places[at[found]]
    return rows

  def _merge(self, one: _Run, other: _Run) -> _Run:
    blocks = _merged_blocks(one, other)
    if len(one[0]) + len(other[0]) < _MERGED_IN_MEMORY:
      keys, rows = zip(*blocks, strict=True)
      return np.concatenate(keys), np.concatenate(rows)
    # Written, not mapped for writing: a full disk is an error and no fault.
    with contextlib.ExitStack() as stack:
      files = [
        stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
        for _ in range(2)
      ]
      for block in blocks:
        for file, array in zip(files, block, strict=True):
          file.write(array.data)
      for file in files:
        file.flush()
      return np.memmap(files[0], np.uint64, "r"), np.memmap(files[1], np.int64, "r")


def _merged_blocks(one: _Run, other: _Run) -> Iterator[_Run]:
  """Two runs as one, a block after another."""
  read = [0, 0]
  while True:
    parts = [
      (keys[at : at + _BLOCK], rows[at : at + _BLOCK])
      for (keys, rows), at in zip((one, other), read, strict=True)
    ]
    last = [keys[-1] for keys, _ in parts if len(keys)]
    if not last:
      return
    # All up to the last hash of the block that ends first.
    counts = [int(np.searchsorted(keys, min(last), side="right")) for keys, _ in parts]
    keys, rows = (
      np.concatenate(
        [part[i][:count] for part, count in zip(parts, counts, strict=True)]
      )
      for i in range(2)
    )
    order = np.argsort(keys, kind="stable")
    yield keys[order], rows[order]
    read = [at + count for at, count in zip(read, counts, strict=True)]
