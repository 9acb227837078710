"""Packed attention: one mask definition, several ways to compute it.

| backend | where | what it does |
|---|---|---|
| reference | anywhere | `jax.nn.dot_product_attention` over whole rows |
| block_local | anywhere | `attention_block_local`: blocks within the window's reach |
| splash | TPU | `attention_splash`: JAX's Pallas kernel |
| cudnn | NVIDIA GPU | cuDNN's kernel through `jax.nn.dot_product_attention` |

All follow `attention_mask` and compute logits and softmax in float32.

Keys are a row's own, those of a memory (what an encoder made of the texts of the same
row), or both: own keys within the layer's reach, a memory's whatever the layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from embgemma.errors import ConfigError
from embgemma.models import attention_block_local, attention_mask, attention_splash
from embgemma.models.attention_mask import Band
from embgemma.models.config import TransformerConfig
from embgemma.models.rotary import rotary_angles
from embgemma.typing import Array, ArrayLike, Bool, Float, Int, PyTree

_GPU = ("gpu", "cuda", "rocm")
# Mesh axis along which heads may be split.
_TENSOR = "tensor"


def resolve(config: TransformerConfig, platform: str) -> TransformerConfig:
  """The configuration with a backend in place of "auto".

  Args:
    config: Of the stack.
    platform: Of the devices that compute it, `jax.Device.platform`: it may be another
      than the process's own (compilation for a TPU on a CPU host).

  Raises:
    ConfigError: the chosen backend cannot compute this stack there.
  """
  if config.attention == "auto":
    backend = "splash" if platform == "tpu" else "block_local"
    return dataclasses.replace(config, attention=backend)
  name = f"TransformerConfig.attention {config.attention!r}"
  if config.attention == "splash" and platform != "tpu":
    raise ConfigError(f"{name} runs on TPU, the devices are {platform}; use 'auto'")
  if config.attention == "cudnn":
    if platform not in _GPU:
      raise ConfigError(f"{name} runs on GPU, the devices are {platform}; use 'auto'")
    if config.dtype != "bfloat16":
      raise ConfigError(
        f"{name} computes in bfloat16, TransformerConfig.dtype is {config.dtype!r}; "
        "use 'bfloat16' for it, or attention 'block_local'"
      )
  return config


def row_lengths(config: TransformerConfig, ladder: Sequence[int]) -> tuple[int, ...]:
  """Those of the ladder's row lengths that the (resolved) backend takes."""
  unit = {"splash": attention_splash.LENGTH_UNIT, "cudnn": 2}.get(config.attention, 1)
  return tuple(length for length in ladder if length % unit == 0)


class Memory(NamedTuple):
  """What a decoder reads of an encoder.

  Attributes:
    states: The encoder's final hidden states.
    ids: Which text of the row each belongs to, as the decoder's ids count them;
      padding has its own id.
  """

  states: Float[Array, "R I E"]
  ids: Int[ArrayLike, "R I"]


class AttentionInputs(NamedTuple):
  """What layers of one kind share: computed once, outside the scan.

  Attributes:
    mask: As the backend reads it; for splash ids of texts.
    angles: Of RoPE.
    states: Of the memory, whose keys follow the row's own (merged attention); None
      is without.
  """

  mask: PyTree
  angles: tuple[Float[Array, "R L 1 half"], Float[Array, "R L 1 half"]]
  states: Float[Array, "R I E"] | None = None


class CrossInputs(NamedTuple):
  """What all layers with a cross-attention of their own share.

  Attributes:
    mask: As the backend reads it; for splash ids of texts.
    states: Of the memory.
    seen: Whether the memory has anything of a query's text.
  """

  mask: PyTree
  states: Float[Array, "R I E"]
  seen: Bool[Array, "R L"]


def prepare(
  config: TransformerConfig,
  positions: Int[ArrayLike, "R L"],
  text_ids: Int[ArrayLike, "R L"],
  memory: Memory | None = None,
) -> dict[str, AttentionInputs]:
  """What the layers of each kind in the stack need, by kind.

  Args:
    config: Of the stack.
    positions: Position of each token in its own text, from 0.
    text_ids: Which text of the row a token belongs to; padding has its own id.
    memory: For merged attention; None is without.
  """
  length = text_ids.shape[1]
  rotary = {
    "local": (config.rope_base_local, 1.0),
    "global": (config.rope_base_global, config.rope_factor_global),
  }
  states, memory_ids = (None, None) if memory is None else memory
  build = _BACKENDS[config.attention].mask
  return {
    kind: AttentionInputs(
      build(attention_mask.band(config, kind, length), text_ids, memory_ids),
      rotary_angles(positions, config.head_dim, *rotary[kind]),
      states,
    )
    for kind in sorted(set(config.layer_kinds))
  }


def prepare_cross(
  config: TransformerConfig, text_ids: Int[ArrayLike, "R L"], memory: Memory
) -> CrossInputs:
  """What the layers of the stack need for a cross-attention of their own.

  Args:
    config: Of the stack.
    text_ids: Which text of the row a token belongs to; padding has its own id.
    memory: What they read.
  """
  seen = jnp.any(attention_mask.dense(None, text_ids, memory.ids), axis=-1)
  mask = _BACKENDS[config.attention].mask(None, text_ids, memory.ids)
  return CrossInputs(mask, memory.states, seen)


def attend(
  config: TransformerConfig,
  kind: str,
  query: Float[Array, "R L H hd"],
  key: Float[Array, "R keys K hd"],
  value: Float[Array, "R keys K hd"],
  inputs: AttentionInputs,
) -> Float[Array, "R L H hd"]:
  """Softmax attention by the configuration's backend, scaled as it says.

  Where the mesh of the context leaves an axis "tensor" to the compiler, heads are
  split over it.

  Args:
    config: Of the stack.
    kind: Of the layer, "local" or "global".
    query: After norm and RoPE.
    key: The row's own after norm and RoPE, then the memory's after norm if there is
      one.
    value: Of the same tokens.
    inputs: From `prepare`, of this kind.

  Raises:
    ConfigError: the backend does not take this row length.
  """
  band = attention_mask.band(config, kind, query.shape[1])
  return _compute(config, band, query, key, value, inputs.mask)


def attend_across(
  config: TransformerConfig,
  query: Float[Array, "R L H hd"],
  key: Float[Array, "R I K hd"],
  value: Float[Array, "R I K hd"],
  inputs: CrossInputs,
) -> Float[Array, "R L H hd"]:
  """`attend` over the keys of a memory alone: every query sees all of its text.

  Zeros for queries of whose text the memory has nothing.

  Args:
    config: Of the stack.
    query: After norm.
    key: The memory's, after norm.
    value: The memory's.
    inputs: From `prepare_cross`.

  Raises:
    ConfigError: the backend does not take these row lengths.
  """
  out = _compute(config, None, query, key, value, inputs.mask)
  return jnp.where(inputs.seen[:, :, None, None], out, 0)


def _compute(
  config: TransformerConfig,
  band: Band | None,
  query: Array,
  key: Array,
  value: Array,
  mask: PyTree,
) -> Array:
  scale = (config.query_scalar or config.head_dim) ** -0.5
  compute = functools.partial(_BACKENDS[config.attention].attend, band, scale=scale)
  return _over_heads(compute)(query, key, value, mask)


def _reference(
  band: Band | None, query: Array, key: Array, value: Array, mask: Array, scale: float
) -> Array:
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask[:, None], scale=scale, implementation="xla"
  )


def _cudnn(
  band: Band | None, query: Array, key: Array, value: Array, mask: Array, scale: float
) -> Array:
  """As cuDNN has neither text ids nor a window on the right, the mask is an array.

  JAX turns it into a bias of [R, 1, L, keys] in bfloat16: time and memory are O(L^2).
  Heads wider than 128 need a Hopper GPU or later (JAX raises). Written from JAX's
  documentation and source; it has not been run on a GPU.
  """
  for tokens in (query.shape[1], key.shape[1]):
    if tokens % 2:
      raise ConfigError(
        f"TransformerConfig.attention 'cudnn': rows of {tokens} tokens; it takes even "
        "row lengths. Choose such, or attention 'block_local'."
      )
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask[:, None], scale=scale, implementation="cudnn"
  )


class _Backend(NamedTuple):
  """`mask(band, text_ids, memory_ids)`, the arguments of `attention_mask.dense`, and
  `attend(band, query, key, value, mask, scale)`.
  """

  mask: Callable[..., PyTree]
  attend: Callable[..., Array]


_BLOCK_LOCAL = _Backend(attention_block_local.block_mask, attention_block_local.attend)
_BACKENDS = {
  "auto": _BLOCK_LOCAL,  # not resolved: what runs anywhere
  "reference": _Backend(attention_mask.dense, _reference),
  "block_local": _BLOCK_LOCAL,
  "splash": _Backend(attention_splash.segments, attention_splash.attend),
  "cudnn": _Backend(attention_mask.dense, _cudnn),
}


def _over_heads(compute: Callable[..., Array]) -> Callable[..., Array]:
  """`compute` on each device's own heads where the compiler would split them.

  No backend can be split by the compiler without moving heads: kernels are opaque to
  it, and products fold heads into rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _TENSOR not in mesh.auto_axes or mesh.shape[_TENSOR] == 1:
    return compute
  size = mesh.shape[_TENSOR]

  def sharded(query: Array, key: Array, value: Array, mask: PyTree) -> Array:
    heads, kv_heads = query.shape[2], key.shape[2]
    whole, split = PartitionSpec(), PartitionSpec(None, None, _TENSOR)
    # A part of the query heads must find its key heads in the part beside it.
    fits = heads % size == 0 and (kv_heads == 1 or kv_heads % size == 0)
    q_spec = split if fits else whole
    kv_spec = split if fits and kv_heads > 1 else whole
    return jax.shard_map(
      compute,
      in_specs=(q_spec, kv_spec, kv_spec, whole),
      out_specs=q_spec,
      axis_names={_TENSOR},
      check_vma=False,
    )(query, key, value, mask)

  return sharded
