"""The Gemma 3 text stack: token ids to hidden states."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from embgemma.models import attention
from embgemma.models.config import TransformerConfig
from embgemma.models.layers import AttentionInputs, LayerGroup, RMSNorm
from embgemma.typing import Array, ArrayLike, Float, Int

_REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TokenEmbedding(nn.Module):
  """Table lookup scaled by sqrt(width), the scale rounded to the compute dtype."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens: Int[ArrayLike, "R L"]) -> Float[Array, "R L D"]:
    cfg = self.config
    table: Any = self.param(
      "table",
      # Unit variance after the scaling below.
      nn.with_logical_partitioning(
        nn.initializers.normal(cfg.width**-0.5), ("vocab", "embed")
      ),
      (cfg.vocab_size, cfg.width),
      jnp.float32,
    )
    dtype = jnp.dtype(cfg.dtype)
    # Look up, then cast: casting first would copy the whole table.
    x = jnp.take(table, tokens, axis=0).astype(dtype)
    return x * jnp.asarray(cfg.width**0.5, dtype)


class Transformer(nn.Module):
  """Gemma 3 decoder blocks, bidirectional or causal, over packed rows.

  Full repetitions of the attention pattern are one `nn.scan` (parameters stacked
  on a leading `layers` axis, under `groups`); layers left over follow under
  `remainder`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    tokens: Int[ArrayLike, "R L"],
    positions: Int[ArrayLike, "R L"],
    text_ids: Int[ArrayLike, "R L"],
  ) -> Float[Array, "R L D"]:
    """Final hidden states in the compute dtype.

    Args:
      tokens: Token ids, < vocab_size.
      positions: Position of each token in its own text, from 0.
      text_ids: Which text of the row a token belongs to; padding has its own id.
    """
    cfg = self.config
    inputs = {
      kind: AttentionInputs(
        attention.attention_mask(cfg, kind, text_ids),
        attention.rotary_angles(positions, cfg.head_dim, base, factor),
      )
      for kind, base, factor in (
        ("local", cfg.rope_base_local, 1.0),
        ("global", cfg.rope_base_global, cfg.rope_factor_global),
      )
      if kind in cfg.layer_kinds
    }
    x = TokenEmbedding(cfg, name="embedder")(tokens)

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
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=repetitions,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      x, _ = scanned(cfg, pattern, name="groups")(x, inputs)
    if left_over:
      remainder = group(in_scan=False)(cfg, pattern[:left_over], name="remainder")
      x, _ = remainder(x, inputs)
    return RMSNorm(cfg.norm_epsilon, name="final_norm")(x)
