"""Exact search: what numpy sorts, whatever the blocks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.mining.searchers import exact_search


@settings(max_examples=20)
@given(
  queries=st.integers(1, 20),
  passages=st.integers(1, 40),
  depth=st.sampled_from([1, 5, 12]),
  block=st.sampled_from([1, 7, 64]),
  seed=st.integers(0, 2**32 - 1),
)
def test_exact_search_is_a_stable_sort(queries, passages, depth, block, seed):
  """Of small integers: products are exact, and many are equal."""
  generator = np.random.default_rng(seed)
  left = generator.integers(-1, 2, (queries, 3)).astype(np.float32)
  right = generator.integers(-1, 2, (passages, 3)).astype(np.float32)
  found = exact_search(left, passages, lambda a, b: right[a:b], depth, block)
  scores = left @ right.T
  order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
  there = min(depth, passages)
  np.testing.assert_array_equal(found[1][:, :there], order)
  expected = np.take_along_axis(scores, order, 1)
  np.testing.assert_array_equal(found[0][:, :there], expected)
  assert (found[1][:, there:] == -1).all()
  assert (found[0][:, there:] == -np.inf).all()


def test_scores_are_float32_at_full_precision():
  generator = np.random.default_rng(0)
  left, right = generator.standard_normal((2, 50, 256)).astype(np.float32)
  scores, found = exact_search(left, 50, lambda a, b: right[a:b], 5, 16)
  exact = left.astype(np.float64) @ right.T.astype(np.float64)
  np.testing.assert_array_equal(found, np.argsort(-exact, axis=1)[:, :5])
  np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=2e-5)


@pytest.mark.parametrize("block", [8, 100])
def test_passages_are_read_block_by_block(block):
  """No more than a block is ever asked for, each once and in order."""
  right = np.eye(30, dtype=np.float32)
  asked = []

  def read(start, stop):
    asked.append((start, stop))
    return right[start:stop]

  exact_search(right[:3], 30, read, 2, block)
  bounds = [*range(0, 30, block), 30]
  assert asked == list(itertools.pairwise(bounds))
