"""What a run would be: sizes, memory, tokens and steps, before any compute."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from embgemma.data.cache import CachedTask, Manifest
from embgemma.data.config import CachedData
from embgemma.data.tasks import Task
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError
from embgemma.losses.denoising import logits_bytes
from embgemma.models import adaptation
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.training import warm_start
from embgemma.training.activation_memory import bytes_per_slot
from embgemma.training.learners import parameter_parts
from embgemma.training.optimizers import OptimizerConfig, split_trainable
from embgemma.training.partitioning import bytes_per_device
from embgemma.training.step_plan import (
  AbstractRun,
  StepPlan,
  abstract_run,
  complete_caches,
  plan_step,
  row,
  row_name,
  text_lengths,
  vocabulary_file,
)
from embgemma.typing import PyTree


def parameter_counts(params: PyTree) -> dict[str, int]:
  """Parameters of each part of the model, see `parameter_parts`, and of all."""
  counts = {k: count(part) for k, part in parameter_parts(params["model"]).items()}
  return counts | {"total": sum(counts.values())}


def count(tree: PyTree) -> int:
  """Elements of the tree's arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def explain(
  *,
  data: CachedData,
  optimizer: OptimizerConfig,
  train_steps: int,
  batch_size: int,
  console: Console,
  **run: Any,
) -> None:
  """Prints the resolved run; takes the arguments of `loop.train`.

  Raises:
    ConfigError, CheckpointError: as `loop.train` does for models, meshes, objectives
      and starting points.
  """
  abstract = abstract_run(
    jax.devices(), data=data, optimizer=optimizer, train_steps=train_steps, **run
  )
  console.print(_model_table(abstract, optimizer))
  start = _start_text(data, **run)
  if start is not None:
    console.print(start, highlight=False, markup=False, soft_wrap=True)
  lengths = text_lengths(data)
  try:
    plan = plan_step(
      abstract, None, batch_size, lengths.lengths, optimizer=optimizer, **run
    )
    console.print(_step_table(plan, lengths.name))
  except ConfigError as error:
    # What the run is can be known where it does not fit.
    console.print(f"a step cannot run here: {error}", highlight=False)
  console.print(_task_table(data, train_steps, batch_size))


def _start_text(
  data: CachedData,
  *,
  model: EmbedderConfig | BackboneConfig,
  model_dir: str = "",
  initial_checkpoint_path: str | None = None,
  initial_decoder_checkpoint_path: str | None = None,
  **unused: Any,
) -> str | None:
  """Where the parameters of a run come or came from, if it adapts other checkpoints.

  Raises:
    ConfigError, CheckpointError: see `warm_start`.
  """
  del unused
  paths = (initial_checkpoint_path, initial_decoder_checkpoint_path)
  if paths == (None, None):
    return None
  vocabulary = vocabulary_file(data)
  if vocabulary is None:
    return "where the parameters come from: known once the vocabulary is there"
  start = warm_start.find_start(
    # No directory is given where none is needed: then none has steps.
    pathlib.Path(model_dir or os.devnull),
    *paths,
    model,
    SentencePieceVocabulary(vocabulary),
  )
  return None if start.report is None else adaptation.report_text(start.report)


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
  batch, config = plan.batch, plan.run.stage.config
  table = Table(title="a step", show_header=False)
  table.add_row("texts", lengths)
  table.add_row("examples per data shard", f"{plan.batch_size // plan.run.shards:,}")
  share = batch.tokens / plan.slots
  table.add_row(
    "tokens", f"{batch.tokens:,} in {plan.slots:,} slots ({share:.1%} real)"
  )
  table.add_row("model FLOPs", f"{plan.model_flops:.3g}")
  for group in batch.groups:
    table.add_row(
      f"rows of {row_name(group)} on a shard",
      f"{group.rows} in each of {group.microbatches} microbatches",
    )
  # A group's tokens are those of all its microbatches.
  largest = max(batch.groups, key=lambda group: group.tokens // group.microbatches)
  slots = largest.tokens // largest.microbatches
  size = bytes_per_slot(config, row(largest)) * slots
  table.add_row(
    "activations of a microbatch", f"about {size / 2**20:,.0f} MiB per device"
  )
  if isinstance(config, BackboneConfig) and config.decoder is not None:
    vocab = config.decoder.vocab_size
    # Float32, and their gradient.
    whole = 2 * 4 * vocab * largest.rows * row(largest)[-1]
    size = min(whole, logits_bytes(vocab))
    table.add_row("logits of a chunk", f"up to {size / 2**20:,.0f} MiB per device")
  return table


def _task_table(data: CachedData, train_steps: int, batch_size: int) -> Table:
  """Rate, size and expected use of each task; sizes are known once it is cached."""
  manifest = complete_caches(data)
  how = "given" if isinstance(data.rates, Mapping) else data.rates
  if manifest is None:
    title = f"tasks, {how} rates (sizes after `embgemma cache`)"
  else:
    title = f"tasks, {how} rates"
  table = Table(title=title)
  for column in ("task", "rate", "steps", "examples", "epochs", "tokens"):
    table.add_column(column, justify="left" if column == "task" else "right")
  tasks: list[Task | CachedTask] = []
  tasks += data.selected() if manifest is None else manifest.tasks
  for task, share in zip(tasks, _shares(data, manifest), strict=True):
    cells = ["–"] * 5
    if share is not None:
      cells[:2] = [f"{share:.3f}", f"{train_steps * share:,.0f}"]
    if isinstance(task, CachedTask) and share is not None:
      examples, tokens = (task.statistics[k] for k in ("examples", "tokens"))
      epochs = train_steps * share * batch_size / examples
      cells[2:] = [f"{examples:,}", f"{epochs:.2f}", f"{epochs * tokens:,.0f}"]
    table.add_row(task.name, *cells)
  return table


def _shares(data: CachedData, manifest: Manifest | None) -> list[float | None]:
  """Of all steps, each task's; None while they follow from sizes yet unknown."""
  if manifest is not None:
    rates = [task.rate for task in manifest.tasks]
  elif isinstance(data.rates, Mapping):
    rates = [data.rates.get(task.name, 0.0) for task in data.selected()]
  elif data.rates in ("explicit", "even"):
    rates = [t.rate if data.rates == "explicit" else 1.0 for t in data.selected()]
  else:
    return [None] * len(data.selected())
  return [rate / sum(rates) for rate in rates]
