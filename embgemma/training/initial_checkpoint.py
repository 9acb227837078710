"""What a run that starts from a checkpoint takes from it: model, vocabulary, widths."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

from embgemma import checkpoints
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models import extraction
from embgemma.models.config import (
  BackboneConfig,
  EmbedderConfig,
  LoraConfig,
  QuantizationConfig,
  TransformerConfig,
)


def checkpoint_model(
  path: str | None,
  dtype: str | None = None,
  remat: str = "none",
  window: Sequence[int] | None = None,
  matryoshka_widths: Sequence[int] | None = None,
  lora: LoraConfig | None = None,
  pooler: str | None = None,
  quantization: QuantizationConfig | Literal["checkpoint"] | None = "checkpoint",
) -> EmbedderConfig:
  """The configuration of a checkpoint's embedder, with what training may change.

  Of pretrained stacks it is `extraction.embedder_config`: their encoder, or a decoder
  alone made bidirectional, with heads.

  Args:
    path: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP.
    dtype: Of computation; None is the checkpoint's.
    remat: As in TransformerConfig.
    window: As in TransformerConfig; None is the checkpoint's.
    matryoshka_widths: Widths trained to stand alone; None is the checkpoint's.
    lora: Adapters to train; None is the checkpoint's, if it has any.
    pooler: Of the embedder that pretrained stacks become, as in EmbedderConfig; None
      is the mean. That of an embedder stays.
    quantization: Formats to compute with; "checkpoint" is the checkpoint's, if it has
      any, and None is none.

  Raises:
    ConfigError: no path, or a value that does not fit the model.
    CheckpointError: the checkpoint cannot be read.
  """
  config = _embedder(path, pooler)
  if quantization == "checkpoint":
    quantization = config.quantization
  return dataclasses.replace(
    config,
    transformer=_trained(config.transformer, dtype, remat, window),
    matryoshka_widths=matryoshka_widths or config.matryoshka_widths,
    lora=lora or config.lora,
    quantization=quantization,
  )


def checkpoint_encoder_decoder(
  path: str | None,
  decoder_path: str | None = None,
  cross_attention: str | None = None,
  shared_table: bool | None = None,
  dtype: str | None = None,
  remat: str = "none",
  window: Sequence[int] | None = None,
) -> BackboneConfig:
  """The encoder-decoder that a checkpoint's decoder becomes, or the one it has.

  Args:
    path: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP.
    decoder_path: Likewise, of another checkpoint whose decoder it is.
    cross_attention: As in BackboneConfig; None is the checkpoint's if it has both
      stacks. Else it is "separate" with `decoder_path`, as T5Gemma's, and "merged"
      without, as T5Gemma 2's.
    shared_table: As in BackboneConfig; None likewise, tables of their own with
      `decoder_path`.
    dtype: Of computation; None is the checkpoint's.
    remat: As in TransformerConfig.
    window: Of the encoder, as in TransformerConfig; None is the checkpoint's, or half
      a decoder's on each side.

  Raises:
    ConfigError: no path, or a value that does not fit the model.
    CheckpointError: the checkpoint cannot be read, or has no decoder.
  """
  first = _backbone(path)
  second = first if decoder_path is None else _backbone(decoder_path)
  if second.decoder is None:
    raise CheckpointError(_NO_DECODER.format(decoder_path or path))
  if decoder_path is not None:
    defaults = ("separate", False)
  elif first.encoder is not None:
    defaults = first.cross_attention, first.shared_table
  else:
    defaults = ("merged", True)
  return BackboneConfig(
    encoder=_trained(extraction.encoder(first), dtype, remat, window),
    decoder=_trained(second.decoder, dtype, remat, None),
    cross_attention=defaults[0] if cross_attention is None else cross_attention,
    shared_table=defaults[1] if shared_table is None else shared_table,
  )


_NO_DECODER = (
  "{}: has no decoder to make an encoder-decoder of; give a decoder-only checkpoint "
  "(`embgemma import --from=gemma`, or a run of gin/stages/pretrain.gin)"
)


def _backbone(path: str | None) -> BackboneConfig:
  """Of a checkpoint of pretrained stacks."""
  config = _config(path)
  if isinstance(config, EmbedderConfig):
    raise CheckpointError(_NO_DECODER.format(path))
  return config


def checkpoint_vocabulary(path: str | None) -> str:
  """The path of a checkpoint's SentencePiece model.

  Raises:
    ConfigError: no path.
    CheckpointError: the checkpoint cannot be read.
  """
  _config(path)
  return str(_directory(path) / "tokenizer.model")


def checkpoint_widths(path: str | None) -> tuple[int, ...]:
  """The Matryoshka widths of a checkpoint's embedder.

  Raises:
    ConfigError: no path.
    CheckpointError: the checkpoint cannot be read.
  """
  return tuple(_embedder(path).matryoshka_widths)


def _trained(
  stack: TransformerConfig,
  dtype: str | None,
  remat: str,
  window: Sequence[int] | None,
) -> TransformerConfig:
  return dataclasses.replace(
    stack, remat=remat, dtype=dtype or stack.dtype, window=window or stack.window
  )


def _embedder(path: str | None, pooler: str | None = None) -> EmbedderConfig:
  """Of a checkpoint's embedder, or that which its stacks become."""
  config = _config(path)
  if isinstance(config, BackboneConfig):
    return extraction.embedder_config(config, pooler=pooler or "mean")
  if pooler not in (None, config.pooler):
    raise ConfigError(
      f"checkpoint_model.pooler is {pooler!r}, and {path} is an embedder with pooler "
      f"{config.pooler!r}; start from pretrained stacks to choose another"
    )
  return config


def _directory(path: str | None) -> pathlib.Path:
  if not path:
    raise ConfigError(
      "no checkpoint to take the model from; give --gin.INITIAL_CHECKPOINT_PATH=…"
    )
  return checkpoints.locate(path)[0]


def _config(path: str | None) -> EmbedderConfig | BackboneConfig:
  directory = _directory(path)
  try:
    return checkpoints.read_description(directory).config
  except CheckpointError as error:
    raise CheckpointError(f"INITIAL_CHECKPOINT_PATH {path}: {error}") from error
