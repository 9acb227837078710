"""What a task's cache holds. `build` is tested in test_seqio_registry.py."""

import grain
import numpy as np
import pytest

from embgemma.data import cache, shard_writer, task_index
from embgemma.data.records import Example, decode_records
from embgemma.errors import DataError


def _examples(counts, longest=30):
  rng = np.random.default_rng(0)
  for count in counts:
    sizes = rng.integers(1, longest + 1, count)
    sizes[0] = longest
    tokens = tuple(rng.integers(0, 99, n).astype(np.int32) for n in sizes)
    yield Example(tokens, rng.integers(0, 2**63, count, dtype=np.uint64))


@pytest.fixture
def write(tmp_path, write_examples):
  def write(counts, longest=30) -> cache.CachedTask:
    examples = _examples(counts, longest)
    statistics = write_examples(tmp_path, examples, (longest, 100, 100))
    return cache.CachedTask("task", 1.0, tmp_path, statistics)

  return write


@pytest.mark.parametrize("longest", [30, 70_000])
def test_lengths_are_those_of_the_texts(write, monkeypatch, longest):
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 4)
  counts = [2, 3, 2, 3, 2, 2, 5, 4, 2]
  task = write(counts, longest)
  assert len(task.paths) == 3
  lengths = task.lengths()
  assert isinstance(lengths, np.memmap)
  source = grain.sources.ArrayRecordDataSource(task.paths)
  records = decode_records([source[i] for i in range(len(counts))], 5)
  np.testing.assert_array_equal(lengths, records.lengths)
  np.testing.assert_array_equal((lengths > 0).sum(axis=1), counts)
  statistics = task.statistics
  assert statistics["examples"] == len(counts)
  assert statistics["max_negatives"] == 3
  assert statistics["max_text_tokens"] == longest
  assert statistics["tokens"] == lengths.sum()
  assert statistics["truncated"] >= len(counts)


def test_segments(tmp_path, monkeypatch, write_examples):
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 4)
  monkeypatch.setattr(task_index, "_BLOCK", 4)
  statistics = write_examples(tmp_path, _examples([1] * 9), None)
  task = cache.CachedTask("task", 1.0, tmp_path, statistics)
  assert task.texts == 1
  assert task.lengths().shape == (9, 1)
  source = grain.sources.ArrayRecordDataSource(task.paths)
  records = decode_records([source[i] for i in range(9)], 1)
  np.testing.assert_array_equal(task.lengths(), records.lengths)
  ids = [
    records.words[start : start + length]
    for start, length in zip(records.starts[:, 0], records.lengths[:, 0], strict=True)
  ]
  expected = {
    "examples": 9,
    "documents": 9,
    "short": 0,
    "tokens": 270,
    "max_text_tokens": 30,
    "max_token_id": np.concatenate(ids).max(),
    "lengths": {"text": [0, 0, 9, *[0] * 7]},
  }
  assert expected.items() <= statistics.items()


@pytest.mark.parametrize(
  ("damage", "message"),
  [("gone", "cannot be read"), ("cut", "cannot be read"), ("other", r"is \(2, 2\), ")],
)
def test_damaged_lengths(tmp_path, write, damage, message):
  task = write([2, 3, 2])
  path = tmp_path / "lengths.npy"
  if damage == "gone":
    path.unlink()
  elif damage == "cut":
    path.write_bytes(path.read_bytes()[:-1])
  else:
    np.save(path, np.ones((2, 2), np.uint16))
  with pytest.raises(DataError, match=f"lengths.npy {message}"):
    task.lengths()
