"""Metrics of steps in flight: checked, and summed up over an interval."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import numpy as np

from embgemma.data.reader import StepBatch
from embgemma.errors import TrainingError
from embgemma.typing import Metrics

_NAMED_TASKS = 64  # of a mixture of more, TensorBoard would be nothing but tasks
_ORDER = ("similarity", "accuracy", "", "loss", "vector_gradient_norm", "gradient_norm")


def check_finite(metrics: Mapping[str, float], step: int, task: str, last: int) -> None:
  """Stops on the first metric, in order of computation, that is not finite.

  Args:
    metrics: Of the step.
    step: Number of the step.
    task: Of its batch.
    last: The last saved step.

  Raises:
    TrainingError: with what to do.
  """

  def order(name: str) -> tuple[int, str]:
    prefix = name.split("/")[0]
    return (_ORDER.index(prefix if prefix in _ORDER else ""), name)

  for name in sorted(metrics, key=order):
    if not math.isfinite(metrics[name]):
      raise TrainingError(
        f"step {step}, task {task!r}: {name} is {metrics[name]}; stopped. The last "
        f"saved step is {last}. Lower the learning rate, clip gradients or look at "
        "the task's data, then run again to resume from there; if that stops at once, "
        "delete that step to resume from the one before."
      )


def epoch_metrics(epochs: Mapping[str, float]) -> dict[str, float]:
  """Epochs of each task as `epoch/TASK`; of very many tasks the least and the most.

  Args:
    epochs: See `reader.BatchSource.epochs`.
  """
  if len(epochs) > _NAMED_TASKS:
    epochs = {"least": min(epochs.values()), "most": max(epochs.values())}
  return {f"epoch/{name}": value for name, value in epochs.items()}


@dataclasses.dataclass
class Interval:
  """Steps since the last log line; the newest may still be computing."""

  batch_size: int
  _pending: list[tuple[int, StepBatch, Metrics]] = dataclasses.field(
    default_factory=list
  )
  _metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
  _tokens: int = 0
  _slots: int = 0
  _duplicates: list[int] = dataclasses.field(default_factory=list)
  _waited: float = 0.0
  _began: float = dataclasses.field(default_factory=time.monotonic)

  def waited_for_input(self, seconds: float) -> None:
    """Time in which a step had no batch yet."""
    self._waited += seconds

  def paused(self, seconds: float) -> None:
    """Leaves out time in which no steps were to be done."""
    self._began += seconds

  def add(self, step: int, batch: StepBatch, metrics: Metrics) -> None:
    """A step that was started."""
    self._pending.append((step, batch, metrics))
    self._tokens += batch.real_tokens
    self._slots += batch.slots
    if batch.duplicates is not None:
      self._duplicates.append(batch.duplicates)

  def collect(self, last_saved: int, in_flight: int = 0) -> None:
    """Waits for all steps but the newest `in_flight`, and checks them.

    Raises:
      TrainingError: see `check_finite`.
    """
    while len(self._pending) > in_flight:
      step, batch, on_device = self._pending.pop(0)
      metrics = {k: float(v) for k, v in jax.device_get(on_device).items()}
      check_finite(metrics, step, batch.task, last_saved)
      self._metrics.append(metrics)

  def summary(self) -> dict[str, float]:
    """Means over the collected steps, and rates.

    `duplicate_share` is of the examples that share a text with another of their batch
    although such are avoided.
    """
    seconds = time.monotonic() - self._began
    count = len(self._metrics)
    means = {
      name: float(np.mean([m[name] for m in self._metrics]))
      for name in self._metrics[0]
    }
    if self._duplicates:
      means["duplicate_share"] = float(np.mean(self._duplicates)) / self.batch_size
    return means | {
      "examples_per_second": count * self.batch_size / seconds,
      "tokens_per_second": self._tokens / seconds,
      "real_token_share": self._tokens / self._slots,
      "input_wait_share": self._waited / seconds,
    }
