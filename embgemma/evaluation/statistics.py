"""How sure a score is: bootstrap intervals, and paired tests of two models.

Over the examples of a task (queries, pairs), which are the sample; seeds of training
are repeats of another kind, and are shown as their range.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

DRAWS = 10_000
_CHUNK = 1 << 24  # numbers drawn at a time


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and where it would lie in other samples.

  Attributes:
    mean: Of the sample.
    low: End of the interval.
    high: The other.
  """

  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two models on the same examples.

  Attributes:
    difference: Mean of the second's scores less the first's, with its interval.
    p_value: Of a difference as large by chance, either way.
  """

  difference: Interval
  p_value: float


def bootstrap(
  scores: Float[np.ndarray, " N"],
  confidence: float = 0.95,
  draws: int = DRAWS,
  seed: int = 0,
) -> Interval:
  """Percentile bootstrap of the mean (Efron and Tibshirani, 1993, chapter 13).

  Args:
    scores: Of each example.
    confidence: Share of samples whose mean lies inside.
    draws: Samples drawn.
    seed: Of the draws.

  Raises:
    ValueError: there are no scores.
  """
  if not len(scores):
    raise ValueError("no scores")
  generator = np.random.default_rng(seed)
  size = len(scores)
  means: list[np.ndarray] = []
  left = draws
  while left:
    now = min(left, max(1, _CHUNK // size))
    means.append(scores[generator.integers(size, size=(now, size))].mean(axis=1))
    left -= now
  tail = 50 * (1 - confidence)
  low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
  return Interval(float(np.mean(scores)), float(low), float(high))


def compare(
  first: Float[np.ndarray, " N"],
  second: Float[np.ndarray, " M"],
  confidence: float = 0.95,
  draws: int = DRAWS,
  seed: int = 0,
) -> Comparison:
  """A paired comparison: a bootstrap interval, and a randomization test.

  The test turns the sign of each example's difference at random (Smucker et al., 2007,
  for retrieval). The smallest p-value is 1 / (draws + 1).

  Args:
    first: Scores of a model on each example.
    second: Of another on the same.
    confidence: See `bootstrap`.
    draws: Of each.
    seed: Of the draws.

  Raises:
    ValueError: they are not of the same examples.
  """
  if first.shape != second.shape:
    raise ValueError(f"{len(first)} and {len(second)} scores: not of the same examples")
  apart = second - first
  interval = bootstrap(apart, confidence, draws, seed)
  generator = np.random.default_rng(seed + 1)
  size, left, extreme = len(apart), draws, 0
  bound = abs(apart.sum()) * (1 - 1e-12)  # sums of the same terms in another order
  while left:
    now = min(left, max(1, _CHUNK // size))
    signs = generator.integers(0, 2, size=(now, size), dtype=np.int8) * 2 - 1
    extreme += int(np.sum(np.abs(signs @ apart) >= bound))
    left -= now
  return Comparison(interval, (extreme + 1) / (draws + 1))
