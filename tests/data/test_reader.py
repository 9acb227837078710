"""Batches depend on seed, step and batch size, and on nothing else."""

import numpy as np
import pytest
from array_record.python import array_record_module

from embgemma.data.cache import CachedTask, write_examples
from embgemma.data.reader import StepSource, read_batches, scheduled_task, shuffled
from embgemma.data.records import Example
from embgemma.errors import ConfigError, DataError

_VOCABULARY = 5000


def _example(rng, number: int, negatives: int) -> Example:
  """Texts of 2 to 39 tokens; the first token of each is its example's number."""
  texts = [
    np.array([number, *rng.integers(0, _VOCABULARY, rng.integers(1, 39))], np.int32)
    for _ in range(2 + negatives)
  ]
  hashes = (np.uint64(number) << np.uint64(33)) + np.arange(len(texts), dtype=np.uint64)
  return Example(tuple(texts), hashes)


def _write(directory, name, size, rate=1.0, negatives=2) -> CachedTask:
  """A cache of examples that have 0 to `negatives` negatives in turn."""
  directory = directory / name
  directory.mkdir()
  rng = np.random.default_rng(len(name))
  examples = (_example(rng, i, i % (negatives + 1)) for i in range(size))
  statistics = write_examples(directory, examples, (99, 99, 99))
  return CachedTask(name, rate, directory, statistics)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  directory = tmp_path_factory.mktemp("caches")
  return [
    _write(directory, "plain", 105, rate=3.0),
    _write(directory, "bare", 50, rate=1.0, negatives=0),
  ]


def _source(tasks, batch_size=8, seed=3, num_shards=1, **options) -> StepSource:
  return StepSource(tasks, batch_size, seed, num_shards, _VOCABULARY, **options)


def _shard_texts(pairs, shard, num_shards) -> list[list[int]]:
  """Token ids of every slot of a shard's vectors, and of the one past the last."""
  texts = []
  for group in pairs.groups:
    for batch in range(len(group.tokens)):
      tokens, starts, lengths = (
        np.split(array[batch], num_shards)[shard]
        for array in (group.tokens, group.starts, group.lengths)
      )
      flat = tokens.ravel().tolist()
      texts += [flat[a : a + n] for a, n in zip(starts, lengths, strict=True)]
  return [*texts, []]


def _joined(words) -> np.ndarray:
  words = words.astype(np.uint64)
  return words[:, 0] | words[:, 1] << np.uint64(32)


def _examples(batch, num_shards=1) -> list[tuple]:
  """Query, positive, negatives, hashes and mask of each example, unpacked."""
  pairs = batch.arrays
  size = len(pairs.query_hash) // num_shards
  negatives = pairs.negative_mask.shape[1]
  roles = []
  for shard, slots in enumerate(np.split(pairs.slots, num_shards)):
    texts = _shard_texts(pairs, shard, num_shards)
    places = [texts[slot] for slot in slots]
    for i in range(size):
      first = 2 * size + i * negatives
      own = places[first : first + negatives]
      roles.append((places[i], places[size + i], own))
  hashes = _joined(pairs.query_hash).tolist(), _joined(pairs.positive_hash).tolist()
  rows = zip(roles, *hashes, pairs.negative_mask.tolist(), strict=True)
  return [(*role, *rest) for role, *rest in rows]


def _numbers(batch, num_shards=1) -> list[int]:
  return [query[0] for query, *_ in _examples(batch, num_shards)]


def _assert_same(a, b):
  assert (a.step, a.task, a.real_tokens) == (b.step, b.task, b.real_tokens)
  assert _examples(a) == _examples(b)


@pytest.mark.parametrize("microbatch_tokens", [None, 128])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_batch_is_its_examples(tasks, num_shards, microbatch_tokens):
  source = _source(tasks, num_shards=num_shards, microbatch_tokens=microbatch_tokens)
  for step in range(6):
    batch = source.batch(step)
    negatives = {"plain": 2, "bare": 0}[batch.task]
    assert batch.arrays.negative_mask.shape == (8, negatives)
    total = 0
    for query, positive, own, *hashes, mask in _examples(batch, num_shards):
      number = query[0]
      assert positive[0] == number
      count = number % (negatives + 1)
      empty = negatives - count
      assert [text[:1] for text in own] == [[number]] * count + [[]] * empty
      assert mask == [True] * count + [False] * empty
      assert hashes == [number << 33, (number << 33) + 1]
      assert query != positive
      total += len(query) + len(positive) + sum(map(len, own))
    assert batch.real_tokens == total
    shapes = batch.arrays.group_shapes(num_shards)
    assert batch.slots == num_shards * sum(shape.tokens for shape in shapes)
    assert total <= batch.slots
    if microbatch_tokens and num_shards == 1:
      assert max(shape.microbatches for shape in shapes) > 1


def _by_number(batch, num_shards):
  return sorted(_examples(batch, num_shards))


@pytest.mark.parametrize("microbatch_tokens", [None, 64, 256])
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_neither_shards_nor_microbatches_change_an_example(
  tasks, num_shards, microbatch_tokens
):
  one = _source(tasks)
  many = _source(tasks, num_shards=num_shards, microbatch_tokens=microbatch_tokens)
  for step in range(8):
    ours, expected = many.batch(step), one.batch(step)
    assert (ours.task, ours.real_tokens) == (expected.task, expected.real_tokens)
    assert _by_number(ours, num_shards) == _by_number(expected, 1)


@pytest.mark.parametrize("own", [[0], [3], [0, 1], [2, 3], [3, 0]])
def test_a_process_has_its_part_of_the_batch(tasks, own):
  whole = _source(tasks, num_shards=4, microbatch_tokens=128)
  part = _source(tasks, num_shards=4, microbatch_tokens=128, own_shards=own)
  for step in range(6):
    ours, expected = part.batch(step), whole.batch(step)
    assert (ours.real_tokens, ours.slots) == (expected.real_tokens, expected.slots)

    def taken(array, axis, own=own):
      parts = np.split(array, 4, axis)
      return np.concatenate([parts[shard] for shard in own], axis)

    for mine, group in zip(ours.arrays.groups, expected.arrays.groups, strict=True):
      for name in ("tokens", "positions", "text_ids", "starts", "lengths"):
        np.testing.assert_array_equal(
          getattr(mine, name), taken(getattr(group, name), 1)
        )
    for name in ("slots", "query_hash", "positive_hash", "negative_mask"):
      np.testing.assert_array_equal(
        getattr(ours.arrays, name), taken(getattr(expected.arrays, name), 0)
      )


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


def test_seed_and_batch_size_change_the_examples(tasks):
  batches = [
    tuple(_numbers(_source(tasks[:1], size, seed).batch(0)))
    for size, seed in ((8, 3), (8, 4), (16, 3))
  ]
  assert len({numbers[:8] for numbers in batches[:2]}) == 2
  assert batches[2][:8] == batches[0]  # a longer part of the same order


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_keep_order_and_content(tasks, num_threads):
  source = _source(tasks)
  batches = read_batches(source, 0, num_threads, num_workers=0)
  for step, batch in zip(range(12), batches, strict=False):
    _assert_same(batch, source.batch(step))


def test_resuming_is_skipping(tasks):
  source = _source(tasks)
  resumed = read_batches(source, 7, num_threads=2, num_workers=0)
  for step, batch in zip(range(7, 12), resumed, strict=False):
    assert batch.step == step
    _assert_same(batch, source.batch(step))


def test_worker_processes_keep_order_and_content(tasks):
  source = _source(tasks)
  batches = read_batches(source, 5, num_threads=2, num_workers=2)
  for step, batch in zip(range(5, 14), batches, strict=False):
    _assert_same(batch, source.batch(step))


@pytest.mark.parametrize(("examples", "size"), [(105, 8), (16, 8), (9, 9), (1, 1)])
def test_an_epoch_has_every_example_at_most_once(tmp_path, examples, size):
  task = _write(tmp_path, "task", examples, negatives=0)
  source = _source([task], size)
  steps = examples // size
  orders = []
  for epoch in range(3):
    batches = [source.batch(epoch * steps + step) for step in range(steps)]
    numbers = [number for batch in batches for number in _numbers(batch)]
    assert len(set(numbers)) == steps * size
    assert set(numbers) <= set(range(examples))
    orders.append(tuple(numbers))
  if examples > 10:
    assert len(set(orders)) == 3
    assert tuple(sorted(orders[0])) != orders[0]


def test_what_an_epoch_leaves_out_changes(tmp_path):
  task = _write(tmp_path, "task", 15, negatives=0)
  source = _source([task], 8)
  left_out = {frozenset(range(15)) - set(_numbers(source.batch(e))) for e in range(20)}
  assert len(left_out) > 10


def test_rates_are_kept():
  """Within four standard deviations over 20,000 steps, across blocks."""
  rates, steps = (1.0, 2.0, 5.0), 20_000
  drawn = [scheduled_task(rates, 11, step) for step in range(steps)]
  counts = np.bincount([task for task, _ in drawn], minlength=3)
  expected = np.array(rates) / sum(rates) * steps
  deviation = np.sqrt(expected * (1 - np.array(rates) / sum(rates)))
  assert (np.abs(counts - expected) < 4 * deviation).all()
  # Each task's batches are numbered without gaps, whatever the order of asking.
  seen = [0, 0, 0]
  for task, earlier in drawn:
    assert earlier == seen[task]
    seen[task] += 1
  assert scheduled_task(rates, 11, steps - 1) == drawn[-1]
  assert scheduled_task((10.0, 20.0, 50.0), 11, 12_345) == drawn[12_345]
  assert [scheduled_task(rates, 12, step) for step in range(50)] != drawn[:50]


def test_a_schedule_has_no_period():
  """Blocks of the generator are not copies of each other."""
  tasks = np.array([scheduled_task((1.0, 1.0), 0, step)[0] for step in range(16_384)])
  first, *others = tasks.reshape(4, -1)
  for other in others:
    assert 0.45 < np.mean(first == other) < 0.55


def test_batch_larger_than_a_task(tasks):
  with pytest.raises(
    ConfigError, match=r"BATCH_SIZE 64 is larger than task 'bare' \(50 examples\)"
  ):
    _source(tasks, 64)


@pytest.mark.parametrize(("batch_size", "num_shards"), [(0, 1), (8, 3), (-8, 8)])
def test_batch_and_shards(tasks, batch_size, num_shards):
  with pytest.raises(
    ConfigError, match=f"BATCH_SIZE {batch_size} must be a positive multiple of .* data"
  ):
    _source(tasks, batch_size, num_shards=num_shards)


def test_token_ids_outside_the_table(tasks):
  with pytest.raises(DataError, match="'plain' holds token id 4999, .* has 4999 rows"):
    StepSource(tasks, 8, 0, 1, _VOCABULARY - 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_record(tmp_path, num_workers):
  task = _write(tmp_path, "task", 8, negatives=0)
  writer = array_record_module.ArrayRecordWriter(task.paths[0], "group_size:1")
  for _ in range(8):
    writer.write(b"\x02\0\0\0 no example")
  writer.close()
  with pytest.raises(DataError, match=f"{task.directory}: .*damaged; delete it to reb"):
    next(read_batches(_source([task]), 0, 1, num_workers))


@pytest.mark.parametrize("place", [70, 20_000])
def test_damaged_shard(tmp_path, place):
  """As many bytes as were written, but not those."""
  task = _write(tmp_path, "task", 400, negatives=0)
  path = task.directory / "examples-00000.array_record"
  content = bytearray(path.read_bytes())
  assert any(content[place : place + 64])
  content[place : place + 64] = bytes(64)
  path.write_bytes(content)
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task], 400).batch(0)


def test_shard_that_is_no_shard(tmp_path):
  task = _write(tmp_path, "task", 8, negatives=0)
  (task.directory / "examples-00000.array_record").write_bytes(b"short")
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task])


def test_lengths_of_other_examples(tmp_path):
  task = _write(tmp_path, "task", 8, negatives=0)
  lengths = np.load(task.directory / "lengths.npy")
  np.save(task.directory / "lengths.npy", lengths[::-1])
  source = _source([task])
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    source.batch(0)
