"""A model with its loss: what the one trainer trains, whatever the stage."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec

from embgemma.data.packing import PackedPairs, by_role, split_roles
from embgemma.losses.denoising import Denoising, TokenLosses
from embgemma.losses.distillation import ROLES
from embgemma.losses.objective import Objective, PairBatch
from embgemma.models import embedder, encoder_decoder
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.models.embedder import Embedder
from embgemma.models.encoder_decoder import TokenVectors
from embgemma.models.transformer import embedding_scale
from embgemma.training.gradient_cache import embed_groups
from embgemma.training.optimizers import join
from embgemma.training.partitioning import BATCH_AXES, pairs_specs
from embgemma.typing import Array, Float, Metrics, PackedSequences, Params, PyTree


@runtime_checkable
class Learner(Protocol):
  """Gradients of a loss by a model's parameters."""

  @property
  def batch_specs(self) -> PyTree:
    """How the arrays of a batch are split over a mesh: a prefix of its tree."""

  def init(self, key: Array) -> Params:
    """Fresh {"model": ..., "objective": ...}, float32 in flax's logical-axis boxes."""
    ...

  def gradients(
    self, trainable: Params, frozen: Params, batch: PyTree, key: Array
  ) -> tuple[Params, Metrics]:
    """This shard's part of the gradients, and the metrics of the whole batch.

    Inside shard_map over the batch axes.

    Args:
      trainable: Whole parameters to differentiate, as of `split_trainable`.
      frozen: The others.
      batch: This shard's.
      key: Of dropout, this shard's own.
    """
    ...


def pair_batch(vectors: Float[Array, "T E"], batch: PackedPairs) -> PairBatch:
  """What the losses take, of one shard.

  Args:
    vectors: Of the shard's groups, end to end.
    batch: The shard's.
  """
  examples = batch.query_hash.shape[0]
  query, positive, negative = split_roles(vectors, batch.slots, examples)
  teacher: dict[str, Array] = {}
  if batch.teacher is not None:
    for values, suffix in ((batch.teacher, ""), (batch.teacher_mask, "_mask")):
      names = [f"teacher_{role}{suffix}" for role in ROLES]
      teacher |= zip(names, by_role(values, examples), strict=True)
  return PairBatch(
    query=query,
    positive=positive,
    negative=negative,
    negative_mask=batch.negative_mask,
    query_hash=batch.query_hash,
    positive_hash=batch.positive_hash,
    **teacher,
  )


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class EmbeddingLearner:
  """An embedder that learns from pairs; batches are `PackedPairs`.

  Attributes:
    config: Of the embedder; its attention suits the devices.
    objective: The loss of all vectors of a batch.
  """

  config: EmbedderConfig
  objective: Objective

  @property
  def batch_specs(self) -> PyTree:
    return pairs_specs()

  def init(self, key: Array) -> Params:
    model_key, objective_key = jax.random.split(key)
    return {
      "model": embedder.init_params(self.config, model_key),
      "objective": self.objective.init(objective_key, self.config.embedding_width),
    }

  def gradients(
    self, trainable: Params, frozen: Params, batch: PackedPairs, key: Array
  ) -> tuple[Params, Metrics]:
    model, others, straight = self._computed(
      trainable["model"], frozen.get("model", {})
    )
    vectors, pullback = embed_groups(
      Embedder(embedder.computed_config(self.config)),
      model,
      others,
      batch.groups,
      key if self.config.transformer.dropout_rate else None,
    )
    of_vectors, of_objective, metrics = self.objective.gradients(
      vectors,
      trainable["objective"],
      lambda vectors: pair_batch(vectors, batch),
      BATCH_AXES,
    )
    gradients = straight(pullback(of_vectors))
    return {"model": gradients, "objective": of_objective}, metrics

  def _computed(
    self, model: Params, others: Params
  ) -> tuple[Params, Params, Callable[[Params], Params]]:
    """What a step computes with, once for all its microbatches.

    Args:
      model: Parameters to differentiate.
      others: The frozen ones.

    Returns:
      The same two, of a model with formats rounded and all in the first; and what makes
      gradients of `model` of those of the first.
    """
    if self.config.quantization is None:
      return model, others, lambda gradient: gradient
    rounded, pull = jax.vjp(
      lambda model: embedder.computed(join(model, others), self.config), model
    )
    return rounded, {}, lambda gradient: pull(gradient)[0]


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class DenoisingLearner:
  """Stacks that learn to predict tokens; batches are `PackedSequences`, [K, S * R, L].

  The loss is the mean over the targets of the whole batch, whatever its microbatches
  and shards.

  Attributes:
    config: Of the stacks; their attention suits the devices.
    objective: The loss of a token.
  """

  config: BackboneConfig
  objective: Denoising

  @property
  def batch_specs(self) -> PyTree:
    return PartitionSpec(None, BATCH_AXES)

  def init(self, key: Array) -> Params:
    model_key, _ = jax.random.split(key)  # as embedders do, and `warm_start`
    model = encoder_decoder.init_params(self.config, model_key)
    return {"model": model, "objective": {}}

  def gradients(
    self, trainable: Params, frozen: Params, batch: PackedSequences, key: Array
  ) -> tuple[Params, Metrics]:
    weight = jax.lax.psum(jnp.sum(batch.weights), BATCH_AXES)
    share = 1.0 / jnp.where(weight > 0, weight, 1.0)
    model, others = trainable["model"], frozen.get("model", {})

    def differentiated(
      rows: PackedSequences, number: Array | int
    ) -> tuple[Params, TokenVectors, TokenLosses]:
      params = join(model, others)
      vectors = encoder_decoder.look_up(self.config, params, rows)

      def loss(model: Params, vectors: TokenVectors) -> tuple[Array, TokenLosses]:
        sums = self._losses(join(model, others), rows, key, number, vectors)
        return sums.loss * share, sums

      gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(model, vectors)
      return *gradients, sums

    def add(total, item):
      of_model, of_vectors, sums = differentiated(*item)
      gradients, earlier = jax.tree.map(jnp.add, total, (of_model, sums))
      return (self._add_rows(gradients, item[0], of_vectors), earlier), None

    items = (batch, jnp.arange(batch.targets.shape[0]))
    first = jax.tree.map(lambda x: x[0], items)
    of_model, _, sums = jax.eval_shape(differentiated, *first)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (of_model, sums))
    if batch.targets.shape[0] == 1:
      total, _ = add(total, first)
    else:
      total, _ = jax.lax.scan(add, total, items)
    gradients, sums = total
    sums = jax.tree.map(lambda x: jax.lax.psum(x, BATCH_AXES), sums)
    return {"model": gradients, "objective": {}}, self.objective.metrics(sums)

  def _losses(
    self,
    params: Params,
    rows: PackedSequences,
    key: Array,
    number: Array | int,
    vectors: TokenVectors,
  ) -> TokenLosses:
    """Of one microbatch."""
    dropout = any(stack.dropout_rate for stack in self.config.stacks)
    own = jax.random.fold_in(key, number) if dropout else None
    hidden = encoder_decoder.hidden_states(self.config, params, rows, own, vectors)
    table = encoder_decoder.output_table(self.config, params)
    return self.objective(hidden, table, rows.targets, rows.weights)

  def _add_rows(
    self, gradients: Params, rows: PackedSequences, of_vectors: TokenVectors
  ) -> Params:
    """Adds the gradient of token vectors to the rows of the tables they came from.

    That of the lookup itself would be of the tables' size, once a side.
    """
    flat = traverse_util.flatten_dict(gradients)
    for side, stack, tokens, gradient in (
      ("encoder", self.config.encoder, rows.inputs, of_vectors.inputs),
      ("decoder", self.config.decoder, rows.decoder_inputs, of_vectors.decoder_inputs),
    ):
      path = encoder_decoder.table_path(self.config, side)
      if stack is not None and gradient is not None and path in flat:
        table = flat[path]
        scale = embedding_scale(stack).astype(table.dtype)
        flat[path] = table.at[tokens].add(gradient.astype(table.dtype) * scale)
    return traverse_util.unflatten_dict(flat)


def parameter_parts(model: Params) -> Mapping[str, PyTree]:
  """The parts of a model's parameters that are there, or of a tree like them.

  They are the token tables, the layers of encoder and decoder (adapters included),
  and the heads.
  """
  stacks = {k: dict(model[k]) for k in ("encoder", "decoder") if k in model}
  tables = {k: s.pop("embedder") for k, s in stacks.items() if "embedder" in s}
  heads = {k: v for k, v in model.items() if k not in stacks}
  parts = {"table": tables, **stacks, "heads": heads}
  return {name: part for name, part in parts.items() if part}
