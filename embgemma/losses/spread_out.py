"""The spread-out regularizer: embeddings should fill the sphere evenly."""

import jax
import jax.numpy as jnp

from embgemma.typing import Array, ArrayLike, Float


def second_moment(x: Float[ArrayLike, "B K"]) -> Float[Array, ""]:
  """The mean of (x_i . x_j)^2 over i != j, float32; 0 for a single vector.

  Computed as |X'X|_F^2 - sum_i |x_i|^4, which needs no B x B similarities and, with
  rows sharded, one all-reduce of K x K. Below B = 2K, where for unit vectors that
  difference may cancel more than half, the similarities are small and are summed.
  """
  x = jnp.asarray(x, jnp.float32)
  rows, columns = x.shape
  total = _by_columns(x) if rows >= 2 * columns else _by_rows(x)
  return total / max(rows * (rows - 1), 1)


def spread_out(
  query: Float[ArrayLike, "B K"], positive: Float[ArrayLike, "B K"]
) -> Float[Array, ""]:
  """The second moment among queries plus that among positives, float32.

  EmbeddingGemma (arXiv:2509.20354) equation 4, after Zhang et al.
  (arXiv:1708.06320) without their mean term, hinge and 1/d offset. Vectors must
  have unit norm, or shrinking them would lower the loss. Every pair counts, equal
  texts too, as in the paper. The value is about 1/K a side for an even spread and
  1 a side where all vectors agree.
  """
  return second_moment(query) + second_moment(positive)


def _by_columns(x: Float[Array, "B K"]) -> Float[Array, ""]:
  gram = jnp.einsum("bi,bj->ij", x, x, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(gram**2) - jnp.sum(jnp.sum(x**2, axis=-1) ** 2)


def _by_rows(x: Float[Array, "B K"]) -> Float[Array, ""]:
  similarity = jnp.einsum("ik,jk->ij", x, x, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(similarity**2, where=~jnp.eye(len(x), dtype=bool))
