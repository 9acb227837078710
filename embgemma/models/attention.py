"""Packed self-attention: one mask definition, several texts in a row."""

import jax
import jax.numpy as jnp

from embgemma.models.config import TransformerConfig
from embgemma.typing import Array, ArrayLike, Bool, Float, Int


def attention_mask(
  config: TransformerConfig, kind: str, text_ids: Int[ArrayLike, "R L"]
) -> Bool[Array, "R 1 L L"]:
  """True where query i may attend to key j.

  Tokens see tokens of the same text only. A text is contiguous in its row, so a
  distance between columns is a distance between positions, and the window test
  is static. Padding (one id of its own) attends to padding: no row is empty.

  Args:
    config: Gives mask kind and window; local layers see `left` keys before and
      `right` keys after the query, inclusive (HF Gemma 3 with
      use_bidirectional_attention and sliding_window W: W // 2 on both sides).
    kind: "local" or "global".
    text_ids: Which text each token belongs to.
  """
  same_text = text_ids[:, None, :, None] == text_ids[:, None, None, :]
  length = text_ids.shape[1]
  distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
  allowed = same_text
  if config.mask == "causal":
    allowed &= distance >= 0
  if kind == "local":
    left, right = config.window
    # A side that covers the whole row needs no mask.
    if left < length - 1:
      allowed &= distance <= left
    if right < length - 1 and config.mask != "causal":
      allowed &= -distance <= right
  return allowed


def rotary_angles(
  positions: Int[ArrayLike, "R L"], head_dim: int, base: float, factor: float = 1.0
) -> tuple[Float[Array, "R L 1 half"], Float[Array, "R L 1 half"]]:
  """Cosine and sine of RoPE in float32, whatever the compute dtype.

  Positions are divided by `factor`.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  angles = positions[..., None].astype(jnp.float32) / (factor * base**exponents)
  return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def apply_rotary(
  x: Float[Array, "R L H hd"],
  angles: tuple[Float[Array, "R L 1 half"], Float[Array, "R L 1 half"]],
) -> Float[Array, "R L H hd"]:
  """x rotated by RoPE; halves are paired (j, j + head_dim / 2), as in Gemma."""
  cos, sin = angles
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def dot_product_attention(
  query: Float[Array, "R L H hd"],
  key: Float[Array, "R L K hd"],
  value: Float[Array, "R L K hd"],
  mask: Bool[Array, "R 1 L L"],
  scale: float,
) -> Float[Array, "R L H hd"]:
  """Softmax attention; logits and softmax in float32, masked by a finite value."""
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, scale=scale, implementation="xla"
  )
