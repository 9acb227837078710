"""Which task each step has: rates of a mixture, and draws from them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embgemma.errors import ConfigError
from embgemma.typing import Int

_BLOCK = 4096  # steps drawn from one counter of the generator
RATES = ("explicit", "even", "proportional")

Rates = str | int | float | Mapping[str, int | float]
"""One of `RATES`, a temperature, or rates by task."""


@runtime_checkable
class Rated(Protocol):
  """A task as mixtures see it, such as `cache.CachedTask`."""

  @property
  def name(self) -> str: ...

  @property
  def rate(self) -> float: ...

  @property
  def statistics(self) -> Mapping[str, Any]: ...


def mixture_rates(tasks: Sequence[Rated], how: Rates = "explicit") -> tuple[float, ...]:
  """The weight of each task, of any positive scale; 0 leaves it out.

  A temperature T is that of mT5 (arXiv 2010.11934, section 3.1), its 1/T their alpha:
  1 is "proportional", and the larger, the more even.

  Args:
    tasks: With statistics["examples"].
    how: "explicit" is each task's own rate; "even" gives all the same, "proportional"
      their numbers of examples, and T these to the power of 1/T. A mapping gives each
      task's by name.

  Raises:
    ConfigError: `how` is none of these, or names other tasks.
  """
  check_rates(how)
  if isinstance(how, Mapping):
    return _named_rates(tasks, how)
  if how == "explicit":
    return tuple(float(task.rate) for task in tasks)
  if how == "even":
    return (1.0,) * len(tasks)
  examples = [task.statistics["examples"] for task in tasks]
  temperature = 1.0 if how == "proportional" else float(how)
  # Relative to the largest: a power of it may be beyond floats.
  return tuple((n / max(examples)) ** (1 / temperature) for n in examples)


def _named_rates(
  tasks: Sequence[Rated], rates: Mapping[str, int | float]
) -> tuple[float, ...]:
  names = [task.name for task in tasks]
  if set(names) != set(rates):
    missing, unknown = (
      sorted(set(names) - set(rates)),
      sorted(set(rates) - set(names)),
    )
    raise ConfigError(
      "MIXTURE_RATES must name each task of the mixture and no other; missing: "
      f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
    )
  return tuple(float(rates[name]) for name in names)


def check_rates(how: Rates) -> None:
  """Returns nothing if `mixture_rates` knows this.

  Raises:
    ConfigError: it does not.
  """
  if isinstance(how, str):
    known = how in RATES
  elif isinstance(how, Mapping):
    known = all(map(_is_rate, how.values())) and any(how.values())
  else:
    known = not isinstance(how, bool) and math.isfinite(how) and how > 0
  if known:
    return
  raise ConfigError(
    f"rates of a mixture are one of {', '.join(map(repr, RATES))}, a temperature above "
    "0, such as 2.0, or a mapping from tasks to rates of 0 or more, not all 0; got "
    f"{how!r}"
  )


def _is_rate(value: Any) -> bool:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and math.isfinite(value) and value >= 0


@functools.cache
def _drawn(rates: tuple[float, ...], seed: int, block: int) -> np.ndarray:
  """Task indices of the steps of one block."""
  generator = np.random.Generator(np.random.Philox(key=seed, counter=block << 64))
  edges = np.cumsum(rates)
  return np.searchsorted(edges, generator.random(_BLOCK) * edges[-1], side="right")


@functools.cache
def _drawn_before(rates: tuple[float, ...], seed: int, block: int) -> np.ndarray:
  """Steps of each task in all earlier blocks."""
  counts = np.zeros(len(rates), np.int64)
  for earlier in range(block):
    counts += np.bincount(_drawn(rates, seed, earlier), minlength=len(rates))
  return counts


def steps_before(
  rates: tuple[float, ...], seed: int, step: int
) -> Int[np.ndarray, " tasks"]:
  """How many of the steps before this one each task had.

  Args:
    rates: Mixture weights, any positive scale.
    seed: Of the run.
    step: From 0.
  """
  block, offset = divmod(step, _BLOCK)
  own = np.bincount(_drawn(rates, seed, block)[:offset], minlength=len(rates))
  return _drawn_before(rates, seed, block) + own


def scheduled_task(rates: tuple[float, ...], seed: int, step: int) -> tuple[int, int]:
  """The index of a step's task, and how many earlier steps had the same task.

  Args:
    rates: Mixture weights, any positive scale.
    seed: Of the run.
    step: From 0.
  """
  block, offset = divmod(step, _BLOCK)
  task = int(_drawn(rates, seed, block)[offset])
  return task, int(steps_before(rates, seed, step)[task])
