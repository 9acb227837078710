"""Numbers of spaces whose values are known."""

import numpy as np
import pytest
from scipy import stats

from embgemma.evaluation import analysis


def units(generator, count, width):
  vectors = generator.standard_normal((count, width)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_an_even_space():
  generator = np.random.default_rng(0)
  documents = units(generator, 1500, 16)
  found = analysis.analyse(documents, documents, np.arange(1500), [5] * 1500)
  assert found.alignment == pytest.approx(0, abs=1e-6)
  assert found.anisotropy == pytest.approx(0, abs=0.005)
  assert 15.9 < found.effective_rank <= 16
  # Of a sphere of 16 dimensions: the mean of exp(-4 + 4 t) over cosines t.
  t = np.linspace(-1, 1, 200_001)
  density = (1 - t**2) ** ((16 - 3) / 2)
  expected = np.log(np.sum(density * np.exp(4 * t - 4)) / np.sum(density))
  assert found.uniformity == pytest.approx(expected, abs=0.02)
  assert found.length_bias == 0


def test_a_space_of_one_direction():
  documents = np.tile(np.eye(4, dtype=np.float32)[:1], (20, 1))
  found = analysis.analyse(documents[:5], documents, np.zeros(5, int), range(20))
  assert found.anisotropy == pytest.approx(1)
  assert found.uniformity == pytest.approx(0)
  assert found.effective_rank == pytest.approx(1)


def test_hubs_and_lengths():
  """The first documents are nearest to all queries, and the longest."""
  generator = np.random.default_rng(0)
  documents = units(generator, 200, 8)
  queries = units(generator, 50, 8)
  hub = np.mean(queries, axis=0)
  documents[:3] = hub / np.linalg.norm(hub)
  queries = queries + 3 * documents[0]
  queries /= np.linalg.norm(queries, axis=1, keepdims=True)
  found = analysis.analyse(
    queries, documents, np.zeros(50, int), [100 - i // 2 for i in range(200)]
  )
  cosines = documents @ documents.T
  np.fill_diagonal(cosines, -np.inf)
  counts = np.bincount(
    np.argsort(-cosines, axis=1, kind="stable")[:, :10].ravel(), minlength=200
  )
  assert found.hubness == pytest.approx(stats.skew(counts), rel=0.1)
  aligned = np.mean(np.sum((queries - documents[0]) ** 2, axis=1))
  assert found.alignment == pytest.approx(aligned, rel=1e-5)


def test_bias_of_length():
  """Queries lie where the long documents are."""
  generator = np.random.default_rng(0)
  vectors = units(generator, 300, 8)
  vectors[100:] += 2 * np.eye(8)[0]
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  documents, queries = vectors[:200], vectors[200:]
  lengths = [10] * 100 + [500] * 100
  found = analysis.analyse(queries, documents, np.arange(100, 200), lengths)
  assert found.length_bias > 0.5


def test_bias_of_language():
  """All queries lie among the German half of the documents; relevant ones aside."""
  generator = np.random.default_rng(0)
  documents = units(generator, 100, 16)
  documents[:50] += 5 * np.eye(16)[0]
  documents /= np.linalg.norm(documents, axis=1, keepdims=True)
  queries = np.tile(np.eye(16, dtype=np.float32)[:1], (6, 1))
  languages = ["de"] * 50 + ["en"] * 50
  common = (queries, documents, np.arange(6), [1] * 100)
  german = analysis.analyse(*common, ["de"] * 5 + [""], languages)
  assert german.language_bias == pytest.approx(1 - 49 / 99)
  english = analysis.analyse(*common, ["en"] * 6, languages)
  assert english.language_bias == pytest.approx(-50 / 99)
  assert analysis.analyse(*common).language_bias is None
  alone = analysis.analyse(*common, ["de"] * 6, ["de"] * 100)
  assert alone.language_bias is None, "nothing to choose from"
  assert analysis.analyse(*common, [""] * 6, [""] * 100).language_bias is None


def test_many_pairs_are_drawn(monkeypatch):
  documents = units(np.random.default_rng(0), 300, 8)
  every = analysis._pair_cosines(documents).mean()
  monkeypatch.setattr(analysis, "_PAIRS", 40_000)
  assert analysis._pair_cosines(documents).shape == (40_000,)
  assert analysis._pair_cosines(documents).mean() == pytest.approx(every, abs=0.01)


def test_one_document():
  vector = np.ones((1, 1), np.float32)
  with pytest.raises(ValueError, match="two documents"):
    analysis.analyse(vector, vector, np.zeros(1, int), [1])
