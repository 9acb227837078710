"""The shapes of a run's typical step, for devices that need not exist."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from embgemma.data import cache, packing
from embgemma.data.shape_plan import plan_shapes
from embgemma.data.tasks import DataConfig
from embgemma.errors import ConfigError
from embgemma.losses.objective import Objective
from embgemma.models import attention
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import Embedder, on_platform
from embgemma.training.activation_memory import device_memory, fitting_tokens
from embgemma.training.flops import forward_flops
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import Partitioner, data_shards
from embgemma.training.train_state import TrainState, abstract_state

_SAMPLED = 8192
_SPREAD = 0.5  # of the logarithm of a text's length


@dataclasses.dataclass(frozen=True)
class TextLengths:
  """Lengths that batches are made of.

  Attributes:
    name: Where they come from.
    lengths: int [n, 2 + M], tokens of query, positive and negatives; 0 is none.
  """

  name: str
  lengths: np.ndarray


def text_lengths(
  data: DataConfig,
  query_tokens: int | None = None,
  passage_tokens: int | None = None,
  cached: bool = True,
) -> TextLengths:
  """Lengths of the cached task with the most tokens an example, or drawn ones.

  A batch is of one task: the longest texts decide whether a step fits. Drawn are
  log-normal lengths of the given means, cut as TASK_FEATURE_LENGTHS says; without a
  mean every text is as long as that allows.

  Args:
    data: Of the run.
    query_tokens: Mean of drawn queries; None, for both means, takes what is cached.
    passage_tokens: Mean of drawn positives and negatives; likewise.
    cached: Whether to look for caches.

  Raises:
    ConfigError: TASK_FEATURE_LENGTHS does not allow a mean.
    DataError: a cache is damaged.
  """
  if query_tokens is None and passage_tokens is None and cached:
    found = _cached_lengths(data)
    if found is not None:
      return found
  means = [query_tokens, passage_tokens, *[passage_tokens] * data.max_negatives]
  features = ["query", "positive", *["negatives"] * data.max_negatives]
  rng = np.random.default_rng(0)
  columns, described = [], {}
  for mean, feature in zip(means, features, strict=True):
    limit = data.lengths[feature]
    mean = limit if mean is None else mean
    if not 3 <= mean <= limit:
      flag = "query" if feature == "query" else "passage"
      raise ConfigError(
        f"--{flag}_tokens={mean}: TASK_FEATURE_LENGTHS cuts {feature} at {limit}; give "
        f"a mean between 3 and {limit}"
      )
    described[feature] = mean
    columns.append(_drawn(rng, mean, limit))
  name = ", ".join(f"{feature} {mean}" for feature, mean in described.items())
  return TextLengths(f"drawn, mean tokens: {name}", np.stack(columns, axis=1))


def _cached_lengths(data: DataConfig) -> TextLengths | None:
  unread = data.vocabulary is not None and not os.path.isfile(data.vocabulary)
  manifest = None if unread else cache.manifest(data)
  if manifest is None:
    return None
  tasks = {task.name: task.lengths() for task in manifest.tasks}
  name = max(tasks, key=lambda task: float(tasks[task].sum(axis=1).mean()))
  every = -(-len(tasks[name]) // _SAMPLED)
  return TextLengths(f"task {name!r}", np.asarray(tasks[name][::every], int))


def _drawn(rng: np.random.Generator, mean: int, limit: int) -> np.ndarray:
  if mean == limit:
    return np.full(_SAMPLED, limit)
  drawn = rng.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, _SAMPLED)
  return np.clip(np.rint(drawn), 3, limit).astype(int)


@dataclasses.dataclass(frozen=True)
class AbstractRun:
  """A run's model and state on devices that need not exist.

  Attributes:
    mesh: Devices of a step.
    model: With the attention that they run.
    state: Shapes and shardings.
  """

  mesh: Mesh
  model: EmbedderConfig
  state: TrainState

  @property
  def shards(self) -> int:
    """S."""
    return data_shards(self.mesh)


def abstract_run(
  devices: Sequence[jax.Device],
  *,
  model: EmbedderConfig,
  objective: Objective,
  optimizer: OptimizerConfig,
  train_steps: int,
  partitioner: Partitioner = Partitioner(),
  ema_decay: float | None = None,
  **unused: Any,
) -> AbstractRun:
  """What `loop.train` would set up on the devices, with its arguments.

  Raises:
    ConfigError: the mesh does not divide the devices, or a setting that `loop.train`
      refuses.
  """
  del unused
  objective.check(model.embedding_width)
  mesh = partitioner.mesh(devices)
  model = on_platform(model, devices[0].platform)
  _, state = abstract_state(
    Embedder(model),
    objective,
    optimizer,
    train_steps,
    ema_decay is not None,
    partitioner,
    mesh,
  )
  return AbstractRun(mesh, model, state)


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """A typical step of a run.

  Attributes:
    run: Of the step.
    batch_size: B.
    negatives: M.
    groups: Of one shard.
    tokens: Real tokens of all shards.
    model_flops: Of forward and backward pass over the real tokens, nothing computed
      twice: three forward passes.
  """

  run: AbstractRun
  batch_size: int
  negatives: int
  groups: tuple[packing.GroupShape, ...]
  tokens: int
  model_flops: float

  @property
  def slots(self) -> int:
    """Token slots of all shards, padding included."""
    return self.run.shards * sum(group.tokens for group in self.groups)


def plan_step(
  run: AbstractRun,
  device_bytes: int | None,
  batch_size: int,
  lengths: np.ndarray,
  *,
  data: DataConfig,
  optimizer: OptimizerConfig,
  microbatch_tokens: int | None = None,
  **unused: Any,
) -> StepPlan:
  """A typical step that `loop.train` would do, with its arguments.

  Args:
    run: Of the step.
    device_bytes: Memory of a device; None asks the devices.
    batch_size: Examples of a step, over all devices.
    lengths: See `TextLengths`.
    data: As `loop.train` takes it, and so on.

  Raises:
    ConfigError: the mesh does not divide the batch, or nothing fits.
  """
  del unused
  shards, model = run.shards, run.model
  if batch_size % shards:
    raise ConfigError(
      f"a batch of {batch_size:,} is not divided by the mesh's {shards} data shards; "
      f"choose a multiple of {shards}"
    )
  row_lengths = attention.row_lengths(model.transformer, packing.ROW_LENGTHS)
  if microbatch_tokens is None:
    size = device_memory(run.mesh) if device_bytes is None else device_bytes
    longest = packing.row_length(data.max_length, row_lengths)
    microbatch_tokens = fitting_tokens(
      model, longest, run.state, size, optimizer.trainable
    )
  plan = plan_shapes(lengths, batch_size, shards, microbatch_tokens, row_lengths)
  share = batch_size / len(lengths)
  return StepPlan(
    run=run,
    batch_size=batch_size,
    negatives=lengths.shape[1] - 2,
    groups=plan.typical,
    tokens=round(int(lengths.sum()) * share),
    model_flops=3 * share * forward_flops(model, lengths.reshape(-1)),
  )
