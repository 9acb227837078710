"""Gemma building blocks: norm, linear map, feed-forward, attention, block."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from embgemma.models import attention, lora
from embgemma.models.attention import AttentionInputs, CrossInputs
from embgemma.models.config import TransformerConfig
from embgemma.models.quantization import Quantized
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
  """A bias-free map with a 2-D kernel [in, out], float32 parameters, or codes of it.

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
    if isinstance(kernel, Quantized):  # this layer's alone is ever whole
      kernel = kernel.values()
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


def _maps(cfg: TransformerConfig) -> tuple[Linear, Linear, Linear]:
  """Of queries, keys and values, of the module that calls it."""
  dtype = jnp.dtype(cfg.dtype)
  kv_width = cfg.num_kv_heads * cfg.head_dim
  return (
    linear(cfg.num_heads * cfg.head_dim, ("embed", "heads"), dtype, "query"),
    linear(kv_width, ("embed", "kv"), dtype, "key"),
    linear(kv_width, ("embed", "kv"), dtype, "value"),
  )


def _norms(cfg: TransformerConfig) -> tuple[Callable[[Array], Array], ...]:
  """Of queries and keys, of the module that calls it."""
  if not cfg.query_key_norm:
    return (lambda x: x,) * 2
  return tuple(
    RMSNorm(cfg.norm_epsilon, "head_dim", name=name)
    for name in ("query_norm", "key_norm")
  )


def _heads(x: Float[Array, "R L HK"], cfg: TransformerConfig) -> Array:
  return x.reshape(*x.shape[:2], -1, cfg.head_dim)


def _output(x: Float[Array, "R L H hd"], cfg: TransformerConfig) -> Array:
  """The map back to the model's width, of the module that calls it."""
  back = linear(cfg.width, ("heads", "embed"), jnp.dtype(cfg.dtype), "output")
  return back(x.reshape(*x.shape[:2], -1))


class Attention(nn.Module):
  """Grouped-query attention with RMS-normed queries and keys, then RoPE.

  Merged attention (T5Gemma 2, arXiv 2512.14856) makes further keys and values of an
  encoder's states by the same maps, without RoPE, under one softmax: no parameter is
  of its own, as in transformers' T5Gemma2MergedAttention.
  """

  config: TransformerConfig
  kind: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "R L D"], inputs: AttentionInputs
  ) -> Float[Array, "R L D"]:
    cfg = self.config
    to_query, to_key, to_value = _maps(cfg)
    query, key, value = (_heads(to(x), cfg) for to in (to_query, to_key, to_value))
    query_norm, key_norm = _norms(cfg)
    query, key = query_norm(query), key_norm(key)
    query, key = (apply_rotary(x, inputs.angles) for x in (query, key))
    if inputs.states is not None:
      more = key_norm(_heads(to_key(inputs.states), cfg))
      key = jnp.concatenate([key, more], axis=1)
      more = _heads(to_value(inputs.states), cfg)
      value = jnp.concatenate([value, more], axis=1)
    return _output(attention.attend(cfg, self.kind, query, key, value, inputs), cfg)


class CrossAttention(nn.Module):
  """Grouped-query attention to an encoder's states, without RoPE.

  As transformers' T5GemmaCrossAttention, and with normed queries and keys where the
  stack has them. Texts without a state get zeros.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "R L D"], inputs: CrossInputs
  ) -> Float[Array, "R L D"]:
    cfg = self.config
    to_query, to_key, to_value = _maps(cfg)
    query_norm, key_norm = _norms(cfg)
    query = query_norm(_heads(to_query(x), cfg))
    key = key_norm(_heads(to_key(inputs.states), cfg))
    value = _heads(to_value(inputs.states), cfg)
    return _output(attention.attend_across(cfg, query, key, value, inputs), cfg)


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

  Between the two, where there is one, a cross-attention of the same build, as in
  transformers' T5GemmaDecoderLayer.

  Dropout, where there is any, is of what they add to the residual stream, after
  the second norm, as in transformers' T5Gemma (T5GemmaEncoderLayer.forward); its
  dropout of embeddings, of hidden units and of the result is left out.
  """

  config: TransformerConfig
  kind: str
  deterministic: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "R L D"],
    inputs: AttentionInputs,
    cross: CrossInputs | None = None,
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
    if cross is not None:
      y = CrossAttention(cfg, name="cross_attention")(
        norm("pre_cross_attention_norm")(x), cross
      )
      x = x + dropout(norm("post_cross_attention_norm", gain)(y))
    y = FeedForward(cfg, name="mlp")(norm("pre_mlp_norm")(x))
    return x + dropout(norm("post_mlp_norm", gain)(y))


class LayerGroup(nn.Module):
  """Consecutive blocks of the given kinds: the body of the scan over layers."""

  config: TransformerConfig
  kinds: tuple[str, ...]
  deterministic: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "R L D"],
    inputs: Mapping[str, AttentionInputs],
    cross: CrossInputs | None = None,
  ) -> tuple[Float[Array, "R L D"], None]:
    for index, kind in enumerate(self.kinds):
      block = Block(self.config, kind, self.deterministic, name=f"layer_{index}")
      x = block(x, inputs[kind], cross)
    return x, None
