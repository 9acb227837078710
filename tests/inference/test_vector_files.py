import io
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from embgemma.errors import ConfigError
from embgemma.inference import vector_files

_WIDTH = 5


def _read(path: pathlib.Path) -> np.ndarray:
  if path.suffix == ".npy":
    return np.load(path)
  column = pq.read_table(path).column("embedding").combine_chunks()
  assert column.type.list_size == _WIDTH
  return column.flatten().to_numpy().reshape(-1, _WIDTH)


def _chunks(*sizes):
  rng = np.random.default_rng(0)
  return [rng.normal(size=(size, _WIDTH)).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("suffix", vector_files.SUFFIXES)
@pytest.mark.parametrize("sizes", [(), (0,), (3,), (4, 1, 7), (2, 0, 3)])
def test_round_trip(tmp_path, suffix, sizes):
  path = tmp_path / f"vectors{suffix}"
  chunks = _chunks(*sizes)
  with open(path, "wb") as file:
    # As they come: a generator is read once.
    rows = vector_files.write(file, path, (chunk for chunk in chunks), _WIDTH)
  found = _read(path)
  expected = np.concatenate([np.zeros((0, _WIDTH), np.float32), *chunks])
  assert rows == len(expected)
  assert found.dtype == np.float32
  assert found.shape == expected.shape
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", vector_files.SUFFIXES)
def test_layout_in_memory_does_not_matter(tmp_path, suffix):
  path = tmp_path / f"vectors{suffix}"
  (chunk,) = _chunks(6)
  strided = np.asfortranarray(chunk)[::2]
  with open(path, "wb") as file:
    vector_files.write(file, path, [strided], _WIDTH)
  np.testing.assert_array_equal(_read(path), chunk[::2])


def test_npy_header_has_room_for_any_number_of_rows():
  """The rows are known last; the header must not grow over the first of them."""
  sizes = set()
  for rows in (0, 10**6, 10**15):
    file = io.BytesIO()
    header = vector_files._npy_header(rows, 768, "<f4")
    np.lib.format.write_array_header_1_0(file, header)
    sizes.add(file.tell())
  assert len(sizes) == 1


@pytest.mark.parametrize("name", ["vectors", "vectors.npz", "vectors.npy.gz", ".npy"])
def test_other_names_are_refused(name):
  with pytest.raises(ConfigError, match=r"must end in \.npy or \.parquet"):
    vector_files.check_name(pathlib.Path(name))


@pytest.mark.parametrize("name", ["a.npy", "dir.x/a.parquet"])
def test_names(name):
  assert vector_files.check_name(pathlib.Path(name)) is None
