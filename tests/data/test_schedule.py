"""Which examples a step sees depends on seed, step and batch size, and nothing else."""

import collections
import concurrent.futures
import dataclasses
import pickle
import random

import numpy as np
import pytest

from embgemma.data.records import Example
from embgemma.data.schedule import RecordSchedule, shuffled
from embgemma.errors import ConfigError, DataError

_ROWS = 5000  # of the model's table


def _examples(rng, queries, positives):
  """Queries of 2 to 9 tokens and positives of 10 to 19, their hashes as given."""
  for query, positive in zip(queries.tolist(), positives.tolist(), strict=True):
    lengths = (rng.integers(2, 10), rng.integers(10, 20))
    tokens = tuple(rng.integers(0, _ROWS, n, dtype=np.int32) for n in lengths)
    yield Example(tokens, np.array([query, positive], np.uint64))


@pytest.fixture(scope="module")
def make(cached):
  def make(directory, name, queries, positives=None, **options):
    rng = np.random.default_rng(0)
    queries = 1 + np.asarray(queries)
    others = 10**6 + np.arange(len(queries))
    positives = others if positives is None else 1 + np.asarray(positives)
    return cached(directory, name, _examples(rng, queries, positives), **options)

  return make


@pytest.fixture(scope="module")
def tasks(make, tmp_path_factory):
  """Every query of one occurs three times; another has two positives, labels."""
  directory, rng = tmp_path_factory.mktemp("caches"), np.random.default_rng(0)
  triples = rng.permutation(np.repeat(np.arange(700), 3))
  return [
    make(directory, "triples", triples, rate=3.0),
    make(directory, "single", np.arange(600), symmetric=True),
    make(directory, "labels", np.arange(400), rng.integers(2, size=400)),
  ]


def _schedule(tasks, batch_size=16, seed=3, avoid_duplicates=True):
  return RecordSchedule(tasks, batch_size, seed, _ROWS, avoid_duplicates)


def _assert_same(ours, theirs):
  assert (ours.index, ours.epoch, ours.duplicates) == (
    theirs.index,
    theirs.epoch,
    theirs.duplicates,
  )
  for name in ("records", "lengths", "swapped"):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 1000])
def test_shuffled_is_a_permutation(size):
  positions = np.arange(size)
  orders = [shuffled(positions, size, key) for key in (1, 2, 2**64 - 1)]
  for order in orders:
    assert sorted(order) == list(range(size))
    np.testing.assert_array_equal(shuffled(positions[1:], size, 1), orders[0][1:])
  if size > 10:
    assert len({tuple(order) for order in orders}) == 3


def test_shuffled_is_even():
  """Any place is as likely for any position: chi-squared within 5 deviations."""
  orders = np.array([shuffled(np.arange(10), 10, key) for key in range(3000)])
  counts = np.array([np.bincount(column, minlength=10) for column in orders.T])
  statistic = ((counts - 300) ** 2 / 300).sum()
  freedom = 81
  assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)
  # And neighbours do not stay neighbours.
  apart = np.abs(np.diff(orders.astype(int), axis=1)) == 1
  assert apart.mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 300, 2100])
def test_an_epoch_has_the_same_examples_with_and_without_duplicates(tasks, batch_size):
  """The first whole batches of its order, each example once."""
  plain = _schedule(tasks[:1], batch_size, avoid_duplicates=False)
  ours = _schedule(tasks[:1], batch_size)
  steps = 2100 // batch_size
  for epoch in range(2):
    parts = [
      [schedule.at(epoch * steps + step).records for step in range(steps)]
      for schedule in (ours, plain)
    ]
    found, expected = (np.concatenate(part).tolist() for part in parts)
    assert len(set(found)) == steps * batch_size
    assert set(found) == set(expected)
    assert (found == expected) == (batch_size in (1, 2100))


def test_no_batch_has_a_text_twice_if_that_can_be(tasks):
  hashes = [task.hashes() for task in tasks]
  schedule, plain = _schedule(tasks), _schedule(tasks, avoid_duplicates=False)
  repeated: collections.Counter[str] = collections.Counter()
  for step in range(300):
    batch, before = schedule.at(step), plain.at(step)
    name = tasks[batch.index].name
    own = [hashes[batch.index][b.records] for b in (batch, before)]
    columns = [texts[:, column] for texts in own for column in (0, 1)]
    twice = [16 - len(np.unique(column)) for column in columns]
    assert before.duplicates is None
    if name == "labels":  # two positives in all
      assert batch.duplicates == 14
      assert twice[1] == 14
    else:
      assert batch.duplicates == 0
      assert twice[:2] == [0, 0]
    repeated[name] += twice[2]
  assert repeated["triples"] > 10


@pytest.mark.parametrize("batches", [65, 129, 200])
def test_epochs_of_several_chunks(make, tmp_path, batches):
  """Each batch is in one chunk: all examples are there once, and no text twice."""
  size = 4
  rng = np.random.default_rng(batches)
  queries = rng.permutation(np.repeat(np.arange(batches * size // 4 + 1), 4))
  task = make(tmp_path, "task", queries[: batches * size])
  schedule, hashes = _schedule([task], size), task.hashes()
  found = [schedule.at(step) for step in range(batches)]
  assert len(set(np.concatenate([b.records for b in found]).tolist())) == batches * size
  assert all(len(np.unique(hashes[b.records, 0])) == size for b in found)


def test_any_step_alone(tasks):
  """Whatever was asked before, by whatever threads, in whatever process."""
  asked = _schedule(tasks)
  expected = [asked.at(step) for step in range(120)]
  steps = random.Random(0).sample(range(120), 60)
  for step in steps[:5]:
    _assert_same(_schedule(tasks).at(step), expected[step])
  copy = pickle.loads(pickle.dumps(asked))
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    for step, batch in zip(steps, threads.map(copy.at, steps), strict=True):
      _assert_same(batch, expected[step])
  other = _schedule(tasks, seed=4)
  assert any(
    other.at(s).records.tolist() != expected[s].records.tolist() for s in range(9)
  )


def test_few_chunks_are_kept(tasks, monkeypatch):
  expected = [_schedule(tasks).at(step) for step in range(60)]
  monkeypatch.setattr("embgemma.data.schedule._KEPT_PLACES", 1)
  schedule = _schedule(tasks)
  for step in [*range(60), *range(0, 60, 7)]:
    _assert_same(schedule.at(step), expected[step])
  assert len(schedule._chunks._chunks) == 1


def test_a_pickle_is_small(tasks):
  schedule = _schedule(tasks)
  before = len(pickle.dumps(schedule))
  for step in range(100):
    schedule.at(step)
  assert len(pickle.dumps(schedule)) == before < 10_000


def test_epochs_are_counted(tasks):
  schedule, size = _schedule(tasks), 16
  taken: collections.Counter[str] = collections.Counter()
  for step in range(400):
    if step % 57 == 0 or step == 399:
      assert schedule.epochs(step) == {
        task.name: taken[task.name] / (task.statistics["examples"] // size)
        for task in tasks
      }
    batch = schedule.at(step)
    name = tasks[batch.index].name
    assert batch.epoch == int(schedule.epochs(step)[name])
    taken[name] += 1
  assert min(schedule.epochs(400).values()) > 1


def test_roles_are_swapped_in_half_of_a_symmetric_task(tasks):
  """A bit of each record and epoch, whatever batch it is in."""
  schedule, other = (_schedule(tasks[1:2], size) for size in (16, 100))
  lengths = tasks[1].lengths().astype(int)
  drawn = {}
  for step in range(6 * 37):
    batch = schedule.at(step)
    for record, swapped, own in zip(
      batch.records.tolist(), batch.swapped.tolist(), batch.lengths, strict=True
    ):
      drawn[batch.epoch, record] = swapped
      assert own.tolist() == lengths[record, [1, 0] if swapped else [0, 1]].tolist()
  share = np.mean(list(drawn.values()))
  assert abs(share - 0.5) < 4 * 0.5 / len(drawn) ** 0.5
  epochs = [[drawn.get((epoch, r)) for r in range(600)] for epoch in range(6)]
  assert len({tuple(epoch) for epoch in epochs}) == 6
  batch = other.at(0)
  found = [drawn.get((0, record)) for record in batch.records.tolist()]
  assert all(a in (None, b) for a, b in zip(found, batch.swapped.tolist(), strict=True))
  # Plans see long texts on both sides.
  assert 0.4 < np.mean(other.sample(0)[:, 0] >= 10) < 0.6
  assert not schedule.at(0).swapped.all()
  assert not _schedule(tasks[:1]).at(0).swapped.any()


def test_a_symmetric_task_has_no_text_on_both_sides_of_a_batch(make, tmp_path):
  """The query of one example is the positive of another, 40 examples away."""
  texts = np.arange(480)
  others = np.roll(texts, 40)
  chained = make(tmp_path, "chained", texts, others, symmetric=True)
  apart = make(tmp_path, "apart", texts, others)
  shared = []
  for task in (chained, apart):
    schedule, hashes = _schedule([task], 24), task.hashes()
    batches = [hashes[schedule.at(step).records] for step in range(60)]
    shared.append(sum(len(np.intersect1d(*texts.T)) for texts in batches))
  assert shared[0] == 0 < shared[1]


def test_ids_tell_equal_texts_apart(make, tmp_path):
  """Two labels' texts are the same to no other; the same example twice is."""
  rng = np.random.default_rng(0)
  queries = rng.permutation(np.repeat(np.arange(240), 2))  # each example twice
  same = make(tmp_path, "same", queries, queries, unique_ids=True)
  labels = make(tmp_path, "labels", np.arange(480), queries % 2, unique_ids=True)
  for task in (same, labels):
    schedule, hashes = _schedule([task], 24), task.hashes()
    for step in range(20):
      batch = schedule.at(step)
      assert len(np.unique(hashes[batch.records], axis=0)) == 24
      assert batch.duplicates == 0
  # Nothing is exchanged where nothing is alike.
  plain = _schedule([labels], 24, avoid_duplicates=False)
  ours = _schedule([labels], 24)
  for step in range(20):
    np.testing.assert_array_equal(ours.at(step).records, plain.at(step).records)
  without = dataclasses.replace(labels, unique_ids=False)
  assert _schedule([without], 24).at(0).duplicates == 22


def test_batch_larger_than_a_task(tasks):
  with pytest.raises(
    ConfigError, match=r"BATCH_SIZE 401 is larger than task 'labels' \(400 examples\)"
  ):
    _schedule(tasks, 401)
  with pytest.raises(ConfigError, match="BATCH_SIZE must be at least 1, got 0"):
    _schedule(tasks, 0)


def test_token_ids_outside_the_table(tasks):
  largest = tasks[0].statistics["max_token_id"]
  with pytest.raises(
    DataError, match=f"'triples' holds token id {largest}, .* has {largest} rows"
  ):
    RecordSchedule(tasks, 8, 0, largest)


def test_hashes_that_are_not_there(make, tmp_path):
  task = make(tmp_path, "task", np.arange(8))
  (task.directory / "hashes.npy").unlink()
  assert _schedule([task], 8, avoid_duplicates=False).at(0)
  with pytest.raises(DataError, match=f"{task.directory}: hashes.npy .*; delete it to"):
    _schedule([task], 8)
