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


def dense(band: Band, text_ids: Int[ArrayLike, "R L"]) -> Bool[Array, "R L L"]:
  """True where query i (second axis) may attend to key j: in the band, same text.

  Padding, which has one id of its own, attends to padding: no row is empty.
  """
  same_text = text_ids[:, :, None] == text_ids[:, None, :]
  length = text_ids.shape[1]
  if band.is_full(length):
    return jnp.asarray(same_text)
  distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
  return same_text & (distance <= band.left) & (-distance <= band.right)
