"""The shapes of a run's typical step, for devices that need not exist."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from embgemma.data import cache
from embgemma.data.cache import Manifest
from embgemma.data.config import CachedData, DataConfig, TextDataConfig
from embgemma.data.packing import GroupShape
from embgemma.data.sequence_packing import SequenceShape
from embgemma.errors import ConfigError
from embgemma.losses.denoising import Denoising
from embgemma.losses.objective import Objective
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.training.activation_memory import device_memory, fitting_tokens
from embgemma.training.learners import Learner
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import Partitioner, data_shards
from embgemma.training.stage_protocol import Stage, TypicalBatch
from embgemma.training.stages import make_stage
from embgemma.training.train_state import TrainState, abstract_state

_SAMPLED = 8192
_SPREAD = 0.5  # of the logarithm of a text's length


@dataclasses.dataclass(frozen=True)
class TextLengths:
  """Lengths that batches are made of.

  Attributes:
    name: Where they come from.
    lengths: int [n, 2 + M], tokens of query, positive and negatives; 0 is none. Of
      documents [n, 1], tokens of segments.
  """

  name: str
  lengths: np.ndarray


def text_lengths(
  data: CachedData,
  query_tokens: int | None = None,
  passage_tokens: int | None = None,
  cached: bool = True,
) -> TextLengths:
  """Lengths of the cached task with the most tokens an example, or others.

  A batch is of one task: the longest texts decide whether a step fits. Without a cache
  pairs have log-normal lengths of the given means, cut as TASK_FEATURE_LENGTHS says,
  or without a mean the length that allows; and segments of documents are as long as
  they may be.

  Args:
    data: Of the run.
    query_tokens: Mean of drawn queries; None, for both means, takes what is cached.
    passage_tokens: Mean of drawn positives and negatives; likewise.
    cached: Whether to look for caches.

  Raises:
    ConfigError: TASK_FEATURE_LENGTHS does not allow a mean, or the run has no pairs.
    DataError: a cache is damaged.
  """
  drawn = query_tokens is not None or passage_tokens is not None
  if drawn and not isinstance(data, DataConfig):
    raise ConfigError(
      "--query_tokens and --passage_tokens are of pairs, and this stage trains on "
      "documents; remove them: segments have the lengths that are cached, or "
      "SEGMENT_TOKENS"
    )
  found = _cached_lengths(data) if cached and not drawn else None
  if found is not None:
    return found
  if isinstance(data, DataConfig):
    return _drawn_pairs(data, query_tokens, passage_tokens)
  assert isinstance(data, TextDataConfig)
  segments = np.full((_SAMPLED, 1), data.longest)
  return TextLengths(f"segments of {data.longest} tokens", segments)


def vocabulary_file(data: CachedData) -> pathlib.Path | None:
  """The vocabulary, if there is one yet."""
  if data.vocabulary is not None and not epath.Path(data.vocabulary).exists():
    return None
  path = data.vocabulary_path()
  return cache.local_copy(path) if path.exists() else None


def complete_caches(data: CachedData) -> Manifest | None:
  """The caches of a run, if there are any yet.

  Raises:
    DataError: a cache is damaged.
  """
  return None if vocabulary_file(data) is None else cache.manifest(data)


def _cached_lengths(data: CachedData) -> TextLengths | None:
  manifest = complete_caches(data)
  if manifest is None:
    return None
  tasks = {task.name: task.lengths() for task in manifest.tasks}
  name = max(tasks, key=lambda task: float(tasks[task].sum(axis=1).mean()))
  every = -(-len(tasks[name]) // _SAMPLED)
  return TextLengths(f"task {name!r}", np.asarray(tasks[name][::every], int))


def _drawn_pairs(
  data: DataConfig, query_tokens: int | None, passage_tokens: int | None
) -> TextLengths:
  """Lengths about the given means."""
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
    stage: Model, loss and data.
    learner: Of the stage.
    state: Shapes and shardings.
  """

  mesh: Mesh
  stage: Stage
  learner: Learner
  state: TrainState

  @property
  def shards(self) -> int:
    """S."""
    return data_shards(self.mesh)


def abstract_run(
  devices: Sequence[jax.Device],
  *,
  model: EmbedderConfig | BackboneConfig,
  objective: Objective | Denoising,
  data: CachedData,
  optimizer: OptimizerConfig,
  train_steps: int,
  partitioner: Partitioner = Partitioner(),
  ema_decay: float | None = None,
  **unused: Any,
) -> AbstractRun:
  """What `loop.train` would set up on the devices, with its arguments.

  But for the state of `OptimizerConfig.alone` where that follows from a starting
  point: one number.

  Raises:
    ConfigError: the mesh does not divide the devices, or a setting that `loop.train`
      refuses.
  """
  del unused
  mesh = partitioner.mesh(devices)
  stage = make_stage(model, objective, data, devices[0].platform)
  learner = stage.learner
  _, state = abstract_state(
    learner, optimizer, train_steps, ema_decay is not None, partitioner, mesh
  )
  return AbstractRun(mesh, stage, learner, state)


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """A typical step of a run.

  Attributes:
    run: Of the step.
    batch_size: B.
    batch: Of the step.
  """

  run: AbstractRun
  batch_size: int
  batch: TypicalBatch

  @property
  def slots(self) -> int:
    """Token slots of all shards, padding included."""
    return self.run.shards * sum(group.tokens for group in self.batch.groups)

  @property
  def model_flops(self) -> float:
    """Of forward and backward pass over the real tokens, nothing computed twice.

    Three forward passes.
    """
    return 3 * self.batch.forward_flops


def plan_step(
  run: AbstractRun,
  device_bytes: int | None,
  batch_size: int,
  lengths: np.ndarray,
  *,
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
    optimizer: As `loop.train` takes it, and so on.

  Raises:
    ConfigError: the mesh does not divide the batch, or nothing fits.
  """
  del unused
  shards, stage = run.shards, run.stage
  if batch_size % shards:
    raise ConfigError(
      f"a batch of {batch_size:,} is not divided by the mesh's {shards} data shards; "
      f"choose a multiple of {shards}"
    )
  if microbatch_tokens is None:
    size = device_memory(run.mesh) if device_bytes is None else device_bytes
    microbatch_tokens = fitting_tokens(
      stage.config, stage.row, run.state, size, optimizer.trainable
    )
  batch = stage.typical_batch(lengths, batch_size, shards, microbatch_tokens)
  return StepPlan(run, batch_size, batch)


def row(group: GroupShape | SequenceShape) -> tuple[int, ...]:
  """Tokens of a row, on each side of the model."""
  if isinstance(group, GroupShape):
    return (group.length,)
  return (group.inputs, group.targets) if group.inputs else (group.targets,)


def row_name(group: GroupShape | SequenceShape) -> str:
  """A row as it is spoken of: "512", or of two sides "512 + 256"."""
  return " + ".join(f"{tokens}" for tokens in row(group))
