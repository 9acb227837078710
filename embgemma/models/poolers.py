"""Poolers: hidden states of packed rows to one vector a text.

A data shard's texts lie in its own rows, so that every pooler works shard by shard
and nothing crosses the mesh.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from embgemma.models.layers import linear
from embgemma.typing import Array, ArrayLike, Float, Int, PackedTexts


def _by_shard(values: ArrayLike, packed: PackedTexts) -> Array:
  """[R, L, ...] to [S, R / S * L, ...]."""
  return jnp.reshape(values, (packed.num_shards, -1, *values.shape[2:]))


def _sum_by_text(values: Array, text_ids: Int[Array, "S T"], num_texts: int) -> Array:
  """Sums of [S, T, ...] over the tokens of each text: [S, num_texts, ...]."""

  def shard_sum(shard_values, shard_ids):
    # Padding carries the id num_texts: out of range, dropped.
    return jax.ops.segment_sum(shard_values, shard_ids, num_segments=num_texts)

  return jax.vmap(shard_sum)(values, text_ids)


def _max_by_text(values: Array, text_ids: Int[Array, "S T"], num_texts: int) -> Array:
  """For each token the maximum of [S, T, ...] over its text, without gradient.

  A maximum of the whole shard would let texts with far lower values underflow.
  """

  def shard_max(shard_values, shard_ids):
    # Padding is a text of its own here: its values stay finite too.
    top = jax.ops.segment_max(shard_values, shard_ids, num_segments=num_texts + 1)
    return top[shard_ids]

  return jax.lax.stop_gradient(jax.vmap(shard_max)(values, text_ids))


def mean_pool(
  hidden: Float[Array, "R L D"], packed: PackedTexts
) -> Float[Array, "N D"]:
  """Mean over all tokens of a text, BOS, EOS and prompt included, in float32.

  A slot without a text (length 0) gives zeros.
  """
  per_shard = packed.lengths.shape[0] // packed.num_shards
  sums = _sum_by_text(
    _by_shard(hidden.astype(jnp.float32), packed),
    _by_shard(packed.text_ids, packed),
    per_shard,
  )
  counts = jnp.maximum(packed.lengths, 1).astype(jnp.float32)
  return sums.reshape(packed.lengths.shape[0], -1) / counts[:, None]


def token_pool(
  hidden: Float[Array, "R L D"], packed: PackedTexts, last: bool
) -> Float[Array, "N D"]:
  """The hidden state of each text's first (BOS) or last (EOS) token, in float32."""
  flat = _by_shard(hidden, packed)
  index = packed.starts
  if last:
    index = index + jnp.maximum(packed.lengths, 1) - 1
  index = index.reshape(packed.num_shards, -1)
  pooled = jnp.take_along_axis(flat, index[:, :, None], axis=1)
  return pooled.reshape(index.size, -1).astype(jnp.float32)


class AttentionPooler(nn.Module):
  """Multi-head attention of one learnable query over a text's tokens.

  EmbeddingGemma, section 3.2 (the ablation): projections of keys and values, scale
  1 / sqrt(D), 4 heads, no output projection.
  """

  num_heads: int

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "R L D"], packed: PackedTexts
  ) -> Float[Array, "N D"]:
    width = hidden.shape[-1]
    per_shard = packed.lengths.shape[0] // packed.num_shards
    query: Any = self.param(
      "query",
      nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed",)),
      (width,),
      jnp.float32,
    )
    x = _by_shard(hidden.astype(jnp.float32), packed)
    text_ids = _by_shard(packed.text_ids, packed)

    def heads(name: str) -> Array:
      y = linear(width, ("embed", "heads"), jnp.float32, name)(x)
      return y.reshape(*y.shape[:2], self.num_heads, -1)

    key, value = heads("key"), heads("value")
    logits = jnp.einsum("sthd,hd->sth", key, query.reshape(self.num_heads, -1))
    logits = logits * width**-0.5
    weights = jnp.exp(logits - _max_by_text(logits, text_ids, per_shard))
    weighted = _sum_by_text(value * weights[..., None], text_ids, per_shard)
    total = _sum_by_text(weights, text_ids, per_shard)
    pooled = weighted / jnp.maximum(total, 1e-30)[..., None]
    return pooled.reshape(packed.lengths.shape[0], width)


class Pooler(nn.Module):
  """One vector a text, by the kind named in EmbedderConfig."""

  kind: str
  num_heads: int

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "R L D"], packed: PackedTexts
  ) -> Float[Array, "N D"]:
    if self.kind == "attention":
      return AttentionPooler(self.num_heads, name="attention")(hidden, packed)
    if self.kind == "mean":
      return mean_pool(hidden, packed)
    return token_pool(hidden, packed, last=self.kind == "last")
