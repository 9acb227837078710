"""What mining found: counts, recall, and how similar positives and negatives are."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from embgemma.mining.filters import RULES

_TASKS_A_TABLE = 6  # that a terminal shows side by side
_BINS = 40
_SHARE_RANGE = (0.0, 1.2)
HISTOGRAMS = ("positive", "negative", "share")


def recall_depths(depth: int) -> tuple[int, ...]:
  """Where recall is measured."""
  return tuple(sorted({1, min(10, depth), depth}))


def edges(name: str, similarity_range: tuple[float, float]) -> np.ndarray:
  """Ends of a histogram's bins; what lies beyond counts in the first or last."""
  ends = _SHARE_RANGE if name == "share" else similarity_range
  return np.linspace(*ends, _BINS + 1)


class Tally:
  """Counts over a block of queries, which add up over blocks.

  Args:
    negatives: Wanted of an example.
    depths: Where recall is measured.
    similarity_range: Ends of histograms.
  """

  def __init__(
    self,
    negatives: int,
    depths: Sequence[int],
    similarity_range: tuple[float, float],
  ):
    self._range = similarity_range
    self._depths = depths
    self.arrays: dict[str, np.ndarray] = {
      "queries": np.zeros(1, np.int64),
      "recalled": np.zeros(len(depths)),
      "dropped": np.zeros(len(RULES), np.int64),
      "mined": np.zeros(negatives + 1, np.int64),
      **{name: np.zeros(_BINS, np.int64) for name in HISTOGRAMS},
    }

  def query(self, hits: np.ndarray, positives: np.ndarray) -> None:
    """Counts one query.

    Args:
      hits: Passages found, best first.
      positives: Known.
    """
    found = np.isin(hits, positives)
    self.arrays["queries"] += 1
    counts = np.array([np.count_nonzero(found[:depth]) for depth in self._depths])
    self.arrays["recalled"] += counts / len(positives)

  def example(
    self, positive: float, negatives: np.ndarray, dropped: np.ndarray
  ) -> None:
    """Counts one example.

    Args:
      positive: Similarity.
      negatives: Similarities of those chosen.
      dropped: By each rule.
    """
    self.arrays["dropped"] += dropped
    self.arrays["mined"][len(negatives)] += 1
    self._count("positive", np.array([positive]))
    self._count("negative", negatives)
    if positive > 0:
      self._count("share", negatives / positive)

  def _count(self, name: str, values: np.ndarray) -> None:
    bounds = edges(name, self._range)
    width = bounds[1] - bounds[0]
    places = np.floor((values.astype(np.float64) - bounds[0]) / width)
    np.add.at(self.arrays[name], np.clip(places, 0, _BINS - 1).astype(int), 1)


def summary(
  totals: Mapping[str, np.ndarray],
  depths: Sequence[int],
  similarity_range: tuple[float, float],
) -> dict[str, Any]:
  """The counts of a task as JSON values.

  Args:
    totals: Arrays of a `Tally`, added up.
    depths: Of the tallies.
    similarity_range: Of the tallies.
  """
  recall = totals["recalled"] / totals["queries"]
  counts = np.arange(len(totals["mined"]))
  return {
    "recall": {str(k): round(float(v), 6) for k, v in zip(depths, recall, strict=True)},
    "mined": int(totals["mined"] @ counts),
    "examples_by_mined": totals["mined"].tolist(),
    "dropped": dict(zip(RULES, totals["dropped"].tolist(), strict=True)),
    "histograms": {
      name: {
        "edges": np.round(edges(name, similarity_range), 6).tolist(),
        "counts": totals[name].tolist(),
      }
      for name in HISTOGRAMS
    },
  }


def _median(histogram: Mapping[str, Sequence[float]]) -> str:
  counts, bounds = np.array(histogram["counts"]), histogram["edges"]
  if not counts.sum():
    return "–"
  place = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
  return f"{(bounds[place] + bounds[place + 1]) / 2:.2f}"


@dataclasses.dataclass(frozen=True)
class MiningReport:
  """What a run found.

  Attributes:
    fingerprint: Of the run.
    searcher: Its name.
    judge: Its name, or None.
    tasks: Task to its numbers: examples, queries, passages, skipped, those of `summary`
      and seconds (of the process that finished the task).
  """

  fingerprint: str
  searcher: str
  judge: str | None
  tasks: Mapping[str, Mapping[str, Any]]

  def as_json(self) -> dict[str, Any]:
    """What `of_json` takes, of JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def of_json(cls, value: Mapping[str, Any]) -> "MiningReport":
    """The report of what `as_json` gave; other keys are left."""
    return cls(**{f.name: value[f.name] for f in dataclasses.fields(cls)})

  def tables(self) -> list[Table]:
    """One column a task, a few tasks a table.

    "mined" is the mean over examples, "short" the share that got fewer than wanted.
    Under a rule's name stands how many passages it dropped, of an example; rules that
    dropped none are left out. Medians are middles of bins.
    """
    judge = f", judged by {self.judge}" if self.judge else ""
    rules = [
      rule
      for rule in RULES
      if any(task["dropped"][rule] for task in self.tasks.values())
    ]
    columns = [_column(name, task, rules) for name, task in self.tasks.items()]
    made = []
    for start in range(0, len(columns), _TASKS_A_TABLE):
      few = columns[start : start + _TASKS_A_TABLE]
      table = Table(title=Text(f"mined by {self.searcher}{judge}"))
      table.add_column("task")
      for column in few:
        table.add_column(Text(column.pop("task")), justify="right")
      for label in dict.fromkeys(label for column in few for label in column):
        table.add_row(label, *(Text(column.get(label, "–")) for column in few))
      made.append(table)
    return made


def _column(name: str, task: Mapping[str, Any], rules: Sequence[str]) -> dict[str, str]:
  examples, by_mined = task["examples"], task["examples_by_mined"]
  column = {
    "task": name,
    "examples": f"{examples:,}",
    "queries": f"{task['queries']:,}",
    "passages": f"{task['passages']:,}",
  }
  column |= {f"R@{k}": f"{100 * v:.1f}" for k, v in task["recall"].items()}
  column["mined"] = f"{task['mined'] / examples:.2f}"
  column["short"] = f"{100 * sum(by_mined[:-1]) / examples:.1f} %"
  column |= {rule: f"{task['dropped'][rule] / examples:.1f}" for rule in rules}
  column |= {f"median {n}": _median(task["histograms"][n]) for n in HISTOGRAMS}
  column["seconds"] = f"{task['seconds']:,.0f}"
  return column
