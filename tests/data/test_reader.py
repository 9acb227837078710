"""Batches depend on seed, step and batch size, and on nothing else."""

import dataclasses

import numpy as np
import pytest
from array_record.python import array_record_module

from embgemma.data import packing
from embgemma.data.cache import CachedTask, Example, encode_example
from embgemma.data.reader import StepSource, read_batches, scheduled_task
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


def _write(directory, name, sizes, rate=1.0, negatives=2) -> CachedTask:
  """A cache of shards of the given sizes; examples have 0 to `negatives` negatives."""
  directory = directory / name
  directory.mkdir()
  rng = np.random.default_rng(len(name))
  number = 0
  for shard, size in enumerate(sizes):
    path = directory / f"examples-{shard:05d}.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(size):
      example = _example(rng, number, number % (negatives + 1))
      writer.write(encode_example(example))
      number += 1
    writer.close()
  statistics = {
    "examples": number,
    "max_token_id": _VOCABULARY - 1,
    "max_negatives": negatives,
  }
  return CachedTask(name, rate, directory, statistics)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  directory = tmp_path_factory.mktemp("caches")
  return [
    _write(directory, "plain", [70, 35], rate=3.0),
    _write(directory, "bare", [50], rate=1.0, negatives=0),
  ]


def _source(tasks, batch_size=8, seed=3, num_shards=1) -> StepSource:
  return StepSource(tasks, batch_size, seed, num_shards, _VOCABULARY)


def _texts(batch) -> list[list[int]]:
  """Token ids of every slot, the packing undone."""
  texts = batch.pairs.texts
  flat = texts.tokens.reshape(texts.num_shards, -1)
  shards = np.repeat(np.arange(texts.num_shards), len(texts.starts) // len(flat))
  return [
    flat[shard, start : start + length].tolist()
    for shard, start, length in zip(shards, texts.starts, texts.lengths, strict=True)
  ]


def _joined(words) -> np.ndarray:
  words = words.astype(np.uint64)
  return words[:, 0] | words[:, 1] << np.uint64(32)


def _roles(batch) -> tuple[list, list, list]:
  """Queries, positives and negatives, example by example."""
  texts = np.empty(len(batch.pairs.texts.starts), object)
  texts[:] = _texts(batch)
  size = len(batch.pairs.query_hash)
  shards = batch.pairs.texts.num_shards
  roles = packing.split_roles(texts[:, None], shards, size)
  return tuple(role[..., 0].tolist() for role in roles)


def _numbers(batch) -> list[int]:
  return [text[0] for text in _roles(batch)[0]]


def _assert_same(a, b):
  assert (a.step, a.task, a.real_tokens) == (b.step, b.task, b.real_tokens)
  for field in dataclasses.fields(a.pairs):
    if field.name != "texts":
      np.testing.assert_array_equal(
        getattr(a.pairs, field.name), getattr(b.pairs, field.name)
      )
  assert _roles(a) == _roles(b)


def test_a_batch_is_its_examples(tasks):
  source = _source(tasks)
  for step in range(6):
    batch = source.batch(step)
    negatives = {"plain": 2, "bare": 0}[batch.task]
    query, positive, negative = _roles(batch)
    numbers = np.array(_numbers(batch))
    assert [text[0] for text in positive] == numbers.tolist()
    assert batch.pairs.negative_mask.shape == (8, negatives)
    counts = numbers % (negatives + 1)
    np.testing.assert_array_equal(batch.pairs.negative_mask.sum(axis=1), counts)
    for number, count, own in zip(numbers, counts, negative, strict=True):
      empty = negatives - count
      assert [text[:1] for text in own] == [[number]] * count + [[]] * empty
    hashes = numbers.astype(np.uint64) << np.uint64(33)
    np.testing.assert_array_equal(_joined(batch.pairs.query_hash), hashes)
    np.testing.assert_array_equal(_joined(batch.pairs.positive_hash), hashes + 1)
    assert batch.real_tokens == sum(map(len, _texts(batch)))
    assert query != positive


def test_number_of_shards_changes_no_example(tasks):
  one = _source(tasks)
  for num_shards in (2, 4, 8):
    many = _source(tasks, num_shards=num_shards)
    for step in range(8):
      batch = many.batch(step)
      assert batch.pairs.texts.num_shards == num_shards
      _assert_same(batch, one.batch(step))


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
  task = _write(tmp_path, "task", [examples], negatives=0)
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
  task = _write(tmp_path, "task", [15], negatives=0)
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
  task = _write(tmp_path, "task", [8], negatives=0)
  writer = array_record_module.ArrayRecordWriter(task.paths[0], "group_size:1")
  for _ in range(8):
    writer.write(b"\x02\0\0\0 no example")
  writer.close()
  with pytest.raises(DataError, match=f"{task.directory}: .*damaged; delete it to reb"):
    next(read_batches(_source([task]), 0, 1, num_workers))


@pytest.mark.parametrize("place", [70, 20_000])
def test_damaged_shard(tmp_path, place):
  """As many bytes as were written, but not those."""
  task = _write(tmp_path, "task", [400], negatives=0)
  path = task.directory / "examples-00000.array_record"
  content = bytearray(path.read_bytes())
  assert any(content[place : place + 64])
  content[place : place + 64] = bytes(64)
  path.write_bytes(content)
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task], 400).batch(0)


def test_shard_that_is_no_shard(tmp_path):
  task = _write(tmp_path, "task", [8], negatives=0)
  (task.directory / "examples-00000.array_record").write_bytes(b"short")
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task])
