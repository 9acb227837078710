"""The Gemma text stack: token ids to hidden states."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from embgemma.models import attention
from embgemma.models.attention import Memory
from embgemma.models.config import TransformerConfig
from embgemma.models.layers import LayerGroup, RMSNorm
from embgemma.models.quantization import Quantized
from embgemma.typing import Array, ArrayLike, Float, Int

_REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def embedding_scale(config: TransformerConfig) -> Array:
  """sqrt(width), rounded to the compute dtype as in transformers' Gemma 3."""
  return jnp.asarray(config.width**0.5, jnp.dtype(config.dtype))


def token_vectors(
  table: Float[ArrayLike, "V D"] | Quantized,
  tokens: Int[ArrayLike, "R L"],
  config: TransformerConfig,
) -> Float[Array, "R L D"]:
  """Rows of the table times `embedding_scale`, in the compute dtype: the stack's input.

  Args:
    table: Of the stack, or its codes.
    tokens: Token ids, < vocab_size.
    config: Of the stack.
  """
  # Look up, then cast: casting first would copy the whole table.
  if isinstance(table, Quantized):
    x = table.rows(jnp.asarray(tokens))
  else:
    x = jnp.take(table, tokens, axis=0)
  return x.astype(jnp.dtype(config.dtype)) * embedding_scale(config)


class TokenEmbedding(nn.Module):
  """The token table and its lookup, `token_vectors`."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens: Int[ArrayLike, "R L"]) -> Float[Array, "R L D"]:
    cfg = self.config
    table: Any = self.param(
      "table",
      # Unit variance after the scaling of the lookup.
      nn.with_logical_partitioning(
        nn.initializers.normal(cfg.width**-0.5), ("vocab", "table")
      ),
      (cfg.vocab_size, cfg.width),
      jnp.float32,
    )
    return token_vectors(table, tokens, cfg)


class Transformer(nn.Module):
  """Gemma blocks, bidirectional or causal, over packed rows.

  Full repetitions of the attention pattern are one `nn.scan` (parameters stacked
  on a leading `layers` axis, under `groups`); layers left over follow under
  `remainder`.

  Attributes:
    config: Of the stack.
    cross_attention: How it reads a memory, see `BackboneConfig`; without one it does
      not matter.
  """

  config: TransformerConfig
  cross_attention: str = "merged"

  @nn.compact
  def __call__(
    self,
    tokens: Int[ArrayLike, "R L"],
    positions: Int[ArrayLike, "R L"],
    text_ids: Int[ArrayLike, "R L"],
    vectors: Float[Array, "R L D"] | None = None,
    deterministic: bool = True,
    memory: Memory | None = None,
  ) -> Float[Array, "R L D"]:
    """Final hidden states in the compute dtype.

    Args:
      tokens: Token ids, < vocab_size.
      positions: Position of each token in its own text, from 0.
      text_ids: Which text of the row a token belongs to; padding has its own id.
      vectors: In place of `token_vectors`; the table is then not read and may be
        missing.
      deterministic: Without dropout. With it, `apply` needs the random stream
        "dropout".
      memory: What an encoder made of the same texts; None is without.
    """
    cfg = self.config
    if self.is_initializing():
      # Parameters do not depend on it; the example row is too short for some.
      cfg = dataclasses.replace(cfg, attention="reference")
    merged, cross = memory, None
    if memory is not None and self.cross_attention == "separate":
      merged, cross = None, attention.prepare_cross(cfg, text_ids, memory)
    inputs = attention.prepare(cfg, positions, text_ids, merged)
    x = TokenEmbedding(cfg, name="embedder")(tokens) if vectors is None else vectors

    def group(in_scan: bool) -> Any:
      if cfg.remat == "none":
        return LayerGroup
      # Only a scan keeps XLA from merging the recomputation with the original.
      return nn.remat(LayerGroup, policy=_REMAT[cfg.remat], prevent_cse=not in_scan)

    pattern = cfg.attention_pattern
    repetitions, left_over = divmod(cfg.num_layers, len(pattern))
    if repetitions:
      scanned = nn.scan(
        group(in_scan=True),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=repetitions,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      x, _ = scanned(cfg, pattern, deterministic, name="groups")(x, inputs, cross)
    if left_over:
      kinds = pattern[:left_over]
      remainder = group(in_scan=False)(cfg, kinds, deterministic, name="remainder")
      x, _ = remainder(x, inputs, cross)
    return RMSNorm(cfg.norm_epsilon, name="final_norm")(x)
