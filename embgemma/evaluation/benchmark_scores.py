"""What a benchmark makes of scores of tasks: means, Borda counts, tables.

Definitions are those of mteb's leaderboard (arXiv 2502.13595): a task's score is the
mean of its main score over splits and subsets; means are undefined where a task is
missing; Borda counts give a missing task no points.
"""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from embgemma.errors import DataError
from embgemma.evaluation.report import MISSING

Scores = Mapping[str, float]  # by task, in 0..1
_COLUMNS = ("benchmark", "task", "type")
_EXPERIMENTS = "experiments"


@dataclasses.dataclass(frozen=True)
class Standing:
  """A model in a benchmark.

  Attributes:
    mean_task: Mean over tasks; None where one is missing.
    mean_type: Mean over types of the means over their tasks; likewise.
    by_type: Mean over the tasks of a type; likewise.
    points: Borda count.
    rank: By points, from 1; equal ones share the smallest.
    missing: Tasks without a score.
  """

  mean_task: float | None
  mean_type: float | None
  by_type: Mapping[str, float | None]
  points: float
  rank: int
  missing: tuple[str, ...]


def standings(
  models: Mapping[str, Scores], types: Mapping[str, str]
) -> dict[str, Standing]:
  """Each model's standing among them all.

  Args:
    models: Scores by model.
    types: Of the benchmark's tasks, such as "STS", in order; other tasks do not count.
  """
  points = borda_points(models, list(types))
  found = {}
  for name, scores in models.items():
    by_type: dict[str, float | None] = {}
    for kind in dict.fromkeys(types.values()):
      by_type[kind] = _mean([scores.get(task) for task in types if types[task] == kind])
    found[name] = Standing(
      mean_task=_mean([scores.get(task) for task in types]),
      mean_type=_mean(list(by_type.values())),
      by_type=by_type,
      points=points[name],
      rank=1 + sum(other > points[name] for other in points.values()),
      missing=tuple(task for task in types if scores.get(task) is None),
    )
  return found


def borda_points(
  models: Mapping[str, Scores], tasks: Sequence[str]
) -> dict[str, float]:
  """Sum over tasks of the number of models less the model's rank.

  Models with equal scores share the mean of their ranks.
  """
  points = dict.fromkeys(models, 0.0)
  for task in tasks:
    scores = {name: of[task] for name, of in models.items() if of.get(task) is not None}
    for name, score in scores.items():
      better = sum(other > score for other in scores.values())
      equal = sum(other == score for other in scores.values())
      points[name] += len(models) - (better + (equal + 1) / 2)
  return points


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known and len(known) == len(values) else None


def read_results(
  directories: Sequence[pathlib.Path], tasks: Sequence[Any]
) -> dict[str, dict[str, float]]:
  """Scores by model from folders in mteb's layout, its public ones or one's own.

  A model that was run at several revisions is there once for each.

  Args:
    directories: That hold results: of many models, of one, or of one revision.
    tasks: mteb's, which say what splits and subsets count.

  Raises:
    DataError: a directory holds no results, or a damaged file.
  """
  wanted = {task.metadata.name: task for task in tasks}
  found: dict[tuple[str, str], dict[str, float]] = {}
  for root in directories:
    places = {path.parent for path in root.rglob("*.json")}
    if not places:
      raise DataError(f"{root}: no results of mteb's; give what `eval --results` wrote")
    for place in sorted(places):
      own = {
        path.stem: _task_score(path, wanted[path.stem])
        for path in sorted(place.glob("*.json"))
        if path.stem in wanted
      }
      known = {task: score for task, score in own.items() if score is not None}
      if known:
        found.setdefault(_model(place), {}).update(known)
  names = [name for name, _ in found]
  return {
    name if names.count(name) == 1 else f"{name} @{revision[:8]}": scores
    for (name, revision), scores in found.items()
  }


def read_table(path: pathlib.Path, benchmark: str) -> dict[str, dict[str, float]]:
  """Scores by model from a CSV: benchmark, task, type, then a column of each model.

  Args:
    path: As `write_table` writes it, in percent; docs/paper_results.csv is one.
    benchmark: Whose rows are read.

  Raises:
    DataError: it is no such table.
  """
  try:
    with path.open(encoding="utf-8", newline="") as file:
      rows = list(csv.DictReader(file))
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise DataError(f"{path}: cannot be read: {error}") from error
  found: dict[str, dict[str, float]] = {}
  for number, row in enumerate(rows, 2):
    if not set(_COLUMNS) <= row.keys():
      raise DataError(f"{path}: needs the columns {', '.join(_COLUMNS)}, and models'")
    if row["benchmark"] != benchmark:
      continue
    for name in [name for name in row if name not in _COLUMNS and row[name]]:
      try:
        found.setdefault(name, {})[row["task"]] = float(row[name]) / 100
      except (TypeError, ValueError) as error:
        raise DataError(f"{path}:{number}: {name} is {row[name]!r}") from error
  return found


def write_table(
  file: IO[str],
  benchmark: str,
  models: Mapping[str, Scores],
  types: Mapping[str, str],
) -> None:
  """Writes what `read_table` reads, with two digits of percent."""
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow([*_COLUMNS, *models])
  for task, kind in types.items():
    scores = (scores.get(task) for scores in models.values())
    cells = ("" if score is None else percent(score) for score in scores)
    writer.writerow([benchmark, task, kind, *cells])


def _model(place: pathlib.Path) -> tuple[str, str]:
  """Name and revision of a folder MODEL/REVISION[/experiments/NAME]."""
  experiment = ""
  if place.parent.name == _EXPERIMENTS:
    experiment, place = f" ({place.name})", place.parents[1]
  name = place.parent.name.replace("__", "/", 1)
  return f"{name}{experiment}", place.name


def _task_score(path: pathlib.Path, task: Any) -> float | None:
  from mteb.results import TaskResult

  try:
    result = TaskResult.from_disk(path)
    if result.get_missing_evaluations(task):
      return None
    score = float(result.validate_and_filter_scores(task).get_score())
    return score if math.isfinite(score) else None
  except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
    raise DataError(f"{path}: not a result of mteb's: {error}") from error


def standings_table(
  found: Mapping[str, Standing], types: Mapping[str, str], digits: int = 2
) -> tuple[list[str], list[list[str]]]:
  """Heads and rows, as the paper's Tables 5 to 7 have them: best model first.

  Args:
    found: Of `standings`.
    types: Of the tasks.
    digits: After the point, of percent.
  """
  kinds = list(dict.fromkeys(types.values()))
  heads = ["model", "rank", "points", "Mean(Task)", "Mean(Type)", *kinds, "missing"]
  order = sorted(found, key=lambda name: (found[name].rank, name))
  rows = []
  for name in order:
    one = found[name]
    means = [one.mean_task, one.mean_type, *(one.by_type[kind] for kind in kinds)]
    cells = [percent(value, digits) for value in means]
    missing = str(len(one.missing)) if one.missing else ""
    rows.append([name, str(one.rank), f"{one.points:g}", *cells, missing])
  return heads, rows


def tasks_table(
  models: Mapping[str, Scores], types: Mapping[str, str], digits: int = 2
) -> tuple[list[str], list[list[str]]]:
  """Heads and rows, as the paper's Tables 10 to 12: a row for each task."""
  rows = [
    [task, kind, *(percent(scores.get(task), digits) for scores in models.values())]
    for task, kind in types.items()
  ]
  return ["task", "type", *models], rows


def percent(value: float | None, digits: int = 2) -> str:
  """A score as it is shown."""
  return MISSING if value is None else f"{100 * value:.{digits}f}"
