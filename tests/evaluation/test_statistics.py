"""Intervals and tests against what is known of samples."""

import numpy as np
import pytest
from scipy import stats

from embgemma.evaluation import metrics
from embgemma.evaluation.statistics import Sample, bootstrap, compare


def test_an_interval_is_scipys():
  scores = np.random.default_rng(0).beta(2, 3, size=400)
  found = bootstrap(Sample(scores), draws=10_000)
  theirs = stats.bootstrap(
    (scores,), np.mean, n_resamples=9999, method="percentile", random_state=1
  ).confidence_interval
  assert found.score == pytest.approx(scores.mean())
  assert found.low == pytest.approx(theirs.low, abs=2e-3)
  assert found.high == pytest.approx(theirs.high, abs=2e-3)


def test_an_interval_of_a_correlation_is_scipys():
  generator = np.random.default_rng(0)
  gold = generator.uniform(size=200)
  values = gold + generator.normal(0, 0.3, size=200)
  sample = Sample(values, lambda own, drawn: metrics.spearman(own[drawn], gold[drawn]))
  found = bootstrap(sample, draws=4000)
  theirs = stats.bootstrap(
    (values, gold),
    lambda a, b: stats.spearmanr(a, b).statistic,
    paired=True,
    vectorized=False,
    n_resamples=4000,
    method="percentile",
    random_state=1,
  ).confidence_interval
  assert found.score == pytest.approx(stats.spearmanr(values, gold).statistic)
  assert found.low == pytest.approx(theirs.low, abs=5e-3)
  assert found.high == pytest.approx(theirs.high, abs=5e-3)


def test_intervals_hold_the_mean_as_often_as_they_say():
  generator = np.random.default_rng(0)
  held = 0
  for _ in range(300):
    found = bootstrap(Sample(generator.normal(0.3, 1, 80)), draws=400)
    held += found.low <= 0.3 <= found.high
  assert 0.9 < held / 300 < 0.985


def test_the_test_is_scipys():
  generator = np.random.default_rng(0)
  first = generator.uniform(size=60)
  second = first + generator.normal(0.03, 0.1, size=60)
  found = compare(Sample(first), Sample(second), draws=10_000)
  theirs = stats.permutation_test(
    (first, second),
    lambda a, b: np.mean(b - a),
    permutation_type="samples",
    n_resamples=9999,
    random_state=2,
  )
  assert found.difference.score == pytest.approx(np.mean(second - first))
  assert found.p_value == pytest.approx(theirs.pvalue, abs=0.02)


def test_no_difference_and_a_clear_one():
  scores = np.random.default_rng(0).uniform(size=200)
  assert compare(Sample(scores), Sample(scores)).p_value == 1
  clear = compare(Sample(scores), Sample(scores + 0.1), draws=1000)
  assert clear.p_value == pytest.approx(1 / 1001)
  assert clear.difference.low > 0.09


def test_other_examples_are_refused():
  with pytest.raises(ValueError, match="3 and 4 examples: not the same"):
    compare(Sample(np.zeros(3)), Sample(np.zeros(4)))
  with pytest.raises(ValueError, match="no examples"):
    Sample(np.zeros(0))
