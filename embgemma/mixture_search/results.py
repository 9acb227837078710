"""What a search found: its trials, the noise, and the mixtures to train experts on."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embgemma import outputs
from embgemma.mixture_search.simplex import posterior_means
from embgemma.mixture_search.training import task_rates
from embgemma.mixture_search.trials import SearchPlan, TrialRecord

_LEAST_DISTANCE = 0.1  # Hellinger's, between two experts
_LEAST_TRIALS = 3
RESULTS_FILE, REPORT_FILE = "search.json", "search.md"


@dataclasses.dataclass(frozen=True)
class Expert:
  """A mixture that a search chose.

  Attributes:
    name: Such as expert_1; of its gin file, too.
    trial: Index of the trial that had it.
    chosen_for: The objective that it is the best for, or "mean" of all.
    rates: Of groups, summing to 1.
    scores: Of objectives, as measured.
    expected: The same without noise, as a Gaussian process of all trials has them.
  """

  name: str
  trial: int
  chosen_for: str
  rates: Mapping[str, float]
  scores: Mapping[str, float]
  expected: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """The outcome of a search.

  Attributes:
    plan: Of its trials.
    trials: All, by index.
    noise: Standard deviation of each objective over repeats of the seed mixture; {}
      where there are fewer than two.
    experts: The best of all first.
  """

  plan: SearchPlan
  trials: Sequence[TrialRecord]
  noise: Mapping[str, float]
  experts: Sequence[Expert]


def conclude(
  plan: SearchPlan, trials: Sequence[TrialRecord], experts: int
) -> SearchResult:
  """Chooses the experts of a search.

  The first is the best of the mean of objectives, the next the best of each objective
  in turn, by scores without noise; none is close to another, but where too few are
  unlike each other.

  Args:
    plan: Of the search.
    trials: Its records.
    experts: How many at most.
  """
  complete = [t for t in trials if t.state == "complete"]
  objectives = list(plan.objectives)
  seeds = np.array([_row(t, objectives) for t in complete if t.role == "seed"])
  noise = {}
  if len(seeds) > 1:
    noise = {o: float(s) for o, s in zip(objectives, seeds.std(0, ddof=1), strict=True)}
  return SearchResult(plan, trials, noise, _choose(plan, complete, experts))


def _row(trial: TrialRecord, objectives: Sequence[str]) -> list[float]:
  return [trial.scores[objective] for objective in objectives]


def _choose(
  plan: SearchPlan, complete: Sequence[TrialRecord], count: int
) -> list[Expert]:
  if not complete:
    return []
  objectives = list(plan.objectives)
  rates = np.array([[t.rates[g] for g in plan.groups] for t in complete], np.float64)
  scores = np.array([_row(t, objectives) for t in complete], np.float64)
  expected = scores
  if len(complete) >= _LEAST_TRIALS:
    expected = posterior_means(rates, scores)
  columns = [("mean", expected.mean(1))]
  if len(objectives) > 1:
    columns += list(zip(objectives, expected.T, strict=True))
  chosen: dict[int, str] = {}  # row: what for
  # Round after round, the next best of each that is unlike those chosen.
  for name, column in itertools.islice(itertools.cycle(columns), count * len(columns)):
    for row in map(int, np.argsort(-column)):
      apart = min((_distance(rates[row], rates[other]) for other in chosen), default=1)
      if apart > _LEAST_DISTANCE and len(chosen) < count:
        chosen[row] = name
        break
  # Fewer are unlike each other than are wanted: then the next best, however alike.
  for row in map(int, np.argsort(-columns[0][1])):
    if len(chosen) < count:
      chosen.setdefault(row, columns[0][0])
  return [
    Expert(
      name=f"expert_{number}",
      trial=complete[row].index,
      chosen_for=name,
      rates=dict(complete[row].rates),
      scores=dict(complete[row].scores),
      expected=dict(zip(objectives, map(float, expected[row]), strict=True)),
    )
    for number, (row, name) in enumerate(chosen.items(), 1)
  ]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
  """Hellinger's, 0 to 1."""
  return float(np.sqrt(np.sum((np.sqrt(one) - np.sqrt(other)) ** 2) / 2))


def write(
  result: SearchResult,
  directory: pathlib.Path,
  shares: Mapping[str, Mapping[str, float]],
) -> None:
  """Writes search.json, search.md, and a gin file of each expert.

  Args:
    result: Of a search.
    directory: Of the search.
    shares: Of each group's rate, by task.

  Raises:
    DataError: they cannot be written.
  """
  for expert in result.experts:
    rates = task_rates(shares, expert.rates)
    lines = [
      f"# Trial {expert.trial + 1} of a search: the best of {expert.chosen_for}.",
      "MIXTURE_RATES = {",
      *(f"  {task!r}: {rate:.6g}," for task, rate in rates.items()),
      "}",
    ]
    _write(directory / f"{expert.name}.gin", "\n".join(lines))
  _write(directory / RESULTS_FILE, json.dumps(_as_json(result), indent=1))
  _write(directory / REPORT_FILE, markdown(result))


def _write(path: pathlib.Path, text: str) -> None:
  with outputs.new_file(path) as file:
    file.write(f"{text}\n".encode())


def _as_json(result: SearchResult) -> dict[str, Any]:
  return {
    "groups": dict(result.plan.groups),
    "objectives": list(result.plan.objectives),
    "noise": dict(result.noise),
    "trials": [dataclasses.asdict(trial) for trial in result.trials],
    "experts": [dataclasses.asdict(expert) for expert in result.experts],
  }


def markdown(result: SearchResult) -> str:
  """Tables of experts and trials, scores in percent."""
  objectives, groups = list(result.plan.objectives), list(result.plan.groups)
  lines = ["# Mixture search", ""]
  if result.noise:
    spread = ", ".join(f"{o} {100 * s:.2f}" for o, s in result.noise.items())
    repeats = sum(t.role == "seed" and t.state == "complete" for t in result.trials)
    lines += [f"Noise, the standard deviation of {repeats} seeds: {spread}.", ""]
  rows = [
    [
      f"{e.name} (trial {e.trial + 1})",
      e.chosen_for,
      *(f"{100 * e.scores[o]:.2f} ({100 * e.expected[o]:.2f})" for o in objectives),
      *(f"{e.rates[g]:.3f}" for g in groups),
    ]
    for e in result.experts
  ]
  heads = ["expert", "best of", *(f"{o} (without noise)" for o in objectives), *groups]
  lines += ["## Experts", "", *_table(heads, rows), "", "## Trials", ""]
  rows = [_trial_row(trial, objectives, groups) for trial in result.trials]
  heads = ["trial", "role", *objectives, *groups, "s"]
  return "\n".join([*lines, *_table(heads, rows)])


def _trial_row(
  trial: TrialRecord, objectives: Sequence[str], groups: Sequence[str]
) -> list[str]:
  scores = [trial.state] * len(objectives)
  if trial.scores:
    scores = [f"{100 * trial.scores[o]:.2f}" for o in objectives]
  rates = [f"{trial.rates[g]:.3f}" if g in trial.rates else "" for g in groups]
  seconds = "" if trial.seconds is None else f"{trial.seconds:.0f}"
  return [str(trial.index + 1), trial.role, *scores, *rates, seconds]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  rule = ["---", "---", *["---:"] * (len(heads) - 2)]
  return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]
