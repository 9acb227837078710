"""Attention by JAX's splash attention kernel for TPU: blocks out of reach are skipped.

Texts are the kernel's segments; the band is its static mask, from which it takes the
blocks that it visits.
"""

import jax
import jax.numpy as jnp
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


def attend(
  band: Band,
  query: Float[Array, "R L H hd"],
  key: Float[Array, "R L K hd"],
  value: Float[Array, "R L K hd"],
  text_ids: Int[ArrayLike, "R L"],
  scale: float,
  interpret: bool = False,
) -> Float[Array, "R L H hd"]:
  """Softmax attention in the inputs' dtype; logits and softmax in float32.

  Args:
    band: Of the layer.
    query: Not scaled; H is a multiple of K.
    key: Keys.
    value: Values.
    text_ids: Which text each token belongs to; padding has its own id.
    scale: Of the logits.
    interpret: Whether the kernel is interpreted instead of compiled, on any platform.

  Raises:
    ConfigError: L is no multiple of 128.
  """
  length, heads = query.shape[1:3]
  if length % LENGTH_UNIT:
    raise ConfigError(
      f"TransformerConfig.attention 'splash' (what 'auto' is on TPU): rows of {length} "
      f"tokens; it takes multiples of {LENGTH_UNIT}. Choose row lengths of 128, 256, "
      "384, 512, …, or attention 'block_local'."
    )
  single = key.shape[2] == 1
  make = kernels.make_splash_mqa if single else kernels.make_splash_mha
  kernel = make(
    _heads_mask(band, length, heads),
    block_sizes=_block_sizes(band, length),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # The kernel applies no scale.
  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
  if single:
    key, value = key[:, 0], value[:, 0]
  ids = jnp.asarray(text_ids)
  out = jax.vmap(kernel)(query, key, value, kernels.SegmentIds(ids, ids))
  return jnp.moveaxis(out, 1, 2).astype(query.dtype)


def _heads_mask(band: Band, length: int, heads: int) -> masks.MultiHeadMask:
  """The band, which the kernel computes as it goes."""
  if band.is_full(length):
    return masks.MultiHeadMask([masks.FullMask((length, length))] * heads)
  left, right = (side if side < length - 1 else None for side in band)
  mask = masks.LocalMask((length, length), (left, right), offset=0)
  return masks.MultiHeadMask([mask] * heads)


def _block_sizes(band: Band, length: int) -> kernels.BlockSizes:
  """Blocks as large as the reach: larger ones would hide what it lets skip."""
  reach = max(*band, LENGTH_UNIT) + 1  # 1: a full row's band is a column short of it
  block = next(b for b in _BLOCKS if b <= reach and length % b == 0)
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
