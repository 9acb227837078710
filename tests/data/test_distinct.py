"""Exchanging examples between batches leaves duplicates only where they must stay."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data.distinct import MOST_BATCHES, exchanged, repeated_texts


def hashes_of(queries, positives) -> np.ndarray:
  return np.stack([queries, positives], axis=1).astype(np.uint64)


def clashing(hashes, size, one_kind) -> set[int]:
  """Places whose example shares a text with an earlier one of its batch."""
  found = set()
  for start in range(0, len(hashes), size):
    seen: set = set()
    for place in range(start, start + size):
      query, positive = hashes[place].tolist()
      own = {query, positive} if one_kind else {("q", query), ("p", positive)}
      if own & seen:
        found.add(place)
      seen |= own
  return found


def solve(hashes, batches, one_kind=False):
  """The order and its conflicts, both checked."""
  found = exchanged(repeated_texts(hashes, one_kind), batches)
  assert sorted(found.order.tolist()) == list(range(len(hashes)))
  left = clashing(hashes[found.order], len(hashes) // batches, one_kind)
  assert found.conflicts.tolist() == sorted(left)
  return found


@given(
  batches=st.integers(1, MOST_BATCHES),
  size=st.integers(1, 12),
  queries=st.integers(1, 200),
  positives=st.integers(1, 200),
  one_kind=st.booleans(),
  seed=st.integers(0, 2**32 - 1),
)
def test_conflicts_are_those_that_are_left(
  batches, size, queries, positives, one_kind, seed
):
  rng = np.random.default_rng(seed)
  count = batches * size
  texts = (rng.integers(bound, size=count) for bound in (queries, positives))
  hashes = hashes_of(*texts)
  found = solve(hashes, batches, one_kind)
  before = clashing(hashes, size, one_kind)
  assert len(found.conflicts) <= len(before)
  if not before:
    assert found.order.tolist() == list(range(count))


@pytest.mark.parametrize(("batches", "size"), [(8, 32), (64, 16), (5, 100)])
def test_every_query_occurs_three_times(batches, size):
  """As entailment sets have it: no text is alone, and all conflicts can be solved."""
  rng = np.random.default_rng(0)
  count = batches * size
  queries = rng.permutation(np.repeat(np.arange(-(-count // 3)), 3)[:count])
  hashes = hashes_of(queries, np.arange(count))
  assert clashing(hashes, size, False)
  assert not len(solve(hashes, batches).conflicts)


def test_only_what_conflicts_moves():
  rng = np.random.default_rng(0)
  queries = np.arange(64 * 64)
  queries[rng.integers(len(queries), size=400)] = rng.integers(len(queries), size=400)
  hashes = hashes_of(queries, np.arange(len(queries)))
  found = solve(hashes, 64)
  moved = np.count_nonzero(found.order != np.arange(len(queries)))
  assert moved <= 2 * len(clashing(hashes, 64, False))


@pytest.mark.parametrize("copies", [15, 16, 17, 40, 512])
def test_a_text_of_many_examples(copies):
  """One a batch; of more copies than batches, the rest stays and is counted."""
  batches, size = 16, 32
  rng = np.random.default_rng(copies)
  queries = 1 + np.arange(batches * size)
  queries[rng.permutation(len(queries))[:copies]] = 0
  hashes = hashes_of(queries, np.arange(len(queries)))
  found = solve(hashes, batches)
  assert len(found.conflicts) == max(0, copies - batches)


def test_few_texts_of_many_examples_are_nearly_as_few_as_can_be():
  """Against the bound that a text can lie in each batch once."""
  batches, size = 64, 128
  rng = np.random.default_rng(0)
  positives = rng.zipf(1.3, batches * size)
  hashes = hashes_of(np.arange(len(positives)), positives)
  counts = collections.Counter(positives.tolist()).values()
  bound = sum(max(0, count - batches) for count in counts)
  assert bound <= len(solve(hashes, batches).conflicts) <= 1.01 * bound


def test_where_sides_change_places_a_query_may_repeat_a_positive():
  hashes = hashes_of([1, 2, 3, 4], [5, 1, 6, 7])  # 1 is twice in the first batch
  assert solve(hashes, 2).order.tolist() == [0, 1, 2, 3]
  found = solve(hashes, 2, one_kind=True)
  assert found.order.tolist() != [0, 1, 2, 3]
  assert not len(found.conflicts)


def test_an_example_of_one_text_does_not_conflict_with_itself():
  hashes = hashes_of([1, 2, 3, 4], [1, 2, 8, 9])
  assert solve(hashes, 2, one_kind=True).order.tolist() == [0, 1, 2, 3]
