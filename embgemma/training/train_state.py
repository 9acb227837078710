"""What a training run changes from step to step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore
from embgemma.errors import CheckpointError
from embgemma.losses.objective import Objective
from embgemma.models import lora
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import Embedder, init_params
from embgemma.training.optimizers import OptimizerConfig, join, split_trainable
from embgemma.training.partitioning import Partitioner
from embgemma.typing import PyTree


@flax.struct.dataclass
class TrainState:
  """State of a run.

  Attributes:
    step: int32 scalar, steps done.
    params: {"embedder": the model's, "objective": learned by loss terms}, float32.
    opt_state: optax's, of the trainable parameters.
    ema: Exponential moving average of params["embedder"], or None.
  """

  step: PyTree
  params: PyTree
  opt_state: PyTree
  ema: PyTree | None

  @property
  def inference_params(self) -> PyTree:
    """The embedder's parameters to evaluate and to ship: averaged, where kept."""
    return self.params["embedder"] if self.ema is None else self.ema


def init_train_state(
  key: jax.Array,
  model: Embedder,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  keep_ema: bool,
  trainable: Sequence[str] | None = None,
) -> TrainState:
  """A new state; parameters in flax's logical-axis boxes (see `nn.unbox`).

  Raises:
    ConfigError: see `init_params` and `split_trainable`.
  """
  model_key, objective_key = jax.random.split(key)
  embedder = init_params(model.config, model_key)
  params = {
    "embedder": embedder,
    "objective": objective.init(objective_key, model.config.embedding_width),
  }
  # Copied: a buffer that appears twice in a donated state cannot be donated.
  ema = jax.tree.map(jnp.copy, embedder) if keep_ema else None
  opt_state = optimizer.init(split_trainable(params, trainable)[0])
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def unbox(tree: PyTree) -> PyTree:
  """The tree without logical-axis boxes."""
  return nn.unbox(tree)


def abstract_state(
  model: Embedder,
  objective: Objective,
  optimizer: OptimizerConfig,
  train_steps: int,
  keep_ema: bool,
  partitioner: Partitioner,
  mesh: Mesh,
) -> tuple[Any, PyTree]:
  """A function of a key that makes the state, and the state's shapes with shardings."""
  transformation = optimizer.build(train_steps)

  def boxed(key: jax.Array) -> TrainState:
    return init_train_state(
      key, model, objective, transformation, keep_ema, optimizer.trainable
    )

  shapes = jax.eval_shape(boxed, jax.random.key(0))
  shardings = partitioner.state_shardings(shapes, mesh)
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    unbox(shapes),
    shardings,
  )
  return jax.jit(lambda key: unbox(boxed(key)), out_shardings=shardings), abstract


def save_state(
  store: CheckpointStore,
  state: TrainState,
  step: int,
  position: Mapping[str, Any],
  metrics: Mapping[str, float] | None,
) -> None:
  """Starts an asynchronous checkpoint from which `restored_state` gives the state."""
  training = {
    "step": state.step,
    "opt_state": state.opt_state,
    "objective": state.params["objective"],
  }
  store.save(step, state.params["embedder"], state.ema, training, position, metrics)


def restored_state(
  store: CheckpointStore, step: int, abstract: TrainState
) -> TrainState:
  """The state saved at a step, placed like the abstract one.

  Raises:
    CheckpointError: see `CheckpointStore.restore`.
  """
  items = {
    "params": abstract.params["embedder"],
    "training": {
      "step": abstract.step,
      "opt_state": abstract.opt_state,
      "objective": abstract.params["objective"],
    },
  }
  if abstract.ema is not None:
    items["ema"] = abstract.ema
  found = store.restore(step, items)
  training = found["training"]
  return TrainState(
    step=training["step"],
    params={"embedder": found["params"], "objective": training["objective"]},
    opt_state=training["opt_state"],
    ema=found.get("ema"),
  )


def state_from_checkpoint(
  init: Callable[[jax.Array], TrainState],
  key: jax.Array,
  path: str,
  abstract: TrainState,
  config: EmbedderConfig,
) -> TrainState:
  """A fresh state with the embedder's parameters of another checkpoint.

  Adapters are fresh if that checkpoint has none. What it holds is never drawn: a
  model that just fits has no room for two.

  Args:
    init: Of `abstract_state`.
    key: Of `init`.
    path: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP.
    abstract: Of `abstract_state`.
    config: Of the state's model.

  Raises:
    CheckpointError: its adapters are others than this model's; see also
      `CheckpointStore.restore`.
  """
  directory, step = checkpoints.locate(path)
  theirs = checkpoints.read_description(directory).embedder.lora
  if theirs is not None and theirs != config.lora:
    raise CheckpointError(
      f"{directory} has adapters {theirs}, this model {config.lora}; set LoraConfig to "
      "the checkpoint's, train its kernels too with OptimizerConfig.trainable = ['.'], "
      "or merge: `embgemma export --to=hf`, then `embgemma import --from=hf`"
    )

  def fresh(state: TrainState) -> TrainState:
    """What the checkpoint does not hold."""
    adapters = lora.split(state.params["embedder"])[1] if theirs is None else {}
    params = {**state.params, "embedder": adapters}
    return dataclasses.replace(state, params=params, ema=None)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh(abstract))
  state = jax.jit(lambda key: fresh(init(key)), out_shardings=shardings)(key)
  store = CheckpointStore(directory)
  step = store.resolve_step(step)
  item = store.shipped_item(step)
  expected = abstract.params["embedder"]
  if theirs is None:
    expected, _ = lora.split(expected)
  found = join(store.restore(step, {item: expected})[item], state.params["embedder"])
  ema = None if abstract.ema is None else jax.tree.map(lambda x: x.copy(), found)
  params = {**state.params, "embedder": found}
  return dataclasses.replace(state, params=params, ema=ema)
