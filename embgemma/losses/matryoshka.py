"""Nested widths: the first k coordinates of an embedding, as an embedding."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from embgemma.errors import ConfigError
from embgemma.typing import Array, ArrayLike, Float

# A vector shorter than this has no direction that float32 can tell.
_MIN_NORM = 1e-12


def normalize(x: Float[ArrayLike, "*n E"]) -> Float[Array, "*n E"]:
  """Unit vectors along the last axis, float32.

  A zero vector stays zero and has zero gradient.
  """
  x = jnp.asarray(x, jnp.float32)
  norm = optax.safe_norm(x, _MIN_NORM, axis=-1, keepdims=True)
  return jnp.where(norm > _MIN_NORM, x / norm, 0.0)


def truncate(x: Float[ArrayLike, "*n E"], width: int) -> Float[Array, "*n K"]:
  """The first `width` coordinates of each vector, normalized again, float32.

  Matryoshka representation learning (arXiv:2205.13147); the prefix is
  normalized again, as sentence-transformers' `MatryoshkaLoss` does, so that dot
  products are the cosines of the contrastive loss at every width.
  """
  return normalize(x[..., :width])


def check_widths(
  term: str, widths: Sequence[int | float], embedding_width: int
) -> None:
  """Returns nothing if `widths` are distinct prefixes of the embedding.

  Raises:
    ConfigError: naming the term and the first width that does not fit.
  """
  if not widths:
    raise ConfigError(f"Term '{term}' has no widths; give at least one, or drop it.")
  for width in widths:
    if not isinstance(width, int) or not 1 <= width <= embedding_width:
      raise ConfigError(
        f"Term '{term}' has width {width}, but embeddings are {embedding_width} "
        f"wide; give integers from 1 to {embedding_width} in its `widths`."
      )
    if list(widths).count(width) > 1:
      raise ConfigError(
        f"Term '{term}' has width {width} more than once; list each width once and "
        "use `weight`, or a second term with its own `name`, to weigh it more."
      )
