"""Gemma 3 building blocks: norm, linear map, feed-forward, attention, block."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from embgemma.models import attention, lora
from embgemma.models.attention import AttentionInputs
from embgemma.models.config import TransformerConfig
from embgemma.models.rotary import apply_rotary
from embgemma.typing import Array, ArrayLike, DTypeLike, Float

# Norms keep the scale of the residual branches, so plain fan-in scaling serves
# at every depth.
kernel_init = nn.initializers.lecun_normal()


def _from_inputs(
  function: Callable[..., Array], **options: Any
) -> Callable[..., Array]:
  """The elementwise function with a gradient computed from its inputs alone.

  What autodiff would keep of it is several times its inputs, and elementwise work is
  bound by memory: computing it again is faster than writing and reading that.
  """
  return jax.checkpoint(function, **options)


@functools.partial(_from_inputs, static_argnums=2)
def _rms_norm(
  x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
  y = x.astype(jnp.float32)
  y = y * (jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon) ** -0.5
  return (y * (1.0 + scale)).astype(x.dtype)


@_from_inputs
def _gated(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Array:
  return nn.gelu(gate, approximate=True) * up


class RMSNorm(nn.Module):
  """x / rms(x) * (1 + scale), computed in float32 and cast back last.

  The scale is zero-centred, as Gemma stores it.
  """

  epsilon: float
  axis_name: str = "embed"
  initial_gain: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale: Any = self.param(
      "scale",
      nn.with_logical_partitioning(
        nn.initializers.constant(self.initial_gain - 1.0), (self.axis_name,)
      ),
      (x.shape[-1],),
      jnp.float32,
    )
    return _rms_norm(x, scale, self.epsilon)


class Linear(nn.Module):
  """A bias-free map with a 2-D kernel [in, out], float32 parameters.

  It adds the adapters that its parameters have. They are not of its making:
  `lora.add` draws them and `lora.scaled` gives B its factor, so that no layer needs
  to know which maps have any.
  """

  features: int
  axes: tuple[str, str]
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    kernel: Any = self.param(
      "kernel",
      nn.with_logical_partitioning(kernel_init, self.axes),
      (x.shape[-1], self.features),
      jnp.float32,
    )
    x = jnp.asarray(x, self.dtype)
    y = self._multiply(x, kernel)
    if not self.has_variable("params", lora.A):
      return y
    a: Any = self.get_variable("params", lora.A)
    b: Any = self.get_variable("params", lora.B)
    return y + self._multiply(self._multiply(x, a), b)

  def _multiply(self, x: Array, matrix: ArrayLike) -> Array:
    return _product(x, jnp.asarray(matrix, self.dtype))


@jax.custom_vjp
def _product(x: Float[Array, "... I"], matrix: Float[Array, "I O"]) -> Array:
  """The product over the last axis of x.

  Autodiff would take the matrix's gradient as (y'T x)T, for which XLA's CPU backend
  writes y' down a second time, transposed, with the elementwise work that makes it.
  Here the narrower of x and y' is the one transposed.
  """
  return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x, matrix):
  # Of what is not differentiated nothing is kept, and no gradient computed.
  kept = (x.value if matrix.perturbed else None, matrix.value if x.perturbed else None)
  return _product(x.value, matrix.value), kept


def _product_backward(kept, dy):
  x, matrix = kept
  if isinstance(dy, SymbolicZero):
    dy = jnp.zeros(dy.shape, dy.dtype)
  leading = tuple(range(dy.ndim - 1))
  over_rows = ((leading, leading), ((), ()))
  dx = dmatrix = None
  if matrix is not None:
    dx = jax.lax.dot_general(dy, matrix, (((dy.ndim - 1,), (1,)), ((), ())))
  if x is not None and x.shape[-1] <= dy.shape[-1]:
    dmatrix = jax.lax.dot_general(x, dy, over_rows)
  elif x is not None:
    dmatrix = jax.lax.dot_general(dy, x, over_rows).T
  return dx, dmatrix


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def linear(features: int, axes: tuple[str, str], dtype: DTypeLike, name: str) -> Linear:
  """A Linear with its arguments in order."""
  return Linear(features, axes, dtype, name=name)


class Attention(nn.Module):
  """Grouped-query attention with RMS-normed queries and keys, then RoPE."""

  config: TransformerConfig
  kind: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "R L D"], inputs: AttentionInputs
  ) -> Float[Array, "R L D"]:
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    rows, length, _ = x.shape

    def project(heads: int, axis: str, name: str) -> Array:
      flat = linear(heads * cfg.head_dim, ("embed", axis), dtype, name)(x)
      return flat.reshape(rows, length, heads, cfg.head_dim)

    query = project(cfg.num_heads, "heads", "query")
    key = project(cfg.num_kv_heads, "kv", "key")
    value = project(cfg.num_kv_heads, "kv", "value")
    query = RMSNorm(cfg.norm_epsilon, "head_dim", name="query_norm")(query)
    key = RMSNorm(cfg.norm_epsilon, "head_dim", name="key_norm")(key)
    query = apply_rotary(query, inputs.angles)
    key = apply_rotary(key, inputs.angles)
    out = attention.attend(cfg, self.kind, query, key, value, inputs)
    out = out.reshape(rows, length, cfg.num_heads * cfg.head_dim)
    return linear(cfg.width, ("heads", "embed"), dtype, "output")(out)


class FeedForward(nn.Module):
  """gelu_tanh(x W_gate) * (x W_up), then W_down."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "R L D"]) -> Float[Array, "R L D"]:
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    gate = linear(cfg.mlp_width, ("embed", "mlp"), dtype, "gate")(x)
    up = linear(cfg.mlp_width, ("embed", "mlp"), dtype, "up")(x)
    return linear(cfg.width, ("mlp", "embed"), dtype, "down")(_gated(gate, up))


class Block(nn.Module):
  """Attention and feed-forward, each between two norms (Gemma 3's sandwich).

  Dropout, where there is any, is of what the two add to the residual stream, after
  the second norm, as in transformers' T5Gemma (T5GemmaEncoderLayer.forward); its
  dropout of embeddings, of hidden units and of the result is left out.
  """

  config: TransformerConfig
  kind: str
  deterministic: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "R L D"], inputs: AttentionInputs
  ) -> Float[Array, "R L D"]:
    cfg = self.config

    def norm(name: str, initial_gain: float = 1.0) -> RMSNorm:
      return RMSNorm(cfg.norm_epsilon, initial_gain=initial_gain, name=name)

    def dropout(y: Array) -> Array:
      return nn.Dropout(cfg.dropout_rate, deterministic=self.deterministic)(y)

    gain = cfg.initial_branch_gain
    y = Attention(cfg, self.kind, name="attention")(
      norm("pre_attention_norm")(x), inputs
    )
    x = x + dropout(norm("post_attention_norm", gain)(y))
    y = FeedForward(cfg, name="mlp")(norm("pre_mlp_norm")(x))
    return x + dropout(norm("post_mlp_norm", gain)(y))


class LayerGroup(nn.Module):
  """Consecutive blocks of the given kinds: the body of the scan over layers."""

  config: TransformerConfig
  kinds: tuple[str, ...]
  deterministic: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "R L D"], inputs: Mapping[str, AttentionInputs]
  ) -> tuple[Float[Array, "R L D"], None]:
    for index, kind in enumerate(self.kinds):
      block = Block(self.config, kind, self.deterministic, name=f"layer_{index}")
      x = block(x, inputs[kind])
    return x, None
