import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk_metrics

from embgemma.evaluation import metrics


def test_ndcg_by_hand():
  judgements = {"a": 3, "b": 2, "c": 1, "d": 0}
  # Gains 1, 0 (judged 0), 3, 0 (unjudged), 2; ideal 3, 2, 1.
  dcg = 1 + 3 / math.log2(4) + 2 / math.log2(6)
  ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
  value = metrics.ndcg(["c", "d", "a", "x", "b"], judgements, k=5)
  assert value == pytest.approx(dcg / ideal, abs=1e-12)


def test_ndcg_ideal_list_is_cut_at_k_too():
  judgements = {"a": 1, "b": 1, "c": 1}
  assert metrics.ndcg(["b", "a", "x"], judgements, k=2) == 1.0
  assert metrics.ndcg(["b", "a", "x"], judgements, k=3) < 1.0


def test_grades_below_zero_count_as_zero():
  assert metrics.ndcg(["spam", "a"], {"spam": -2, "a": 1}, 10) == pytest.approx(
    1 / math.log2(3)
  )
  assert metrics.recall(["spam"], {"spam": -2, "a": 1}, 10) == 0.0
  assert metrics.reciprocal_rank(["spam", "a"], {"spam": -2, "a": 1}, 10) == 0.5


@given(
  st.lists(st.integers(0, 4), min_size=2, max_size=30),
  st.integers(1, 40),
  st.randoms(use_true_random=False),
)
def test_ndcg_equals_sklearn(grades, k, random):
  ranking = list(range(len(grades)))
  random.shuffle(ranking)
  scores = np.empty(len(grades))
  scores[ranking] = -np.arange(len(grades), dtype=np.float64)
  expected = sk_metrics.ndcg_score([grades], [scores], k=k)
  value = metrics.ndcg(ranking, dict(enumerate(grades)), k)
  assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
  ("k", "reciprocal", "recall"), [(1, 0.0, 0.0), (2, 0.5, 1 / 3), (4, 0.5, 2 / 3)]
)
def test_reciprocal_rank_and_recall(k, reciprocal, recall):
  judgements = {"a": 1, "b": 2, "missed": 1, "d": 0}
  ranking = ["d", "b", "x", "a"]
  assert metrics.reciprocal_rank(ranking, judgements, k) == reciprocal
  assert metrics.recall(ranking, judgements, k) == recall


@pytest.mark.parametrize(
  "metric", [metrics.ndcg, metrics.reciprocal_rank, metrics.recall]
)
def test_nothing_relevant_and_nothing_ranked_are_zero(metric):
  assert metric(["a"], {"a": 0}, 10) == 0.0
  assert metric([], {"a": 1}, 10) == 0.0


@given(
  st.lists(
    st.tuples(st.integers(-3, 3), st.floats(-5, 5, width=32)), min_size=3, max_size=40
  )
)
def test_spearman_equals_scipy_with_ties(pairs):
  a, b = np.array(pairs, np.float64).T
  if len(set(a)) == 1 or len(set(b)) == 1:
    assert metrics.spearman(a, b) == 0.0
  else:
    expected = stats.spearmanr(a, b).statistic
    assert metrics.spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
  # Hits at ranks 1 and 3 of 4: (1/1 + 2/3) / 2.
  value = metrics.average_precision(
    np.array([0.9, 0.5, 0.4, 0.1]), np.array([1, 0, 1, 0])
  )
  assert value == pytest.approx(5 / 6, abs=1e-12)
  assert metrics.average_precision(np.array([0.9]), np.array([0])) == 0.0


@given(
  st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=1, max_size=40)
)
def test_average_precision_equals_sklearn_with_ties(rows):
  scores, labels = np.array(rows).T
  if labels.any():
    expected = sk_metrics.average_precision_score(labels, scores)
    value = metrics.average_precision(scores, labels)
    assert value == pytest.approx(expected, abs=1e-12)
