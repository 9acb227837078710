"""T5Gemma 2 as transformers saves it: its text encoder and its decoder.

Blocks are Gemma 3's with two norms renamed. The decoder's merged attention (arXiv
2512.14856) reads the encoder's states with the kernels of its self-attention, so it
has no tensor that a decoder-only Gemma 3 lacks.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop import huggingface, layout
from embgemma.interop.layout import NumpyTree, Tensor
from embgemma.interop.model import (
  BACKBONE_LENGTH,
  Model,
  equal_lengths,
  read_vocabulary,
)
from embgemma.interop.safetensors_files import SafetensorsDirectory
from embgemma.models.config import BackboneConfig, TransformerConfig

_MODEL_TYPE = "t5gemma2"
_TIED = ("lm_head.out_proj.weight", "decoder.embed_tokens.weight")
_VISION = ("encoder.vision_tower.", "encoder.multi_modal_projector.")
_EOI = ".embed_tokens.eoi_embedding"


def load(directory: pathlib.Path, tokenizer: pathlib.Path | None = None) -> Model:
  """The text stacks of a T5Gemma2ForConditionalGeneration.

  The token table is the encoder's; the decoder, which shares it, has none.

  Args:
    directory: With config.json, safetensors and a tokenizer.
    tokenizer: A SentencePiece model to take instead of the directory's.

  Raises:
    CheckpointError: a file is missing or damaged, or the model is of another kind;
      tensors that do not fit are listed by name.
  """
  path = directory / "config.json"
  values = huggingface.read_json(path)
  if values.get("model_type") != _MODEL_TYPE:
    raise CheckpointError(
      f"{path}: model_type is {values.get('model_type')!r}, not {_MODEL_TYPE!r}; give "
      "the directory of a T5Gemma 2"
    )
  source = SafetensorsDirectory(directory)
  encoder, decoder = _configs(values, path, source.dtype)
  config = _backbone(encoder, decoder, path)
  tensors = _tensors(encoder, decoder, source)
  ignored = _ignored(source)
  layout.check_names(tensors, source, ignored)
  vocabulary, notes = read_vocabulary(directory, encoder.vocab_size, tokenizer)
  params = _allocate(encoder, decoder)
  layout.fill(params, tensors, source)
  unread = [f"{n} not read: {why}" for why, n in Counter(ignored.values()).items()]
  length = min(BACKBONE_LENGTH, encoder.max_length, decoder.max_length)
  description = Description(config, equal_lengths(length), PROMPTS)
  return Model(description, vocabulary, params, (*notes, *unread))


def _configs(
  values: Mapping[str, Any], path: pathlib.Path, dtype: str
) -> tuple[TransformerConfig, TransformerConfig]:
  """Shapes of the text encoder and of the decoder."""
  if values.get("tie_word_embeddings", True) is not True:
    raise CheckpointError(
      f"{path}: tie_word_embeddings is {values['tie_word_embeddings']!r}; only T5Gemma "
      "2's one table for encoder and decoder is supported"
    )
  text = _part(_part(values, "encoder", path), "text_config", path, "encoder.")
  encoder = huggingface.text_config(text, path, dtype, mask="bidirectional")
  # Of an even span the key more is to the right, unlike in Gemma 3: transformers'
  # sliding_window_mask_function of T5Gemma 2.
  span = text["sliding_window"]
  encoder = dataclasses.replace(encoder, window=((span + 1) // 2 - 1, span // 2))
  decoder = huggingface.text_config(
    _part(values, "decoder", path), path, dtype, mask="causal"
  )
  return encoder, decoder


def _backbone(
  encoder: TransformerConfig, decoder: TransformerConfig, path: pathlib.Path
) -> BackboneConfig:
  try:
    return BackboneConfig(encoder, decoder, cross_attention="merged", shared_table=True)
  except ConfigError as error:
    raise CheckpointError(f"{path}: {error}") from error


def _part(
  values: Mapping[str, Any], key: str, path: pathlib.Path, inside: str = ""
) -> Mapping[str, Any]:
  part = values.get(key)
  if not isinstance(part, Mapping):
    raise CheckpointError(
      f"{path}: has no configuration {inside}{key}; it is no complete configuration of "
      "a T5Gemma 2, download it again"
    )
  return part


def _tensors(
  encoder: TransformerConfig, decoder: TransformerConfig, source: SafetensorsDirectory
) -> list[Tensor]:
  # transformers saves `model.encoder.layers…`; the model without its head has no
  # `model.`, and modules in memory have `text_model.`
  root = "model." if any(n.startswith("model.") for n in source.shapes) else ""
  text = huggingface.name_prefix(
    source.shapes, (f"{root}encoder.", f"{root}encoder.text_model.")
  )
  names = huggingface.T5GEMMA2_NAMES
  return [
    *huggingface.stack_tensors(encoder, ("encoder",), text or f"{root}encoder.", names),
    *huggingface.stack_tensors(
      decoder, ("decoder",), f"{root}decoder.", names, table=None
    ),
  ]


def _ignored(source: SafetensorsDirectory) -> dict[str, str]:
  """Tensors that are not read, to the reason why."""
  reasons = {}
  for name in source.shapes:
    inner = name.removeprefix("model.")
    if inner in _TIED:
      reasons[name] = "tied to the encoder's token table"
    elif inner.startswith(_VISION):
      reasons[name] = "vision tower and projector"
    elif inner.endswith(_EOI):
      reasons[name] = "the end of an image, which is in no text"
  return reasons


def _allocate(encoder: TransformerConfig, decoder: TransformerConfig) -> NumpyTree:
  own = {k: v for k, v in layout.abstract_stack(decoder).items() if k != "embedder"}
  return {
    "encoder": layout.allocate(layout.abstract_stack(encoder)),
    "decoder": layout.allocate(own),
  }
