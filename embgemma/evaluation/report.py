"""Results of several runs side by side: a rich table, or markdown for files."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from embgemma.evaluation import statistics
from embgemma.evaluation.statistics import Sample

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Column (run) to task to metric key to value; a key is such as "ndcg@10/768",
"ndcg@10" or "loss/R_3_15"."""

MISSING = "–"
# Shown as they are, beside scaled ones: nats and what is made of them.
UNSCALED = frozenset({"loss", "perplexity"})
_UNSCALED_DIGITS = 3
_LABELS = ("task", "metric", "width")


@dataclasses.dataclass(frozen=True)
class _Row:
  task: str
  metric: str
  width: str
  values: tuple[float | None, ...]


def _value(metrics: Mapping[str, float], metric: str, width: str) -> float | None:
  if not width.isdigit():
    return metrics.get(f"{metric}/{width}" if width else metric)
  # BM25 has no width: its value stands beside every width.
  return metrics.get(f"{metric}/{width}", metrics.get(metric))


def _task_rows(results: Results, task: str, only: Sequence[str] | None) -> list[_Row]:
  columns = [column.get(task, {}) for column in results.values()]
  widths: dict[str, list[str]] = {}
  for key in (key for column in columns for key in column):
    metric, _, width = key.partition("/")
    if (only is None or metric in only) and width not in widths.setdefault(metric, []):
      widths[metric].append(width)
  return [
    _Row(task, metric, width, tuple(_value(c, metric, width) for c in columns))
    for metric, found in widths.items()
    for width in sorted(found, key=_widest_first)
    if width or not any(map(str.isdigit, found))
  ]


def _widest_first(width: str) -> int:
  """Orders numbers; names of denoisers stay as they are."""
  return -int(width) if width.isdigit() else 0


def _mean_rows(rows: Sequence[_Row]) -> list[_Row]:
  groups: dict[tuple[str, str], list[_Row]] = {}
  for row in rows:
    groups.setdefault((row.metric, row.width), []).append(row)
  means = []
  for (metric, width), group in groups.items():
    if len(group) > 1:
      columns = zip(*(row.values for row in group), strict=True)
      # As MTEB: without one of the tasks a mean would compare unlike things.
      values = tuple(None if None in c else float(np.mean(c)) for c in columns)
      means.append(_Row("mean", metric, width, values))
  return means


def _sections(results: Results, only: Sequence[str] | None) -> list[list[_Row]]:
  tasks = dict.fromkeys(task for column in results.values() for task in column)
  by_task = [_task_rows(results, task, only) for task in tasks]
  means = _mean_rows([row for rows in by_task for row in rows])
  return [rows for rows in [*by_task, means] if rows]


def _cells(row: _Row, scale: float, digits: int) -> list[str]:
  if row.metric in UNSCALED:
    scale, digits = 1.0, _UNSCALED_DIGITS
  values = (MISSING if v is None else f"{v * scale:.{digits}f}" for v in row.values)
  return [row.task, row.metric, row.width, *values]


def results_table(
  results: Results,
  title: str | None = None,
  metrics: Sequence[str] | None = None,
  scale: float = 100.0,
  digits: int = 2,
) -> Table:
  """Returns a table of one row per task, metric and width, one column per run.

  Values are multiplied by `scale`, but for those of UNSCALED, which have three digits.
  The width may be a denoiser's name. Means over tasks follow, for each metric and
  width that several tasks have; a run without one of those tasks has no mean.

  Args:
    results: Run name to task name to metric key to value; what is missing shows
      as "–", and a key without a width counts for every width that is a number.
    title: Above the table.
    metrics: Only these, such as ("ndcg@10", "spearman"); None is all.
    scale: 100 for metrics in 0..1.
    digits: After the point.
  """
  table = Table(title=None if title is None else Text(title))
  for label in _LABELS:
    table.add_column(label, justify="right" if label == "width" else "left")
  for name in results:
    table.add_column(Text(name), justify="right")
  for rows in _sections(results, metrics):
    for row in rows:
      table.add_row(*map(Text, _cells(row, scale, digits)))
    table.add_section()
  return table


def results_cells(
  results: Results,
  metrics: Sequence[str] | None = None,
  scale: float = 100.0,
  digits: int = 2,
) -> tuple[list[str], list[list[str]]]:
  """Returns the heads and the rows of `results_table` as text: task, metric, width,
  then a value of each run."""
  rows = [row for section in _sections(results, metrics) for row in section]
  return [*_LABELS, *results], [_cells(row, scale, digits) for row in rows]


def results_markdown(
  results: Results,
  metrics: Sequence[str] | None = None,
  scale: float = 100.0,
  digits: int = 2,
) -> str:
  """Returns the rows of `results_table` as a markdown table, ending in a newline."""
  heads, rows = results_cells(results, metrics, scale, digits)
  lines = [heads, ["---", "---", "---:", *("---:" for _ in results)], *rows]
  escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
  return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)


def intervals_table(
  metrics: Sequence[tuple[str, str]],
  samples: Mapping[str, Sequence[Sample]],
  width: int,
) -> Table:
  """Returns a table of scores with their 95% intervals, in percent.

  Of two models it has their scores, and the second's gain over the first with its
  interval and its p-value.

  Args:
    metrics: Task and metric of each sample.
    samples: By model, in the order of `metrics`.
    width: Of the vectors, for the title.
  """
  table = Table(title=f"95 % intervals over examples, width {width}")
  for label in (*_LABELS[:2], "examples"):
    table.add_column(label)
  heads = list(map(Text, samples))
  compared = len(samples) == 2
  for head in heads:
    table.add_column(head, justify="right")
  for label in ("gain", "p") if compared else ():
    table.add_column(label, justify="right", no_wrap=True)
  for (task, metric), *own in zip(metrics, *samples.values(), strict=True):
    if compared:
      found = statistics.compare(*own)
      scores = [f"{100 * sample.score:.2f}" for sample in own]
      cells = [*scores, _interval(found.difference, "+"), f"{found.p_value:.4f}"]
    else:
      cells = [_interval(statistics.bootstrap(sample)) for sample in own]
    examples = f"{len(own[0].values):,}"
    table.add_row(Text(task), metric, examples, *map(Text, cells))
  return table


def _interval(found: statistics.Interval, sign: str = "") -> str:
  score, low, high = (100 * each for each in (found.score, found.low, found.high))
  return f"{score:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
