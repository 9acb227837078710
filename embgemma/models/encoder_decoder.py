"""A decoder over packed rows, alone or with the encoder that it reads.

Parameters are {"encoder": a Transformer's, "decoder": a Transformer's}, without the one
that the configuration lacks. A decoder that shares the encoder's token table has no
"embedder". The output matrix is the decoder's token table, as in T5Gemma and T5Gemma 2
(transformers ties `lm_head` to it).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from embgemma.errors import ConfigError
from embgemma.models import attention
from embgemma.models.attention import Memory
from embgemma.models.config import BackboneConfig, TransformerConfig
from embgemma.models.transformer import Transformer, token_vectors
from embgemma.typing import Array, Float, PackedSequences, Params


class TokenVectors(NamedTuple):
  """The input of both stacks, see `transformer.token_vectors`.

  Attributes:
    inputs: [R, I, D] of the encoder; None of a decoder alone.
    decoder_inputs: [R, T, D] of the decoder.
  """

  inputs: Array | None
  decoder_inputs: Array


def look_up(
  config: BackboneConfig, params: Params, sequences: PackedSequences
) -> TokenVectors:
  """The vectors of all tokens.

  Args:
    config: Of the model.
    params: Of `init_params`, without axis boxes.
    sequences: The encoder's inputs, if there is one, and the decoder's.

  Raises:
    ConfigError: the model is an encoder alone.
  """
  inputs = None
  if config.encoder is not None:
    table = params["encoder"]["embedder"]["table"]
    inputs = token_vectors(table, sequences.inputs, config.encoder)
  decoder = _decoder(config)
  table = output_table(config, params)
  return TokenVectors(inputs, token_vectors(table, sequences.decoder_inputs, decoder))


def hidden_states(
  config: BackboneConfig,
  params: Params,
  sequences: PackedSequences,
  key: Array | None = None,
  vectors: TokenVectors | None = None,
) -> Float[Array, "R T D"]:
  """Final hidden states of the decoder in its compute dtype: what predicts targets.

  Those of padding are finite and mean nothing.

  Args:
    config: Of the model.
    params: Of `init_params`, without axis boxes.
    sequences: The encoder's inputs, if there is one, and the decoder's.
    key: Of dropout; None is without.
    vectors: In place of `look_up`; tables are then not read and may be missing.

  Raises:
    ConfigError: the model is an encoder alone.
  """
  decoder = _decoder(config)
  keys = (None, None) if key is None else tuple(jax.random.split(key))
  vectors = look_up(config, params, sequences) if vectors is None else vectors
  memory = None
  if config.encoder is not None:
    states = _apply(
      Transformer(config.encoder),
      params["encoder"],
      keys[0],
      sequences.inputs,
      sequences.input_positions,
      sequences.input_ids,
      vectors=vectors.inputs,
    )
    memory = Memory(states, sequences.input_ids)
  return _apply(
    Transformer(decoder, config.cross_attention),
    params["decoder"],
    keys[1],
    sequences.decoder_inputs,
    sequences.target_positions,
    sequences.target_ids,
    vectors=vectors.decoder_inputs,
    memory=memory,
  )


def _apply(
  stack: Transformer, params: Params, key: Array | None, *inputs: Any, **options: Any
) -> Array:
  rngs = None if key is None else {"dropout": key}
  states: Any = stack.apply(
    {"params": params}, *inputs, **options, deterministic=key is None, rngs=rngs
  )
  return states


def output_table(config: BackboneConfig, params: Params) -> Float[Array, "V D"]:
  """The decoder's token table, which is the output matrix: float32.

  Args:
    config: Of the model.
    params: Of `init_params`, without axis boxes.
  """
  side, module, name = table_path(config, "decoder")
  return jnp.asarray(params[side][module][name])


def table_path(config: BackboneConfig, side: str) -> tuple[str, str, str]:
  """Where the token table of a side, "encoder" or "decoder", is among parameters."""
  shared = config.encoder is not None and config.shared_table
  return ("encoder" if shared else side, "embedder", "table")


def logits(
  config: BackboneConfig, params: Params, sequences: PackedSequences
) -> Float[Array, "R T V"]:
  """Scores of the targets in float32, without soft-cap; whole, for small checks.

  As transformers' Gemma3ForCausalLM: the product is taken in the compute dtype.

  Args:
    config: Of the model.
    params: Of `init_params`, without axis boxes.
    sequences: The encoder's inputs, if there is one, and the decoder's.

  Raises:
    ConfigError: the model is an encoder alone.
  """
  hidden = hidden_states(config, params, sequences)
  table = output_table(config, params).astype(hidden.dtype)
  return jnp.einsum("rtd,vd->rtv", hidden, table).astype(jnp.float32)


def on_platform(config: BackboneConfig, platform: str) -> BackboneConfig:
  """The configuration with the attention that suits a platform, see `resolve`."""
  encoder, decoder = (
    stack and attention.resolve(stack, platform)
    for stack in (config.encoder, config.decoder)
  )
  return dataclasses.replace(config, encoder=encoder, decoder=decoder)


def init_params(config: BackboneConfig, key: Array) -> Params:
  """Fresh parameters, float32 in flax's logical-axis boxes."""
  encoder_key, decoder_key = jax.random.split(key)
  ids = jnp.zeros((1, 2), jnp.int32)
  params = {}
  memory = vectors = None
  if config.encoder is not None:
    memory = Memory(jnp.zeros((1, 2, config.encoder.width)), ids)
    params["encoder"] = Transformer(config.encoder).init(encoder_key, ids, ids, ids)
  if config.decoder is not None:
    if memory is not None and config.shared_table:
      vectors = jnp.zeros((1, 2, config.decoder.width))
    decoder = Transformer(config.decoder, config.cross_attention)
    params["decoder"] = decoder.init(
      decoder_key, ids, ids, ids, vectors=vectors, memory=memory
    )
  return {stack: variables["params"] for stack, variables in params.items()}


def abstract_params(config: BackboneConfig) -> Params:
  """Shapes and dtypes of `init_params`, without axis boxes."""
  init = functools.partial(init_params, config)
  return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def _decoder(config: BackboneConfig) -> TransformerConfig:
  if config.decoder is None:
    raise ConfigError(
      "BackboneConfig has no decoder, so nothing predicts targets; make an embedder of "
      "an encoder alone, or give a decoder too"
    )
  return config.decoder
