"""Batches depend on seed, step and batch size, and on nothing else."""

import hashlib
import pathlib

import numpy as np
import pytest
from array_record.python import array_record_module

from embgemma.data import teacher_vectors
from embgemma.data.reader import Shards, StepSource, read_batches
from embgemma.data.records import Example
from embgemma.data.schedule import RecordSchedule
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.vector_store import VectorStore
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


def _made(size, negatives, seed=5):
  """Examples that have 0 to `negatives` negatives in turn."""
  rng = np.random.default_rng(seed)
  return (_example(rng, i, i % (negatives + 1)) for i in range(size))


@pytest.fixture(scope="module")
def tasks(cached, tmp_path_factory):
  directory = tmp_path_factory.mktemp("caches")
  return [
    cached(directory, "plain", _made(105, 2), rate=3.0),
    cached(directory, "bare", _made(50, 0)),
  ]


@pytest.fixture
def make_task(cached, tmp_path):
  return lambda size: cached(tmp_path, "task", _made(size, 0))


def _source(
  tasks, batch_size=8, seed=3, num_shards=1, own=None, avoid_duplicates=False, **options
) -> StepSource:
  schedule = RecordSchedule(tasks, batch_size, seed, _VOCABULARY, avoid_duplicates)
  return StepSource(schedule, Shards(num_shards, own), **options)


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
  for name in ("step", "task", "epoch", "real_tokens", "duplicates"):
    assert getattr(a, name) == getattr(b, name)
  assert a.records.tolist() == b.records.tolist()
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
    tokens = [group.tokens for group in batch.arrays.groups]
    assert batch.slots == sum(array.size for array in tokens)
    assert total <= batch.slots
    if microbatch_tokens and num_shards == 1:
      assert max(map(len, tokens)) > 1


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
  part = _source(tasks, num_shards=4, microbatch_tokens=128, own=own)
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


def test_worker_processes_keep_order_and_content(taught):
  tasks, teachers, _ = taught
  source = _source(tasks, avoid_duplicates=True, teachers=teachers)
  batches = read_batches(source, 17, num_threads=2, num_workers=4)
  for step, batch in zip(range(17, 57), batches, strict=False):
    expected = source.batch(step)
    _assert_same(batch, expected)
    for name in ("teacher", "teacher_mask"):
      ours, theirs = getattr(batch.arrays, name), getattr(expected.arrays, name)
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("examples", "size"), [(105, 8), (16, 8), (9, 9), (1, 1)])
def test_an_epoch_has_every_example_at_most_once(make_task, examples, size):
  task = make_task(examples)
  source = _source([task], size)
  steps = examples // size
  orders = []
  for epoch in range(3):
    batches = [source.batch(epoch * steps + step) for step in range(steps)]
    assert {batch.epoch for batch in batches} == {epoch}
    numbers = [number for batch in batches for number in _numbers(batch)]
    assert numbers == np.concatenate([batch.records for batch in batches]).tolist()
    assert len(set(numbers)) == steps * size
    assert set(numbers) <= set(range(examples))
    orders.append(tuple(numbers))
  if examples > 10:
    assert len(set(orders)) == 3
    assert tuple(sorted(orders[0])) != orders[0]


def test_what_an_epoch_leaves_out_changes(make_task):
  task = make_task(15)
  source = _source([task], 8)
  left_out = {frozenset(range(15)) - set(_numbers(source.batch(e))) for e in range(20)}
  assert len(left_out) > 10


@pytest.mark.parametrize(("batch_size", "num_shards"), [(8, 3), (12, 8)])
def test_batch_and_shards(tasks, batch_size, num_shards):
  with pytest.raises(
    ConfigError, match=f"BATCH_SIZE {batch_size} must be a positive multiple of .* data"
  ):
    _source(tasks, batch_size, num_shards=num_shards)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_record(make_task, num_workers):
  task = make_task(8)
  writer = array_record_module.ArrayRecordWriter(task.paths[0], "group_size:1")
  for _ in range(8):
    writer.write(b"\x02\0\0\0 no example")
  writer.close()
  with pytest.raises(DataError, match=f"{task.directory}: .*damaged; delete it to reb"):
    next(read_batches(_source([task]), 0, 1, num_workers))


@pytest.mark.parametrize("place", [70, 20_000])
def test_damaged_shard(make_task, place):
  """As many bytes as were written, but not those."""
  task = make_task(400)
  path = task.directory / "examples-00000-00000.array_record"
  content = bytearray(path.read_bytes())
  assert any(content[place : place + 64])
  content[place : place + 64] = bytes(64)
  path.write_bytes(content)
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task], 400).batch(0)


def test_shard_that_is_no_shard(make_task):
  task = make_task(8)
  (task.directory / "examples-00000-00000.array_record").write_bytes(b"short")
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task])


def test_lengths_of_other_examples(make_task):
  task = make_task(8)
  lengths = np.load(task.directory / "lengths.npy")
  np.save(task.directory / "lengths.npy", lengths[::-1])
  source = _source([task])
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    source.batch(0)


def _teach(task, examples, width=6, dtype="float16", keep=0.8):
  """Random vectors of most texts of a task; and the same by the text's tokens."""
  rng = np.random.default_rng(len(task.name))
  directory = pathlib.Path(task.directory)
  store = VectorStore.create_or_open(directory / "vectors", width, dtype, "random")
  rows, by_text = np.full(task.lengths().shape, -1), {}
  for record, example in enumerate(examples):
    for column, tokens in enumerate(example.tokens):
      if rng.random() < keep:
        rows[record, column] = len(by_text)
        vector = rng.normal(size=width)
        by_text[tuple(tokens.tolist())] = vector / np.linalg.norm(vector)
  vectors = np.array(list(by_text.values()), dtype)
  store.add(np.arange(len(vectors), dtype=np.uint64), vectors)
  teacher_vectors.write(directory, "t", store, rows.shape, [rows])
  kept = dict(zip(by_text, vectors, strict=True))
  return TeacherVectors(directory, "t"), kept


@pytest.fixture(scope="module")
def taught(cached, tmp_path_factory):
  """Tasks of which all but the last have a teacher, the first is symmetric; vectors."""
  directory = tmp_path_factory.mktemp("taught")
  made = {"pairs": (160, 0), "triples": (130, 2), "alone": (90, 1)}
  tasks, teachers, by_text = [], [], {}
  for seed, (name, sizes) in enumerate(made.items()):
    examples = list(_made(*sizes, seed))
    tasks.append(cached(directory, name, examples, symmetric=name == "pairs"))
    teachers.append(None)
    if name != "alone":
      teachers[-1], own = _teach(tasks[-1], examples)
      by_text |= own
  return tasks, teachers, by_text


def _check_teacher(batch, by_text, num_shards):
  """Each slot has the vector of the text that lies there, if that text has one."""
  pairs = batch.arrays
  assert pairs.teacher.shape == (len(pairs.slots), 6)
  shards = (np.split(a, num_shards) for a in (pairs.slots, pairs.teacher))
  masks = np.split(pairs.teacher_mask, num_shards)
  for shard, (slots, vectors, mask) in enumerate(zip(*shards, masks, strict=True)):
    texts = _shard_texts(pairs, shard, num_shards)
    for slot, vector, present in zip(slots, vectors, mask, strict=True):
      expected = by_text.get(tuple(texts[slot]))
      assert present == (expected is not None)
      np.testing.assert_array_equal(
        vector, np.zeros(6) if expected is None else expected
      )
  return int(pairs.teacher_mask.sum())


@pytest.mark.parametrize("num_shards", [1, 4])
def test_teacher_vectors_are_those_of_the_texts(taught, num_shards):
  tasks, teachers, by_text = taught
  source = _source(tasks, num_shards=num_shards, teachers=teachers)
  seen = {}
  for step in range(24):
    batch = source.batch(step)
    assert batch.arrays.teacher.dtype == np.float16
    found = _check_teacher(batch, by_text, num_shards)
    seen[batch.task] = seen.get(batch.task, 0) + found
  assert seen["alone"] == 0 < min(seen["pairs"], seen["triples"])


def test_a_symmetric_task_swaps_all_that_its_texts_have(taught):
  """Both texts of an example, their hashes and their vectors change places together."""
  tasks, teachers, by_text = taught
  pairs, examples = tasks[:1], list(_made(160, 0, 0))
  source = _source(pairs, 16, num_shards=2, teachers=teachers[:1])
  swapped = 0
  for step in range(10):
    batch = source.batch(step)
    assert _check_teacher(batch, by_text, 2)
    for query, positive, _, query_hash, positive_hash, _ in _examples(batch, 2):
      example = examples[query[0]]
      texts = [tokens.tolist() for tokens in example.tokens]
      hashes = example.hashes.tolist()
      if query == texts[1]:
        swapped += 1
        texts, hashes = texts[::-1], hashes[::-1]
      assert [[query, positive], [query_hash, positive_hash]] == [texts, hashes]
  assert 50 < swapped < 110


def test_without_teachers_there_are_no_arrays(taught):
  tasks, _, _ = taught
  for teachers in (None, [None] * 3):
    pairs = _source(tasks, teachers=teachers).batch(0).arrays
    assert pairs.teacher is None
    assert pairs.teacher_mask is None


def test_one_dtype_for_all_tasks(cached, taught, tmp_path):
  tasks, teachers, _ = taught
  examples = list(_made(90, 1))
  task = cached(tmp_path, "precise", examples)
  precise, _ = _teach(task, examples, dtype="float32")
  source = _source([tasks[1], task], teachers=[teachers[1], precise])
  batches = [source.batch(step).arrays for step in range(8)]
  assert {pairs.teacher.dtype for pairs in batches} == {np.dtype(np.float32)}


def test_teachers_of_two_widths(cached, taught, tmp_path):
  tasks, teachers, _ = taught
  examples = list(_made(90, 1))
  task = cached(tmp_path, "wide", examples)
  wide, _ = _teach(task, examples, width=8)
  with pytest.raises(
    ConfigError, match="task 'wide' have width 8, those of task 'pairs' 6; .*teach"
  ):
    _source([*tasks, task], teachers=[*teachers, wide])


def test_a_teacher_of_other_examples(taught):
  tasks, teachers, _ = taught
  with pytest.raises(DataError, match=f"{tasks[0].directory}: .* run `embgemma teach`"):
    _source(tasks[:1], teachers=teachers[1:2])


def _digest(batches) -> list[str]:
  """Of everything in each batch that may not depend on who reads it."""
  found = []
  for batch in batches:
    parts = [batch.task, batch.epoch, batch.records.tobytes(), batch.real_tokens]
    found.append(hashlib.blake2b(repr(parts).encode()).hexdigest())
  return found


def _of_processes(tasks, teachers, processes, steps):
  """Batches of 8 shards as processes read them; and their arrays, put together."""
  each = 8 // processes
  shards = [range(p * each, (p + 1) * each) for p in range(processes)]
  sources = [
    _source(tasks, 16, num_shards=8, own=own, avoid_duplicates=True, teachers=teachers)
    for own in shards
  ]
  for step in steps:
    parts = [source.batch(step) for source in sources]
    assert len(set(_digest(parts))) == 1
    arrays = [
      (
        p.slots,
        p.query_hash,
        p.positive_hash,
        p.negative_mask,
        p.teacher,
        p.teacher_mask,
      )
      for p in (part.arrays for part in parts)
    ]
    yield parts[0], [np.concatenate(a) for a in zip(*arrays, strict=True)]


def test_processes_and_resuming_see_the_same_examples(taught):
  """And the same teacher vectors, in the same places."""
  tasks, teachers, _ = taught
  expected = list(_of_processes(tasks, teachers, 1, range(90)))
  assert len({batch.task for batch, _ in expected}) == 3
  assert max(batch.epoch for batch, _ in expected) > 3
  steps = [*range(8), *range(75, 90)]
  for processes in (2, 8):
    found = _of_processes(tasks, teachers, processes, steps)
    for step, (batch, arrays) in zip(steps, found, strict=True):
      one, whole = expected[step]
      assert _digest([batch]) == _digest([one])
      for ours, theirs in zip(arrays, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
