"""Poolers: hidden states of packed rows to one vector a text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from embgemma.models.layers import linear
from embgemma.typing import Array, Float, PackedTexts


def _flat(values: Array) -> Array:
  """[R, L, ...] to [R * L, ...]."""
  return values.reshape(-1, *values.shape[2:])


def _sum_by_text(values: Array, packed: PackedTexts) -> Array:
  """Sums of [R * L, ...] over the tokens of each text: [N, ...]."""
  # Padding carries the id N: out of range, dropped.
  return jax.ops.segment_sum(
    values, _flat(packed.text_ids), num_segments=packed.lengths.shape[0]
  )


def _max_by_text(values: Array, packed: PackedTexts) -> Array:
  """For each token the maximum of [R * L, ...] over its text, without gradient.

  A maximum of all rows would let texts with far lower values underflow.
  """
  ids = _flat(packed.text_ids)
  # Padding is a text of its own here: its values stay finite too.
  top = jax.ops.segment_max(values, ids, num_segments=packed.lengths.shape[0] + 1)
  return jax.lax.stop_gradient(top[ids])


def mean_pool(
  hidden: Float[Array, "R L D"], packed: PackedTexts
) -> Float[Array, "N D"]:
  """Mean over all tokens of a text, BOS, EOS and prompt included, in float32.

  A slot without a text (length 0) gives zeros.
  """
  sums = _sum_by_text(_flat(hidden.astype(jnp.float32)), packed)
  counts = jnp.maximum(packed.lengths, 1).astype(jnp.float32)
  return sums / counts[:, None]


def token_pool(
  hidden: Float[Array, "R L D"], packed: PackedTexts, last: bool
) -> Float[Array, "N D"]:
  """The hidden state of each text's first (BOS) or last (EOS) token, in float32."""
  index = packed.starts
  if last:
    index = index + jnp.maximum(packed.lengths, 1) - 1
  return jnp.take(_flat(hidden), index, axis=0).astype(jnp.float32)


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
    query: Any = self.param(
      "query",
      nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed",)),
      (width,),
      jnp.float32,
    )
    x = _flat(hidden.astype(jnp.float32))

    def heads(name: str) -> Array:
      y = linear(width, ("embed", "heads"), jnp.float32, name)(x)
      return y.reshape(len(y), self.num_heads, -1)

    key, value = heads("key"), heads("value")
    logits = jnp.einsum("thd,hd->th", key, query.reshape(self.num_heads, -1))
    logits = logits * width**-0.5
    weights = jnp.exp(logits - _max_by_text(logits, packed))
    weighted = _sum_by_text(value * weights[..., None], packed)
    total = _sum_by_text(weights, packed)
    pooled = weighted / jnp.maximum(total, 1e-30)[..., None]
    return pooled.reshape(-1, width)


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
