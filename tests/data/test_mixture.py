"""Tasks are drawn at the rates that a mixture has."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data.mixture import mixture_rates, scheduled_task, steps_before
from embgemma.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Task:
  name: str
  rate: float
  examples: int

  @property
  def statistics(self) -> dict[str, Any]:
    return {"examples": self.examples}


TASKS = [_Task("qa", 3.0, 100), _Task("code", 1.0, 6400), _Task("web", 0.5, 1600)]


def shares(rates) -> np.ndarray:
  return np.array(rates) / np.sum(rates)


@pytest.mark.parametrize(
  ("how", "expected"),
  [
    ("explicit", [3.0, 1.0, 0.5]),
    ("even", [1, 1, 1]),
    ("proportional", [100, 6400, 1600]),
    (1, [100, 6400, 1600]),
    (2.0, [10, 80, 40]),
    (0.5, [1e4, 4096e4, 256e4]),
    (1e9, [1, 1, 1]),
  ],
)
def test_rates(how, expected):
  np.testing.assert_allclose(shares(mixture_rates(TASKS, how)), shares(expected))


def test_explicit_rates_stay_as_they_are():
  assert mixture_rates(TASKS) == (3.0, 1.0, 0.5)


@given(
  st.lists(st.integers(1, 10**12), min_size=1, max_size=5),
  st.floats(1e-3, 1e6),
  st.floats(1.01, 1e3),
)
def test_the_warmer_the_more_even(examples, temperature, factor):
  tasks = [_Task("any", 1.0, n) for n in examples]
  cold, warm = (
    shares(mixture_rates(tasks, t)) for t in (temperature, temperature * factor)
  )
  for each in (cold, warm):
    assert np.isfinite(each).all()
    assert (np.argsort(examples, kind="stable") == np.lexsort((each, examples))).all()
  assert warm.max() <= cold.max() * (1 + 1e-9)
  assert warm.min() >= cold.min() * (1 - 1e-9)


@pytest.mark.parametrize("how", ["evenly", "", 0, -1.0, math.inf, math.nan, True])
def test_rates_that_are_none(how):
  with pytest.raises(ConfigError, match="mixture are one of 'explicit'.*; got"):
    mixture_rates(TASKS, how)


def test_rates_are_kept():
  """Within four standard deviations over 20,000 steps, across blocks."""
  rates, steps = (1.0, 2.0, 5.0), 20_000
  drawn = [scheduled_task(rates, 11, step) for step in range(steps)]
  counts = np.bincount([task for task, _ in drawn], minlength=3)
  expected = np.array(rates) / sum(rates) * steps
  deviation = np.sqrt(expected * (1 - np.array(rates) / sum(rates)))
  assert (np.abs(counts - expected) < 4 * deviation).all()
  # Each task's batches are numbered without gaps, whatever the order of asking.
  seen = [0, 0, 0]
  for step, (task, earlier) in enumerate(drawn):
    assert earlier == seen[task]
    if step % 997 == 0:
      assert steps_before(rates, 11, step).tolist() == seen
    seen[task] += 1
  assert scheduled_task(rates, 11, steps - 1) == drawn[-1]
  assert scheduled_task((10.0, 20.0, 50.0), 11, 12_345) == drawn[12_345]
  assert [scheduled_task(rates, 12, step) for step in range(50)] != drawn[:50]


def test_a_schedule_has_no_period():
  """Blocks of the generator are not copies of each other."""
  tasks = np.array([scheduled_task((1.0, 1.0), 0, step)[0] for step in range(16_384)])
  first, *others = tasks.reshape(4, -1)
  for other in others:
    assert 0.45 < np.mean(first == other) < 0.55


def test_rates_by_name():
  """In the order of the tasks, whatever that of the mapping."""
  names = [task.name for task in TASKS]
  rates = dict(zip(reversed(names), (0.5, 0, 2), strict=True))
  assert mixture_rates(TASKS, rates) == (2.0, 0.0, 0.5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"another": 1.0}, "unknown: another"),
    ({"qa": None}, "missing: qa"),
    ({"qa": -1.0}, "0 or more"),
    ({"qa": math.inf}, "0 or more"),
  ],
)
def test_wrong_rates_by_name(change, message):
  rates = {**{task.name: 1.0 for task in TASKS}, **change}
  rates = {name: rate for name, rate in rates.items() if rate is not None}
  with pytest.raises(ConfigError, match=message):
    mixture_rates(TASKS, rates)


def test_rates_by_name_are_not_all_0():
  with pytest.raises(ConfigError, match="not all 0"):
    mixture_rates(TASKS, {task.name: 0 for task in TASKS})
