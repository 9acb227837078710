"""Proposals are mixtures, and find what is better."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.mixture_search import simplex


def quality(rates, best):
  """Highest at one mixture."""
  return 1 - np.sum((np.asarray(rates) - best) ** 2, axis=-1, keepdims=True)


@settings(max_examples=5)
@given(st.integers(2, 6), st.integers(1, 2), st.integers(0, 2), st.integers(0, 99))
def test_a_proposal_is_a_mixture(groups, objectives, pending, seed):
  generator = np.random.default_rng(seed)
  rates = generator.dirichlet(np.ones(groups), 6)
  scores = generator.normal(size=(6, objectives))
  proposed = simplex.propose(rates, scores, rates[:pending], generator)
  assert proposed.shape == (groups,)
  assert proposed.min() >= 0
  assert proposed.sum() == pytest.approx(1, abs=1e-9)


def test_proposals_near_the_best_mixture():
  """Of a smooth function, 11 draws and 8 proposals fall short less than 19 draws."""
  best = np.array([0.6, 0.1, 0.3])
  shortfalls = []
  for seed in range(4):
    generator = np.random.default_rng(seed)
    drawn = generator.dirichlet(np.ones(3), 19)
    rates = drawn[:11]
    for _ in range(8):
      proposed = simplex.propose(rates, quality(rates, best), rates[:0], generator)
      rates = np.concatenate([rates, proposed[None]])
    shortfalls.append([1 - quality(each, best).max() for each in (rates, drawn)])
  found, random = np.mean(shortfalls, axis=0)
  assert found < 0.5 * random


def test_a_proposal_is_a_function_of_its_generator():
  rates = np.random.default_rng(1).dirichlet(np.ones(3), 5)
  scores = quality(rates, np.array([0.2, 0.2, 0.6]))
  one, same, other = (
    simplex.propose(rates, scores, rates[:0], np.random.default_rng(seed))
    for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)


def test_pending_mixtures_are_not_proposed_again():
  best = np.array([0.5, 0.3, 0.2])
  rates = np.random.default_rng(2).dirichlet(np.ones(3), 12)
  scores = quality(rates, best) + np.random.default_rng(3).normal(0, 0.01, (12, 1))
  first = simplex.propose(rates, scores, rates[:0], np.random.default_rng(4))
  second = simplex.propose(rates, scores, first[None], np.random.default_rng(4))
  assert np.abs(first - second).max() > 0.01


def test_posterior_means_take_out_noise():
  """Closer to the truth than what was measured."""
  generator = np.random.default_rng(5)
  rates = generator.dirichlet(np.ones(3), 60)
  true = quality(rates, np.array([0.4, 0.4, 0.2]))
  measured = true + generator.normal(0, 0.1, true.shape)
  expected = simplex.posterior_means(rates, measured)
  assert np.std(expected - true) < 0.5 * np.std(measured - true)
