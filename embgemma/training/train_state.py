"""What a training run changes from step to step."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from embgemma.checkpoints import CheckpointStore
from embgemma.training.learners import Learner
from embgemma.training.optimizers import OptimizerConfig, split_trainable
from embgemma.training.partitioning import Partitioner
from embgemma.typing import PyTree


@flax.struct.dataclass
class TrainState:
  """State of a run.

  Attributes:
    step: int32 scalar, steps done.
    params: {"model": the model's, "objective": learned by loss terms}, float32.
    opt_state: optax's, of the trainable parameters.
    ema: Exponential moving average of params["model"], or None.
  """

  step: PyTree
  params: PyTree
  opt_state: PyTree
  ema: PyTree | None

  @property
  def inference_params(self) -> PyTree:
    """The model's parameters to evaluate and to ship: averaged, where kept."""
    return self.params["model"] if self.ema is None else self.ema


def init_train_state(
  key: jax.Array,
  learner: Learner,
  optimizer: optax.GradientTransformation,
  keep_ema: bool,
  trainable: Sequence[str] | None = None,
) -> TrainState:
  """A new state; parameters in flax's logical-axis boxes (see `nn.unbox`).

  Raises:
    ConfigError: see `Learner.init` and `split_trainable`.
  """
  params = learner.init(key)
  # Copied: a buffer that appears twice in a donated state cannot be donated.
  ema = jax.tree.map(jnp.copy, params["model"]) if keep_ema else None
  opt_state = optimizer.init(split_trainable(params, trainable)[0])
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def abstract_state(
  learner: Learner,
  optimizer: OptimizerConfig,
  train_steps: int,
  keep_ema: bool,
  partitioner: Partitioner,
  mesh: Mesh,
) -> tuple[Any, PyTree]:
  """A function of a key that makes the state, and the state's shapes with shardings."""
  transformation = optimizer.build(train_steps)

  def boxed(key: jax.Array) -> TrainState:
    return init_train_state(key, learner, transformation, keep_ema, optimizer.trainable)

  shapes = jax.eval_shape(boxed, jax.random.key(0))
  shardings = partitioner.state_shardings(shapes, mesh)
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    nn.unbox(shapes),
    shardings,
  )
  return jax.jit(lambda key: nn.unbox(boxed(key)), out_shardings=shardings), abstract


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
  store.save(step, state.params["model"], state.ema, training, position, metrics)


def restored_state(
  store: CheckpointStore, step: int, abstract: TrainState
) -> TrainState:
  """The state saved at a step, placed like the abstract one.

  Raises:
    CheckpointError: see `CheckpointStore.restore`.
  """
  items = {
    "params": abstract.params["model"],
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
    params={"model": found["params"], "objective": training["objective"]},
    opt_state=training["opt_state"],
    ema=found.get("ema"),
  )
