"""Gradient caching: a batch of any size through an embedder that holds a microbatch.

The objective couples all examples, but only through their vectors. So: embed every
microbatch without keeping activations; differentiate the objective with respect to
the vectors; then embed each microbatch again and pull its vectors' gradient back
(arXiv 2101.06983). The result is the gradient of the whole batch, exactly.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from embgemma.models.embedder import Embedder
from embgemma.models.transformer import embedding_scale, token_vectors
from embgemma.training.optimizers import join
from embgemma.typing import Array, Float, PackedTexts, Params

_TABLE = ("encoder", "embedder", "table")

# Adds the gradient of some texts, given that of their vectors, to a total.
Pullback = Callable[[Params, Float[Array, "T E"]], Params]


def embed_groups(
  model: Embedder,
  trainable: Params,
  frozen: Params,
  groups: Sequence[PackedTexts],
  key: Array | None = None,
) -> tuple[Float[Array, "T E"], Callable[[Float[Array, "T E"]], Params]]:
  """Vectors of one shard's texts, and their pullback.

  Activations are kept where a group is one microbatch; texts of groups of several
  are embedded again by the pullback.

  Args:
    model: The embedding function.
    trainable: Whole parameters to differentiate, float32.
    frozen: The others; together they are the embedder's.
    groups: Texts of one row length each, with a leading microbatch axis.
    key: Of dropout; None is without.

  Returns:
    The groups' vectors end to end, and a function from the gradient with respect to
    them to the gradient with respect to `trainable`, float32.
  """
  parts, pullbacks = [], []
  for index, group in enumerate(groups):
    own = None if key is None else jax.random.fold_in(key, index)
    microbatches = _Microbatches(model, trainable, frozen, own)
    kept = group.tokens.shape[0] == 1
    part, pullback = (microbatches.keep if kept else microbatches.cache)(group)
    parts.append(part)
    pullbacks.append((not kept, pullback))
  ends = list(itertools.accumulate(len(part) for part in parts))

  def pull(gradient: Float[Array, "T E"]) -> Params:
    gradients = jnp.split(gradient, ends[:-1])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    # Kept activations first: they are gone before others are made.
    for index in sorted(range(len(parts)), key=lambda i: pullbacks[i][0]):
      total = pullbacks[index][1](total, gradients[index])
    return total

  return jnp.concatenate(parts), pull


@dataclasses.dataclass(frozen=True)
class _Microbatches:
  """The microbatches of one group.

  The token table takes part through the vectors looked up in it. Their gradient is
  added to the rows they came from: no microbatch makes one of the table's size.
  """

  model: Embedder
  trainable: Params
  frozen: Params
  key: Array | None

  def keep(self, group: PackedTexts) -> tuple[Array, Pullback]:
    """A single microbatch, whose activations stay until its pullback."""
    packed = jax.tree.map(lambda x: x[0], group)
    embedded, pullback = self._differentiated(packed, 0)

    def pull(total: Params, gradient: Array) -> Params:
      return self._add(total, packed, *pullback(gradient))

    return embedded, pull

  def cache(self, group: PackedTexts) -> tuple[Array, Pullback]:
    """Several microbatches, of which nothing but the vectors stays."""
    numbers = jnp.arange(group.tokens.shape[0])

    def forward(carry, item):
      return carry, self._differentiated(*item)[0]

    with jax.named_scope("without_gradient"):
      _, embedded = jax.lax.scan(forward, None, (group, numbers))

    def pull(total: Params, gradient: Array) -> Params:
      def backward(total, item):
        packed, number, own = item
        _, pullback = self._differentiated(packed, number)
        return self._add(total, packed, *pullback(own)), None

      items = (group, numbers, gradient.reshape(embedded.shape))
      return jax.lax.scan(backward, total, items)[0]

    return embedded.reshape(-1, embedded.shape[-1]), pull

  def _differentiated(self, packed: PackedTexts, number: Array | int):
    """Vectors of a microbatch; their pullback to parameters and token vectors."""
    rest, table = _split_table(self.trainable)
    frozen, frozen_table = _split_table(self.frozen)
    table = frozen_table if table is None else table
    assert table is not None
    config = self.model.config.transformer
    key = None if self.key is None else jax.random.fold_in(self.key, number)

    def embed(rest: Params, vectors: Array) -> Array:
      return _embed(self.model, join(rest, frozen), packed, vectors, key)

    return jax.vjp(embed, rest, token_vectors(table, packed.tokens, config))

  def _add(
    self, total: Params, packed: PackedTexts, rest: Params, vectors: Array
  ) -> Params:
    total, table = _split_table(total)
    total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, rest)
    if table is None:
      return total
    scale = embedding_scale(self.model.config.transformer).astype(table.dtype)
    rows = vectors.astype(table.dtype) * scale
    return _with_table(total, table.at[packed.tokens].add(rows))


@functools.partial(jax.jit, static_argnums=0)
def _embed(
  model: Embedder,
  params: Params,
  packed: PackedTexts,
  vectors: Array,
  key: Array | None,
) -> Array:
  """`Embedder.embed`, traced once a shape of rows, not once a step that has them.

  Steps differ in how many rows of each length they have; the compiler inlines it.
  """
  return model.embed(params, packed, vectors, key)


def _split_table(params: Params) -> tuple[Params, Array | None]:
  """The other parameters, and the token table if it is among them."""
  flat = traverse_util.flatten_dict(params)
  table = flat.pop(_TABLE, None)
  return traverse_util.unflatten_dict(flat), table


def _with_table(params: Params, table: Array) -> Params:
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({**flat, _TABLE: table})
