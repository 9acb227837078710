"""Held-out results of models, side by side."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from embgemma.evaluation import report
from embgemma.evaluation.suite import (
  LOSS,
  MAIN_METRICS,
  TaskResults,
  main_scores,
  mean_score,
)
from embgemma.models.config import VECTOR_FORMATS
from embgemma.reporting.document import Section, Table
from embgemma.reporting.records import RECIPE_KEY, Records

_SEED = re.compile(r"_seed\d+$")  # of a recipe's stages
_OF_CODES = (f"{metric} ({name})" for name in VECTOR_FORMATS for metric in MAIN_METRICS)
_SHOWN = (*MAIN_METRICS, *_OF_CODES, LOSS, "perplexity")


def of_embedder(results: TaskResults) -> bool:
  """Whether results are an embedder's."""
  return bool(results) and not any(LOSS in metrics for metrics in results.values())


def final_results(records: Records) -> dict[str, TaskResults]:
  """Of each model that is done and was evaluated, its last results by its name.

  Files of evaluations have a column of one name for what was evaluated in several
  commands; where they say different things of a set, they are of models of one name.
  """
  found: dict[str, TaskResults] = {}
  runs = [(run.name, run.name, run.final) for run in records.runs if run.complete]
  evaluated = [
    (RECIPE_KEY.sub("", column), each.name, of)
    for each in records.evaluations
    for column, of in each.results.items()
  ]
  for column, source, of in [*(each for each in runs if each[2]), *evaluated]:
    numbered = (f"{column} ({source}, {number})" for number in itertools.count(2))
    for name in itertools.chain([column, f"{column} ({source})"], numbered):
      known = found.get(name, {})
      if all(known[task] == of[task] for task in known.keys() & of.keys()):
        found[name] = known | of
        break
  return found


def _shown(results: TaskResults) -> TaskResults:
  """The metrics that stand for tasks; of a task without one, such as XTREME-UP, its
  means."""
  shown = {}
  for task, metrics in results.items():
    wanted = {k: v for k, v in metrics.items() if k.partition("/")[0] in _SHOWN}
    shown[task] = wanted or {k: v for k, v in metrics.items() if ":" not in k}
  return shown


def results_sections(results: Mapping[str, TaskResults]) -> list[Section]:
  """One of embedders, one of pretrained stacks."""
  sections = []
  for title, wanted in (("Held-out evaluation", True), ("Held-out loss", False)):
    chosen = {
      name: of for name, of in results.items() if of and of_embedder(of) is wanted
    }
    if chosen:
      said = "In percent, by Matryoshka width" if wanted else "Nats a token"
      text = f"{said}; the best of a row is bold."
      sections.append(Section(title, [text], [_results_table(chosen, wanted)]))
  return sections


def _results_table(results: Mapping[str, TaskResults], higher: bool) -> Table:
  shown = {name: _shown(of) for name, of in results.items()}
  heads, rows = report.results_cells(shown)
  labels = len(heads) - len(results)
  if higher:
    rows = [row for row in rows if row[0] != "mean"] + _mean_rows(results)
  best: set[tuple[int, int]] = set()
  for i, row in enumerate(rows):
    values = {j: _number(row[j]) for j in range(labels, len(row))}
    known = {j: value for j, value in values.items() if not math.isnan(value)}
    if len(known) > 1:
      top = max(known.values()) if higher else min(known.values())
      best |= {(i, j) for j, value in known.items() if value == top}
  begins = [i for i in range(1, len(rows)) if rows[i][:2] != rows[i - 1][:2]]
  numbers = frozenset(range(labels - 1, len(heads)))
  return Table(heads, rows, "", numbers, frozenset(best), frozenset(begins))


def seeds_sections(results: Mapping[str, TaskResults]) -> list[Section]:
  """Means of models that differ in their seed alone."""
  arms: dict[str, list[TaskResults]] = {}
  for name, of in results.items():
    if _SEED.search(name) and of_embedder(of) and main_scores(of):
      arms.setdefault(_SEED.sub("", name), []).append(of)
  arms = {name: seeds for name, seeds in arms.items() if len(seeds) > 1}
  if not arms:
    return []
  means = {name: _mean_results(seeds) for name, seeds in arms.items()}
  rows = []
  for name, seeds in arms.items():
    scores = [100 * mean_score(of) for of in seeds]
    cells = (np.mean(scores), min(scores), max(scores))
    rows.append([name, str(len(seeds)), *(f"{cell:.2f}" for cell in cells)])
  heads = ["model", "seeds", "mean score", "lowest", "highest"]
  ranges = Table(heads, rows, "At the widest width", frozenset({1, 2, 3, 4}))
  return [
    Section("Means over seeds", tables=[ranges, _results_table(means, higher=True)])
  ]


def _mean_results(seeds: Sequence[TaskResults]) -> TaskResults:
  """Of the tasks and metrics that all have."""
  tasks = [task for task in seeds[0] if all(task in of for of in seeds)]
  return {
    task: {
      key: float(np.mean([of[task][key] for of in seeds]))
      for key in seeds[0][task]
      if all(key in of[task] for of in seeds)
    }
    for task in tasks
  }


def _mean_rows(results: Mapping[str, TaskResults]) -> list[list[str]]:
  """Means over tasks of main metrics, of models that have them all at a width."""
  keys = {key for of in results.values() for metrics in of.values() for key in metrics}
  parts = [key.partition("/") for key in keys]  # those of BM25 have no width
  widths = {int(width) for name, _, width in parts if name in MAIN_METRICS and width}
  results = {name: _with_main_metrics(of) for name, of in results.items()}
  tasks = {task for of in results.values() for task in of}
  rows = []
  for width in sorted(widths, reverse=True):
    cells = []
    for of in results.values():
      scores = [
        next((value for key, value in metrics.items() if _at(key, width)), None)
        for metrics in of.values()
      ]
      known = [score for score in scores if score is not None]
      complete = set(of) == tasks and len(known) == len(scores)
      cells.append(f"{100 * np.mean(known):.2f}" if complete else report.MISSING)
    rows.append(["mean", "of main metrics", str(width), *cells])
  return rows


def _with_main_metrics(results: TaskResults) -> TaskResults:
  """The tasks that have one."""
  return {
    task: metrics
    for task, metrics in results.items()
    if any(key.partition("/")[0] in MAIN_METRICS for key in metrics)
  }


def _at(key: str, width: int) -> bool:
  """Whether a key is of a main metric at a width, or of one without (BM25's)."""
  metric, _, at = key.partition("/")
  return metric in MAIN_METRICS and at in (str(width), "")


def _number(cell: str) -> float:
  try:
    return float(cell)
  except ValueError:
    return math.nan
