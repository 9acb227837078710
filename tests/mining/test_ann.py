"""The approximate index against exact search."""

import ctypes
import sys

import numpy as np
import pytest

from embgemma.errors import ConfigError
from embgemma.mining import ann
from embgemma.mining.ann import AnnOptions, open_index


class _Table:
  def __init__(self, vectors):
    self.vectors = vectors
    self.most = 0

  def passages(self, which):
    self.most = max(self.most, len(which))
    return self.vectors[which]

  def passage_range(self, start, stop):
    return self.passages(np.arange(start, stop))


def _unit(vectors):
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  return (vectors / norms).astype(np.float32)


@pytest.fixture(scope="module")
def table():
  """Vectors in clusters, as those of texts are."""
  generator = np.random.default_rng(0)
  centers = generator.standard_normal((50, 24))
  own = centers[generator.integers(0, 50, 3000)]
  return _Table(_unit(own + 0.4 * generator.standard_normal(own.shape)))


def test_most_neighbours_are_found(table, tmp_path, monkeypatch):
  monkeypatch.setattr(ann, "_BATCH", 256)
  options = AnnOptions(lists=30, nprobe=6, part=1000)
  index = open_index(tmp_path, 3000, 24, table, options, [].append)
  generator = np.random.default_rng(1)
  near = generator.choice(3000, 200, replace=False)
  queries = _unit(table.vectors[near] + 0.1 * generator.standard_normal((200, 24)))
  found = index.search(queries, 10)
  exact = np.argsort(-(queries @ table.vectors.T), axis=1)[:, :10]
  recall = np.mean(
    [len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]
  )
  assert recall >= 0.9
  assert table.most <= 40 * 30  # the sample; else no more than a batch


def test_building_goes_on_where_it_was_killed(table, tmp_path, monkeypatch):
  options = AnnOptions(lists=8, part=700)
  whole = open_index(tmp_path / "whole", 3000, 24, table, options, [].append)
  written = ann._write

  for _ in range(20):
    done = 0

    def write_one(index, path):
      nonlocal done
      if done:
        raise KeyboardInterrupt
      written(index, path)
      done += 1

    monkeypatch.setattr(ann, "_write", write_one)
    try:
      parts = open_index(tmp_path / "parts", 3000, 24, table, options, [].append)
      break
    except KeyboardInterrupt:
      continue
  queries = table.vectors[:50]
  np.testing.assert_array_equal(whole.search(queries, 9), parts.search(queries, 9))


def test_fewer_passages_than_asked_for(table, tmp_path):
  options = AnnOptions(lists=50)
  index = open_index(tmp_path, 3, 24, table, options, [].append)
  found = index.search(table.vectors[:2], 5)
  assert sorted(found[0]) == [-1, -1, 0, 1, 2]


def test_nothing_is_printed(table, tmp_path, capfd):
  """Reports are on stdout; faiss says there what it does with files."""
  options = AnnOptions(lists=8, part=700)
  open_index(tmp_path, 3000, 24, table, options, [].append)
  ctypes.CDLL(None).fflush(None)
  assert capfd.readouterr().out == ""
  print("here", flush=True)
  assert capfd.readouterr().out == "here\n"


def test_without_faiss(monkeypatch):
  monkeypatch.setitem(sys.modules, "faiss", None)
  with pytest.raises(ConfigError, match=r"embgemma\[ann\]: pip install"):
    ann.faiss()


@pytest.mark.parametrize("name", ["lists", "nprobe", "part"])
def test_options_that_are_not_positive(name):
  with pytest.raises(ConfigError, match=f"ANN {name} must be at least 1"):
    AnnOptions(**{name: 0})
