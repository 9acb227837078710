"""Attention by JAX's splash attention kernel for TPU: blocks out of reach are skipped.

Texts are the kernel's segments; the band is its static mask, from which it takes the
blocks that it visits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from embgemma.errors import ConfigError
from embgemma.models.attention_mask import Band
from embgemma.typing import Array, ArrayLike, Float, Int

LENGTH_UNIT = 128
"""Row lengths are multiples of it: the lanes of a TPU's vector unit."""

_BLOCKS = (512, 256, LENGTH_UNIT)


def segments(
  band: Band | None,
  text_ids: Int[ArrayLike, "R L"],
  memory_ids: Int[ArrayLike, "R I"] | None = None,
) -> kernels.SegmentIds:
  """Ids of queries and of keys, see `attention_mask.dense`."""
  ids = jnp.asarray(text_ids)
  keys = [] if band is None else [ids]
  if memory_ids is not None:
    keys.append(jnp.asarray(memory_ids))
  return kernels.SegmentIds(ids, jnp.concatenate(keys, axis=1))


def attend(
  band: Band | None,
  query: Float[Array, "R L H hd"],
  key: Float[Array, "R keys K hd"],
  value: Float[Array, "R keys K hd"],
  ids: kernels.SegmentIds,
  scale: float,
  interpret: bool = False,
) -> Float[Array, "R L H hd"]:
  """Softmax attention in the inputs' dtype; logits and softmax in float32.

  Args:
    band: Of the layer, over the row's own keys; None where there are none of these.
    query: Not scaled; H is a multiple of K.
    key: The row's own, then the memory's.
    value: Alike.
    ids: From `segments`.
    scale: Of the logits.
    interpret: Whether the kernel is interpreted instead of compiled, on any platform.

  Raises:
    ConfigError: L, or the length of the memory, is no multiple of 128.
  """
  length, heads = query.shape[1:3]
  keys = key.shape[1]
  for tokens in (length, keys if band is None else keys - length):
    if tokens % LENGTH_UNIT:
      raise ConfigError(
        "TransformerConfig.attention 'splash' (what 'auto' is on TPU): rows of "
        f"{tokens} tokens; it takes multiples of {LENGTH_UNIT}. Choose row lengths of "
        "128, 256, 384, 512, …, or attention 'block_local'."
      )
  single = key.shape[2] == 1
  make = kernels.make_splash_mqa if single else kernels.make_splash_mha
  kernel = make(
    _heads_mask(band, length, heads, keys),
    block_sizes=_block_sizes(band, length, keys),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # The kernel applies no scale.
  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
  if single:
    key, value = key[:, 0], value[:, 0]
  out = jax.vmap(kernel)(query, key, value, ids)
  return jnp.moveaxis(out, 1, 2).astype(query.dtype)


def _heads_mask(
  band: Band | None, length: int, heads: int, keys: int | None = None
) -> masks.MultiHeadMask:
  """The static part of `attention_mask.dense`, the same of all heads."""
  return masks.MultiHeadMask([_mask(band, length, keys or length)] * heads)


def _mask(band: Band | None, length: int, keys: int) -> masks.Mask:
  if band is None:
    return masks.FullMask((length, keys))
  own: masks.Mask = masks.FullMask((length, length))
  if not band.is_full(length):
    left, right = (side if side < length - 1 else None for side in band)
    own = masks.LocalMask((length, length), (left, right), offset=0)
  if keys == length:
    return own  # which the kernel computes as it goes
  memory = np.ones((length, keys - length), np.bool_)
  return masks.NumpyMask(np.concatenate([own[:, :], memory], axis=1))


def _block_sizes(
  band: Band | None, length: int, keys: int | None = None
) -> kernels.BlockSizes:
  """Blocks as large as the reach: larger ones would hide what it lets skip."""
  # 1: a full row's band is a column short of it.
  reach = _BLOCKS[0] if band is None else max(*band, LENGTH_UNIT) + 1
  lengths = (length, keys or length)
  block = next(b for b in _BLOCKS if b <= reach and not any(n % b for n in lengths))
  return kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
