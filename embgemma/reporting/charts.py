"""Charts as SVG that takes its colours of text and lines from the page around it."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embgemma.reporting.records import Curve

# Okabe and Ito's colours, told apart with any vision, on light and dark.
COLOURS = (
  *("#0072B2", "#E69F00", "#009E73", "#CC79A7"),
  *("#56B4E9", "#D55E00", "#B8A600", "#888888"),
)
_INK = "#010203"  # of no chart: becomes the page's colour of text
_MANY = 200  # points of a line that a reader tells apart

_STYLE: Any = {
  "svg.fonttype": "none",
  "svg.hashsalt": "embgemma",
  "font.family": "sans-serif",
  "font.size": 9,
  "text.color": _INK,
  "axes.edgecolor": _INK,
  "axes.labelcolor": _INK,
  "axes.titlecolor": _INK,
  "axes.titlesize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.6,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#888888",
  "grid.alpha": 0.25,
  "grid.linewidth": 0.5,
  "xtick.color": _INK,
  "ytick.color": _INK,
  "lines.linewidth": 1.4,
  "legend.frameon": False,
  "legend.fontsize": 8,
  "axes.prop_cycle": cycler(color=COLOURS),
}


def lines(title: str, curves: Mapping[str, Curve], logarithmic: bool = False) -> str:
  """Curves over steps.

  Args:
    title: Above.
    curves: By the name that the legend gives.
    logarithmic: Whether values are; those of 0 and below are left out then.
  """

  def draw(axes: Axes) -> None:
    for name, curve in curves.items():
      steps, values = _thinned(curve.steps, curve.values)
      axes.plot(steps, values, label=name, marker="." if len(steps) < 12 else None)
    if logarithmic:
      axes.set_yscale("log")
    axes.set_xlabel("step")
    if len(curves) > 1:
      axes.legend(ncols=2)

  return _svg(title, draw, (4.6, 2.6))


def mixtures(
  title: str, rates: Sequence[Mapping[str, float]], labels: Sequence[str]
) -> str:
  """A stacked bar of each mixture.

  Args:
    title: Above.
    rates: Of groups, summing to 1, of each mixture.
    labels: Of the bars.
  """
  groups = list(dict.fromkeys(group for each in rates for group in each))

  def draw(axes: Axes) -> None:
    base = np.zeros(len(rates))
    for number, group in enumerate(groups):
      heights = np.array([each.get(group, 0.0) for each in rates])
      hatch = "//" if number // len(COLOURS) % 2 else None
      colour = COLOURS[number % len(COLOURS)]
      places = np.arange(len(rates))
      axes.bar(places, heights, 0.8, base, color=colour, label=group, hatch=hatch)
      base += heights
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    axes.set_ylabel("rate")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

  return _svg(title, draw, (max(4.6, 1.8 + 0.24 * len(rates)), 3.0))


def scores(
  title: str,
  values: Mapping[str, Sequence[float]],
  labels: Sequence[str],
  noise: Mapping[str, float],
) -> str:
  """Scores of trials with bars of noise.

  Args:
    title: Above.
    values: Of each objective, of each trial.
    labels: Of the trials.
    noise: Standard deviation of an objective, where known.
  """

  def draw(axes: Axes) -> None:
    for number, (name, of) in enumerate(values.items()):
      places = np.arange(len(of)) + 0.15 * (number - (len(values) - 1) / 2)
      error = noise.get(name) or None
      axes.errorbar(places, of, yerr=error, fmt="o", ms=3, capsize=2, label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

  return _svg(title, draw, (max(4.6, 1.8 + 0.24 * len(labels)), 3.0))


def scatter(title: str, places: Mapping[str, np.ndarray]) -> str:
  """Points in a plane.

  Args:
    title: Above.
    places: Of each group, [N, 2].
  """

  def draw(axes: Axes) -> None:
    for number, (name, of) in enumerate(places.items()):
      colour = COLOURS[number % len(COLOURS)]
      axes.plot(of[:, 0], of[:, 1], ".", ms=3, color=colour, alpha=0.7, label=name)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=3)

  return _svg(title, draw, (6.0, 4.0))


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """As many points as are seen: means of neighbours."""
  if len(steps) <= _MANY:
    return steps, values
  parts = np.array_split(np.arange(len(steps)), _MANY)
  means = [(steps[part].mean(), values[part].mean()) for part in parts]
  return tuple(map(np.array, zip(*means, strict=True)))  # type: ignore[return-value]


def _svg(title: str, draw: Callable[[Axes], None], inches: tuple[float, float]) -> str:
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    draw(axes)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
  text = file.getvalue()
  text = text[text.index("<svg") :].replace(_INK, "currentColor")
  # Ids are of the whole page; each chart has its own.
  prefix = re.sub(r"\W", "", title)
  text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
  label = html.escape(title)
  return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
