"""Batches of sequences depend on seed, step and batch size, and on nothing else."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from embgemma.data.cache import CachedTask
from embgemma.data.denoisers import Sentinels, causal_lm, longest_segment, t5gemma2
from embgemma.data.denoising import Corruption
from embgemma.data.reader import Shards, read_batches
from embgemma.data.records import Example
from embgemma.data.schedule import RecordSchedule
from embgemma.data.sources import BuiltinSource, TextFileSource
from embgemma.data.text_reader import TextSource, held_out_segments
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import ConfigError, DataError

_FIRST = 4000  # sentinel
_ROWS = 5000  # of the model's table
_LENGTHS = {"inputs": 64, "targets": 64}
_LONGEST = 48


def _corruption(denoisers=None, lengths=_LENGTHS, longest=_LONGEST) -> Corruption:
  denoisers = denoisers or t5gemma2()
  return Corruption(denoisers, lengths, longest, Sentinels(_FIRST, 50), 2, 1)


def _write(write_examples, directory, name, size, rate=1.0) -> CachedTask:
  """Segments of 2 to 48 tokens; the first token of each is its record's number."""
  directory = directory / name
  directory.mkdir()
  rng = np.random.default_rng(len(name))

  def segment(number):
    tokens = [1000 + number, *rng.integers(10, 900, rng.integers(1, _LONGEST))]
    return Example((np.array(tokens, np.int32),), np.array([number], np.uint64))

  statistics = write_examples(directory, map(segment, range(size)), None)
  return CachedTask(name, rate, epath.Path(directory), statistics)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, write_examples):
  directory = tmp_path_factory.mktemp("caches")
  return [
    _write(write_examples, directory, "prose", 210, rate=3.0),
    _write(write_examples, directory, "code", 100),
  ]


def _source(
  tasks, batch_size=16, seed=3, num_shards=1, corruption=None, own=None, **options
):
  schedule = RecordSchedule(tasks, batch_size, seed, _ROWS)
  shards = Shards(num_shards, own)
  return TextSource(schedule, corruption or _corruption(), shards, **options)


def _side(ids, tokens) -> list[tuple[int, ...]]:
  return [tuple(tokens[ids == i].tolist()) for i in range(1, 1 + int(ids.max()))]


def _examples(batch) -> list[tuple[tuple[int, ...], ...]]:
  """Inputs and targets of each example, sorted."""
  arrays, found = batch.arrays, []
  for at in np.ndindex(arrays.targets.shape[:2]):
    targets = _side(arrays.target_ids[at], arrays.targets[at])
    inputs: list[tuple[int, ...]] = [()] * len(targets)
    if arrays.inputs is not None:
      inputs = _side(arrays.input_ids[at], arrays.inputs[at])
    found += zip(inputs, targets, strict=True)
  return sorted(found)


def _number(example) -> int:
  """The record's number: the only token from 1000 on that is no sentinel."""
  (number,) = [t for part in example for t in part if 1000 <= t < _FIRST]
  return number - 1000


def _numbers(batch) -> list[int]:
  return sorted(map(_number, _examples(batch)))


def _assert_same(a, b):
  assert (a.step, a.task, a.real_tokens, a.slots) == (
    *(b.step, b.task, b.real_tokens, b.slots),
  )
  for name in ("inputs", "targets", "decoder_inputs", "target_ids", "weights"):
    np.testing.assert_array_equal(getattr(a.arrays, name), getattr(b.arrays, name))


@pytest.mark.parametrize("microbatch_tokens", [None, 512])
@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_neither_shards_nor_microbatches_change_an_example(
  tasks, num_shards, microbatch_tokens
):
  one = _source(tasks)
  many = _source(tasks, num_shards=num_shards, microbatch_tokens=microbatch_tokens)
  for step in range(8):
    ours, expected = many.batch(step), one.batch(step)
    assert (ours.task, ours.real_tokens) == (expected.task, expected.real_tokens)
    assert _examples(ours) == _examples(expected)
    assert len(_examples(ours)) == 16
    assert ours.real_tokens == sum(len(a) + len(b) for a, b in _examples(ours))
    microbatches, rows, width = ours.arrays.targets.shape
    assert width == 64
    assert ours.slots == microbatches * rows * 128
    if microbatch_tokens:
      assert rows // num_shards <= 4


@pytest.mark.parametrize("own", [[0], [3], [0, 1], [3, 0]])
def test_a_process_has_its_part_of_the_batch(tasks, own):
  options = {"num_shards": 4, "microbatch_tokens": 256}
  whole = _source(tasks, **options)
  part = _source(tasks, own=own, **options)
  for step in range(6):
    ours, expected = part.batch(step), whole.batch(step)
    assert (ours.real_tokens, ours.slots) == (expected.real_tokens, expected.slots)
    for field in dataclasses.fields(ours.arrays):
      shards = np.split(getattr(expected.arrays, field.name), 4, axis=1)
      np.testing.assert_array_equal(
        getattr(ours.arrays, field.name),
        np.concatenate([shards[shard] for shard in own], axis=1),
      )


def test_the_schedule_is_that_of_pairs(tasks):
  """Tasks and records are drawn before any corruption, which changes neither."""
  source = _source(tasks)
  other = _source(tasks, corruption=_corruption(t5gemma2({"R": 6, "S": 7, "X": 8})))
  for step in range(6):
    batch = source.batch(step)
    assert len(set(_numbers(batch))) == 16
    assert _numbers(other.batch(step)) == _numbers(batch)
    assert other.batch(step).task == batch.task


def test_an_epoch_has_every_segment_once_and_the_next_corrupts_it_anew(
  tmp_path, write_examples
):
  task = _write(write_examples, tmp_path, "task", 64)
  source = _source([task])
  epochs = []
  for epoch in range(3):
    batches = [source.batch(4 * epoch + step) for step in range(4)]
    examples = [example for batch in batches for example in _examples(batch)]
    assert sorted(map(_number, examples)) == list(range(64))
    epochs.append({_number(example): example for example in examples})
  first, second, _ = epochs
  same = sum(first[number] == second[number] for number in first)
  # Two draws of S, a quarter of all pairs, are alike; few others are.
  assert 4 <= same <= 32


def test_the_seed_changes_the_corruption(tmp_path, write_examples):
  task = _write(write_examples, tmp_path, "task", 64)
  drawn = []
  for seed in (3, 3, 4):
    source = _source([task], 64, seed)
    drawn.append(_examples(source.batch(0)))
  assert drawn[0] == drawn[1]
  assert sorted(map(_number, drawn[2])) == sorted(map(_number, drawn[0]))
  assert len(set(drawn[0]) & set(drawn[2])) <= 32


@pytest.mark.parametrize(("num_threads", "num_workers"), [(1, 0), (4, 0), (2, 2)])
def test_resuming_is_skipping(tasks, num_threads, num_workers):
  source = _source(tasks)
  batches = read_batches(source, 7, num_threads, num_workers)
  for step, batch in zip(range(7, 14), batches, strict=False):
    assert batch.step == step
    _assert_same(batch, source.batch(step))


def test_few_shapes(tasks):
  source = _source(tasks[:1], 64)
  shapes = {source.batch(step).arrays.targets.shape for step in range(40)}
  assert len(shapes) <= 5
  plan = source.plans[0].typical
  assert (plan.microbatches, plan.rows, plan.targets) in shapes


def test_causal_segments_have_no_inputs(tasks):
  corruption = _corruption(causal_lm(), {"targets": 64})
  source = _source(tasks, corruption=corruption)
  batch = source.batch(0)
  assert batch.arrays.inputs is None
  assert batch.slots == batch.arrays.targets.size
  for _, targets in _examples(batch):
    assert 1000 <= targets[0] < _FIRST
    assert targets[-1] == 1
  again = _source(tasks, corruption=corruption, num_shards=4).batch(0)
  assert _examples(again) == _examples(batch)


def test_caches_of_other_data(tasks, tmp_path, write_examples):
  with pytest.raises(DataError, match=f"{tasks[0].directory} does not hold segments"):
    _source(tasks, corruption=_corruption(longest=int(tasks[0].lengths().max()) - 1))
  pair = Example((np.arange(9, dtype=np.int32),) * 2, np.arange(2, dtype=np.uint64))
  statistics = write_examples(tmp_path, [pair] * 16, (99, 99, 99))
  with pytest.raises(DataError, match="does not hold segments"):
    _source([CachedTask("pairs", 1.0, epath.Path(tmp_path), statistics)])


def test_batches_that_cannot_be(tasks):
  with pytest.raises(ConfigError, match="BATCH_SIZE 128 is larger than task 'code'"):
    _source(tasks, 128)
  with pytest.raises(ConfigError, match="BATCH_SIZE 16 must be a positive multiple of"):
    _source(tasks, 16, num_shards=3)


def test_damaged_cache(tmp_path, write_examples):
  task = _write(write_examples, tmp_path, "task", 16)
  lengths = np.load(task.directory / "lengths.npy")
  np.save(task.directory / "lengths.npy", lengths[::-1])
  with pytest.raises(DataError, match=f"{task.directory}: .*; delete it to rebuild"):
    _source([task]).batch(0)


def test_longest_segment_is_read(tmp_path, write_examples):
  """A cache of segments of exactly the budget."""
  longest = longest_segment(t5gemma2(), _LENGTHS)
  segment = Example((np.arange(10, 10 + longest, dtype=np.int32),), np.zeros(1, "u8"))
  statistics = write_examples(tmp_path, [segment] * 32, None)
  task = CachedTask("full", 1.0, epath.Path(tmp_path), statistics)
  batch = _source([task], 32, corruption=_corruption(longest=longest)).batch(0)
  assert len(_examples(batch)) == 32
  widest = max(max(len(a), len(b)) for a, b in _examples(batch))
  assert widest == 64


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  return train_vocabulary(["some words of a few letters " * 30], 520, path)


def test_held_out_segments(vocabulary, tmp_path):
  path = tmp_path / "held_out.txt"
  documents = ["some words " * 40, "a", "few letters"]
  path.write_text("\n\n".join(documents))
  source = TextFileSource(str(path))
  segments = held_out_segments(source, vocabulary, 16)
  assert max(map(len, segments)) <= 16
  assert min(map(len, segments)) >= 2
  joined = vocabulary.decode(np.concatenate(segments))
  assert joined == documents[0] + documents[2]  # one token is none
  assert len(held_out_segments(source, vocabulary, 16, limit=2)) == 2
  path.write_text("a\n")
  with pytest.raises(DataError, match="has no text to evaluate on"):
    held_out_segments(source, vocabulary, 16)


def test_held_out_segments_of_the_builtin_corpus(vocabulary, monkeypatch):
  def documents(task, split):
    return iter([{"text": f"{task} {split}"}])

  monkeypatch.setattr("embgemma.data.sources.builtin_corpus.documents", documents)
  (segment,) = held_out_segments(BuiltinSource("stdlib_modules"), vocabulary, 99)
  assert vocabulary.decode(segment) == "stdlib_modules validation"
