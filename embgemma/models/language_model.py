"""Next-token logits of a stack: what pretrained decoders are checked by."""

from typing import Any

import jax.numpy as jnp

from embgemma.models.config import TransformerConfig
from embgemma.models.transformer import Transformer
from embgemma.typing import Array, ArrayLike, Float, Int, Params


def logits(
  config: TransformerConfig,
  params: Params,
  tokens: Int[ArrayLike, "R L"],
  positions: Int[ArrayLike, "R L"],
  text_ids: Int[ArrayLike, "R L"],
) -> Float[Array, "R L V"]:
  """Scores of the next token in float32; tied to the token table, without soft-cap.

  As transformers' Gemma3ForCausalLM: the product is taken in the compute dtype.

  Args:
    config: Of the stack.
    params: Of the stack, without adapters: embedder, groups, remainder, final_norm.
    tokens: Token ids, < vocab_size.
    positions: Position of each token in its own text, from 0.
    text_ids: Which text of the row a token belongs to; padding has its own id.
  """
  hidden: Any = Transformer(config).apply(
    {"params": params}, tokens, positions, text_ids
  )
  table = params["embedder"]["table"].astype(hidden.dtype)
  return jnp.einsum("rld,vd->rlv", hidden, table).astype(jnp.float32)
