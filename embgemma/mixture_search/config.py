"""A search of mixtures for a stage, as configuration."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from embgemma.errors import ConfigError

MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class MixtureSearch:
  """What `embgemma search` tries, and how it judges; the rest is a stage's.

  Attributes:
    directory: Of trials, the study and the outcome: SEARCH_DIR.
    storage: Of the study, a URL of SQLAlchemy that all workers reach; None is
      study.db in `directory`.
    study: The study's name in the storage.
    groups: Name to tasks whose rates are searched as one, shared out among them by
      their own rates; every task is in one. None: each task is a group.
    objectives: Name to evaluations of the stage whose mean it is; several let
      specialists be found. None is one, the mean of all.
    proxy: Macros of a trial in place of the stage's, such as fewer TRAIN_STEPS.
    seed_repeats: Of the seed mixture, the rates of the stage's tasks: they measure the
      noise.
    dirichlet_trials: Random mixtures, before any is proposed; the paper's 10.
    proposed_trials: By Bayesian optimisation.
    stop_below: See `study.SearchPlan`; trials report where the stage evaluates.
    experts: Mixtures chosen in the end.
    seed: Of draws, proposals and training.

  Raises:
    ConfigError: a group or objective without members, or a macro that a search sets.
  """

  directory: str
  storage: str | None = None
  study: str = "mixtures"
  groups: Mapping[str, str | Sequence[str]] | None = None
  objectives: Mapping[str, str | Sequence[str]] | None = None
  proxy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed_repeats: int = 3
  dirichlet_trials: int = 10
  proposed_trials: int = 20
  stop_below: float | None = 25.0
  experts: int = 3
  seed: int = 0

  def __post_init__(self) -> None:
    taken = sorted(
      {"MODEL_DIR", "MIXTURE_RATES", "RANDOM_SEED", "SEARCH_DIR"} & set(self.proxy)
    )
    if taken:
      raise ConfigError(f"PROXY: the search sets {', '.join(taken)} itself; leave out")
    if self.experts < 1:
      raise ConfigError(f"experts must be 1 at least, got {self.experts}")
    for what, members in (("groups", self.groups), ("objectives", self.objectives)):
      empty = [name for name, of in (members or {}).items() if not of]
      if empty:
        raise ConfigError(f"{what} without members: {', '.join(empty)}")

  @property
  def url(self) -> str:
    """Of the study's storage."""
    if self.storage is not None:
      return self.storage
    return f"sqlite:///{pathlib.Path(self.directory).absolute() / 'study.db'}"

  def members(self, tasks: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each group's tasks and their shares of its rate, summing to 1.

    Args:
      tasks: All tasks of the stage, with their rates.

    Raises:
      ConfigError: a group names no task, or a task is in none or in two.
    """
    groups = self.groups or {task: (task,) for task in tasks}
    named = [task for group in groups.values() for task in _names(group)]
    unknown = sorted(set(named) - set(tasks))
    if unknown:
      raise ConfigError(
        f"groups name {', '.join(unknown)}; the stage's tasks are {', '.join(tasks)}"
      )
    for wrong, what in (
      (sorted(set(tasks) - set(named)), "in no group"),
      (sorted({task for task in named if named.count(task) > 1}), "in two groups"),
    ):
      if wrong:
        raise ConfigError(f"tasks {what}: {', '.join(wrong)}; each is in one")
    shares = {}
    for group, of in groups.items():
      total = sum(tasks[task] for task in _names(of))
      shares[group] = {task: tasks[task] / total for task in _names(of)}
    return shares

  def judged(self, evaluations: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each objective's evaluations.

    Args:
      evaluations: Names of the stage's EVALUATIONS.

    Raises:
      ConfigError: there are none, or an objective names another.
    """
    if not evaluations:
      raise ConfigError("a search needs EVALUATIONS, by which mixtures are judged")
    objectives = {
      name: _names(of)
      for name, of in (self.objectives or {MEAN: tuple(evaluations)}).items()
    }
    for name, of in objectives.items():
      unknown = sorted(set(of) - set(evaluations))
      if unknown:
        raise ConfigError(
          f"objective {name!r} names {', '.join(unknown)}; EVALUATIONS are "
          f"{', '.join(evaluations)}"
        )
    return objectives


def _names(of: str | Sequence[str]) -> tuple[str, ...]:
  return (of,) if isinstance(of, str) else tuple(of)
