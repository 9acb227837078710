"""Attention in plain XLA: O(L * window), and few logits at a time.

Queries are cut into blocks; a block sees the slice of keys that its band reaches.
Without a window, with a memory (`attention_mask.dense`), or where blocks would save
nothing, a row is one block. Blocks are computed a few at a time in a loop, and the
backward pass computes their logits again from queries, keys and each query's
log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1, with a whole slice of keys
for a tile): on CPU no array of [R, H, L, L] goes through main memory. What this gives
is in docs/performance.md.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embgemma.models.attention_mask import Band, dense
from embgemma.typing import Array, ArrayLike, Bool, Float, Int

# Finite, and far below any logit: a masked key's weight is exactly 0.
_MASKED = -0.7 * float(np.finfo(np.float32).max)
# Logits held at once: 4 MiB stay in a CPU's caches. An accelerator wants work for all
# its units instead, within half a GiB.
_CPU_LOGITS = 2**20
_ACCELERATOR_LOGITS = 2**27
# Smaller blocks make slower products, larger ones see more keys than they need.
_BLOCK = 128


class Plan(NamedTuple):
  """How a row is cut: `blocks` of `block` queries with `span` keys each.

  The first key of a block is `left` columns before its first query.
  """

  blocks: int
  block: int
  left: int
  span: int


def plan(band: Band | None, length: int, keys: int | None = None) -> Plan:
  """Blocks with the keys in their reach, or the whole row if that saves no tenth.

  Args:
    band: Of the row's own keys; None where there are none of these.
    length: Queries of a row.
    keys: Of a row, with those of the memory; None is the row's own.
  """
  keys = keys or length
  if band is None or keys > length:
    return Plan(1, length, 0, keys)
  span = _BLOCK + band.left + band.right
  blocks = -(-length // _BLOCK)
  if blocks * _BLOCK * span > 0.9 * length**2:
    return Plan(1, length, 0, length)
  return Plan(blocks, _BLOCK, band.left, span)


def block_mask(
  band: Band | None,
  text_ids: Int[ArrayLike, "R L"],
  memory_ids: Int[ArrayLike, "R I"] | None = None,
) -> Bool[Array, "R blocks block span"]:
  """`dense` of the same arguments, cut as `plan` says."""
  length = text_ids.shape[1]
  if band is None or memory_ids is not None or plan(band, length).blocks == 1:
    return dense(band, text_ids, memory_ids)[:, None]
  cut = plan(band, length)
  ids = jnp.asarray(text_ids)
  same_text = _query_blocks(ids, cut)[..., None] == _key_spans(ids, cut)[:, :, None, :]
  column = np.arange(cut.span)[None, :] - cut.left
  distance = np.arange(cut.block)[:, None] - column
  in_band = (distance <= band.left) & (-distance <= band.right)
  column = column + cut.block * np.arange(cut.blocks)[:, None]
  in_row = (column >= 0) & (column < length)
  return same_text & in_band & in_row[:, None, :]


def attend(
  band: Band | None,
  query: Float[Array, "R L H hd"],
  key: Float[Array, "R keys K hd"],
  value: Float[Array, "R keys K hd"],
  mask: Bool[Array, "R blocks block span"],
  scale: float,
) -> Float[Array, "R L H hd"]:
  """Softmax attention in the inputs' dtype; logits and softmax in float32.

  Args:
    band: Of the layer, over the row's own keys; None where there are none of these.
    query: Not scaled; H is a multiple of K.
    key: The row's own, then the memory's.
    value: Alike.
    mask: From `block_mask`.
    scale: Of the logits.
  """
  rows, length, heads, head_dim = query.shape
  kv_heads = key.shape[2]
  group = heads // kv_heads
  cut = plan(band, length, key.shape[1])

  def units(x: Array, positions: int) -> Array:
    """[R, blocks, n, K, ...] as [R * blocks * K, positions, hd]."""
    return jnp.moveaxis(x, 3, 2).reshape(-1, positions, head_dim)

  # Heads that share a key stand beside each other, for one large product. With one
  # key head this moves no data.
  query = query.reshape(rows, length, kv_heads, group, head_dim)
  out = _attend_units(
    scale,
    units(_query_blocks(query, cut), cut.block * group),
    units(_key_spans(key, cut), cut.span),
    units(_key_spans(value, cut), cut.span),
    jnp.repeat(mask.reshape(-1, cut.block, cut.span), kv_heads, axis=0),
  )
  out = out.reshape(rows, cut.blocks, kv_heads, cut.block, group, head_dim)
  return jnp.moveaxis(out, 2, 3).reshape(rows, -1, heads, head_dim)[:, :length]


def _query_blocks(x: Array, cut: Plan) -> Array:
  """[R, L, ...] as [R, blocks, block, ...], zeros after the end."""
  after = cut.blocks * cut.block - x.shape[1]
  padded = jnp.pad(x, [(0, 0), (0, after)] + [(0, 0)] * (x.ndim - 2))
  return padded.reshape(x.shape[0], cut.blocks, cut.block, *x.shape[2:])


def _key_spans(x: Array, cut: Plan) -> Array:
  """[R, L, ...] as overlapping [R, blocks, span, ...], zeros around the row."""
  if cut.blocks == 1:
    return x[:, None]
  starts = [i * cut.block for i in range(cut.blocks)]
  after = starts[-1] + cut.span - cut.left - x.shape[1]
  padded = jnp.pad(x, [(0, 0), (cut.left, max(after, 0))] + [(0, 0)] * (x.ndim - 2))
  return jnp.stack([padded[:, s : s + cut.span] for s in starts], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_units(
  scale: float,
  query: Float[Array, "U m hd"],
  key: Float[Array, "U span hd"],
  value: Float[Array, "U span hd"],
  mask: Bool[Array, "U block span"],
) -> Float[Array, "U m hd"]:
  """Attention of blocks with one key head each; m = block * H / K, heads innermost."""
  return _forward(scale, query, key, value, mask)[0]


def _forward(scale, query, key, value, mask):
  def one(unit):
    query, key, value, mask = unit
    logits = _logits(scale, query, key, mask)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("ms,sd->md", weights.astype(value.dtype), value) / total
    return out.astype(query.dtype), top + jnp.log(total)

  out, log_sum = _map(one, query, key, value, mask)
  return out, (query, key, value, mask, out, log_sum)


def _backward(scale, residuals, gradient):
  def one(unit):
    query, key, value, mask, out, log_sum, gradient = unit
    weights = jnp.exp(_logits(scale, query, key, mask) - log_sum)
    dvalue = _product("ms,md->sd", weights.astype(value.dtype), gradient)
    dweights = _product("md,sd->ms", gradient, value)
    # Each query's sum of weights * dweights, without the weights.
    mean = jnp.sum(gradient * out, axis=-1, keepdims=True, dtype=jnp.float32)
    dlogits = (weights * (dweights - mean) * scale).astype(key.dtype)
    dquery = _product("ms,sd->md", dlogits, key)
    dkey = _product("ms,md->sd", dlogits, query)
    return tuple(x.astype(query.dtype) for x in (dquery, dkey, dvalue))

  return *_map(one, *residuals, gradient), None


_attend_units.defvjp(_forward, _backward)


def _logits(scale: float, query: Array, key: Array, mask: Array) -> Array:
  """Masked logits of one unit, [m, span]."""
  products = _product("md,sd->ms", query, key) * scale
  by_head = products.reshape(mask.shape[0], -1, mask.shape[1])
  return jnp.where(mask[:, None], by_head, _MASKED).reshape(products.shape)


def _product(spec: str, *operands: Array) -> Array:
  return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _map(function: Callable[[Any], Any], query: Array, key: Array, *others: Array):
  """`function` of every unit, as many at a time as the platform likes."""
  units, queries, _ = query.shape

  def mapped(budget: int) -> Callable[..., Any]:
    most = min(max(1, budget // (queries * key.shape[1])), units)
    # A divisor: what is left over would be copied.
    size = next(size for size in range(most, 0, -1) if units % size == 0)
    if size == units:
      return lambda *arrays: jax.vmap(function)(arrays)
    return lambda *arrays: jax.lax.map(function, arrays, batch_size=size)

  return jax.lax.platform_dependent(
    query, key, *others, cpu=mapped(_CPU_LOGITS), default=mapped(_ACCELERATOR_LOGITS)
  )
