"""Logits against transformers' Gemma3ForCausalLM."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from embgemma.interop import huggingface, layout
from embgemma.models.config import GEMMA3_PATTERN, TransformerConfig
from embgemma.models.language_model import logits

_TINY = TransformerConfig(
  vocab_size=97,
  num_layers=7,
  width=32,
  mlp_width=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=10,
  attention_pattern=("local", "local", "global"),
  mask="causal",
  window=(15, 0),
  rope_base_local=100.0,
  rope_base_global=5000.0,
  query_scalar=24.0,
  max_length=1024,
)
# As Gemma 3 270M, less deep and with fewer tokens: queries are wider than the model.
_LIKE_270M = TransformerConfig(
  vocab_size=128,
  num_layers=7,
  width=640,
  mlp_width=2048,
  num_heads=4,
  num_kv_heads=1,
  head_dim=256,
  attention_pattern=GEMMA3_PATTERN,
  mask="causal",
  window=(31, 0),
  max_length=1024,
)


def _reference(config: TransformerConfig) -> Gemma3ForCausalLM:
  """A random model of the same shape, norms and all."""
  kinds = {"local": "sliding_attention", "global": "full_attention"}
  bases = {"local": config.rope_base_local, "global": config.rope_base_global}
  torch.manual_seed(0)
  model = Gemma3ForCausalLM(
    Gemma3TextConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.width,
      intermediate_size=config.mlp_width,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      query_pre_attn_scalar=int(config.query_scalar or config.head_dim),
      max_position_embeddings=config.max_length,
      sliding_window=config.window[0] + 1,
      layer_types=[kinds[kind] for kind in config.layer_kinds],
      rope_parameters={
        kinds[kind]: {"rope_type": "default", "rope_theta": base}
        for kind, base in bases.items()
      },
      use_cache=False,
      attn_implementation="sdpa",
    )
  ).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  return model


def _params(config: TransformerConfig, model: Gemma3ForCausalLM) -> dict:
  state = model.model.state_dict()
  params = {"stack": layout.allocate(layout.abstract_stack(config))}
  for tensor in huggingface.stack_tensors(config, ("stack",)):
    for part in tensor.parts:
      part.slot.view(params)[...] = part.pick(state[tensor.name].numpy())
  return params["stack"]


def _inputs(config: TransformerConfig) -> tuple[np.ndarray, ...]:
  """One text, longer than two windows."""
  length = 2 * config.window[0] + 10
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
  positions = np.arange(length, dtype=np.int32)[None]
  return tokens.astype(np.int32), positions, np.zeros_like(positions)


def _expected(model: Gemma3ForCausalLM, tokens: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.numpy()


_compute = jax.jit(logits, static_argnums=0)


@pytest.mark.parametrize("config", [_TINY, _LIKE_270M], ids=["tiny", "like 270M"])
def test_against_transformers(config):
  model = _reference(config)
  inputs = _inputs(config)
  ours = _compute(config, _params(config, model), *inputs)
  expected = _expected(model, inputs[0])
  assert ours.dtype == np.float32
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_bfloat16():
  """The product is rounded to it, as transformers' is, and returned in float32."""
  model = _reference(_TINY)
  inputs = _inputs(_TINY)
  config = dataclasses.replace(_TINY, dtype="bfloat16")
  ours = _compute(config, _params(_TINY, model), *inputs)
  assert ours.dtype == np.float32
  np.testing.assert_array_equal(ours, np.asarray(ours.astype("bfloat16"), np.float32))
  expected = _expected(model, inputs[0])
  error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
  assert 1e-4 < error < 0.05
