"""Encoder-decoders and decoders against transformers', and what packing promises."""

import dataclasses
import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from transformers import (
  Gemma3ForCausalLM,
  Gemma3TextConfig,
  T5Gemma2Config,
  T5Gemma2ForConditionalGeneration,
  T5GemmaConfig,
  T5GemmaForConditionalGeneration,
)

from embgemma.errors import ConfigError
from embgemma.models import encoder_decoder
from embgemma.models.config import GEMMA3_PATTERN, BackboneConfig, TransformerConfig
from embgemma.models.transformer import Transformer
from embgemma.training.partitioning import LOGICAL_AXIS_RULES
from embgemma.typing import PackedSequences

_KINDS = {"local": "sliding_attention", "global": "full_attention"}
# Two full groups and one layer left over. Every count differs from every other; the
# query scalar is no head_dim; the bases differ at short distances.
_STACK = TransformerConfig(
  vocab_size=97,
  num_layers=5,
  width=32,
  mlp_width=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=10,
  attention_pattern=("local", "global"),
  window=(7, 8),
  rope_base_local=100.0,
  rope_base_global=5000.0,
  query_scalar=24.0,
  max_length=1024,
)
_DECODER = dataclasses.replace(_STACK, mask="causal", window=(8, 0), num_layers=4)
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
_MERGED = BackboneConfig(_STACK, _DECODER)
# Gemma 2 blocks, as T5Gemma has: no norm of queries and keys, one base of RoPE.
_GEMMA2 = dataclasses.replace(
  _STACK,
  window=(6, 6),
  rope_base_local=500.0,
  rope_base_global=500.0,
  query_key_norm=False,
)
_GEMMA2_DECODER = dataclasses.replace(_GEMMA2, mask="causal", window=(5, 0))
_SEPARATE = BackboneConfig(
  _GEMMA2, _GEMMA2_DECODER, cross_attention="separate", shared_table=False
)
_UNBALANCED = dataclasses.replace(
  _SEPARATE,
  decoder=dataclasses.replace(
    _GEMMA2_DECODER,
    num_layers=3,
    width=24,
    mlp_width=40,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
  ),
)
_VISION = {
  "hidden_size": 16,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": 28,
  "patch_size": 14,
}
_NAMES = {
  "self_attn": "attention",
  "cross_attn": "cross_attention",
  "mlp": "mlp",
  "q_proj": "query",
  "k_proj": "key",
  "v_proj": "value",
  "o_proj": "output",
  "q_norm": "query_norm",
  "k_norm": "key_norm",
  "gate_proj": "gate",
  "up_proj": "up",
  "down_proj": "down",
  "input_layernorm": "pre_attention_norm",
  "pre_self_attn_layernorm": "pre_attention_norm",
  "post_attention_layernorm": "post_attention_norm",
  "post_self_attn_layernorm": "post_attention_norm",
  "pre_cross_attn_layernorm": "pre_cross_attention_norm",
  "post_cross_attn_layernorm": "post_cross_attention_norm",
  "pre_feedforward_layernorm": "pre_mlp_norm",
  "post_feedforward_layernorm": "post_mlp_norm",
}


def _shape(config: TransformerConfig, sliding_window: int) -> dict:
  """What transformers calls the fields of a stack."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "query_pre_attn_scalar": int(config.query_scalar or config.head_dim),
    "max_position_embeddings": config.max_length,
    "sliding_window": sliding_window,
    "layer_types": [_KINDS[kind] for kind in config.layer_kinds],
  }


def _gemma3_shape(config: TransformerConfig, sliding_window: int) -> dict:
  bases = {"local": config.rope_base_local, "global": config.rope_base_global}
  rope = {
    _KINDS[kind]: {"rope_type": "default", "rope_theta": base}
    for kind, base in bases.items()
  }
  return {**_shape(config, sliding_window), "rope_parameters": rope}


def _gemma2_shape(config: TransformerConfig, sliding_window: int) -> dict:
  assert config.rope_base_local == config.rope_base_global
  return {
    **_shape(config, sliding_window),
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base_local},
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
  }


def _random(model: torch.nn.Module) -> torch.nn.Module:
  """All weights drawn, norms too."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  return model.eval()


def _t5gemma2(config: BackboneConfig) -> T5Gemma2ForConditionalGeneration:
  left, right = config.encoder.window
  encoder = {
    "text_config": _gemma3_shape(config.encoder, left + right + 1),
    "vision_config": _VISION,
    "eoi_token_index": 96,
  }
  decoder = _gemma3_shape(config.decoder, config.decoder.window[0] + 1)
  return _random(
    T5Gemma2ForConditionalGeneration(
      T5Gemma2Config(encoder=encoder, decoder=decoder, image_token_index=95)
    )
  )


def _t5gemma(config: BackboneConfig) -> T5GemmaForConditionalGeneration:
  return _random(
    T5GemmaForConditionalGeneration(
      T5GemmaConfig(
        encoder=_gemma2_shape(config.encoder, config.encoder.window[0]),
        decoder=_gemma2_shape(config.decoder, config.decoder.window[0] + 1),
        vocab_size=config.decoder.vocab_size,
        attn_implementation="eager",
      )
    )
  )


def _gemma3(config: TransformerConfig) -> Gemma3ForCausalLM:
  shape = _gemma3_shape(config, config.window[0] + 1)
  return _random(
    Gemma3ForCausalLM(
      Gemma3TextConfig(**shape, use_cache=False, attn_implementation="sdpa")
    )
  )


def _layer(layer: torch.nn.Module) -> dict:
  flat = {}
  for name, weight in layer.named_parameters():
    path = [_NAMES[part] for part in name.split(".")[:-1]]
    # torch keeps [out, in].
    flat[*path, "kernel" if weight.ndim == 2 else "scale"] = weight.detach().numpy().T
  return traverse_util.unflatten_dict(flat)


def _stack(stack: torch.nn.Module, config: TransformerConfig, table: bool) -> dict:
  """Our tree of its weights: whole groups stacked, the rest beside them."""
  layers = [_layer(layer) for layer in stack.layers]
  period = len(config.attention_pattern)
  whole = len(layers) // period * period
  params = {
    "final_norm": {"scale": stack.norm.weight.detach().numpy()},
    "groups": {
      f"layer_{i}": jax.tree.map(lambda *x: np.stack(x), *layers[i:whole:period])
      for i in range(period)
    },
  }
  if layers[whole:]:
    params["remainder"] = {f"layer_{i}": x for i, x in enumerate(layers[whole:])}
  if table:
    params["embedder"] = {"table": stack.embed_tokens.weight.detach().numpy()}
  return params


def _backbone(model: torch.nn.Module, config: BackboneConfig) -> dict:
  encoder = getattr(model.model.encoder, "text_model", model.model.encoder)
  return {
    "encoder": _stack(encoder, config.encoder, table=True),
    "decoder": _stack(model.model.decoder, config.decoder, not config.shared_table),
  }


def _tokens(length: int, seed: int = 0) -> np.ndarray:
  """None of padding, and none of images."""
  return np.random.default_rng(seed).integers(3, 95, length).astype(np.int32)


def _lay(rows: list[list[np.ndarray]], length: int) -> tuple[np.ndarray, ...]:
  """Tokens, positions and ids of rows of texts."""
  tokens, positions, ids = np.zeros((3, len(rows), length), np.int32)
  for row, texts in enumerate(rows):
    start = 0
    for number, text in enumerate(texts, 1):
      part = slice(start, start + len(text))
      tokens[row, part], ids[row, part] = text, number
      positions[row, part] = np.arange(len(text))
      start += len(text)
  return tokens, positions, ids


def _pack(rows: list[list[tuple]], lengths: tuple[int | None, int]) -> PackedSequences:
  """Rows of examples (input, decoder's input), on both sides or the decoder's alone."""
  inputs = input_positions = input_ids = None
  if lengths[0] is not None:
    inputs, input_positions, input_ids = _lay(
      [[example[0] for example in row] for row in rows], lengths[0]
    )
  tokens, positions, ids = _lay(
    [[example[1] for example in row] for row in rows], lengths[1]
  )
  return PackedSequences(
    inputs=inputs,
    input_positions=input_positions,
    input_ids=input_ids,
    targets=np.roll(tokens, -1, axis=1),
    decoder_inputs=tokens,
    target_positions=positions,
    target_ids=ids,
    weights=(ids > 0).astype(np.float32),
  )


# Compiling is most of what these tests do.
_jit = functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
_logits = _jit(encoder_decoder.logits)
_hidden = _jit(encoder_decoder.hidden_states)


def _changed_stacks(config: BackboneConfig, **changes) -> BackboneConfig:
  """With the given fields of both stacks."""
  return dataclasses.replace(
    config,
    encoder=dataclasses.replace(config.encoder, **changes),
    decoder=dataclasses.replace(config.decoder, **changes),
  )


# Below the windows, at their edges and beyond; on both sides.
_TEXTS = [
  (_tokens(source, 1), _tokens(target, 2))
  for source, target in ((5, 4), (8, 7), (9, 10), (40, 60), (60, 30))
]


def _compare(config: BackboneConfig, model: torch.nn.Module) -> None:
  packed = _pack([[text] for text in _TEXTS], (60, 60))
  ours = _logits(config, _backbone(model, config), packed)
  assert ours.dtype == np.float32
  for logits, (source, target) in zip(ours, _TEXTS, strict=True):
    with torch.no_grad():
      theirs = (
        model(
          input_ids=torch.from_numpy(source)[None].long(),
          decoder_input_ids=torch.from_numpy(target)[None].long(),
          use_cache=False,
        )
        .logits[0]
        .numpy()
      )
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits[: len(target)], theirs, atol=1e-4)


def test_merged_attention_against_transformers():
  _compare(_MERGED, _t5gemma2(_MERGED))


@pytest.mark.parametrize(
  "config", [_SEPARATE, _UNBALANCED], ids=["equal", "unbalanced"]
)
def test_separate_attention_against_transformers(config):
  _compare(config, _t5gemma(config))


@pytest.mark.parametrize("config", [_DECODER, _LIKE_270M], ids=["tiny", "like 270M"])
def test_decoder_alone_against_transformers(config):
  """One text, longer than two windows."""
  model = _gemma3(config)
  params = {"decoder": _stack(model.model, config, table=True)}
  length = 2 * config.window[0] + 10
  tokens = _tokens(length)
  backbone = BackboneConfig(decoder=config)
  ours = _logits(backbone, params, _pack([[(None, tokens)]], (None, length)))
  with torch.no_grad():
    expected = model(torch.from_numpy(tokens)[None].long()).logits.numpy()
  assert ours.dtype == np.float32
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def _random_params(config: BackboneConfig) -> dict:
  """Norms too are drawn: zeros would hide them."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    scale = 0.3 if leaf.ndim == 1 else leaf.shape[-2] ** -0.5
    return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

  return jax.tree.map(draw, encoder_decoder.abstract_params(config))


def test_bfloat16():
  """Logits are rounded to it, as transformers' are, and returned in float32."""
  params = _random_params(_MERGED)
  packed = _pack([[text] for text in _TEXTS], (60, 60))
  ours = _logits(_changed_stacks(_MERGED, dtype="bfloat16"), params, packed)
  assert ours.dtype == np.float32
  np.testing.assert_array_equal(ours, np.asarray(ours.astype("bfloat16"), np.float32))
  expected = _logits(_MERGED, params, packed)
  error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
  assert 1e-4 < error < 0.05


# Inputs and targets; one without an input, one longer than every window.
_EXAMPLES = [
  (_tokens(11, 1), _tokens(5, 2)),
  (_tokens(25, 3), _tokens(30, 4)),
  (_tokens(0), _tokens(12, 5)),
  (_tokens(3, 6), _tokens(9, 7)),
]
_ROWS = [[0, 1], [2, 3], [2], []]
# Padding of the first row's targets finds none among its inputs; the third and the
# fourth row have no inputs.
_LENGTHS = (36, 40)
_BOTH = pytest.mark.parametrize(
  "config", [_MERGED, _UNBALANCED], ids=["merged", "separate"]
)


def _packed(rows: list[list[int]] = _ROWS) -> PackedSequences:
  return _pack([[_EXAMPLES[i] for i in row] for row in rows], _LENGTHS)


@_BOTH
def test_packed_examples_are_as_alone(config):
  params = _random_params(config)
  hidden = np.asarray(_hidden(config, params, _packed()))
  assert hidden.shape == (4, 40, config.decoder.width)
  assert np.isfinite(hidden).all()
  alone = _hidden(config, params, _packed([[0], [1], [2], [3]]))
  for row, numbers in enumerate(_ROWS):
    ends = np.cumsum([0, *(len(_EXAMPLES[i][1]) for i in numbers)])
    for i, (start, end) in zip(numbers, itertools.pairwise(ends), strict=True):
      ours, expected = hidden[row, start:end], alone[i][: end - start]
      np.testing.assert_allclose(ours, expected, atol=2e-5)


@_BOTH
def test_decoder_without_an_input_is_as_without_an_encoder(config):
  """Merged attention then sees its own keys alone; a cross-attention adds nothing."""
  params = _random_params(config)
  hidden = _hidden(config, params, _packed([[0], [1], [2], [3]]))[2, :12]
  decoder = traverse_util.flatten_dict(params["decoder"])
  own = {path: x for path, x in decoder.items() if not any("cross" in p for p in path)}
  own["embedder", "table"] = encoder_decoder.output_table(config, params)
  alone = _hidden(
    BackboneConfig(decoder=config.decoder),
    {"decoder": traverse_util.unflatten_dict(own)},
    _pack([[(None, _EXAMPLES[2][1])]], (None, 12)),
  )
  np.testing.assert_allclose(hidden, alone[0], atol=2e-5)


@_jit
@functools.partial(jax.grad, argnums=1)
def _gradient(config, params, packed):
  hidden = encoder_decoder.hidden_states(config, params, packed)
  return jnp.sum(jnp.sin(hidden) * packed.weights[..., None])


@_BOTH
def test_gradients_of_padding(config):
  """Finite, and none reaches what padding looks up: token 0 is nowhere else."""
  config = _changed_stacks(config, num_layers=2)
  gradient = _gradient(config, _random_params(config), _packed())
  for path, leaf in traverse_util.flatten_dict(gradient).items():
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path
    if path[-1] == "table":
      np.testing.assert_array_equal(leaf[0], 0)


def test_remat_changes_no_gradient():
  kept = _changed_stacks(_UNBALANCED, num_layers=2)
  params, packed = _random_params(kept), _packed()
  recomputed = _changed_stacks(kept, remat="full")
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max()),
    _gradient(recomputed, params, packed),
    _gradient(kept, params, packed),
  )


def _changed(packed: PackedSequences, field: str, row: int, columns) -> PackedSequences:
  values = getattr(packed, field).copy()
  values[row, columns] = 94 - values[row, columns]
  return dataclasses.replace(packed, **{field: values})


@_BOTH
def test_what_a_hidden_state_depends_on(config):
  """On its own example's input and targets up to it, and on nothing else."""
  params = _random_params(config)
  packed = _packed()
  before = np.asarray(_hidden(config, params, packed))

  def moved(field: str, row: int, columns) -> np.ndarray:
    after = _hidden(config, params, _changed(packed, field, row, columns))
    return np.abs(np.asarray(after) - before).max(axis=-1) > 0

  # A token of the second example's target, at column 15.
  expected = np.zeros_like(before[..., 0], bool)
  expected[0, 15:35] = True
  np.testing.assert_array_equal(moved("decoder_inputs", 0, 15), expected)
  # The whole input of the first example.
  expected = np.zeros_like(expected)
  expected[0, :5] = True
  np.testing.assert_array_equal(moved("inputs", 0, slice(0, 11)), expected)
  # Padding, on both sides.
  real = packed.target_ids > 0
  assert not moved("inputs", 1, slice(3, None))[real].any()
  assert not moved("decoder_inputs", 2, slice(12, None))[real].any()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_dropout_on_either_side(stack):
  dropping = dataclasses.replace(getattr(_UNBALANCED, stack), dropout_rate=0.3)
  config = dataclasses.replace(_UNBALANCED, **{stack: dropping})
  params, packed = _random_params(config), _packed()
  keys = [jax.random.key(seed) for seed in (0, 0, 1)]
  first, again, other = (_hidden(config, params, packed, key) for key in keys)
  np.testing.assert_array_equal(first, again)
  real = packed.target_ids > 0
  # Example 2, where those rows begin, has no input.
  real[1:, :12] &= stack == "decoder"
  without = _hidden(_UNBALANCED, params, packed)
  for x, y in ((first, without), (first, other)):
    assert (np.abs(x - y).max(axis=-1)[real] > 0).all()


def _paths(tree) -> dict:
  return {
    "/".join(path): leaf.shape
    for path, leaf in traverse_util.flatten_dict(nn.unbox(tree)).items()
  }


def _stack_paths(config: TransformerConfig) -> dict:
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids, ids, ids)
  return _paths(init["params"])


def test_parameters_of_merged_attention():
  """Those of a decoder-only model, but for the token table."""
  params = encoder_decoder.abstract_params(_MERGED)
  assert _paths(params["encoder"]) == _stack_paths(_STACK)
  expected = _stack_paths(_DECODER)
  del expected["embedder/table"]
  assert _paths(params["decoder"]) == expected
  alone = encoder_decoder.abstract_params(BackboneConfig(decoder=_DECODER))
  assert _paths(alone) == {f"decoder/{k}": v for k, v in _stack_paths(_DECODER).items()}
  alone = encoder_decoder.abstract_params(BackboneConfig(encoder=_STACK))
  assert _paths(alone) == {f"encoder/{k}": v for k, v in _stack_paths(_STACK).items()}


@pytest.mark.parametrize("normed", [False, True])
def test_parameters_of_separate_attention(normed):
  config = dataclasses.replace(
    _UNBALANCED,
    encoder=dataclasses.replace(_UNBALANCED.encoder, query_key_norm=normed),
    decoder=dataclasses.replace(_UNBALANCED.decoder, query_key_norm=normed),
  )
  params = encoder_decoder.abstract_params(config)
  assert _paths(params["encoder"]) == _stack_paths(config.encoder)
  layer = {
    "cross_attention/query/kernel": (24, 16),
    "cross_attention/key/kernel": (32, 8),
    "cross_attention/value/kernel": (32, 8),
    "cross_attention/output/kernel": (16, 24),
    "pre_cross_attention_norm/scale": (24,),
    "post_cross_attention_norm/scale": (24,),
  }
  if normed:
    layer |= dict.fromkeys(
      ("cross_attention/query_norm/scale", "cross_attention/key_norm/scale"), (8,)
    )
  more = {f"remainder/layer_0/{name}": shape for name, shape in layer.items()}
  for i in range(2):
    more |= {f"groups/layer_{i}/{name}": (1, *shape) for name, shape in layer.items()}
  own = _stack_paths(config.decoder)
  assert any("query_norm" in path for path in own) == normed
  assert _paths(params["decoder"]) == {**own, **more}


@_BOTH
def test_axes_have_rules(config):
  rules = dict(LOGICAL_AXIS_RULES)
  init = functools.partial(encoder_decoder.init_params, config)
  boxed = jax.eval_shape(init, jax.random.key(0))
  for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names")):
    assert leaf.value.dtype == np.float32
    assert len(leaf.names) == leaf.value.ndim
    assert set(leaf.names) <= rules.keys()


def test_an_encoder_alone_predicts_nothing():
  config = BackboneConfig(encoder=_STACK)
  with pytest.raises(ConfigError, match="BackboneConfig has no decoder"):
    encoder_decoder.hidden_states(config, _random_params(config), _packed())


@pytest.mark.parametrize(
  ("platform", "backend"), [("tpu", "splash"), ("cpu", "block_local")]
)
def test_attention_of_a_platform(platform, backend):
  config = encoder_decoder.on_platform(_MERGED, platform)
  assert config.encoder.attention == config.decoder.attention == backend
  alone = encoder_decoder.on_platform(BackboneConfig(decoder=_DECODER), platform)
  assert alone == BackboneConfig(decoder=config.decoder)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"encoder": None, "decoder": None}, "needs an encoder or a decoder"),
    ({"cross_attention": "both"}, "cross_attention must be one of .*got 'both'"),
    ({"decoder": {"mask": "bidirectional"}}, "decoder.*mask must be 'causal'"),
    ({"encoder": {"mask": "causal"}}, "encoder.*mask must be 'bidirectional'"),
    ({"encoder": {"width": 64}}, "width of the encoder is 64.* one token table"),
    ({"encoder": {"vocab_size": 98}}, "vocab_size of the encoder is 98.* token table"),
    ({"encoder": {"num_heads": 8}}, "num_heads of the encoder is 8, of the decoder 4"),
    ({"decoder": {"num_kv_heads": 1}}, "num_kv_heads of the encoder is 2.*merged"),
    (
      {"decoder": {"head_dim": 12}},
      "head_dim of the encoder is 10.*'separate' does not",
    ),
  ],
)
def test_configurations_that_cannot_work(changes, message):
  values = {
    field: dataclasses.replace(getattr(_MERGED, field), **value)
    if isinstance(value, dict)
    else value
    for field, value in changes.items()
  }
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(_MERGED, **values)


@pytest.mark.parametrize(
  "config", [_MERGED, _UNBALANCED, BackboneConfig(decoder=_DECODER)]
)
def test_json(config):
  values = json.loads(json.dumps(config.to_json()))
  assert BackboneConfig.from_json(values) == config
  with pytest.raises(ConfigError, match="another version of embgemma"):
    BackboneConfig.from_json({**values, "bridge": 1})


def test_json_of_earlier_versions():
  """They knew T5Gemma 2's kind alone, and normed queries and keys."""
  values = json.loads(json.dumps(_MERGED.to_json()))
  del values["cross_attention"], values["shared_table"]
  for stack in ("encoder", "decoder"):
    del values[stack]["query_key_norm"]
  assert BackboneConfig.from_json(values) == _MERGED
