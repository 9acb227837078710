"""The embedder that a pretrained stack becomes: its shape, without a weight."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig

# As EmbeddingGemma's 768 -> 3072 -> 768, and its 512, 256 and 128.
_HIDDEN_FACTOR = 4
_PREFIXES = (512, 256, 128)


def embedder_config(
  backbone: BackboneConfig,
  *,
  hidden_width: int | Literal["default"] | None = "default",
  embedding_width: int | None = None,
  matryoshka_widths: Sequence[int] | None = None,
  pooler: str = "mean",
) -> EmbedderConfig:
  """The embedder around a backbone's encoder, or its decoder made bidirectional.

  Two rows of Table 2 of EmbeddingGemma (arXiv 2509.20354); `adaptation.adapt` gives it
  its parameters. Of a backbone with both stacks the decoder is dropped.

  Args:
    backbone: Whose stack it takes.
    hidden_width: Between the two heads; "default" is four times the stack's width, as
      EmbeddingGemma's 3072 of 768, and None an embedder without heads.
    embedding_width: Of the result; None is the stack's width.
    matryoshka_widths: As in EmbedderConfig; None is the embedding width, then those of
      512, 256 and 128 below it.
    pooler: As in EmbedderConfig.

  Raises:
    ConfigError: the widths or the pooler do not fit the stack.
  """
  stack = encoder(backbone)
  if hidden_width == "default":
    hidden_width = _HIDDEN_FACTOR * stack.width
  width = stack.width if embedding_width is None else embedding_width
  if matryoshka_widths is None:
    matryoshka_widths = (width, *(prefix for prefix in _PREFIXES if prefix < width))
  return EmbedderConfig(
    transformer=stack,
    pooler=pooler,
    hidden_width=hidden_width,
    embedding_width=width,
    matryoshka_widths=matryoshka_widths,
  )


def encoder(backbone: BackboneConfig) -> TransformerConfig:
  """A backbone's encoder, or its decoder made bidirectional."""
  if backbone.encoder is not None:
    return backbone.encoder
  assert backbone.decoder is not None  # a backbone has one of them
  return bidirectional(backbone.decoder)


def bidirectional(causal: TransformerConfig) -> TransformerConfig:
  """A causal stack that sees both sides, in local layers half the window on each.

  A window of (511, 0), Gemma 3's sliding_window of 512, becomes the (256, 256) of
  EmbeddingGemma and of transformers' `use_bidirectional_attention`.
  """
  half = (causal.window[0] + 1) // 2
  return dataclasses.replace(causal, mask="bidirectional", window=(half, half))
