"""What a training run changes from step to step."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from embgemma.losses.objective import Objective
from embgemma.models.embedder import Embedder, abstract_packed_texts
from embgemma.typing import PyTree


@flax.struct.dataclass
class TrainState:
  """State of a run.

  Attributes:
    step: int32 scalar, steps done.
    params: {"embedder": the model's, "objective": learned by loss terms}, float32.
    opt_state: optax's.
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
) -> TrainState:
  """A new state; parameters in flax's logical-axis boxes (see `nn.unbox`)."""
  model_key, objective_key = jax.random.split(key)
  embedder = model.init(model_key, abstract_packed_texts())["params"]
  params = {
    "embedder": embedder,
    "objective": objective.init(objective_key, model.config.embedding_width),
  }
  # Copied: a buffer that appears twice in a donated state cannot be donated.
  ema = jax.tree.map(jnp.copy, embedder) if keep_ema else None
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def unbox(tree: PyTree) -> PyTree:
  """The tree without logical-axis boxes."""
  return nn.unbox(tree)
