"""One step of training."""

import dataclasses
from collections.abc import Sequence

import jax
import optax

from embgemma.data.packing import PackedPairs, split_roles
from embgemma.losses.objective import Objective, PairBatch
from embgemma.models.embedder import Embedder
from embgemma.training.optimizers import join, split_trainable
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
    trainable: See `OptimizerConfig.trainable`; other parameters and their averages
      leave a step bit for bit as they entered it.
  """

  model: Embedder
  objective: Objective
  optimizer: optax.GradientTransformation
  ema_decay: float | None = None
  trainable: Sequence[str] | None = None

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
    trainable, frozen = split_trainable(state.params, self.trainable)

    def loss(trainable: Params) -> tuple[Array, Metrics]:
      return self.loss(join(trainable, frozen), pairs)

    # With respect to the trainable alone: the others' gradients are never computed.
    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
    updates, opt_state = self.optimizer.update(gradients, state.opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    ema = state.ema
    if ema is not None and self.ema_decay is not None:
      ema = self._averaged(trainable["embedder"], ema, self.ema_decay)
    params = join(trainable, frozen)
    new_state = TrainState(state.step + 1, params, opt_state, ema)
    return new_state, metrics | gradient_norms(gradients)

  def _averaged(self, trainable: Params, ema: Params, decay: float) -> Params:
    # The average of equal values may round to another one: frozen ones stay out.
    moving, still = split_trainable({"embedder": ema}, self.trainable)
    moved = optax.incremental_update(trainable, moving["embedder"], 1.0 - decay)
    return join({"embedder": moved}, still)["embedder"]


def gradient_norms(gradients: Params) -> Metrics:
  """Global norms of the gradient: of all, and of each part that is trained."""
  embedder = gradients["embedder"]
  encoder = dict(embedder.get("encoder", {}))
  parts = {
    "table": encoder.pop("embedder", {}),
    "layers": encoder,
    "heads": {k: v for k, v in embedder.items() if k != "encoder"},
  }
  norms = {f"gradient_norm/{k}": optax.tree.norm(v) for k, v in parts.items() if v}
  return {"gradient_norm": optax.tree.norm(gradients), **norms}
