"""The store against a dict, its files as they are left, and what it refuses."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from embgemma.data import scratch, vector_store
from embgemma.data.vector_store import VectorStore
from embgemma.errors import DataError

_WIDTH = 3


def _open(path: pathlib.Path, dtype: str = "float32") -> VectorStore:
  return VectorStore.create_or_open(path / "store", _WIDTH, dtype, "teacher")


def _hashes(values) -> np.ndarray:
  return np.array(values, np.uint64)


def _vectors(hashes: np.ndarray) -> np.ndarray:
  """A vector that says which hash it belongs to, in numbers float16 has exactly."""
  digits = [(hashes >> np.uint64(shift)) % np.uint64(1000) for shift in (0, 9, 18)]
  return np.stack(digits, axis=1).astype(np.float32) + 1


_HASH = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1))
_BATCHES = st.lists(
  st.tuples(st.lists(_HASH, max_size=12), st.integers(0, 3), st.booleans()),
  max_size=10,
)


@hypothesis.given(_BATCHES, st.lists(_HASH, max_size=30), st.sampled_from([2, 5, 1000]))
@hypothesis.settings(max_examples=40)
def test_it_behaves_as_a_dict(tmp_path_factory, batches, asked, block):
  """Hashes are added to one object and looked up in it, in another and in a third."""
  path = tmp_path_factory.mktemp("store")
  reference = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(vector_store, "_BLOCK", block)
    patch.setattr(vector_store, "_MERGED_IN_MEMORY", 8)  # files for the longer runs
    store, other = _open(path), _open(path)
    for batch, part, look in batches:
      hashes = _hashes(batch)
      store.add(hashes, _vectors(hashes), part)
      reference.update(dict(zip(batch, _vectors(hashes), strict=True)))
      if look:  # from here on the index grows with each segment
        _check(store, reference, asked + batch)
    other.refresh()
    for each in (store, other, _open(path)):
      _check(each, reference, asked + [key for batch, *_ in batches for key in batch])


def _check(store, reference, asked) -> None:
  hashes = _hashes(asked)
  present = np.array([key in reference for key in asked], bool)
  np.testing.assert_array_equal(store.missing(hashes), ~present)
  rows = store.locate(hashes)
  assert (rows[~present] == -1).all()
  gathered = store.gather(rows[present])
  expected = [reference[key] for key in asked if key in reference]
  np.testing.assert_array_equal(gathered, np.array(expected).reshape(-1, _WIDTH))


def test_rows_hold_for_given_segments(tmp_path):
  store = _open(tmp_path)
  for start in range(0, 50, 10):
    hashes = _hashes(range(start, start + 10))
    store.add(hashes, _vectors(hashes), part=9 - start // 10)
  wanted = _hashes([3, 41, 17])
  rows, segments = store.locate(wanted), store.segments
  late = _hashes([99])
  store.add(late, _vectors(late))
  # By name the new segment comes first, and would shift all rows.
  assert sorted(store.segments)[0] == store.segments[-1]
  again = VectorStore(store.directory, segments)
  np.testing.assert_array_equal(again.gather(rows), _vectors(wanted))
  np.testing.assert_array_equal(again.locate(late), [-1])
  with pytest.raises(IndexError):
    again.gather(np.array([50]))


def test_vectors_keep_their_dtype(tmp_path):
  hashes = _hashes([5, 2])
  exact = np.array([[0.1, 0.2, 0.3], [1, -1, 1e-3]], np.float32)
  for dtype in vector_store.DTYPES:
    store = _open(tmp_path / dtype, dtype)
    store.add(hashes, exact)
    gathered = store.gather(store.locate(hashes))
    assert gathered.dtype == dtype
    np.testing.assert_array_equal(gathered, exact.astype(dtype))


@pytest.mark.parametrize(
  ("vector", "message"),
  [
    ([1, np.nan, 0], "vector 1 holds NaN"),
    ([1, np.inf, 0], "vector 1 holds NaN or an infinity"),
    ([0, 0, 0], "vector 1 is zero"),
  ],
)
def test_bad_vectors_are_refused(tmp_path, vector, message):
  store = _open(tmp_path)
  vectors = np.array([[1, 0, 0], vector], np.float32)
  with pytest.raises(DataError, match=message):
    store.add(_hashes([1, 2]), vectors)
  assert not len(store)
  assert sorted(os.listdir(store.directory)) == ["meta.json"]


def test_a_wrong_width_is_refused(tmp_path):
  with pytest.raises(DataError, match="width 2, expected 3"):
    _open(tmp_path).add(_hashes([1]), np.ones((1, 2), np.float32))


def test_another_teacher_is_refused(tmp_path):
  _open(tmp_path)
  for width, dtype, fingerprint in (
    (4, "float32", "teacher"),
    (3, "float16", "teacher"),
    (3, "float32", "another"),
  ):
    with pytest.raises(DataError, match="another teacher .* another name"):
      VectorStore.create_or_open(tmp_path / "store", width, dtype, fingerprint)


def test_no_store(tmp_path):
  with pytest.raises(DataError, match="no store of vectors"):
    VectorStore(tmp_path)
  (tmp_path / "meta.json").write_text(json.dumps({"format": 99, "dtype": "float32"}))
  with pytest.raises(DataError, match="format 99"):
    VectorStore(tmp_path)


@pytest.mark.parametrize("file", ["hashes.npy", "vectors.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damage_is_found(tmp_path, file, damage):
  hashes = _hashes(range(100))
  _open(tmp_path).add(hashes, _vectors(hashes))
  path = next((tmp_path / "store").glob("segment-*")) / file
  if damage == "cut":
    os.truncate(path, path.stat().st_size - 8)
  elif damage == "gone":
    path.unlink()
  else:
    np.save(path, np.zeros(100, np.float16))
  with pytest.raises(DataError, match=r"segment-0000-000000: damaged .* delete it"):
    _open(tmp_path).gather(np.arange(100))


def _add(path: pathlib.Path, seed: int) -> None:
  store = _open(path)
  for start in range(0, 200, 10):
    hashes = _hashes(range(start, start + 10 + seed))
    store.add(hashes, _vectors(hashes))


def test_two_writers_add_at_once(tmp_path):
  store = _open(tmp_path)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    list(pool.map(_add, [tmp_path] * 2, range(2)))
  store.refresh()
  assert len(store.segments) == 40
  hashes = _hashes(range(201))
  np.testing.assert_array_equal(store.gather(store.locate(hashes)), _vectors(hashes))


def test_a_part_is_held_by_one_and_cleared_of_what_a_killed_one_left(tmp_path):
  store = _open(tmp_path)
  hour = 3600
  for name, age in (("1-killed", 7), ("1-alive", 5), ("2-killed", 7)):
    left = store.directory / f".unfinished-000{name}"
    left.mkdir()
    (left / "vectors.npy").touch()
    os.utime(left, (time.time() - age * hour,) * 2)
  with store.writing(1):
    left = sorted(path.name for path in store.directory.glob(".unfinished*"))
    # Another machine's that lives, where files cannot be locked.
    assert left == [".unfinished-0001-alive", ".unfinished-0002-killed"]
    with (
      pytest.raises(DataError, match="another process writes part 1"),
      _open(tmp_path).writing(1),
    ):
      pass
    with _open(tmp_path).writing(0):
      pass
  with _open(tmp_path).writing(1):
    pass


_LEAVE = """
import pathlib, sys
from embgemma.data.vector_store import VectorStore
store = VectorStore(pathlib.Path(sys.argv[1]))
with store.writing(0), store.scratch(0) as scratch:
  print(scratch, flush=True)
  sys.stdin.read()
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_killed_process_left_goes_at_once(tmp_path, monkeypatch, elsewhere):
  """Unless it may be a process that lives and cannot be seen from here."""
  store = _open(tmp_path)
  process = subprocess.Popen(
    [sys.executable, "-c", _LEAVE, str(store.directory)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    left = pathlib.Path(process.stdout.readline().strip())
    scratch.clear(store.directory, 0)
    assert left.is_dir()
    process.kill()
  if elsewhere:
    monkeypatch.setattr(scratch, "_process_space", lambda: "01234567")
  with store.writing(0):
    assert left.exists() is elsewhere
