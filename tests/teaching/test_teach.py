"""A run's cached texts and their vectors: nothing lost, nothing of something else."""

import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from embgemma.data import cache, cache_builder
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.vector_store import VectorStore
from embgemma.errors import ConfigError, DataError
from embgemma.teaching import teach as teach_module
from embgemma.teaching.teach import TaskReport, teach
from embgemma.teaching.teachers import open_teacher


def _quiet(line: str) -> None:
  del line


def _expected(pairs, teacher, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Vectors [examples, T, W] of a file's records and which there are."""
  records = pairs.records[name]
  texts = 2 + max(len(record.get("negatives", [])[:2]) for record in records)
  vectors = np.zeros((len(records), texts, teacher.width), np.float32)
  present = np.zeros((len(records), texts), bool)
  for i, record in enumerate(records):
    kind, title = record.get("task"), record.get("title") or None
    inputs = [
      teacher.query(record["query"], kind),
      teacher.document(record["positive"], title, kind),
    ]
    inputs += [
      teacher.document(text, None, kind) for text in record.get("negatives", [])[:2]
    ]
    present[i, : len(inputs)] = True
    vectors[i, : len(inputs)] = [teacher.vector(each) for each in inputs]
  return vectors, present


def _check(pairs, teacher, dtype: str = "float32", names=("plain", "hard")) -> None:
  manifest = cache.manifest(pairs.config)
  for task in manifest.tasks:
    if task.name in names:
      found = TeacherVectors(task.directory, "big")
      records = np.random.default_rng(0).permutation(len(found))
      vectors, present = found.gather(records)
      expected, there = _expected(pairs, teacher, task.name)
      assert vectors.dtype == dtype
      np.testing.assert_array_equal(present, there[records])
      np.testing.assert_array_equal(vectors, expected[records].astype(dtype))
      assert found.taught
      assert (found.width, found.dtype) == (teacher.width, dtype)


def _distinct(pairs, teacher) -> int:
  inputs = set()
  for name in pairs.records:
    vectors, present = _expected(pairs, teacher, name)
    inputs |= {vector.tobytes() for vector in vectors[present]}
  return len(inputs)


def _task(pairs, name: str) -> cache.CachedTask:
  return next(t for t in cache.manifest(pairs.config).tasks if t.name == name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_text_has_its_vector(pairs, fake, dtype):
  teacher, lines = fake(), []
  report = teach(pairs.config, teacher, "big", dtype, lines.append)
  _check(pairs, teacher, dtype)
  texts = [int(_expected(pairs, teacher, name)[1].sum()) for name in ("plain", "hard")]
  assert {task.name: task for task in report.tasks} == {
    "plain": TaskReport("plain", texts[0], True),
    "hard": TaskReport("hard", texts[1], True),
  }
  # Texts come again, within a task and between them.
  distinct = _distinct(pairs, teacher)
  assert report.embedded == report.stored == report.estimate.texts == distinct
  assert distinct < sum(texts)
  assert sum(map(len, teacher.embedded)) == distinct
  assert report.estimate.usd == 0
  assert lines == [f"fake: {distinct} distinct texts to embed"]
  _no_litter(pairs)


def _no_litter(pairs) -> None:
  assert not list(pathlib.Path(pairs.config.cache_dir).rglob(".unfinished*"))


def test_run_again_it_does_nothing(pairs, fake, monkeypatch):
  teach(pairs.config, fake(), "big", "float16", _quiet)
  before = _times(pairs)
  monkeypatch.setattr(cache, "kept_examples", None)  # no source is read
  again = fake()
  report = teach(pairs.config, again, "big", "float16", _quiet)
  assert not again.embedded
  assert report.embedded == report.estimate.texts == 0
  assert all(task.ready for task in report.tasks)
  assert _times(pairs) == before


def _times(pairs) -> dict[pathlib.Path, int]:
  paths = pathlib.Path(pairs.config.cache_dir).rglob("*.*")
  return {p: p.stat().st_mtime_ns for p in paths if p.is_file() and p.suffix != ".lock"}


def test_shards_make_what_one_makes(pairs, fake):
  for index in (1, 0):
    teacher = fake()
    report = teach(pairs.config, teacher, "big", "float32", _quiet, (index, 2))
    assert all(e.key() % 2 == index for call in teacher.embedded for e in call)
    assert report.estimate.texts == report.embedded == sum(map(len, teacher.embedded))
    assert [task.ready for task in report.tasks] == [index == 0] * 2
    if index == 1:
      assert report.tasks[0].remark.endswith("run the other shards")
      with pytest.raises(DataError, match="embgemma teach"):
        TeacherVectors(_task(pairs, "plain").directory, "big")
  assert report.stored == _distinct(pairs, fake())
  _check(pairs, fake())


def test_killed_in_any_window_it_goes_on(pairs, fake):
  root = pathlib.Path(pairs.config.cache_dir)
  for call in itertools.count():
    shutil.rmtree(root / "teachers", ignore_errors=True)
    for path in root.glob("tasks/*/teacher-big"):
      shutil.rmtree(path)
    killed, after = fake(window=18, fail_at=call), fake(window=18)
    try:
      teach(pairs.config, killed, "big", "float32", _quiet)
      break
    except KeyboardInterrupt:
      teach(pairs.config, after, "big", "float32", _quiet)
    _check(pairs, after)
    both = list(itertools.chain(*killed.embedded, *after.embedded))
    assert len(set(both)) == len(both)
  assert call > 3


@pytest.mark.parametrize("rename", [0, 1, 2, 3, 4])
def test_killed_at_a_rename_it_goes_on(pairs, fake, monkeypatch, rename):
  """A kill leaves what was being written, under another name."""
  monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
  done = itertools.count()
  replace = os.rename

  def killed(source, target):
    if "teacher" in str(target) and next(done) == rename:
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "rename", killed)
  with pytest.raises(KeyboardInterrupt):
    teach(pairs.config, fake(window=20), "big", "float32", _quiet)
  store = pathlib.Path(pairs.config.cache_dir) / "teachers" / "big"
  left = list(store.glob(".unfinished-0000-*"))
  assert left
  for path in left:
    os.utime(path, (0, 0))  # hours ago
  monkeypatch.undo()
  teach(pairs.config, fake(window=20), "big", "float32", _quiet)
  _check(pairs, fake())
  _no_litter(pairs)


def test_some_tasks(pairs, fake):
  report = teach(pairs.config, fake(), "big", "float32", _quiet, tasks=["plain"])
  _check(pairs, fake(), names=["plain"])
  left_out = TeacherVectors(_task(pairs, "hard").directory, "big")
  vectors, present = left_out.gather(np.arange(len(left_out)))
  assert vectors.shape == (30, 4, 4)
  assert not vectors.any()
  assert not present.any()
  assert not left_out.taught
  remarks = {task.name: (task.ready, task.remark) for task in report.tasks}
  unknown = (True, "not among --tasks: has no vectors")
  assert remarks == {"plain": (True, ""), "hard": unknown}
  # The others may come later, and those of before stay.
  report = teach(pairs.config, fake(), "big", "float32", _quiet, tasks=["hard"])
  remarks = {task.name: task.remark for task in report.tasks}
  earlier = "not among --tasks: has the vectors of an earlier call"
  assert remarks == {"plain": earlier, "hard": ""}
  assert report.stored == _distinct(pairs, fake())
  _check(pairs, fake())


def test_two_at_once(pairs, fake):
  store = VectorStore.create_or_open(
    pathlib.Path(pairs.config.cache_dir, "teachers", "big"), 4, "float32", "fake/1"
  )
  with (
    store.writing(0),
    pytest.raises(DataError, match="another process writes part 0 .*--shard_index"),
  ):
    teach(pairs.config, fake(), "big", "float32", _quiet)
  teach(pairs.config, fake(), "big", "float32", _quiet)


@pytest.mark.parametrize("others", [None, ["plain"]])
def test_another_process_is_first_with_the_other_tasks(
  pairs, fake, monkeypatch, others
):
  """It teaches them, or leaves them out as well, before this one leaves them out."""
  write = teach_module.teacher_vectors.write

  def late(*args):
    monkeypatch.undo()
    teach(pairs.config, fake(), "big", "float32", _quiet, tasks=others)
    write(*args)

  monkeypatch.setattr(teach_module.teacher_vectors, "write", late)
  report = teach(pairs.config, fake(), "big", "float32", _quiet, (1, 2), ["plain"])
  assert all(task.ready for task in report.tasks)
  _check(pairs, fake(), names=["plain"] if others else ["plain", "hard"])
  assert TeacherVectors(_task(pairs, "hard").directory, "big").taught == (not others)


def test_tasks_left_out_with_vectors_of_another_teacher(pairs, fake):
  teach(pairs.config, fake(), "big", "float32", _quiet)
  shutil.rmtree(pathlib.Path(pairs.config.cache_dir, "teachers"))
  new = fake(fingerprint="fake/2")
  report = teach(pairs.config, new, "big", "float32", _quiet, tasks=["plain"])
  (task,) = (task for task in report.tasks if task.name == "hard")
  assert not task.ready
  assert "teacher-big is of other vectors: teach it, too" in task.remark


def test_another_teacher_under_the_name(pairs, fake):
  teach(pairs.config, fake(), "big", "float32", _quiet)
  for other in (fake(fingerprint="fake/2"), fake(width=5)):
    with pytest.raises(DataError, match="another teacher .* another name"):
      teach(pairs.config, other, "big", "float32", _quiet)
  with pytest.raises(DataError, match="another teacher"):
    teach(pairs.config, fake(), "big", "float16", _quiet)
  # With the store gone, rows of the old one are not taken for the new one's.
  shutil.rmtree(pathlib.Path(pairs.config.cache_dir, "teachers"))
  teach(pairs.config, fake(fingerprint="fake/2"), "big", "float32", _quiet)
  _check(pairs, fake())


def test_a_lost_segment_is_made_again(pairs, fake):
  teach(pairs.config, fake(), "big", "float32", _quiet)
  segments = sorted(pathlib.Path(pairs.config.cache_dir).glob("teachers/big/segment*"))
  shutil.rmtree(segments[1])
  found = TeacherVectors(_task(pairs, "plain").directory, "big")
  with pytest.raises(DataError, match=r"segment-0000-000001.*`embgemma teach` again"):
    found.gather(np.arange(len(found)))
  again = fake()
  teach(pairs.config, again, "big", "float32", _quiet)
  assert sum(map(len, again.embedded)) == 8
  _check(pairs, fake())


def test_a_source_that_changed(pairs, fake, monkeypatch):
  manifest = cache.manifest(pairs.config)
  monkeypatch.setattr(cache, "manifest", lambda config: manifest)
  file = pairs.files["hard"]
  lines = file.read_text().splitlines(keepends=True)
  changes = {
    7: [*lines[:7], lines[8], lines[7], *lines[9:]],  # two changed places
    29: lines[:-1],
    30: [*lines, lines[0]],
  }
  for example, changed in changes.items():
    file.write_text("".join(changed))
    with pytest.raises(
      DataError, match=f"'hard': example {example} is not .*`embgemma cache`"
    ):
      teach(pairs.config, fake(), "big", "float32", _quiet)


def test_a_source_with_more_texts_than_were_cached(pairs, fake, monkeypatch):
  manifest = cache.manifest(pairs.config)
  monkeypatch.setattr(cache, "manifest", lambda config: manifest)
  file = pairs.files["plain"]
  lines = file.read_text().splitlines(keepends=True)
  lines[5] = json.dumps(json.loads(lines[5]) | {"negatives": ["a", "b"]}) + "\n"
  file.write_text("".join(lines))
  with pytest.raises(DataError, match=r"'plain': example 5 is not .*`embgemma cache`"):
    teach(pairs.config, fake(), "big", "float32", _quiet)


def test_a_source_that_changes_meanwhile(pairs, fake):
  file = pairs.files["plain"]
  teacher = fake()
  lines = file.read_text().splitlines(keepends=True)

  def log(line: str) -> None:  # after all is read once
    file.write_text("".join([*lines[:20], lines[22], *lines[21:]]))

  with pytest.raises(DataError, match="'plain': example 20 is not the one"):
    teach(pairs.config, teacher, "big", "float32", log)
  file.write_text("".join(lines))
  cache_builder.build(pairs.config, _quiet)
  teach(pairs.config, fake(), "big", "float32", _quiet)
  _check(pairs, fake())


@dataclasses.dataclass
class _Paid:
  """A fake teacher at a price."""

  teacher: object
  price: float = 50_000.0
  price_source: str = "a list of today"

  def __getattr__(self, name):
    return getattr(self.teacher, name)


def test_money_is_not_spent_unasked(pairs, fake):
  teacher, lines = fake(), []
  paid = _Paid(teacher)
  inputs = set()
  for name, records in pairs.records.items():
    del name
    for record in records:
      kind, title = record.get("task"), record.get("title") or None
      inputs |= {
        teacher.query(record["query"], kind),
        teacher.document(record["positive"], title, kind),
        *(teacher.document(t, None, kind) for t in record.get("negatives", [])[:2]),
      }
  tokens = -(-sum(len(each.text.encode()) for each in inputs) // 4)
  usd = tokens * 50_000 / 1e6
  said = f"some {tokens:,} tokens: about ${usd:,.2f} at $50000 a million"
  for max_cost, given in ((None, "no --max_cost"), (usd - 0.1, "--max_cost=")):
    with pytest.raises(ConfigError) as raised:
      teach(pairs.config, paid, "big", "float32", _quiet, max_cost=max_cost)
    assert f"{len(inputs)} distinct texts to embed, {said} (a list" in str(raised.value)
    assert given in str(raised.value)
  assert not teacher.embedded
  enough = float(str(raised.value).rpartition("=")[2])
  assert usd <= enough <= usd + 0.02
  # Half of it costs half, and what is there nothing.
  half = teach(
    pairs.config, paid, "big", "float32", lines.append, (0, 2), max_cost=enough
  )
  assert 0 < half.estimate.usd < usd
  rest = teach(pairs.config, paid, "big", "float32", lines.append, max_cost=enough)
  assert rest.estimate.usd + half.estimate.usd == pytest.approx(usd, abs=0.06)
  assert teach(pairs.config, paid, "big", "float32", _quiet).estimate.usd == 0
  assert said not in lines[0]
  assert "(a list of today)" in lines[0]


def test_the_estimate_in_passes_is_the_same(pairs, fake, monkeypatch):
  whole = teach(pairs.config, fake(), "big", "float32", _quiet).estimate
  shutil.rmtree(pathlib.Path(pairs.config.cache_dir, "teachers"))
  monkeypatch.setattr(teach_module, "_COUNTED", 9)
  monkeypatch.setattr(teach_module, "_BLOCK", 7)
  assert teach(pairs.config, fake(), "big", "float32", _quiet).estimate == whole
  _check(pairs, fake())


def test_what_cannot_be_taught(pairs, fake):
  with pytest.raises(ConfigError, match=r"no task soft, weak in the run; .*'plain'"):
    teach(pairs.config, fake(), "big", "float32", _quiet, tasks=["weak", "soft"])
  for shard in ((2, 2), (-1, 2), (0, 0)):
    with pytest.raises(ConfigError, match="shards are 0"):
      teach(pairs.config, fake(), "big", "float32", _quiet, shard)
  remote = dataclasses.replace(pairs.config, cache_dir="gs://bucket/cache")
  with pytest.raises(ConfigError, match="give a local CACHE_DIR"):
    teach(remote, fake(), "big", "float32", _quiet)
  fresh = dataclasses.replace(pairs.config, cache_dir=pairs.config.cache_dir + "2")
  with pytest.raises(DataError, match="run `embgemma cache`"):
    teach(fresh, fake(), "big", "float32", _quiet)


def test_a_checkpoint_teaches(pairs, checkpoint):
  teacher = open_teacher(str(checkpoint), 8)
  teach(pairs.config, teacher, "own", "float16", _quiet, tasks=["hard"])
  found = TeacherVectors(_task(pairs, "hard").directory, "own")
  vectors, _ = found.gather(np.array([5]))
  record = pairs.records["hard"][5]
  inputs = [
    teacher.query(record["query"], record["task"]),
    teacher.document(record["positive"], record["title"] or None, record["task"]),
  ]
  np.testing.assert_allclose(vectors[0, :2], teacher.encode(inputs), atol=1e-3)


def test_vectors_can_be_pickled(pairs, fake):
  teach(pairs.config, fake(), "big", "float16", _quiet)
  found = TeacherVectors(_task(pairs, "hard").directory, "big")
  before = found.gather(np.arange(30))
  pickled = pickle.dumps(found)
  assert len(pickled) < 4096
  for mine, theirs in zip(
    before, pickle.loads(pickled).gather(np.arange(30)), strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)


def test_a_cache_can_be_moved(pairs, fake, tmp_path):
  teach(pairs.config, fake(), "big", "float32", _quiet)
  shutil.move(pairs.config.cache_dir, tmp_path / "elsewhere")
  config = dataclasses.replace(pairs.config, cache_dir=str(tmp_path / "elsewhere"))
  _check(dataclasses.replace(pairs, config=config), fake())
