"""A trial is a run of `embgemma train` in a process of its own."""

import dataclasses
import pathlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from embgemma.child_process import child_process
from embgemma.evaluation.suite import TaskResults, main_scores, read_results
from embgemma.mixture_search.trials import (
  MixtureTrial,
  Report,
  TrialError,
  TrialKilledError,
)

_POLL_SECONDS = 1.0
_LOG = "train.log"


@dataclasses.dataclass(frozen=True)
class TrainingTrials:
  """Trains and evaluates mixtures; a call is `study.RunTrial`.

  Attributes:
    directory: Trials are in trials/INDEX there; one begun before goes on.
    flags: Of `embgemma train`, the proxy's included.
    shares: Of each group's rate, by task.
    objectives: Of each objective, the evaluations whose mean it is.
  """

  directory: pathlib.Path
  flags: Sequence[str]
  shares: Mapping[str, Mapping[str, float]]
  objectives: Mapping[str, Sequence[str]]

  def __call__(self, trial: MixtureTrial, report: Report) -> dict[str, float]:
    """The scores of a mixture, 0 to 1.

    Raises:
      TrialError: the run ended with an error, or without results.
      TrialKilledError: it was killed, which says nothing of the mixture.
    """
    run = self.directory / "trials" / f"{trial.index:04d}"
    run.mkdir(parents=True, exist_ok=True)
    rates = task_rates(self.shares, trial.rates)
    command = [
      *(sys.executable, "-m", "embgemma", "train", *self.flags),
      f"--gin.MODEL_DIR={str(run)!r}",
      f"--gin.MIXTURE_RATES={rates}",
      f"--gin.RANDOM_SEED={trial.seed}",
      "--gin.train.baselines=False",
    ]
    said: set[int] = set()
    with (run / _LOG).open("ab") as log, child_process(command, log) as child:
      while child.poll() is None:
        time.sleep(_POLL_SECONDS)
        self._report(run, report, said)
    if child.returncode < 0 or child.returncode == 128 + signal.SIGTERM:
      raise TrialKilledError(
        f"trial {trial.index + 1}: `embgemma train` was killed ({child.returncode}; -9 "
        f"is often memory, see {run / _LOG}); the same command goes on with it"
      )
    if child.returncode:
      raise TrialError(
        f"`embgemma train` ended with {child.returncode}: {_last_line(run / _LOG)}; "
        f"see {run / _LOG}"
      )
    results = read_results(run / "evaluations.json")
    return self.scores(results[max(results, key=int)])

  def scores(self, results: TaskResults) -> dict[str, float]:
    """Of each objective."""
    main = main_scores(results)
    return {
      name: float(np.mean([main[task] for task in tasks]))
      for name, tasks in self.objectives.items()
    }

  def _report(self, run: pathlib.Path, report: Report, said: set[int]) -> None:
    """Steps whose results are new, but for the untrained model's."""
    for step, results in read_results(run / "evaluations.json").items():
      if int(step) > 0 and int(step) not in said:
        said.add(int(step))
        report(int(step), self.scores(results))


def task_rates(
  shares: Mapping[str, Mapping[str, float]], rates: Mapping[str, float]
) -> dict[str, float]:
  """Rates of tasks, summing to 1, from those of groups."""
  return {
    task: rates[group] * share
    for group, tasks in shares.items()
    for task, share in tasks.items()
  }


def _last_line(log: pathlib.Path) -> str:
  lines = log.read_text(errors="replace").split("\n")
  return next((line for line in reversed(lines) if line.strip()), "no output")
