"""Weights in 4 or 8 bits: formats, which parameter has which, and how it is trained.

A format rounds a parameter exactly as its target does: blocks of 32 input features as
GGUF's Q4_0 and Q8_0 (ggml; gguf-py `quants.py`), or symmetric integers with one scale
an output channel. Quantization-aware training computes with rounded weights and hands
their gradient to the weights as they are (straight-through, arXiv 1308.3432).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util

from embgemma.errors import ConfigError
from embgemma.models.config import QuantizationConfig
from embgemma.typing import Array, ArrayLike, Float, Params

BLOCK = 32
_TABLE, _KERNEL = "table", "kernel"


# As a pytree node rebuilt around shapes and comparisons: its fields are not checked.
@no_type_check
@flax.struct.dataclass
class Quantized:
  """A parameter as codes and scales.

  Attributes:
    codes: int8, of the parameter's shape.
    scales: Of its shape but for the axis of input features, which has one a block, or
      1: float16 of blocks, float32 of channels.
    axis: Of input features, from the end.
    bits: That a code needs.
  """

  codes: ArrayLike
  scales: ArrayLike
  axis: int = flax.struct.field(pytree_node=False)
  bits: int = flax.struct.field(pytree_node=False)

  def values(self) -> Float[Array, "..."]:
    """What the codes stand for, float32."""
    codes, scales = (jnp.asarray(x, jnp.float32) for x in (self.codes, self.scales))
    size, blocks = codes.shape[self.axis], scales.shape[self.axis]
    return jnp.repeat(scales, size // blocks, self.axis) * codes

  def rows(self, indices: Array) -> Float[Array, "..."]:
    """Values of some rows of a table: its input features are the last axis."""
    codes, scales = (jnp.take(x, indices, axis=0) for x in (self.codes, self.scales))
    return Quantized(codes, scales, self.axis, self.bits).values()


def _by_block(
  bits: int, round_block: Callable[[Array], tuple[Array, Array]], x: Array, axis: int
) -> Quantized:
  rows = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
  blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
  codes, scales = round_block(blocks)
  return Quantized(
    jnp.moveaxis(codes.reshape(rows.shape), -1, axis),
    # Codes are of the scale as it is; what is kept, and used, is its float16.
    jnp.moveaxis(scales[..., 0].astype(jnp.float16), -1, axis),
    axis,
    bits,
  )


def _q4_0(blocks: Array) -> tuple[Array, Array]:
  """The largest by magnitude, with its sign, is code -8."""
  largest = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
  scale = jnp.take_along_axis(blocks, largest, axis=-1) / -8
  # Within -8..8: the bounds keep compilers from rounding product and sum as one.
  scaled = jnp.clip(blocks * _inverse(scale), -9, 9)
  codes = jnp.clip(jnp.trunc(scaled + 8.5), 0, 15) - 8
  return codes.astype(jnp.int8), scale


def _q8_0(blocks: Array) -> tuple[Array, Array]:
  """The largest magnitude is code 127; halves are rounded away from 0."""
  scale = _divided(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), 127)
  scaled = blocks * _inverse(scale)
  size = jnp.abs(scaled)
  whole = jnp.floor(size)
  codes = jnp.sign(scaled) * (whole + jnp.floor(2 * (size - whole)))
  return codes.astype(jnp.int8), scale


def _divided(x: Array, by: int) -> Array:
  """A true quotient: for a scalar XLA multiplies by its reciprocal, an ulp off."""
  return x / jax.lax.optimization_barrier(jnp.full_like(x, by))


def _inverse(scale: Array) -> Array:
  return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _by_channel(bits: int, x: Array, axis: int) -> Quantized:
  """The largest magnitude is the largest code; halves are rounded to even."""
  top = 2 ** (bits - 1) - 1
  x = x.astype(jnp.float32)
  scale = _divided(jnp.max(jnp.abs(x), axis=axis, keepdims=True), top)
  codes = jnp.clip(jnp.round(x * _inverse(scale)), -top - 1, top)
  return Quantized(codes.astype(jnp.int8), scale, axis, bits)


@dataclasses.dataclass(frozen=True)
class WeightFormat:
  """How numbers of a parameter are kept.

  Attributes:
    bits: Of a code.
    block: Input features that share a scale; None is all.
    quantize: A parameter and its axis of input features to its codes.
  """

  bits: int
  block: int | None
  quantize: Callable[[Array, int], Quantized]

  def bytes(self, shape: Sequence[int], axis: int) -> int:
    """Of a parameter: codes packed, and scales."""
    count = 1
    for size in shape:
      count *= size
    if self.block is not None:
      return count // self.block * (self.block * self.bits // 8 + 2)
    return count * self.bits // 8 + count // shape[axis] * 4


FORMATS: Mapping[str, WeightFormat] = {
  "q4_0": WeightFormat(4, BLOCK, functools.partial(_by_block, 4, _q4_0)),
  "q8_0": WeightFormat(8, BLOCK, functools.partial(_by_block, 8, _q8_0)),
  "int4_channel": WeightFormat(4, None, functools.partial(_by_channel, 4)),
  "int8_channel": WeightFormat(8, None, functools.partial(_by_channel, 8)),
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def straight_through(x: Float[Array, "..."], name: str, axis: int) -> Array:
  """Values of a parameter in a format; the derivative is the identity's.

  Args:
    x: A parameter.
    name: Of its format.
    axis: Of its input features.
  """
  return FORMATS[name].quantize(x, axis).values().astype(x.dtype)


@straight_through.defjvp
def _identity(name: str, axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
  return straight_through(primals[0], name, axis), tangents[0]


def formats(params: Params, config: QuantizationConfig) -> dict[tuple[str, ...], str]:
  """The format of each parameter that has one, by path.

  Args:
    params: Of a model without adapters: arrays or their shapes.
    config: Its rules.

  Raises:
    ConfigError: a rule that no parameter follows, or a shape that its format cannot
      have.
  """
  flat = traverse_util.flatten_dict(params)
  matrices = {path: x for path, x in flat.items() if path[-1] in (_TABLE, _KERNEL)}
  found: dict[tuple[str, ...], str] = {}
  used = set()
  for path, x in matrices.items():
    name = "/".join(path)
    for number, (pattern, chosen) in enumerate(config.rules):
      if re.search(pattern, name):
        used.add(number)
        _check_shape(name, x.shape, chosen)
        found[path] = chosen
        break
  for number, (pattern, _) in enumerate(config.rules):
    if number not in used:
      names = ", ".join("/".join(path) for path in list(matrices)[:8])
      raise ConfigError(
        f"QuantizationConfig.rules: no parameter follows {pattern!r} (or all that do "
        f"follow an earlier rule); there are {names}, …"
      )
  return found


def rounded(params: Params, config: QuantizationConfig) -> Params:
  """The parameters with the values that their formats have, straight through.

  Raises:
    ConfigError: see `formats`.
  """
  flat = traverse_util.flatten_dict(params)
  for path, name in formats(params, config).items():
    flat[path] = straight_through(jnp.asarray(flat[path]), name, input_axis(path))
  return traverse_util.unflatten_dict(flat)


def is_quantized(params: Params) -> bool:
  """Whether parameters are codes, as of `quantized`."""
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
  return any(isinstance(leaf, Quantized) for leaf in leaves)


def quantized(params: Params, config: QuantizationConfig) -> Params:
  """The parameters, those with a format as `Quantized`.

  Raises:
    ConfigError: see `formats`.
  """
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
  for path, name in formats(params, config).items():
    flat[path] = FORMATS[name].quantize(jnp.asarray(flat[path]), input_axis(path))
  return traverse_util.unflatten_dict(flat)


def input_axis(path: Sequence[str]) -> int:
  """The axis of a parameter, from the end, over which a product with it sums.

  Kernels are [in, out], stacked on a leading axis where layers are scanned; the token
  table is [pieces, width], of which a row is one output channel of the lookup.
  """
  return -1 if path[-1] == _TABLE else -2


def _check_shape(name: str, shape: Sequence[int], chosen: str) -> None:
  axis = input_axis(name.split("/"))
  if FORMATS[chosen].block is not None and shape[axis] % BLOCK:
    raise ConfigError(
      f"{name} has {shape[axis]} input features, and {chosen} needs a multiple of "
      f"{BLOCK}; leave it out of QuantizationConfig.rules, or give it a format of "
      "channels"
    )


def int8_block32() -> QuantizationConfig:
  """All matrices as GGUF's Q8_0: int8 per block (arXiv 2509.20354, section 2.3)."""
  return QuantizationConfig(((f"/({_TABLE}|{_KERNEL})$", "q8_0"),))


def int4_block32(table: str = "q4_0") -> QuantizationConfig:
  """All matrices as GGUF's Q4_0: int4 per block (arXiv 2509.20354, section 2.3).

  Args:
    table: Format of the token table; "q8_0" is that of the released GGUF.
  """
  return QuantizationConfig(((f"/{_TABLE}$", table), (f"/{_KERNEL}$", "q4_0")))


def mixed_channel() -> QuantizationConfig:
  """Attention int8, all else int4, per channel (arXiv 2509.20354, section 2.3)."""
  return QuantizationConfig(
    (
      (f"/attention/.*{_KERNEL}$", "int8_channel"),
      (f"/({_TABLE}|{_KERNEL})$", "int4_channel"),
    )
  )


def dequantized(params: Params) -> Params:
  """The parameters with values in place of codes, float32."""
  return jax.tree.map(
    lambda x: x.values() if isinstance(x, Quantized) else x,
    params,
    is_leaf=lambda x: isinstance(x, Quantized),
  )
