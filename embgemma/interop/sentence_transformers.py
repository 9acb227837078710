"""sentence-transformers directories around a Hugging Face Gemma 3 text model, read.

    modules.json                       the order of what follows
    config.json, model*.safetensors    Transformer, in the directory itself
    tokenizer.json, tokenizer.model
    1_Pooling/, 2_Dense/, 3_Dense/, 4_Normalize/
    config_sentence_transformers.json  prompts

Formats: sentence-transformers 6.2, and the older spelling that EmbeddingGemma's files
have.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.checkpoints import Description
from embgemma.data import prompts
from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop import huggingface, layout
from embgemma.interop.layout import Slot, Tensor
from embgemma.interop.model import (
  BACKBONE_LENGTH,
  Model,
  equal_lengths,
  read_vocabulary,
)
from embgemma.interop.safetensors_files import SafetensorsDirectory
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig

MODULES = "modules.json"
POOLERS: Mapping[str, str] = {"mean": "mean", "cls": "first", "lasttoken": "last"}
"""Pooling modes of sentence-transformers to ours."""

# Every flag of the older spelling; sentence-transformers wants them all.
POOLING_FLAGS: Mapping[str, str] = {
  "cls": "pooling_mode_cls_token",
  "mean": "pooling_mode_mean_tokens",
  "max": "pooling_mode_max_tokens",
  "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
  "weightedmean": "pooling_mode_weightedmean_tokens",
  "lasttoken": "pooling_mode_lasttoken",
}
# EmbeddingGemma's files do not say them (arXiv 2509.20354, section 2.2).
_EMBEDDINGGEMMA = {"heads": (768, 3072, 768), "widths": (768, 512, 256, 128)}


@dataclasses.dataclass(frozen=True)
class _Packaging:
  """What sentence-transformers adds to an encoder.

  Attributes:
    pooler: As in EmbedderConfig.
    heads: Weights of the two Dense modules, or nothing.
    max_length: Tokens a text is cut to; None is the encoder's longest.
    prompts: By name.
    notes: For the user.
  """

  pooler: str = "mean"
  heads: Sequence[SafetensorsDirectory] = ()
  max_length: int | None = None
  prompts: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: prompts.PROMPTS
  )
  notes: tuple[str, ...] = ()


def is_model(directory: pathlib.Path) -> bool:
  """Whether a directory looks like one that `load` reads."""
  return any((directory / name).exists() for name in ("config.json", MODULES))


def load(directory: pathlib.Path, tokenizer: pathlib.Path | None = None) -> Model:
  """A Gemma 3 text model: an embedder, or the decoder of a language model.

  A bidirectional model without sentence-transformers' files is an embedder with mean
  pooling and no heads, as sentence-transformers would load it but for its unit norm.

  Args:
    directory: With config.json and safetensors.
    tokenizer: A SentencePiece model to take instead of the directory's.

  Raises:
    CheckpointError: a file is missing or damaged, or the model is of another kind;
      tensors that do not fit are listed by name.
  """
  path = directory / "config.json"
  values = huggingface.read_json(path)
  if values.get("model_type") != "gemma3_text":
    raise CheckpointError(
      f"{path}: model_type is {values.get('model_type')!r}, not 'gemma3_text'; only "
      "Gemma 3's text models (EmbeddingGemma, 270M, 1B) can be read so, T5Gemma 2 "
      "with --from=t5gemma2"
    )
  source = SafetensorsDirectory(directory)
  transformer = huggingface.text_config(values, path, source.dtype)
  vocabulary, notes = read_vocabulary(directory, transformer.vocab_size, tokenizer)
  packaging = None
  if (directory / MODULES).exists():
    packaging = _read_packaging(directory)
  elif transformer.mask == "bidirectional":
    note = f"no {MODULES}: taken as an embedder with mean pooling and without heads"
    length = _read_max_length(directory, directory)
    packaging = _Packaging(max_length=length, notes=(note,))
  if packaging is None:
    config: EmbedderConfig | BackboneConfig = BackboneConfig(decoder=transformer)
    length = min(BACKBONE_LENGTH, transformer.max_length)
    table: Mapping[str, str] = prompts.PROMPTS
    params = _read_stack(transformer, "decoder", source)
  else:
    config = _embedder_config(transformer, packaging, values, directory)
    length = min(packaging.max_length or transformer.max_length, transformer.max_length)
    table = packaging.prompts
    params = _read_stack(transformer, "encoder", source)
    params |= _read_heads(config, packaging.heads)
    notes += (*packaging.notes, *_oddities(directory, values, transformer, table))
  return Model(
    Description(config, equal_lengths(length), table), vocabulary, params, notes
  )


def _oddities(
  directory: pathlib.Path,
  values: Mapping[str, Any],
  transformer: TransformerConfig,
  table: Mapping[str, str],
) -> list[str]:
  """What makes an embedder differ from what its user may expect, without an error."""
  notes = []
  span = values["sliding_window"]
  if transformer.mask == "bidirectional" and span % 2:
    notes.append(
      f"sliding_window is {span}: transformers before 5 halves a bidirectional model's "
      f"window each time it saves it. If this one was trained with {2 * span - 2}, set "
      f"--gin.checkpoint_model.window='({span - 1}, {span - 1})'"
    )
  path = directory / "tokenizer_config.json"
  side = huggingface.read_json(path).get("truncation_side") if path.exists() else None
  if side == "left":
    notes.append("texts are cut at their beginning there, at their end here")
  if any(table.get(name) != text for name, text in prompts.OFFICIAL_PROMPTS.items()):
    notes.append(
      "its prompts are not EmbeddingGemma's: `embed` uses its own, training and `eval` "
      "EmbeddingGemma's"
    )
  return notes


def _read_stack(
  config: TransformerConfig, root: str, source: SafetensorsDirectory
) -> layout.NumpyTree:
  prefix = huggingface.name_prefix(source.shapes, ("", "model."))
  tensors = huggingface.stack_tensors(config, (root,), prefix)
  # The configuration was checked to tie it.
  ignored = {"lm_head.weight": "tied to the token table"}
  layout.check_names(tensors, source, ignored)
  tree = {root: layout.allocate(layout.abstract_stack(config))}
  layout.fill(tree, tensors, source)
  return tree


def head_tensors(config: EmbedderConfig) -> list[tuple[str, Tensor]]:
  """Our name and the torch tensor of each Dense module."""
  if config.hidden_width is None:
    return []
  widths = (config.transformer.width, config.hidden_width, config.embedding_width)
  names = ("projection_up", "projection_down")
  return [
    (name, huggingface.linear_tensor("linear.weight", Slot((name, "kernel"), None, s)))
    for name, s in zip(names, itertools.pairwise(widths), strict=True)
  ]


def _read_heads(
  config: EmbedderConfig, sources: Sequence[SafetensorsDirectory]
) -> layout.NumpyTree:
  tree: layout.NumpyTree = {}
  for (name, tensor), source in zip(head_tensors(config), sources, strict=True):
    layout.check_names([tensor], source)
    shape = tensor.parts[0].slot.shape
    tree[name] = {"kernel": np.empty(shape, np.float32)}
    layout.fill(tree, [tensor], source)
  return tree


def _embedder_config(
  transformer: TransformerConfig,
  packaging: _Packaging,
  values: Mapping[str, Any],
  directory: pathlib.Path,
) -> EmbedderConfig:
  hidden, width = None, transformer.width
  if packaging.heads:
    up, down = (source.shapes.get("linear.weight", ()) for source in packaging.heads)
    if len(up) != 2 or len(down) != 2:
      raise CheckpointError(
        f"{packaging.heads[0].location}, {packaging.heads[1].location}: each must hold "
        "one matrix, linear.weight"
      )
    hidden, width = up[0], down[0]
  is_known = (transformer.width, hidden, width) == _EMBEDDINGGEMMA["heads"]
  known = _EMBEDDINGGEMMA["widths"] if is_known else (width,)
  try:
    return EmbedderConfig(
      transformer=transformer,
      pooler=packaging.pooler,
      hidden_width=hidden,
      embedding_width=width,
      matryoshka_widths=values.get("matryoshka_dimensions") or known,
    )
  except (ConfigError, TypeError) as error:
    raise CheckpointError(f"{directory}: {error}") from error


def _read_packaging(directory: pathlib.Path) -> _Packaging:
  modules = _read_modules(directory)
  kinds = [kind for kind, _ in modules]
  head = ["Transformer", "Pooling"]
  if kinds[:2] != head or kinds[2:] not in (
    [],
    ["Normalize"],
    ["Dense", "Dense"],
    ["Dense", "Dense", "Normalize"],
  ):
    raise CheckpointError(
      f"{directory / MODULES}: the modules are {', '.join(kinds)}; embgemma has "
      "Transformer, Pooling, then two Dense modules or none, then Normalize"
    )
  notes: tuple[str, ...] = ()
  if kinds[-1] != "Normalize":
    notes += ("no Normalize module: embgemma gives unit vectors all the same",)
  config_path = directory / "config_sentence_transformers.json"
  config = huggingface.read_json(config_path) if config_path.exists() else {}
  default = config.get("default_prompt_name")
  if default is not None:
    notes += (
      f"sentence-transformers adds the prompt {default!r} by default; here give "
      f"--prompt={default}",
    )
  table = config.get("prompts", prompts.PROMPTS)
  if not isinstance(table, Mapping) or not all(
    isinstance(text, str) for text in table.values()
  ):
    raise CheckpointError(f"{config_path}: prompts must be strings by name")
  return _Packaging(
    pooler=_read_pooler(modules[1][1]),
    heads=[_read_dense(path) for kind, path in modules if kind == "Dense"],
    max_length=_read_max_length(directory, modules[0][1]),
    prompts={**table, prompts.NO_PROMPT: ""},
    notes=notes,
  )


def _read_modules(directory: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """Class name and directory of each module, in order."""
  path = directory / MODULES
  try:
    entries = json.loads(path.read_text("utf-8"))
    entries = sorted(entries, key=lambda entry: entry["idx"])
    found = [(e["type"].rpartition(".")[2], str(e["path"])) for e in entries]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f"{path}: damaged: {error!r}; download it again") from error
  for kind, name in found:
    if name and (pathlib.PurePath(name).is_absolute() or ".." in name.split("/")):
      raise CheckpointError(f"{path}: {kind} lies in {name!r}, outside the directory")
  if not found or found[0][1]:
    raise CheckpointError(
      f"{path}: the Transformer must come first and lie in the directory itself"
    )
  return [(kind, directory / name) for kind, name in found]


def _read_pooler(directory: pathlib.Path) -> str:
  path = directory / "config.json"
  values = huggingface.read_json(path)
  modes = values.get("pooling_mode")
  if modes is None:
    modes = [mode for mode, flag in POOLING_FLAGS.items() if values.get(flag)]
  modes = modes if isinstance(modes, list) else [modes]
  if len(modes) != 1 or str(modes[0]) not in POOLERS:
    raise CheckpointError(
      f"{path}: pooling {'+'.join(map(str, modes)) or 'none'} is not supported; "
      f"embgemma has one of {', '.join(POOLERS)}"
    )
  if not values.get("include_prompt", True):
    raise CheckpointError(
      f"{path}: include_prompt is false; embgemma pools over prompts, too, as "
      "EmbeddingGemma does"
    )
  return POOLERS[modes[0]]


def _read_dense(directory: pathlib.Path) -> SafetensorsDirectory:
  path = directory / "config.json"
  values = huggingface.read_json(path)
  activation = str(
    values.get("activation_function", "torch.nn.modules.activation.Tanh")
  )
  if values.get("bias", True) or not activation.endswith(".Identity"):
    raise CheckpointError(
      f"{path}: a Dense module with bias {values.get('bias', True)} and activation "
      f"{activation} is not supported; EmbeddingGemma's have neither"
    )
  return SafetensorsDirectory(directory)


def _read_max_length(directory: pathlib.Path, transformer: pathlib.Path) -> int | None:
  path = transformer / "sentence_bert_config.json"
  values = huggingface.read_json(path) if path.exists() else {}
  if values.get("do_lower_case"):
    raise CheckpointError(f"{path}: do_lower_case is not supported")
  length = values.get("max_seq_length")
  tokenizer = directory / "tokenizer_config.json"
  if length is None and tokenizer.exists():
    # Newer files keep it here; a huge number stands for none.
    length = huggingface.read_json(tokenizer).get("model_max_length")
  if length is None:
    return None
  if not isinstance(length, int | float) or length < 3:
    raise CheckpointError(f"{path}: max_seq_length is {length!r}; it must be 3 or more")
  return int(min(length, 1 << 31))
