"""The rules, against a naive reading of them."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.errors import ConfigError
from embgemma.mining.filters import RULES, Candidates, MiningOptions, select


def _candidates(similarities, keys=None, **masks):
  count = len(similarities)
  none = np.zeros(count, bool)
  return Candidates(
    np.arange(count) + 100,
    np.array(similarities, np.float32),
    np.arange(count, dtype=np.uint64) if keys is None else np.array(keys, np.uint64),
    *(
      np.array(masks.get(name, none), bool)
      for name in ("positive", "same_text", "same_label")
    ),
  )


def _naive(found, positive, taken, options):
  """One candidate after another, as the documentation has it."""
  seen, chosen, dropped = set(taken.tolist()), [], collections.Counter()
  for place in range(len(found.passages)):
    similarity, key = float(found.similarities[place]), int(found.keys[place])
    bound = positive * options.max_share if options.max_share else np.inf
    if options.max_share and positive < 0:
      bound = positive + positive * (1 - options.max_share)
    if not options.first_rank <= place + 1 <= options.worst_rank:
      rule = "rank"
    elif found.positive[place]:
      rule = "positive"
    elif found.same_text[place]:
      rule = "same_text"
    elif found.same_label[place]:
      rule = "same_label"
    elif key in seen:
      rule = "duplicate"
    else:
      seen.add(key)
      if options.max_share and not similarity < bound:
        rule = "max_share"
      elif options.margin is not None and not similarity < positive - options.margin:
        rule = "margin"
      elif options.min_similarity is not None and similarity < options.min_similarity:
        rule = "min_similarity"
      else:
        chosen.append(place)
        continue
    dropped[rule] += 1
  return chosen, [dropped[rule] for rule in RULES]


# Exact in float32 and in the products that bounds are made of.
_GRID = st.integers(-64, 64).map(lambda value: value / 64)


@st.composite
def _cases(draw):
  """Arguments only: checking types draws random numbers, which strategies must not."""
  count = draw(st.integers(0, 12))

  def column(values):
    return draw(st.lists(values, min_size=count, max_size=count))

  masks = ("positive", "same_text", "same_label")
  found = (column(_GRID), column(st.integers(0, 8)))
  depth = draw(st.integers(1, 14))
  first = draw(st.integers(1, depth))
  options = {
    "depth": depth,
    "negatives": draw(st.integers(1, 4)),
    "first_rank": first,
    "last_rank": draw(st.none() | st.integers(first, depth)),
    "max_share": draw(st.sampled_from([None, 0.5, 0.75, 1.0])),
    "margin": draw(st.none() | _GRID),
    "min_similarity": draw(st.none() | _GRID),
  }
  taken = draw(st.lists(st.integers(0, 8), max_size=3))
  return found, {name: column(st.booleans()) for name in masks}, taken, options


@given(_cases(), _GRID)
def test_hardest_are_those_of_the_naive_rules(case, positive):
  columns, masks, taken, options = case
  found, options = _candidates(*columns, **masks), MiningOptions(**options)
  taken = np.array(taken, np.uint64)
  chosen, dropped = _naive(found, positive, taken, options)
  places, counts = select(found, positive, taken, options, 0)
  assert places.tolist() == chosen[: options.negatives]
  assert counts.tolist() == dropped


def test_nv_retrievers_rule():
  """Below 95 % of the positive's similarity, and not at it."""
  found = _candidates([0.99, 0.96, 0.95, 0.949, 0.5])
  options = MiningOptions(negatives=5)
  places, dropped = select(found, 1.0, np.zeros(0, np.uint64), options, 0)
  # 0.95 as float32 is a little below 0.95.
  assert places.tolist() == [2, 3, 4]
  assert dropped[RULES.index("max_share")] == 2


def test_random_depends_on_the_example_alone():
  found = _candidates(np.linspace(0.9, 0.1, 30))
  options = MiningOptions(negatives=3, pick="random", last_rank=20)
  nothing = np.zeros(0, np.uint64)
  draws = {key: select(found, 1.0, nothing, options, key)[0] for key in range(300)}
  again = {
    key: select(found, 1.0, nothing, options, key)[0] for key in reversed(range(300))
  }
  assert all((draws[key] == again[key]).all() for key in draws)
  assert all(len(set(places.tolist())) == 3 for places in draws.values())
  assert all(places.tolist() == sorted(places.tolist()) for places in draws.values())
  counts = np.bincount(np.concatenate(list(draws.values())), minlength=30)
  assert (counts[:20] > 15).all()  # 45 expected of each
  assert not counts[20:].any()
  other = MiningOptions(negatives=3, pick="random", last_rank=20, seed=1)
  moved = [
    k for k in draws if (draws[k] != select(found, 1.0, nothing, other, k)[0]).any()
  ]
  assert len(moved) > 250


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"depth": 0}, "depth must be at least 1"),
    ({"negatives": 0}, "negatives must be at least 1"),
    ({"first_rank": 5, "last_rank": 4}, "ranks 5 to 4 are not within"),
    ({"depth": 10, "last_rank": 11}, "ranks 1 to 11 are not within the depth of 10"),
    ({"max_share": 95.0}, "max_share must be in"),
    ({"pick": "best"}, "pick must be one of"),
    ({"existing": "drop"}, "existing must be one of"),
  ],
)
def test_options_that_cannot_work(options, message):
  with pytest.raises(ConfigError, match=message):
    MiningOptions(**options)


def test_corpus_files_by_task():
  assert MiningOptions(corpus="a").corpus_files("x") == ("a",)
  by_task = MiningOptions(corpus={"x": ["a", "b"], "y": "c"})
  assert by_task.corpus_files("x") == ("a", "b")
  assert by_task.corpus_files("y") == ("c",)
  assert by_task.corpus_files("z") == ()
