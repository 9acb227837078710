"""What a run would be: sizes, memory, tokens and steps, before any compute."""

import math
import pathlib
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from embgemma.data import cache
from embgemma.data.tasks import DataConfig
from embgemma.errors import ConfigError
from embgemma.training.activation_memory import bytes_per_slot
from embgemma.training.optimizers import OptimizerConfig, split_trainable
from embgemma.training.partitioning import bytes_per_device
from embgemma.training.step_plan import (
  AbstractRun,
  StepPlan,
  abstract_run,
  plan_step,
  text_lengths,
)
from embgemma.typing import PyTree


def parameter_counts(params: PyTree) -> dict[str, int]:
  """Parameters of the table, the layers (adapters included), the heads, and of all."""
  embedder = dict(params["embedder"])
  encoder = dict(embedder.pop("encoder"))
  parts = {"table": encoder.pop("embedder"), "layers": encoder, "heads": embedder}
  counts = {name: count(tree) for name, tree in parts.items()}
  return counts | {"total": sum(counts.values())}


def count(tree: PyTree) -> int:
  """Elements of the tree's arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def explain(
  *,
  data: DataConfig,
  optimizer: OptimizerConfig,
  train_steps: int,
  batch_size: int,
  console: Console,
  **run: Any,
) -> None:
  """Prints the resolved run; takes the arguments of `loop.train`.

  Raises:
    ConfigError: as `loop.train` does for models, meshes and objectives.
  """
  abstract = abstract_run(
    jax.devices(), optimizer=optimizer, train_steps=train_steps, **run
  )
  console.print(_model_table(abstract, optimizer))
  lengths = text_lengths(data)
  try:
    plan = plan_step(
      abstract,
      None,
      batch_size,
      lengths.lengths,
      data=data,
      optimizer=optimizer,
      **run,
    )
    console.print(_step_table(plan, lengths.name))
  except ConfigError as error:
    # What the run is can be known where it does not fit.
    console.print(f"a step cannot run here: {error}", highlight=False)
  console.print(_task_table(data, train_steps, batch_size))


def _model_table(run: AbstractRun, optimizer: OptimizerConfig) -> Table:
  """Parameters, and the memory that a device needs whatever the batch."""
  state = run.state
  table = Table(title="model", show_header=False)
  trainable, frozen = split_trainable(state.params, optimizer.trainable)
  counts = parameter_counts(state.params)
  counts |= {"trainable": count(trainable), "frozen": count(frozen)}
  for name, number in counts.items():
    table.add_row(f"parameters: {name}", f"{number:,}")
  parts = {
    "parameters": bytes_per_device(state.params),
    "gradients": bytes_per_device(trainable),
    "optimizer state": bytes_per_device(state.opt_state),
    "averaged parameters": bytes_per_device(state.ema),
  }
  parts["sum, without activations"] = sum(parts.values())
  for name, size in parts.items():
    table.add_row(f"memory per device: {name}", f"{size / 2**20:,.1f} MiB")
  devices = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
  table.add_row("mesh", f"{devices} ({run.mesh.devices.flat[0].platform})")
  return table


def _step_table(plan: StepPlan, lengths: str) -> Table:
  """A typical step: what it computes, and in how many microbatches."""
  table = Table(title="a step", show_header=False)
  table.add_row("texts", lengths)
  table.add_row("examples per data shard", f"{plan.batch_size // plan.run.shards:,}")
  share = plan.tokens / plan.slots
  table.add_row("tokens", f"{plan.tokens:,} in {plan.slots:,} slots ({share:.1%} real)")
  table.add_row("model FLOPs", f"{plan.model_flops:.3g}")
  for group in plan.groups:
    table.add_row(
      f"rows of {group.length} on a shard",
      f"{group.rows} in each of {group.microbatches} microbatches",
    )
  largest = max(plan.groups, key=lambda group: group.rows * group.length)
  size = bytes_per_slot(plan.run.model, largest.length) * largest.rows * largest.length
  table.add_row(
    "activations of a microbatch", f"about {size / 2**20:,.0f} MiB per device"
  )
  return table


def _task_table(data: DataConfig, train_steps: int, batch_size: int) -> Table:
  """Rate, size and expected use of each task; sizes are known once it is cached."""
  unread = data.vocabulary and not pathlib.Path(data.vocabulary).is_file()
  manifest = None if unread else cache.manifest(data)
  if manifest is None:
    tasks = [(task.name, task.rate, None) for task in data.selected()]
    title = "tasks (sizes after `embgemma cache`)"
  else:
    tasks = [(task.name, task.rate, task.statistics) for task in manifest.tasks]
    title = "tasks"
  table = Table(title=title)
  for column in ("task", "rate", "steps", "examples", "epochs", "tokens"):
    table.add_column(column, justify="left" if column == "task" else "right")
  total = sum(rate for _, rate, _ in tasks)
  for name, rate, statistics in tasks:
    steps = train_steps * rate / total
    cells = ["–", "–", "–"]
    if statistics is not None:
      epochs = steps * batch_size / statistics["examples"]
      cells = [
        f"{statistics['examples']:,}",
        f"{epochs:.2f}",
        f"{epochs * statistics['tokens']:,.0f}",
      ]
    table.add_row(name, f"{rate / total:.3f}", f"{steps:,.0f}", *cells)
  return table
