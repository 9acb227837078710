"""How sure a score is: bootstrap intervals, and paired tests of two models.

Over the examples of a task (queries, pairs), which are the sample; seeds of training
are repeats of another kind, and are shown as their range.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

DRAWS = 2_000
CONFIDENCE = 0.95

Metric = Callable[[Float[np.ndarray, " N"], Int[np.ndarray, " N"]], float]
"""From all examples' values, and the indices of those drawn, to a score."""


def mean(values: Float[np.ndarray, " N"], drawn: Int[np.ndarray, " N"]) -> float:
  """The metric whose values are scores themselves, such as nDCG of each query."""
  return float(np.mean(values[drawn]))


@dataclasses.dataclass(frozen=True)
class Sample:
  """What a model makes of each example of a task.

  Attributes:
    values: [N], in a unit that models share: scores, or ranks of similarities.
    metric: What makes a score of them.
  """

  values: Float[np.ndarray, " N"]
  metric: Metric = mean

  def __post_init__(self) -> None:
    if not len(self.values):
      raise ValueError("no examples")

  @property
  def score(self) -> float:
    """Of all examples."""
    return self.metric(self.values, np.arange(len(self.values)))


@dataclasses.dataclass(frozen=True)
class Interval:
  """A score and where it would lie in other samples.

  Attributes:
    score: Of the sample.
    low: End of the interval.
    high: The other.
  """

  score: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two models on the same examples.

  Attributes:
    difference: The second's score less the first's, with its interval.
    p_value: Of a difference as large by chance, either way.
  """

  difference: Interval
  p_value: float


def bootstrap(
  sample: Sample, confidence: float = CONFIDENCE, draws: int = DRAWS, seed: int = 0
) -> Interval:
  """Percentile bootstrap of a score (Efron and Tibshirani, 1993, chapter 13).

  Args:
    sample: Of one model.
    confidence: Share of samples whose score lies inside.
    draws: Samples drawn.
    seed: Of the draws.
  """
  generator, size = np.random.default_rng(seed), len(sample.values)
  scores = [
    sample.metric(sample.values, generator.integers(size, size=size))
    for _ in range(draws)
  ]
  return _interval(sample.score, scores, confidence)


def compare(
  first: Sample,
  second: Sample,
  confidence: float = CONFIDENCE,
  draws: int = DRAWS,
  seed: int = 0,
) -> Comparison:
  """A paired comparison: a bootstrap interval, and a randomization test.

  The test has the models change places on each example at random (Smucker et al.,
  2007, for retrieval). The smallest p-value is 1 / (draws + 1).

  Args:
    first: Of a model.
    second: Of another on the same examples.
    confidence: See `bootstrap`.
    draws: Of each.
    seed: Of the draws.

  Raises:
    ValueError: they are not of the same examples.
  """
  one, other, metric = first.values, second.values, first.metric
  size = len(one)
  if other.shape != one.shape:
    raise ValueError(f"{size} and {len(other)} examples: not the same")
  generator = np.random.default_rng(seed)
  apart = []
  for _ in range(draws):
    drawn = generator.integers(size, size=size)
    apart.append(metric(other, drawn) - metric(one, drawn))
  every = np.arange(size)
  difference = metric(other, every) - metric(one, every)
  bound = abs(difference) * (1 - 1e-9)  # the same sum in another order
  extreme = 0
  for _ in range(draws):
    changed = generator.integers(2, size=size, dtype=np.int8) == 1
    left, right = np.where(changed, other, one), np.where(changed, one, other)
    extreme += abs(metric(right, every) - metric(left, every)) >= bound
  interval = _interval(difference, apart, confidence)
  return Comparison(interval, (extreme + 1) / (draws + 1))


def _interval(score: float, drawn: list[float], confidence: float) -> Interval:
  tail = 50 * (1 - confidence)
  low, high = np.percentile(drawn, [tail, 100 - tail])
  return Interval(float(score), float(low), float(high))
