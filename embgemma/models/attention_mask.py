"""Which keys a query may see: the one definition that every backend follows."""

from typing import NamedTuple

import jax.numpy as jnp

from embgemma.models.config import TransformerConfig
from embgemma.typing import Array, ArrayLike, Bool, Int


class Band(NamedTuple):
  """Columns of a row that a query may see besides its own, both sides inclusive.

  A side that reaches beyond the row is cut to the row's length less one, so that
  equal masks are equal bands.
  """

  left: int
  right: int

  def is_full(self, length: int) -> bool:
    """Whether it covers every pair of columns of a row."""
    return min(self) >= length - 1


def band(config: TransformerConfig, kind: str, length: int) -> Band:
  """The band of a layer.

  A text is contiguous in its row, so a distance between columns is a distance
  between positions: the window is static, whatever the texts.

  Args:
    config: Gives mask kind and window; local layers see `left` keys before and
      `right` keys after the query, inclusive (HF Gemma 3 with
      use_bidirectional_attention and sliding_window W: W // 2 on both sides).
    kind: "local" or "global".
    length: L, of a row.
  """
  left, right = config.window if kind == "local" else (length, length)
  if config.mask == "causal":
    right = 0
  return Band(min(left, length - 1), min(right, length - 1))


def dense(
  band: Band | None,
  text_ids: Int[ArrayLike, "R L"],
  memory_ids: Int[ArrayLike, "R I"] | None = None,
) -> Bool[Array, "R L keys"]:
  """True where query i (second axis) may attend to key j: in the band, same text.

  Keys are the row's own, then those of the memory (an encoder's states), of which a
  query sees all of its text. Padding, which has one id of its own, attends to padding:
  no query is without a key, unless the keys are a memory's alone.

  Args:
    band: Of the row's own keys; None where there are none of these.
    text_ids: Which text of the row a token belongs to.
    memory_ids: The same of the memory; None is without.
  """
  parts = [] if band is None else [_own(band, text_ids)]
  if memory_ids is not None:
    parts.append(jnp.asarray(text_ids[:, :, None] == memory_ids[:, None, :]))
  return jnp.concatenate(parts, axis=-1)


def _own(band: Band, text_ids: ArrayLike) -> Array:
  same_text = text_ids[:, :, None] == text_ids[:, None, :]
  length = text_ids.shape[1]
  if band.is_full(length):
    return jnp.asarray(same_text)
  distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
  return same_text & (distance <= band.left) & (-distance <= band.right)
