"""Vectors by record against an array, and what a damaged file says."""

import json
import os
import pathlib

import numpy as np
import pytest

from embgemma.data import teacher_vectors
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.vector_store import VectorStore
from embgemma.errors import DataError

_SHAPE = (7, 3)
_WIDTH = 4


def _rows() -> np.ndarray:
  """Of 9 vectors, some twice; -1 where there is none."""
  rows = np.random.default_rng(0).integers(-1, 9, _SHAPE)
  assert (rows == -1).any()
  return rows


def _vectors() -> np.ndarray:
  vectors = np.random.default_rng(1).standard_normal((9, _WIDTH)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def store(tmp_path) -> VectorStore:
  made = VectorStore.create_or_open(tmp_path / "store", _WIDTH, "float16", "teacher")
  for start in (0, 4):
    made.add(
      np.arange(start, start + 5, dtype=np.uint64), _vectors()[start : start + 5]
    )
  return made


@pytest.fixture
def task(tmp_path, store) -> pathlib.Path:
  directory = tmp_path / "tasks" / "task"
  directory.mkdir(parents=True)
  located = store.locate(np.arange(9, dtype=np.uint64))
  rows = np.where(_rows() < 0, -1, located[_rows()])
  teacher_vectors.write(directory, "big", store, _SHAPE, [rows[:4], rows[4:]])
  return directory


@pytest.mark.parametrize("records", [[], [3], [6, 0, 0, 5], list(range(7))])
def test_vectors_of_records(task, records):
  found = TeacherVectors(task, "big")
  assert (len(found), found.texts, found.width) == (*_SHAPE, _WIDTH)
  vectors, present = found.gather(np.array(records, int))
  rows = _rows()[np.array(records, int)]
  expected = np.where((rows >= 0)[..., None], _vectors()[rows], 0).astype(np.float16)
  assert vectors.dtype == np.float16
  np.testing.assert_array_equal(vectors, expected)
  np.testing.assert_array_equal(present, rows >= 0)


def test_what_is_added_later_moves_no_rows(task, store):
  before = TeacherVectors(task, "big").gather(np.arange(7))
  # Its name comes first.
  other = VectorStore.create_or_open(store.directory, _WIDTH, "float16", "teacher")
  other.add(np.array([99], np.uint64), _vectors()[:1], part=0)
  (store.directory / "segment-0000-000002").rename(
    store.directory / "segment-00000-000000"
  )
  for mine, theirs in zip(
    before, TeacherVectors(task, "big").gather(np.arange(7)), strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)


def test_a_task_that_was_left_out(store, tmp_path):
  task = tmp_path / "tasks"
  task.mkdir()
  for _ in range(2):  # another process may have said so already
    teacher_vectors.write(task, "big", store, _SHAPE, None)
  found = TeacherVectors(task, "big")
  vectors, present = found.gather(np.arange(7))
  assert vectors.shape == (*_SHAPE, _WIDTH)
  assert not vectors.any()
  assert not present.any()
  assert not found.taught
  assert sorted(os.listdir(task)) == ["teacher-big"]


def test_a_task_that_was_taught_stays_so(task, store):
  before = TeacherVectors(task, "big").gather(np.arange(7))
  teacher_vectors.write(task, "big", store, _SHAPE, None)
  found = TeacherVectors(task, "big")
  assert found.taught
  for mine, theirs in zip(before, found.gather(np.arange(7)), strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_two_write_at_once(task, store, monkeypatch):
  """What another process puts there between two renames goes, too."""
  rename, others = os.rename, [1, 2]

  def raced(source, target):
    if target == task / "teacher-big" and others:
      target.mkdir()
      (target / f"{others.pop()}").touch()
    rename(source, target)

  monkeypatch.setattr(os, "rename", raced)
  rows = np.full(_SHAPE, -1)
  teacher_vectors.write(task, "big", store, _SHAPE, [rows])
  assert sorted(os.listdir(task / "teacher-big")) == ["index.json", "rows.npy"]
  assert not list(store.directory.glob(".unfinished*"))


def test_vectors_that_are_not_there(task):
  with pytest.raises(
    DataError, match=r"no vectors of a teacher 'small'; .*embgemma teach"
  ):
    TeacherVectors(task, "small")


def _edit(path: pathlib.Path, **changes) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda path: os.truncate(path / "rows.npy", 200), "rows.npy"),
    (lambda path: (path / "rows.npy").unlink(), "rows.npy"),
    (
      lambda path: np.save(path / "rows.npy", _rows()[1:]),
      r"rows.npy is int64\[6, 3\]",
    ),
    (lambda path: (path / "index.json").write_text("{"), "index.json"),
    (lambda path: (path / "index.json").write_text("{}"), "KeyError"),
    (lambda path: _edit(path / "index.json", format=9), "format 9"),
    (lambda path: _edit(path / "index.json", store="../nowhere"), "no store"),
    (lambda path: _edit(path / "index.json", fingerprint="x"), "another teacher"),
    (lambda path: _edit(path / "index.json", segments=["segment-9"]), "segment-9"),
  ],
)
def test_damage_says_what_to_do(task, damage, message):
  damage(task / "teacher-big")
  with pytest.raises(
    DataError, match=f"{message}.* run the same `embgemma teach` again"
  ):
    TeacherVectors(task, "big").gather(np.arange(7))


def test_a_full_disk(task, store, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  before = TeacherVectors(task, "big").gather(np.arange(7))
  monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
  with pytest.raises(DataError, match="No space left on device; the vectors are kept"):
    teacher_vectors.write(task, "big", store, _SHAPE, None)
  for mine, theirs in zip(
    before, TeacherVectors(task, "big").gather(np.arange(7)), strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)
