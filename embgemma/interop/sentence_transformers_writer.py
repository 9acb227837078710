"""sentence-transformers directories, written in the spelling that every version reads.

`sentence_transformers` lists the files.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from embgemma.data import prompts
from embgemma.errors import ConfigError
from embgemma.interop import huggingface, layout, safetensors_files, tokenizer_files
from embgemma.interop.layout import Tensor
from embgemma.interop.model import Model
from embgemma.interop.sentence_transformers import (
  MODULES,
  POOLERS,
  POOLING_FLAGS,
  head_tensors,
)
from embgemma.models.config import EmbedderConfig

_IDENTITY = "torch.nn.modules.linear.Identity"


@dataclasses.dataclass(frozen=True)
class _Module:
  kind: str
  config: Mapping[str, Any] | None = None
  tensor: Tensor | None = None


def write(
  model: Model,
  directory: pathlib.Path,
  dtype: str,
  max_length: int,
  card: str = "",
) -> tuple[str, ...]:
  """Writes a complete sentence-transformers directory.

  Args:
    model: An embedder.
    directory: Exists, and is empty.
    dtype: Of the weights, "float32" or "bfloat16".
    max_length: Tokens a text is cut to.
    card: Content of README.md.

  Returns:
    What the user should know about it.

  Raises:
    CheckpointError: the model is no embedder.
    ConfigError: transformers or sentence-transformers has no such model.
  """
  config = model.description.embedder
  check_exportable(config, max_length)
  transformer = config.transformer
  text_model = huggingface.config_json(transformer, dtype)
  widths = list(config.matryoshka_widths)
  # Keys that vLLM reads, and our import.
  text_model |= {"is_matryoshka": len(widths) > 1, "matryoshka_dimensions": widths}
  tokenizer_config = tokenizer_files.tokenizer_config(model.vocabulary, max_length)
  _write_json(directory / "config.json", text_model)
  tokenizer_json = tokenizer_files.tokenizer_json(model.vocabulary)
  (directory / "tokenizer.json").write_bytes(tokenizer_json)
  (directory / "tokenizer.model").write_bytes(model.vocabulary.serialized)
  _write_json(directory / "tokenizer_config.json", tokenizer_config)
  _write_json(
    directory / "sentence_bert_config.json",
    {"max_seq_length": max_length, "do_lower_case": False},
  )
  named = dict(model.description.prompts)
  named.pop(prompts.NO_PROMPT, None)
  _write_json(
    directory / "config_sentence_transformers.json",
    {
      "model_type": "SentenceTransformer",
      "prompts": named,
      "default_prompt_name": None,
      "similarity_fn_name": "cosine",
    },
  )
  modules = _modules(config)
  _write_json(
    directory / MODULES,
    [
      {
        "idx": i,
        "name": str(i),
        "path": _folder(i, module),
        "type": f"sentence_transformers.models.{module.kind}",
      }
      for i, module in enumerate(modules)
    ],
  )
  for i, module in enumerate(modules[1:], start=1):
    folder = directory / _folder(i, module)
    folder.mkdir()
    if module.config is not None:
      _write_json(folder / "config.json", module.config)
    if module.tensor is not None:
      _write_tensors(folder, [module.tensor], model.params, dtype)
  tensors = huggingface.stack_tensors(transformer, ("encoder",))
  _write_tensors(directory, tensors, model.params, dtype)
  if card:
    (directory / "README.md").write_text(card, "utf-8")
  reason = tokenizer_files.inexact(model.vocabulary)
  return (f"tokenizer.json gives some texts other ids: {reason}",) if reason else ()


def check_exportable(config: EmbedderConfig, max_length: int | None) -> None:
  """Refuses what `write` would, before weights are read.

  Args:
    config: Of the model.
    max_length: As of `write`, if it is known.

  Raises:
    ConfigError: as for `write`.
  """
  if config.pooler not in POOLERS.values():
    raise ConfigError(
      f"the model's pooler is {config.pooler!r}; sentence-transformers has no module "
      f"for it (it has those for {', '.join(POOLERS.values())}). Train with another "
      "EmbedderConfig.pooler to export."
    )
  if max_length is not None and not 3 <= max_length <= config.transformer.max_length:
    raise ConfigError(
      f"--max_length={max_length} is not in 3..{config.transformer.max_length}, the "
      "model's positions"
    )
  huggingface.config_json(config.transformer, "float32")


def _modules(config: EmbedderConfig) -> list[_Module]:
  width = config.transformer.width
  modes = {ours: theirs for theirs, ours in POOLERS.items()}
  pooling: dict[str, Any] = {"word_embedding_dimension": width}
  pooling |= {
    flag: mode == modes[config.pooler] for mode, flag in POOLING_FLAGS.items()
  }
  pooling["include_prompt"] = True
  modules = [_Module("Transformer"), _Module("Pooling", pooling)]
  for _, tensor in head_tensors(config):
    out_features, in_features = tensor.shape
    dense = {
      "in_features": in_features,
      "out_features": out_features,
      "bias": False,
      "activation_function": _IDENTITY,
    }
    modules.append(_Module("Dense", dense, tensor))
  return [*modules, _Module("Normalize")]


def _folder(index: int, module: _Module) -> str:
  return f"{index}_{module.kind}" if index else ""


def _write_tensors(
  directory: pathlib.Path,
  tensors: Iterable[Tensor],
  params: layout.NumpyTree,
  dtype: str,
) -> None:
  def entry(tensor: Tensor) -> safetensors_files.Entry:
    (part,) = tensor.parts
    # Transposition and identity are their own inverses.
    return tensor.name, tensor.shape, lambda: part.pick(part.slot.view(params))

  with open(directory / safetensors_files.SINGLE, "wb") as file:
    safetensors_files.write(file, map(entry, tensors), dtype)


def _write_json(path: pathlib.Path, content: Any) -> None:
  text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
  path.write_text(text, "utf-8")
