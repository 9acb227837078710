"""Embedders for LiteRT (TensorFlow Lite), the runtime of phones.

Google's converter writes what sentence-transformers computes with the exported weights;
its quantizer rounds weights by output channel, to the codes of `models.quantization`.
Both are of the extra `litert`, whose requirements exclude those of others: it wants an
environment of its own.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax import traverse_util

from embgemma.errors import ConfigError
from embgemma.interop import torch_pipeline
from embgemma.interop.model import Model
from embgemma.interop.torch_pipeline import INPUTS
from embgemma.models import embedder, quantization
from embgemma.models.config import EmbedderConfig, QuantizationConfig

MODEL_FILE = "model.tflite"
DTYPES = ("float32", "mixed_channel", "trained")
_BITS = {"int8_channel": 8, "int4_channel": 4}
# What the converter calls the results of a part's products; how our parameters are
# called; and its operation.
_PARTS: Mapping[str, tuple[str, str, str]] = {
  "token table": ("embed_tokens", r"/table$", "EMBEDDING_LOOKUP"),
  "attention": ("self_attn", r"/attention/", "FULLY_CONNECTED"),
  "feed-forward": ("_mlp", r"/mlp/", "FULLY_CONNECTED"),
  "heads": (r"Dense_\d", r"^projection_", "FULLY_CONNECTED"),
}


def check_exportable(config: EmbedderConfig, dtype: str) -> None:
  """Refuses what `write` would, before weights are read.

  Raises:
    ConfigError: another dtype, formats that LiteRT does not have, or its converter is
      not installed.
  """
  if dtype not in DTYPES:
    raise ConfigError(f"--dtype={dtype}: litert has {', '.join(DTYPES)}")
  _bits(config, dtype)
  try:
    import ai_edge_quantizer  # noqa: F401
    import litert_torch  # noqa: F401
    import sentence_transformers  # noqa: F401
  except ModuleNotFoundError as error:
    raise ConfigError(
      f"`embgemma export --to=litert` needs {error.name}: in an environment of its "
      "own, pip install 'embgemma[litert]'"
    ) from error


def write(
  model: Model, directory: pathlib.Path, dtype: str, max_length: int, card: str = ""
) -> tuple[str, ...]:
  """Writes model.tflite with tokenizer and settings.

  The graph takes int32 `input_ids` and `attention_mask` [1, max_length], one text with
  BOS, EOS and the prompt, padded on the right, and gives float32
  `sentence_embedding` [1, E] of unit norm. Where weights are integers products are
  too, of activations that the runtime rounds to 8 bits as they come.

  Args:
    model: An embedder.
    directory: Exists, and is empty.
    dtype: Of the weights, one of DTYPES.
    max_length: Tokens of every input.
    card: Content of README.md.

  Returns:
    What the user should know about it.

  Raises:
    CheckpointError, ConfigError: see `sentence_transformers_writer.write`.
  """
  bits = _bits(model.description.embedder, dtype)
  path = directory / MODEL_FILE
  with torch_pipeline.loaded(model, max_length, card) as pipeline:
    _convert(pipeline.vectors, path, max_length)
    if bits:
      _quantize(path, bits)
    pipeline.copy_settings(directory)
    return pipeline.notes


def _bits(config: EmbedderConfig, dtype: str) -> dict[str, int]:
  """Bits of the weights of each part; parts that are missing stay float32."""
  rules: QuantizationConfig | None = None
  if dtype == "mixed_channel":
    rules = quantization.mixed_channel()
  elif dtype == "trained":
    rules = config.quantization
    if rules is None:
      raise ConfigError(
        "--dtype=trained: the model was not trained in a format of 4 or 8 bits; write "
        "--dtype=mixed_channel"
      )
  if rules is None:
    return {}
  plain = embedder.abstract_params(dataclasses.replace(config, lora=None))
  formats = quantization.formats(plain, rules)
  found = {}
  for part, (_, pattern, _) in _PARTS.items():
    own = {
      formats.get(path, "float32")
      for path, leaf in traverse_util.flatten_dict(plain).items()
      if path[-1] in ("kernel", "table") and re.search(pattern, "/".join(path))
    }
    if own and own != {"float32"}:
      if len(own) > 1 or not own <= _BITS.keys():
        raise ConfigError(
          f"--dtype={dtype}: the {part} of the model has {', '.join(sorted(own))}; "
          f"LiteRT has one of {', '.join(_BITS)} for each part, such as "
          "@mixed_channel() gives"
        )
      found[part] = _BITS[own.pop()]
  return found


def _convert(vectors: Any, path: pathlib.Path, max_length: int) -> None:
  import litert_torch
  import torch

  ids = torch.ones((1, max_length), dtype=torch.int32)
  mask = torch.ones_like(ids)
  mask[:, -1] = 0  # transformers leaves out a mask that masks nothing
  example = dict(zip(INPUTS, (ids, mask), strict=True))
  with _repeated_heads(), _silent():
    litert_torch.convert(vectors, sample_kwargs=example).export(str(path))


@contextlib.contextmanager
def _repeated_heads() -> Iterator[None]:
  """Keys and values of shared heads as copies.

  litert-torch 0.10 computes something else where a product's operand was expanded.
  """
  import torch
  from transformers.models.gemma3 import modeling_gemma3

  def repeat_kv(hidden_states: Any, n_rep: int) -> Any:
    return torch.stack([hidden_states] * n_rep, dim=2).flatten(1, 2)

  theirs = modeling_gemma3.repeat_kv
  modeling_gemma3.repeat_kv = repeat_kv
  try:
    yield
  finally:
    modeling_gemma3.repeat_kv = theirs


def _quantize(path: pathlib.Path, bits: Mapping[str, int]) -> None:
  from ai_edge_quantizer import quantizer

  found = quantizer.Quantizer(str(path))
  for part, number in bits.items():
    pattern, _, operation = _PARTS[part]
    found.add_dynamic_config(f".*{pattern}.*", operation, number)
  with _silent():
    quantized = found.quantize()
    path.unlink()
    quantized.export_model(str(path))
  _check_quantized(path, bits)


def _check_quantized(path: pathlib.Path, bits: Mapping[str, int]) -> None:
  """That the converter called parts as `_PARTS` has it: else they are float32 still."""
  from ai_edge_litert.interpreter import Interpreter

  names = [
    each["name"]
    for each in Interpreter(str(path)).get_tensor_details()
    if each["quantization_parameters"]["scales"].size > 1
  ]
  # The table's own tensor is a constant without a name.
  for part in bits.keys() - {"token table"}:
    if not any(re.search(_PARTS[part][0], name) for name in names):
      raise ConfigError(
        f"litert-torch names the products of {part} otherwise than version 0.10 does; "
        "install that one"
      )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Without what the converter prints of its steps."""
  with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
    yield
