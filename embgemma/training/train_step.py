"""One step of training."""

import dataclasses

import jax
import optax

from embgemma.data.packing import PackedPairs, split_roles
from embgemma.losses.objective import Objective, PairBatch
from embgemma.models.embedder import Embedder
from embgemma.training.train_state import TrainState
from embgemma.typing import Array, Metrics, Params


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """Gradient, clip, update: (state, batch) -> (state, metrics).

  Attributes:
    model: The embedding function.
    objective: The loss.
    optimizer: Clipping and update rule.
    ema_decay: Of the averaged parameters, if the state keeps them.
  """

  model: Embedder
  objective: Objective
  optimizer: optax.GradientTransformation
  ema_decay: float | None = None

  def loss(self, params: Params, pairs: PackedPairs) -> tuple[Array, Metrics]:
    """The objective at one batch, with its metrics."""
    embeddings = self.model.embed(params["embedder"], pairs.texts)
    query, positive, negative = split_roles(
      embeddings, pairs.texts.num_shards, pairs.query_hash.shape[0]
    )
    batch = PairBatch(
      query=query,
      positive=positive,
      negative=negative,
      negative_mask=pairs.negative_mask,
      query_hash=pairs.query_hash,
      positive_hash=pairs.positive_hash,
    )
    return self.objective(batch, params["objective"])

  def __call__(
    self, state: TrainState, pairs: PackedPairs
  ) -> tuple[TrainState, Metrics]:
    gradient_fn = jax.value_and_grad(self.loss, has_aux=True)
    (_, metrics), gradients = gradient_fn(state.params, pairs)
    updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and self.ema_decay is not None:
      ema = optax.incremental_update(params["embedder"], ema, 1.0 - self.ema_decay)
    new_state = TrainState(state.step + 1, params, opt_state, ema)
    return new_state, metrics | gradient_norms(gradients)


def gradient_norms(gradients: Params) -> Metrics:
  """Global norms of the gradient: of all, and of each part of the model."""
  embedder = gradients["embedder"]
  encoder = dict(embedder["encoder"])
  parts = {
    "table": encoder.pop("embedder"),
    "layers": encoder,
    "heads": {k: v for k, v in embedder.items() if k != "encoder"},
  }
  norms = {f"gradient_norm/{k}": optax.tree.norm(v) for k, v in parts.items()}
  return {"gradient_norm": optax.tree.norm(gradients), **norms}
