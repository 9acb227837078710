"""Rotary position embedding (RoPE, arXiv 2104.09864), as in Gemma."""

import jax.numpy as jnp

from embgemma.typing import Array, ArrayLike, Float, Int


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
