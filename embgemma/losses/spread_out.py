"""The spread-out regularizer: embeddings should fill the sphere evenly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from embgemma.losses import global_batch
from embgemma.typing import Array, ArrayLike, Float


def second_moment(
  x: Float[ArrayLike, "B K"], axes: Sequence[str] = ()
) -> Float[Array, ""]:
  """The shard's share of the mean of (x_i . x_j)^2 over i != j; 0 for one vector.

  The vectors are those of a batch split over the mesh axes `axes`; see `global_batch`.
  Computed in float32 as |X'X|_F^2 - sum_i |x_i|^4, which needs no similarities and one
  all-reduce of K x K. In a batch of less than 2K vectors that difference may cancel
  more than half (of unit vectors); there the similarities, at most twice as many as
  coordinates, are summed.
  """
  x = jnp.asarray(x, jnp.float32)
  rows, columns = len(x) * global_batch.shards(axes), x.shape[1]
  share = _by_columns(x, axes) if rows >= 2 * columns else _by_rows(x, axes)
  return share / max(rows * (rows - 1), 1)


def spread_out(
  query: Float[ArrayLike, "B K"],
  positive: Float[ArrayLike, "B K"],
  axes: Sequence[str] = (),
) -> Float[Array, ""]:
  """The second moment among queries plus that among positives, float32.

  EmbeddingGemma (arXiv:2509.20354) equation 4, after Zhang et al.
  (arXiv:1708.06320) without their mean term, hinge and 1/d offset. Vectors must
  have unit norm, or shrinking them would lower the loss. Every pair counts, equal
  texts too, as in the paper. The value is about 1/K a side for an even spread and
  1 a side where all vectors agree. With `axes`, the shard's share of it.
  """
  return second_moment(query, axes) + second_moment(positive, axes)


def _by_columns(x: Float[Array, "B K"], axes: Sequence[str]) -> Float[Array, ""]:
  gram = jnp.einsum("bi,bj->ij", x, x, precision=jax.lax.Precision.HIGHEST)
  squares = jnp.sum(global_batch.total(gram, axes) ** 2) / global_batch.shards(axes)
  return squares - jnp.sum(jnp.sum(x**2, axis=-1) ** 2)


def _by_rows(x: Float[Array, "B K"], axes: Sequence[str]) -> Float[Array, ""]:
  others = global_batch.gather(x, axes)
  similarity = jnp.einsum("ik,jk->ij", x, others, precision=jax.lax.Precision.HIGHEST)
  itself = global_batch.first_row(len(x), axes) + jnp.arange(len(x))
  distinct = itself[:, None] != jnp.arange(len(others))
  return jnp.sum(similarity**2, where=distinct)
