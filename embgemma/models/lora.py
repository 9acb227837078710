"""Low-rank adapters beside kernels: y = x W + (alpha / rank) (x A) B.

A linear map's `kernel` W [in, out] gets the siblings `lora_a` A [in, r] and `lora_b`
B [r, out], all stacked on a leading axis inside the scan over layers.
`layers.Linear` uses them where they are (arXiv 2106.09685, section 4.1).
"""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from embgemma.errors import ConfigError
from embgemma.models.config import EmbedderConfig, LoraConfig
from embgemma.typing import Array, Params

A, B = "lora_a", "lora_b"
# Searched in a parameter's path.
PATTERN = f"(^|/)({A}|{B})$"


def is_adapter(path: str) -> bool:
  """Whether a parameter's path is an adapter's."""
  return bool(re.search(PATTERN, path))


def add(params: Params, lora: LoraConfig, key: Array) -> Params:
  """The parameters with fresh adapters, which change nothing yet.

  A is uniform in +-in ** -0.5 and B zero, as PEFT starts them (the paper draws A
  from a normal distribution).

  Args:
    params: Of an Embedder, float32 in flax's logical-axis boxes; so are adapters.
    lora: Which maps get adapters, and their rank.
    key: Of A.

  Raises:
    ConfigError: a pattern of `targets` matches no linear map.
  """
  flat = dict(traverse_util.flatten_dict(params))
  maps = {"/".join(path[:-1]): path[:-1] for path in flat if path[-1] == "kernel"}
  for pattern in lora.targets:
    if not any(re.search(pattern, name) for name in maps):
      examples = ", ".join(sorted(maps)[:4])
      raise ConfigError(
        f"LoraConfig.targets: {pattern!r} matches no linear map; the model has "
        f"{len(maps)}, such as {examples}"
      )
  chosen = [n for n in sorted(maps) if any(re.search(p, n) for p in lora.targets)]
  for name, own in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
    kernel = flat[*maps[name], "kernel"]
    *layers, fan_in, fan_out = kernel.value.shape
    *axes, axis_in, axis_out = kernel.names
    bound = fan_in**-0.5
    a = jax.random.uniform(
      own, (*layers, fan_in, lora.rank), jnp.float32, -bound, bound
    )
    b = jnp.zeros((*layers, lora.rank, fan_out), jnp.float32)
    flat[*maps[name], A] = nn.LogicallyPartitioned(a, (*axes, axis_in, "lora"))
    flat[*maps[name], B] = nn.LogicallyPartitioned(b, (*axes, "lora", axis_out))
  return traverse_util.unflatten_dict(flat)


def scaled(params: Params, lora: LoraConfig | None) -> Params:
  """The parameters with every B times alpha / rank, as `layers.Linear` needs them."""
  if lora is None:
    return params
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: lora.scale * x if path[-1] == B else x for path, x in flat.items()}
  )


def split(params: Params) -> tuple[Params, Params]:
  """The parameters of the base model, and the adapters beside them."""
  flat = traverse_util.flatten_dict(params)
  base = {path: x for path, x in flat.items() if path[-1] not in (A, B)}
  adapters = {path: x for path, x in flat.items() if path[-1] in (A, B)}
  return traverse_util.unflatten_dict(base), traverse_util.unflatten_dict(adapters)


def merge(params: Params, config: EmbedderConfig) -> tuple[Params, EmbedderConfig]:
  """Parameters and configuration of a model without adapters that embeds alike.

  Its kernels are W + (alpha / rank) A B (section 4.1). Those without adapters, and
  everything else, are the given arrays, not copies.

  Args:
    params: Of an Embedder, without axis boxes, float32 in numpy or jax arrays; so are
      the result's.
    config: Of that Embedder; without `lora` it and `params` are the result.
  """
  if config.lora is None:
    return params, config
  flat = traverse_util.flatten_dict(scaled(params, config.lora))
  merged = {}
  # Accelerators would multiply float32 in fewer bits.
  with jax.default_matmul_precision("highest"):
    for path, x in flat.items():
      a, b = (flat.get((*path[:-1], name)) for name in (A, B))
      if path[-1] == "kernel" and a is not None:
        merged[path] = x + a @ b
      elif path[-1] not in (A, B):
        merged[path] = x
  return traverse_util.unflatten_dict(merged), dataclasses.replace(config, lora=None)
