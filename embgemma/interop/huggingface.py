"""Gemma 3 and T5Gemma 2 text models as transformers keeps them.

Configurations are read from the raw JSON: a live `Gemma3TextConfig` has already
replaced its window. Layouts and rules: transformers 5.23, models/gemma3 and
models/t5gemma2, checked numerically by the tests.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop.layout import (
  LAYER_PARAMETERS,
  Part,
  Slot,
  Tensor,
  identity,
  stack_slots,
)
from embgemma.models.config import TransformerConfig

GEMMA3_NAMES: Mapping[str, str] = dict(
  zip(
    LAYER_PARAMETERS,
    (
      "self_attn.q_proj.weight",
      "self_attn.k_proj.weight",
      "self_attn.v_proj.weight",
      "self_attn.o_proj.weight",
      "self_attn.q_norm.weight",
      "self_attn.k_norm.weight",
      "mlp.gate_proj.weight",
      "mlp.up_proj.weight",
      "mlp.down_proj.weight",
      "input_layernorm.weight",
      "post_attention_layernorm.weight",
      "pre_feedforward_layernorm.weight",
      "post_feedforward_layernorm.weight",
    ),
    strict=True,
  )
)
"""Names of a block's tensors in Gemma 3."""

T5GEMMA2_NAMES: Mapping[str, str] = {
  **GEMMA3_NAMES,
  "pre_attention_norm/scale": "pre_self_attn_layernorm.weight",
  "post_attention_norm/scale": "post_self_attn_layernorm.weight",
}
"""Names of a block's tensors in both stacks of T5Gemma 2."""

_KINDS = {"sliding_attention": "local", "full_attention": "global"}
_REQUIRED = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "sliding_window",
  "max_position_embeddings",
  "query_pre_attn_scalar",
  "rms_norm_eps",
)
# What Gemma 3's text models have, and the only values that our blocks compute.
_FIXED: Mapping[str, tuple[Any, ...]] = {
  "attention_bias": (False,),
  "hidden_activation": ("gelu_pytorch_tanh",),
  "attn_logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "tie_word_embeddings": (True,),
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    CheckpointError: the file is missing or damaged.
  """
  try:
    content = json.loads(path.read_text("utf-8"))
  except OSError as error:
    raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
  except ValueError as error:
    raise CheckpointError(f"{path}: no JSON: {error}; download it again") from error
  if not isinstance(content, dict):
    raise CheckpointError(f"{path}: must hold a JSON object; download it again")
  return content


def text_config(
  values: Mapping[str, Any], path: pathlib.Path, dtype: str, mask: str | None = None
) -> TransformerConfig:
  """The shape of a Gemma 3 text stack.

  Args:
    values: Content of config.json, or of its part about the stack.
    path: The file, for messages.
    dtype: Of computation.
    mask: "bidirectional" or "causal"; None reads `use_bidirectional_attention`.

  Raises:
    CheckpointError: a key is missing, or has a value that our blocks do not compute.
  """
  _check_keys(values, path)
  if mask is None:
    causal = not values.get("use_bidirectional_attention", False)
    mask = "causal" if causal else "bidirectional"
  try:
    pattern = _pattern(values, path)
    bases, factor = _rope(values, path)
    span = int(values["sliding_window"])
    # transformers makes the span of a bidirectional model an exclusive radius of
    # span // 2 + 1; a causal one counts the token itself.
    window = (span - 1, 0) if mask == "causal" else (span // 2, span // 2)
    return TransformerConfig(
      vocab_size=values["vocab_size"],
      num_layers=values["num_hidden_layers"],
      width=values["hidden_size"],
      mlp_width=values["intermediate_size"],
      num_heads=values["num_attention_heads"],
      num_kv_heads=values["num_key_value_heads"],
      head_dim=values["head_dim"],
      attention_pattern=pattern,
      mask=mask,
      window=window,
      rope_base_local=bases["sliding_attention"],
      rope_base_global=bases["full_attention"],
      rope_factor_global=factor,
      query_scalar=float(values["query_pre_attn_scalar"]),
      norm_epsilon=values["rms_norm_eps"],
      max_length=values["max_position_embeddings"],
      dtype=dtype,
    )
  except ConfigError as error:
    raise CheckpointError(f"{path}: {error}") from error
  except (TypeError, ValueError, AttributeError, OverflowError) as error:
    raise CheckpointError(
      f"{path}: a value is of the wrong kind: {error}; download it again"
    ) from error


def _check_keys(values: Mapping[str, Any], path: pathlib.Path) -> None:
  missing = [key for key in _REQUIRED if values.get(key) is None]
  if values.get("rope_parameters") is None:
    missing += [k for k in ("rope_theta", "rope_local_base_freq") if k not in values]
  if missing:
    raise CheckpointError(
      f"{path}: keys are missing: {', '.join(missing)}; it is no complete "
      "configuration of a Gemma 3 text model"
    )
  for key, allowed in _FIXED.items():
    if key in values and values[key] not in allowed:
      raise CheckpointError(
        f"{path}: {key} is {values[key]!r}; only {allowed[0]!r} is supported, as in "
        "Gemma 3's text models of up to 1B"
      )


def _rope(
  values: Mapping[str, Any], path: pathlib.Path
) -> tuple[dict[str, float], float]:
  """RoPE bases by layer type and the factor of global layers, in either spelling."""
  ropes = values.get("rope_parameters")
  if ropes is None:
    scaling = values.get("rope_scaling") or {}
    ropes = {
      "sliding_attention": {"rope_theta": values["rope_local_base_freq"]},
      "full_attention": {"rope_theta": values["rope_theta"], **scaling},
    }
  bases, factor = {}, 1.0
  for kind in _KINDS:
    rope = ropes.get(kind)
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
      raise CheckpointError(f"{path}: rope_parameters has no rope_theta for {kind}")
    of = rope.get("rope_type", "default")
    if of == "linear" and kind == "full_attention" and "factor" in rope:
      factor = float(rope["factor"])
    elif of != "default":
      raise CheckpointError(
        f"{path}: RoPE of {kind}: rope_type {of!r} is not supported, only 'default' "
        "and, of full_attention, 'linear' with its factor"
      )
    bases[kind] = float(rope["rope_theta"])
  return bases, factor


def _pattern(values: Mapping[str, Any], path: pathlib.Path) -> tuple[str, ...]:
  """The shortest repeating group of layer kinds; `layer_types` has the last word."""
  layers = values["num_hidden_layers"]
  types = values.get("layer_types")
  if types is None:
    # "_sliding_window_pattern" is what transformers writes beside layer_types, and
    # does not read without them.
    period = values.get("sliding_window_pattern")
    if not isinstance(period, int) or period < 1:
      raise CheckpointError(
        f"{path}: neither layer_types nor sliding_window_pattern says which layers "
        "are local"
      )
    return ("local",) * (period - 1) + ("global",)
  unknown = sorted({str(t) for t in types} - _KINDS.keys())
  if unknown or len(types) != layers:
    raise CheckpointError(
      f"{path}: layer_types must be {layers} (num_hidden_layers) of {sorted(_KINDS)}; "
      f"it has {len(types)}" + (f", with {unknown}" if unknown else "")
    )
  kinds = [_KINDS[t] for t in types]
  period = next(
    p
    for p in range(1, layers + 1)
    if all(kind == kinds[i % p] for i, kind in enumerate(kinds))
  )
  return tuple(kinds[:period])


def config_json(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """config.json of a Gemma3TextModel, as transformers 4.57 and 5 read it.

  Args:
    config: Of the encoder.
    dtype: Of the weights.

  Raises:
    ConfigError: transformers' Gemma 3 cannot express the windows.
  """
  types = {kind: name for name, kind in _KINDS.items()}
  pattern = config.attention_pattern
  regular = pattern == ("local",) * (len(pattern) - 1) + ("global",)
  return {
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": _num_heads(config),
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "layer_types": [types[kind] for kind in config.layer_kinds],
    **({"_sliding_window_pattern": len(pattern)} if regular else {}),
    "sliding_window": _span(config),
    "use_bidirectional_attention": config.mask == "bidirectional",
    "rope_theta": config.rope_base_global,
    "rope_local_base_freq": config.rope_base_local,
    "rope_scaling": _rope_scaling(config),
    "query_pre_attn_scalar": _query_scalar(config),
    "rms_norm_eps": config.norm_epsilon,
    "max_position_embeddings": config.max_length,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "initializer_range": 0.02,
    "use_cache": True,
    "dtype": dtype,
  }


def _rope_scaling(config: TransformerConfig) -> dict[str, Any] | None:
  if config.rope_factor_global == 1:
    return None
  return {"rope_type": "linear", "factor": config.rope_factor_global}


def _query_scalar(config: TransformerConfig) -> int:
  scalar = config.query_scalar or config.head_dim
  if scalar != int(scalar):
    raise ConfigError(
      f"TransformerConfig.query_scalar is {scalar}; transformers' Gemma 3 has whole "
      "numbers only"
    )
  return int(scalar)


def _num_heads(config: TransformerConfig) -> int:
  if config.width % config.num_heads:
    raise ConfigError(
      f"TransformerConfig.width ({config.width}) is no multiple of num_heads "
      f"({config.num_heads}); transformers loads no such Gemma 3"
    )
  return config.num_heads


def _span(config: TransformerConfig) -> int:
  left, right = config.window
  if config.mask == "causal":
    return left + 1
  if left != right:
    raise ConfigError(
      f"the model's window is {left} keys to the left and {right} to the right; "
      "transformers' bidirectional Gemma 3 has the same number on both sides. Train "
      f"with --gin.TransformerConfig.window='({right}, {right})', or for a model that "
      f"starts from a checkpoint --gin.checkpoint_model.window='({right}, {right})'."
    )
  return 2 * left


def stack_tensors(
  config: TransformerConfig,
  root: tuple[str, ...],
  prefix: str = "",
  names: Mapping[str, str] = GEMMA3_NAMES,
  table: str | None = "embed_tokens.weight",
) -> list[Tensor]:
  """Every tensor of a stack, as transformers names and shapes it.

  Args:
    config: Of the stack.
    root: Its path in our tree.
    prefix: In front of every name.
    names: Of a block's tensors.
    table: Name of the token table; None where the stack has none of its own.
  """
  tensors = []
  for key, slot in stack_slots(config, root).items():
    if key == "table":
      if table is None:
        continue
      name = table
    elif key == "final_norm":
      name = "norm.weight"
    else:
      layer, _, parameter = key.partition("/")
      name = f"layers.{layer}.{names[parameter]}"
    tensors.append(linear_tensor(prefix + name, slot))
  return tensors


def linear_tensor(name: str, slot: Slot) -> Tensor:
  """A kernel, which torch keeps as [out, in]; norms and the table are as ours."""
  if slot.path[-1] != "kernel":
    return Tensor(name, slot.shape, (Part(slot, identity),))
  return Tensor(name, slot.shape[::-1], (Part(slot, np.transpose),))


def name_prefix(shapes: Mapping[str, Sequence[int]], candidates: Sequence[str]) -> str:
  """The prefix under which a checkpoint keeps its token table; "" if there is none."""
  return next((p for p in candidates if f"{p}embed_tokens.weight" in shapes), "")
