"""The trials of a search: which there are, and what is known of each.

They are numbered by `index`, from 0: repeats of the seed mixture, which measure the
noise, then Dirichlet draws, then proposals.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from embgemma.errors import ConfigError

Scores = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SearchPlan:
  """The trials of a search.

  Attributes:
    groups: The seed mixture: each group of tasks and its rate, any positive scale.
    objectives: Names of the scores of a trial; higher is better.
    seed_repeats: Trials of the seed mixture, each with another seed of training.
    dirichlet_trials: Trials of draws from Dirichlet(1, ..., 1).
    proposed_trials: Trials that Bayesian optimisation proposes.
    stop_below: A trial is ended early where its best gain over the seed mixture at the
      same step is in this lowest share of those of finished trials, in percent; None
      ends none.
    random_seed: Of draws and proposals.

  Raises:
    ConfigError: fewer than two groups, a rate or count that is negative, or no seed.
  """

  groups: Mapping[str, float]
  objectives: Sequence[str]
  seed_repeats: int = 3
  dirichlet_trials: int = 10
  proposed_trials: int = 20
  stop_below: float | None = 25.0
  random_seed: int = 0

  def __post_init__(self) -> None:
    if len(self.groups) < 2:
      raise ConfigError(
        f"a search of mixtures needs two groups of tasks or more, got "
        f"{list(self.groups)}"
      )
    wrong = {g: r for g, r in self.groups.items() if not (r > 0 and np.isfinite(r))}
    if wrong:
      raise ConfigError(f"rates of the seed mixture must be above 0, got {wrong}")
    if self.seed_repeats < 1 or min(self.dirichlet_trials, self.proposed_trials) < 0:
      raise ConfigError(
        "seed_repeats must be 1 at least, dirichlet_trials and proposed_trials 0, got "
        f"{self.seed_repeats}, {self.dirichlet_trials} and {self.proposed_trials}"
      )

  @property
  def trials(self) -> int:
    return self.seed_repeats + self.dirichlet_trials + self.proposed_trials

  def role(self, index: int) -> str:
    """'seed', 'dirichlet' or 'proposed'."""
    if index < self.seed_repeats:
      return "seed"
    if index < self.seed_repeats + self.dirichlet_trials:
      return "dirichlet"
    return "proposed"

  def fixed_rates(self, index: int) -> dict[str, float] | None:
    """The mixture of a trial that is not proposed, summing to 1."""
    role = self.role(index)
    if role == "proposed":
      return None
    values = np.array(list(self.groups.values()), np.float64)
    if role == "dirichlet":
      generator = np.random.default_rng([self.random_seed, index])
      values = generator.dirichlet(np.ones(len(values)))
    return {
      g: float(v) for g, v in zip(self.groups, values / values.sum(), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class MixtureTrial:
  """What a worker is to try.

  Attributes:
    index: In the search.
    role: 'seed', 'dirichlet' or 'proposed'.
    rates: Of groups, summing to 1.
    seed: Of training: repeats of the seed mixture differ in it alone.
  """

  index: int
  role: str
  rates: Mapping[str, float]
  seed: int


@dataclasses.dataclass(frozen=True)
class TrialRecord:
  """What is known of a trial.

  Attributes:
    index: In the search.
    role: As of `MixtureTrial`.
    state: "waiting", "running", "complete", "stopped" (early), "failed", or "lost"
      where its worker ended before it.
    rates: Of groups; {} until they are chosen.
    scores: Of objectives, of a complete trial.
    steps: Scores at steps before the end.
    seconds: Of a trial that has ended.
    worker: HOST:PID.
    error: Why it failed.
  """

  index: int
  role: str
  state: str
  rates: Mapping[str, float]
  scores: Scores
  steps: Mapping[int, Scores]
  seconds: float | None
  worker: str
  error: str

  @property
  def is_done(self) -> bool:
    return self.state in ("complete", "stopped", "failed")


# Takes the scores of a step of a trial that goes on; raises to end it.
Report = Callable[[int, Scores], None]
RunTrial = Callable[[MixtureTrial, Report], Scores]


class TrialError(Exception):
  """A trial has no scores; its message says why. The search goes on."""


class TrialKilledError(Exception):
  """A trial was ended from outside: it stays open, and this worker ends."""
