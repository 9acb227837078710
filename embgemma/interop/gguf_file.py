"""Embedders as GGUF files: architecture "gemma-embedding" of llama.cpp.

Keys and tensors are those of llama.cpp's own converter (conversion/gemma.py), and
read as src/models/gemma-embedding.cpp reads them; both at the version that
llama-cpp-python 0.3.36 holds. The Dense heads are in the file, as with the
converter's --sentence-transformers-dense-modules. llama.cpp adds BOS and EOS itself
and normalises where it is asked to; prompts are the caller's.
benchmarks/llama_cpp_parity.py compares its vectors and token ids with ours.

Token ids are ours, but for text with U+2581 ("▁") and for "</s>", which llama.cpp
takes for an end of text in every vocabulary; and programs such as llama-server read
text that spells a control token as that token.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, PoolingType
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
  ModelProto,
)

from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError
from embgemma.interop import tokenizer_files
from embgemma.interop.huggingface import linear_tensor
from embgemma.interop.layout import LAYER_PARAMETERS, Slot, Tensor, stack_slots
from embgemma.interop.model import Model
from embgemma.models import embedder, quantization
from embgemma.models.config import GEMMA3_PATTERN, EmbedderConfig, TransformerConfig

WEIGHT_TYPES = ("F32", "BF16", "Q8_0", "Q4_0", "TRAINED")
"""Of matrices; norms are always F32. Beside Q4_0 the token table is Q8_0, as in the
released file; TRAINED is the format that each was trained in (`QuantizationConfig`),
and F32 of those without."""
TYPE_OF_DTYPE = {
  "float32": "F32",
  "bfloat16": "BF16",
  "float16": "F16",
  "q8_0": "Q8_0",
  "q4_0": "Q4_0",
  "trained": "TRAINED",
}
"""ggml's name of a --dtype; F16 is refused by `write`, with the reason."""

_ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA_EMBEDDING]
_FILE_TYPES = {
  "F32": LlamaFileType.ALL_F32,
  "BF16": LlamaFileType.MOSTLY_BF16,
  "Q8_0": LlamaFileType.MOSTLY_Q8_0,
  "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_TYPE_OF_FORMAT = {"q4_0": "Q4_0", "q8_0": "Q8_0"}
_POOLING = {
  "mean": PoolingType.MEAN,
  "first": PoolingType.CLS,
  "last": PoolingType.LAST,
}
_NAMES: Mapping[str, str] = dict(
  zip(
    LAYER_PARAMETERS,
    (
      "attn_q",
      "attn_k",
      "attn_v",
      "attn_output",
      "attn_q_norm",
      "attn_k_norm",
      "ffn_gate",
      "ffn_up",
      "ffn_down",
      "attn_norm",
      "post_attention_norm",
      "ffn_norm",
      "post_ffw_norm",
    ),
    strict=True,
  )
)
_PADDING_SCORE = -10_000.0  # the converter's
_Piece = ModelProto.SentencePiece


def write(model: Model, path: pathlib.Path, weight_type: str) -> None:
  """Writes an embedder; beyond the model one tensor at a time is in memory.

  Args:
    model: Its parameters float32.
    path: Of the file; an unfinished one is left there if writing fails.
    weight_type: One of WEIGHT_TYPES. BF16 rounds to nearest even; Q8_0 and Q4_0 are
      one float16 scale for 32 codes along the input width, as ggml's reference
      quantises: the codes of `models.quantization`.

  Raises:
    CheckpointError: the model is no embedder.
    ConfigError: llama.cpp cannot compute the model, or the weight type cannot hold it.
    OSError: the file cannot be written.
  """
  config = model.description.embedder
  check_exportable(config, weight_type)
  tensors = _tensors(config)
  kinds = _kinds(config, tensors, weight_type)
  writer = gguf.GGUFWriter(path, _ARCHITECTURE)
  _add_settings(writer, config)
  _add_vocabulary(writer, model.vocabulary, config.transformer.vocab_size)
  writer.add_file_type(_FILE_TYPES[_usual(kinds)])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  for tensor in tensors:
    of = kinds[tensor.name]
    size = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, of)))
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, of)
  writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
      writer.write_tensor_data(_stored(tensor, model.params, kinds[tensor.name]))
  finally:
    writer.close()


def check_exportable(config: EmbedderConfig, weight_type: str) -> None:
  """Refuses what `write` would, but for the vocabulary, before weights are read.

  Raises:
    ConfigError: as for `write`.
  """
  _check_weight_type(weight_type)
  _check_model(config)
  tensors = _tensors(config)
  _check_blocks(tensors, _kinds(config, tensors, weight_type))


def _check_weight_type(weight_type: str) -> None:
  if weight_type == "F16":
    raise ConfigError(
      "GGUF weight type F16 is not supported: ggml casts activations to float16 beside "
      "float16 weights, and those of Gemma 3 exceed its largest value (65,504); use "
      "BF16, of the same size"
    )
  if weight_type not in WEIGHT_TYPES:
    raise ConfigError(
      f"GGUF weight type {weight_type!r} is unknown; choose from "
      f"{', '.join(WEIGHT_TYPES)}"
    )


def _check_model(config: EmbedderConfig) -> None:
  """Refuses what llama.cpp would compute in another way, or would abort at."""
  cfg = config.transformer
  width, heads = cfg.width, config.hidden_width is not None
  reasons = {
    f"EmbedderConfig.pooler is {config.pooler!r}; it has {', '.join(_POOLING)}": (
      config.pooler not in _POOLING
    ),
    f"TransformerConfig.mask is {cfg.mask!r}; it is bidirectional": (
      cfg.mask != "bidirectional"
    ),
    f"TransformerConfig.window is {cfg.window}; its window is symmetric": (
      cfg.window[0] != cfg.window[1]
    ),
    f"TransformerConfig.rope_factor_global is {cfg.rope_factor_global}; it is 1": (
      cfg.rope_factor_global != 1
    ),
    f"TransformerConfig.query_scalar is {cfg.query_scalar}; it scales queries by "
    f"head_dim ({cfg.head_dim}) ** -0.5": (
      cfg.query_scalar not in (None, cfg.head_dim)
    ),
    f"all layers are {cfg.layer_kinds[0]}; it aborts without at least one local and "
    "one global layer": len(set(cfg.layer_kinds)) == 1,
    f"EmbedderConfig.embedding_width is {config.embedding_width}; its heads end at the "
    f"encoder's width ({width})": heads and config.embedding_width != width,
  }
  reason = next((reason for reason, found in reasons.items() if found), None)
  if reason is not None:
    raise ConfigError(
      f"the model has no exact GGUF: llama.cpp's {_ARCHITECTURE} computes something "
      f"else: {reason}. Export it with --to=hf."
    )


def _tensors(config: EmbedderConfig) -> list[Tensor]:
  """All tensors, by their names and shapes in the file, in its order."""
  cfg = config.transformer
  slots = stack_slots(cfg, ("encoder",))
  named = {"token_embd": slots["table"]}
  for layer in range(cfg.num_layers):
    for parameter, name in _NAMES.items():
      named[f"blk.{layer}.{name}"] = slots[f"{layer}/{parameter}"]
  named["output_norm"] = slots["final_norm"]
  if (hidden := config.hidden_width) is not None:
    up, down = (cfg.width, hidden), (hidden, config.embedding_width)
    named["dense_2"] = Slot(("projection_up", "kernel"), None, up)
    named["dense_3"] = Slot(("projection_down", "kernel"), None, down)
  return [linear_tensor(f"{name}.weight", slot) for name, slot in named.items()]


def _kinds(
  config: EmbedderConfig, tensors: Sequence[Tensor], weight_type: str
) -> dict[str, GGMLQuantizationType]:
  """The type of each tensor, by name."""
  trained: Mapping[tuple[str, ...], str] = {}
  if weight_type == "TRAINED":
    trained = _trained_formats(config)
  kinds = {}
  for tensor in tensors:
    (part,) = tensor.parts
    name = weight_type
    if len(tensor.shape) == 1:
      name = "F32"
    elif weight_type == "TRAINED":
      name = _TYPE_OF_FORMAT.get(trained.get(part.slot.path, ""), "F32")
    elif weight_type == "Q4_0" and tensor.name.startswith("token_embd"):
      name = "Q8_0"
    kinds[tensor.name] = GGMLQuantizationType[name]
  return kinds


def _trained_formats(config: EmbedderConfig) -> dict[tuple[str, ...], str]:
  """The formats of a model's parameters.

  Raises:
    ConfigError: it has none, or one that GGUF lacks.
  """
  if config.quantization is None:
    raise ConfigError(
      "--dtype=trained: the model was not trained in a format of 4 or 8 bits; choose "
      "q4_0, q8_0, bfloat16 or float32"
    )
  plain = dataclasses.replace(config, lora=None)
  found = quantization.formats(embedder.abstract_params(plain), config.quantization)
  for path, name in found.items():
    if name not in _TYPE_OF_FORMAT:
      raise ConfigError(
        f"{'/'.join(path)} was trained as {name}, and GGUF has no scales of channels; "
        "export q8_0, or train with @int8_block32() or @int4_block32()"
      )
  return found


def _usual(kinds: Mapping[str, GGMLQuantizationType]) -> str:
  """The type of most matrices, by which a file is known."""
  counts = Counter(kind.name for kind in kinds.values())
  matrices = {name: count for name, count in counts.items() if name != "F32"}
  return max(matrices, key=lambda name: matrices[name], default="F32")


def _check_blocks(
  tensors: Sequence[Tensor], kinds: Mapping[str, GGMLQuantizationType]
) -> None:
  for tensor in tensors:
    kind = kinds[tensor.name]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
      raise ConfigError(
        f"{tensor.name}: GGUF weight type {kind.name} needs an input width that is a "
        f"multiple of {block}, and this is {tensor.shape[-1]}; use BF16"
      )


def _stored(
  tensor: Tensor, params: Mapping[str, Any], kind: GGMLQuantizationType
) -> np.ndarray:
  """A tensor's content as the file keeps it."""
  (part,) = tensor.parts
  array = part.pick(part.slot.view(params))
  if part.slot.path[-1] == "scale":
    array = array + np.float32(1)  # Gemma's norms multiply by 1 + scale
  return gguf.quants.quantize(np.ascontiguousarray(array), kind)


def _add_settings(writer: gguf.GGUFWriter, config: EmbedderConfig) -> None:
  cfg = config.transformer
  writer.add_type("model")
  writer.add_name("embgemma")
  writer.add_context_length(cfg.max_length)
  writer.add_block_count(cfg.num_layers)
  writer.add_embedding_length(cfg.width)
  writer.add_feed_forward_length(cfg.mlp_width)
  writer.add_head_count(cfg.num_heads)
  writer.add_head_count_kv(cfg.num_kv_heads)
  writer.add_key_length(cfg.head_dim)
  writer.add_value_length(cfg.head_dim)
  writer.add_layer_norm_rms_eps(cfg.norm_epsilon)
  writer.add_rope_freq_base(cfg.rope_base_global)
  writer.add_rope_freq_base_swa(cfg.rope_base_local)
  writer.add_causal_attention(False)
  _add_windows(writer, cfg)
  writer.add_pooling_type(_POOLING[config.pooler])
  if config.hidden_width is not None:
    writer.add_dense_features_dims("dense_2", cfg.width, config.hidden_width)
    writer.add_dense_features_dims(
      "dense_3", config.hidden_width, config.embedding_width
    )


def _add_windows(writer: gguf.GGUFWriter, config: TransformerConfig) -> None:
  # The whole span, as in EmbeddingGemma's config.json: halved when it is applied.
  writer.add_sliding_window(2 * config.window[0])
  # The official files have no pattern, and readers that know none assume Gemma 3's.
  period = len(GEMMA3_PATTERN)
  if any(
    kind != GEMMA3_PATTERN[i % period] for i, kind in enumerate(config.layer_kinds)
  ):
    local = [kind == "local" for kind in config.layer_kinds]
    writer.add_sliding_window_pattern(local)


def _add_vocabulary(
  writer: gguf.GGUFWriter, vocabulary: SentencePieceVocabulary, rows: int
) -> None:
  """Adds pieces, scores and types, padded to the rows of the table.

  llama.cpp's "llama" tokenizer is SentencePiece's BPE with byte fallback. It splits
  text at USER_DEFINED pieces before spaces become "▁", so theirs are spaces here; it
  takes the longest of them first, SentencePiece the leftmost first, which differs
  only for pieces that overlap without being runs of one character.
  """
  model = vocabulary.effective_model
  pieces = [_text(piece) for piece in model.pieces]
  padding = [f"[PAD{i}]" for i in range(len(pieces), rows)]
  if reason := _not_llama(model, pieces + padding):
    raise ConfigError(
      f"the vocabulary has no exact GGUF: {reason}; use Gemma's tokenizer.model or a "
      "vocabulary made by train_vocabulary"
    )
  types = [piece.type for piece in model.pieces]  # SentencePiece's numbers are gguf's
  scores = [piece.score for piece in model.pieces]
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list(pieces + padding)
  writer.add_token_scores(scores + [_PADDING_SCORE] * len(padding))
  writer.add_token_types(types + [int(gguf.TokenType.UNUSED)] * len(padding))
  writer.add_bos_token_id(vocabulary.bos_id)
  writer.add_eos_token_id(vocabulary.eos_id)
  writer.add_unk_token_id(types.index(_Piece.UNKNOWN))
  writer.add_pad_token_id(vocabulary.pad_id)
  if "<mask>" in pieces:
    writer.add_mask_token_id(pieces.index("<mask>"))
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(True)
  writer.add_add_sep_token(False)
  writer.add_add_space_prefix(False)


def _text(piece: Any) -> str:
  if piece.type == _Piece.USER_DEFINED:
    return piece.piece.replace("▁", " ")
  return piece.piece


def _not_llama(model: ModelProto, tokens: Sequence[str]) -> str:
  """Returns why llama.cpp would tokenise in another way; empty if it would not."""
  twice = [token for token, count in Counter(tokens).items() if count > 1]
  unused = [p.piece for p in model.pieces if p.type == _Piece.UNUSED]
  reasons = {
    f"the UNUSED pieces {unused[:3]} would match text": bool(unused),
    f"the tokens {twice[:3]} would be there twice": bool(twice),
  }
  return next(
    (reason for reason, found in reasons.items() if found),
    tokenizer_files.not_gemmas(model),
  )
