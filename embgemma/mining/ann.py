"""An approximate index of vectors: faiss' inverted lists of scalar codes, on disk."""

import contextlib
import ctypes
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from embgemma.errors import ConfigError
from embgemma.mining import pieces
from embgemma.mining.searchers import Log
from embgemma.outputs import new_path
from embgemma.teaching.teachers import missing_extra

_TRAINED = 40  # vectors a list: faiss warns below 39
_BATCH = 16_384  # vectors that are added at a time


@dataclasses.dataclass(frozen=True)
class AnnOptions:
  """An index of inverted lists (IVF) with codes of 8 bits a component.

  Attributes:
    lists: Inverted lists; None is 2 sqrt(passages).
    nprobe: Lists searched for a query.
    part: Passages of which one part of the index is made; what building holds: as many
      bytes as they have components.

  Raises:
    ConfigError: one is not positive.
  """

  lists: int | None = None
  nprobe: int = 64
  part: int = 1_000_000

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and value < 1:
        raise ConfigError(f"ANN {name} must be at least 1, got {value}")


@runtime_checkable
class PassageVectors(Protocol):
  """Vectors by number of passage."""

  def passages(self, which: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n W"]: ...

  def passage_range(self, start: int, stop: int) -> Float[np.ndarray, "n W"]: ...


def faiss() -> Any:
  """The module.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import faiss
  except ImportError as error:
    raise missing_extra("an approximate index", "ann") from error
  return faiss


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Drops what C++ prints meanwhile: faiss says on stdout what it does with files."""
  flush = ctypes.CDLL(None).fflush
  sys.stdout.flush()
  flush(None)
  stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 1)
  try:
    yield
  finally:
    flush(None)  # what C++ holds back
    os.dup2(stdout, 1)
    os.close(stdout)
    os.close(null)


class AnnIndex:
  """A finished index; its lists stay on disk.

  Args:
    directory: That `open_index` made.
    nprobe: Lists searched for a query.
  """

  def __init__(self, directory: pathlib.Path, nprobe: int):
    module = faiss()
    with _silent():
      self._index = module.read_index(
        str(directory / "index.faiss"),
        module.IO_FLAG_ONDISK_SAME_DIR | module.IO_FLAG_READ_ONLY,
      )
    self._index.nprobe = nprobe

  def search(
    self, queries: Float[np.ndarray, "Q W"], depth: int
  ) -> Int[np.ndarray, "Q K"]:
    """Passages by their codes, about the best `depth`; -1 where there are fewer."""
    return self._index.search(np.ascontiguousarray(queries), depth)[1]


def open_index(
  work: pathlib.Path,
  passages: int,
  width: int,
  vectors: PassageVectors,
  options: AnnOptions,
  log: Log,
) -> AnnIndex:
  """The index of a collection's passages, made unless it is there.

  Trained on a sample (40 vectors a list), then made in parts, each a piece, which are
  merged on disk. Building holds the sample, or one part.

  Args:
    work: For pieces of this collection and searcher.
    passages: Number of them.
    width: Of vectors.
    vectors: Of the passages, unit norm.
    options: Of the index.
    log: Takes lines of progress.

  Raises:
    ConfigError: faiss is not installed.
  """
  whole = work / "ann"
  if not whole.is_dir():
    trained = work / "trained.faiss"
    if not trained.is_file():
      _train(trained, passages, width, vectors, options, log)
    parts = [
      _part(work, trained, start, min(start + options.part, passages), vectors, log)
      for start in range(0, passages, options.part)
    ]
    _merge(whole, trained, parts)
    for part in parts:
      part.unlink()
  return AnnIndex(whole, options.nprobe)


def _write(index: Any, path: pathlib.Path) -> None:
  with new_path(path) as made:
    faiss().write_index(index, str(made))


def _train(
  path: pathlib.Path,
  passages: int,
  width: int,
  vectors: PassageVectors,
  options: AnnOptions,
  log: Log,
) -> None:
  module = faiss()
  lists = options.lists or max(1, round(2 * math.sqrt(passages)))
  lists = min(lists, passages)
  count = min(passages, _TRAINED * lists)
  log(f"training an index of {lists:,} lists on {count:,} passages")
  generator = np.random.Generator(np.random.Philox(key=passages))
  sample = np.sort(generator.choice(passages, count, replace=False))
  quantizer = module.IndexFlatIP(width)
  index = module.IndexIVFScalarQuantizer(
    quantizer,
    width,
    lists,
    module.ScalarQuantizer.QT_8bit,
    module.METRIC_INNER_PRODUCT,
  )
  # Vectors have unit norm, and so should centroids: cosines, not lengths, choose lists.
  index.cp.spherical = True
  index.cp.min_points_per_centroid = 1
  index.train(vectors.passages(sample))
  _write(index, path)


def _part(
  work: pathlib.Path,
  trained: pathlib.Path,
  start: int,
  stop: int,
  vectors: PassageVectors,
  log: Log,
) -> pathlib.Path:
  path = work / f"part-{start:012d}.faiss"
  if path.is_file():
    return path
  index = faiss().read_index(str(trained))
  for begin in range(start, stop, _BATCH):
    end = min(begin + _BATCH, stop)
    index.add_with_ids(
      vectors.passage_range(begin, end), np.arange(begin, end, dtype=np.int64)
    )
  _write(index, path)
  log(f"indexed {stop:,} passages")
  return path


def _merge(
  directory: pathlib.Path, trained: pathlib.Path, parts: list[pathlib.Path]
) -> None:
  from faiss.contrib import ondisk

  module = faiss()
  with pieces.new_piece(directory) as made, _silent():
    index = module.read_index(str(trained))
    lists = made / "lists.ivfdata"
    ondisk.merge_ondisk(index, [os.fspath(part) for part in parts], str(lists))
    module.write_index(index, str(made / "index.faiss"))
