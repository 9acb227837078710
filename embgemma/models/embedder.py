"""The embedding function: packed texts to unit vectors."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from embgemma.models import attention, lora, quantization
from embgemma.models.config import EmbedderConfig
from embgemma.models.layers import linear
from embgemma.models.poolers import Pooler
from embgemma.models.transformer import Transformer
from embgemma.typing import Array, Float, PackedTexts, Params

# Tokens at once from which products on a CPU are as fast as they get; more leave its
# caches (docs/performance.md).
CPU_TOKENS = 2048


class Embedder(nn.Module):
  """Encoder, pooler, g: D -> d_U, f: d_U -> E, unit norm (arXiv 2509.20354, eq. 1)."""

  config: EmbedderConfig

  @nn.compact
  def __call__(
    self,
    packed: PackedTexts,
    vectors: Float[Array, "R L D"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "N E"]:
    """Unit vectors in float32; zeros for slots that hold no text."""
    cfg = self.config
    dtype = jnp.dtype(cfg.transformer.dtype)
    hidden = Transformer(cfg.transformer, name="encoder")(
      packed.tokens, packed.positions, packed.text_ids, vectors, deterministic
    )
    pooled = Pooler(cfg.pooler, cfg.pooler_heads, name="pooler")(hidden, packed)
    x = pooled.astype(dtype)
    if cfg.hidden_width is not None:
      x = linear(cfg.hidden_width, ("embed", "projection"), dtype, "projection_up")(x)
      x = linear(
        cfg.embedding_width, ("projection", "embedding"), dtype, "projection_down"
      )(x)
    x = x.astype(jnp.float32)
    # The bound keeps the gradient of an empty slot finite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))

  def embed(
    self,
    params: Params,
    packed: PackedTexts,
    vectors: Float[Array, "R L D"] | None = None,
    key: Array | None = None,
  ) -> Float[Array, "N E"]:
    """`__call__` with explicit parameters: what training and inference both call.

    Adapters take part with their scale, which `apply` alone would leave out.

    Args:
      params: Of `init_params`, without axis boxes.
      packed: The texts.
      vectors: In place of the token table's, see `transformer.token_vectors`; the
        table may then be missing.
      key: Of dropout; None is without.
    """
    scaled = lora.scaled(params, self.config.lora)
    rngs = None if key is None else {"dropout": key}
    embedded: Any = self.apply(
      {"params": scaled}, packed, vectors, key is None, rngs=rngs
    )
    return embedded


def computed(params: Params, config: EmbedderConfig) -> Params:
  """The parameters that a model with formats computes with, differentiable.

  Adapters are merged into their kernels, and what has a format is rounded, straight
  through; `computed_config` is the configuration of the result. Without formats, or as
  codes, they are the given ones.

  Args:
    params: Of an Embedder, without axis boxes.
    config: Of that Embedder.

  Raises:
    ConfigError: see `quantization.formats`.
  """
  if config.quantization is None or quantization.is_quantized(params):
    return params
  merged, _ = lora.merge(params, config)
  return quantization.rounded(merged, config.quantization)


def computed_config(config: EmbedderConfig) -> EmbedderConfig:
  """The configuration of what `computed` returns."""
  if config.quantization is None:
    return config
  return dataclasses.replace(config, lora=None, quantization=None)


def check_formats(config: EmbedderConfig) -> None:
  """Returns nothing if the model's parameters can have the formats that it names.

  Raises:
    ConfigError: see `quantization.formats`.
  """
  if config.quantization is not None:
    plain = dataclasses.replace(config, lora=None)
    quantization.formats(abstract_params(plain), config.quantization)


def on_platform(config: EmbedderConfig, platform: str) -> EmbedderConfig:
  """The configuration with the attention that suits a platform, see `resolve`."""
  transformer = attention.resolve(config.transformer, platform)
  return dataclasses.replace(config, transformer=transformer)


def init_params(config: EmbedderConfig, key: Array) -> Params:
  """Fresh parameters, adapters included, float32 in flax's logical-axis boxes.

  With adapters the others are those of the model without, bit for bit.

  Raises:
    ConfigError: see `lora.add`.
  """
  params = Embedder(config).init(key, abstract_packed_texts())["params"]
  if config.lora is None:
    return params
  return lora.add(params, config.lora, jax.random.fold_in(key, 1))


def abstract_params(config: EmbedderConfig) -> Params:
  """Shapes and dtypes of `init_params`, without axis boxes."""
  init = functools.partial(init_params, config)
  return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def abstract_packed_texts() -> PackedTexts:
  """The smallest input that initialises an Embedder: one row with one text."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return PackedTexts(
    tokens=ids,
    positions=ids,
    text_ids=ids,
    starts=jnp.zeros((1,), jnp.int32),
    lengths=jnp.full((1,), 2, jnp.int32),
  )
