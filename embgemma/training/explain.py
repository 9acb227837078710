"""What a run would be: sizes, memory, tokens and steps, before any compute."""

import math
import pathlib
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from embgemma.data import cache
from embgemma.data.tasks import DataConfig
from embgemma.losses.objective import Objective
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import Embedder
from embgemma.training.optimizers import OptimizerConfig, split_trainable
from embgemma.training.partitioning import Partitioner, data_shards
from embgemma.training.train_state import abstract_state
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


def bytes_per_device(tree: PyTree) -> int:
  """Bytes of the tree's arrays on one device, by their shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def explain(
  *,
  model: EmbedderConfig,
  objective: Objective,
  data: DataConfig,
  optimizer: OptimizerConfig,
  train_steps: int,
  batch_size: int,
  partitioner: Partitioner = Partitioner(),
  ema_decay: float | None = None,
  console: Console,
  **unused: Any,
) -> None:
  """Prints the resolved run; takes the arguments of `loop.train`.

  Raises:
    ConfigError: as `loop.train` does for models, meshes and objectives.
  """
  del unused
  objective.check(model.embedding_width)
  mesh = partitioner.mesh()
  _, state = abstract_state(
    Embedder(model),
    objective,
    optimizer,
    train_steps,
    ema_decay is not None,
    partitioner,
    mesh,
  )
  sizes = Table(title="model", show_header=False)
  trainable, frozen = split_trainable(state.params, optimizer.trainable)
  counts = parameter_counts(state.params)
  counts |= {"trainable": count(trainable), "frozen": count(frozen)}
  for name, number in counts.items():
    sizes.add_row(f"parameters: {name}", f"{number:,}")
  mib = 1 / 2**20
  params = bytes_per_device(state.params) * mib
  gradients = bytes_per_device(trainable) * mib
  optimizer_state = bytes_per_device(state.opt_state) * mib
  averaged = bytes_per_device(state.ema) * mib
  for name, size in (
    ("parameters", params),
    ("gradients", gradients),
    ("optimizer state", optimizer_state),
    ("averaged parameters", averaged),
    ("sum, without activations", params + gradients + optimizer_state + averaged),
  ):
    sizes.add_row(f"memory per device: {name}", f"{size:,.1f} MiB")
  devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  sizes.add_row("mesh", f"{devices} ({mesh.devices.flat[0].platform})")
  sizes.add_row("examples per data shard", f"{batch_size / data_shards(mesh):,g}")
  console.print(sizes)
  console.print(_task_table(data, train_steps, batch_size))


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
