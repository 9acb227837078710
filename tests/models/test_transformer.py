"""The stack against transformers' Gemma3TextModel, and what its shapes promise."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, Gemma3TextModel

from embgemma.errors import ConfigError
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import Embedder, abstract_packed_texts
from embgemma.models.transformer import Transformer, token_vectors
from embgemma.training.partitioning import LOGICAL_AXIS_RULES

_GIN = pathlib.Path(__file__).parents[2] / "gin" / "models"
_WINDOW = 16  # as in config.json: the full span
# Around the edges of both windows: 8 keys on each side, and 15 before.
_LENGTHS = (8, 9, 10, 16, 17, 33, 40)
# float32 on random weights, activations of order 1 to 4.
_TOLERANCE = 2e-5
# Two full groups of three and one layer left over. Every count differs from every
# other; the query scalar is no head_dim; the bases differ at short distances.
_CONFIG = TransformerConfig(
  vocab_size=97,
  num_layers=7,
  width=32,
  mlp_width=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=10,
  attention_pattern=("local", "local", "global"),
  window=(_WINDOW // 2, _WINDOW // 2),
  rope_base_local=100.0,
  rope_base_global=5000.0,
  query_scalar=24.0,
  max_length=1024,
)
_CAUSAL = dataclasses.replace(_CONFIG, mask="causal", window=(_WINDOW - 1, 0))


@functools.cache
def _reference(config: TransformerConfig, sliding_window: int) -> Gemma3TextModel:
  """A random model of the same shape, norms and all."""
  kinds = {"local": "sliding_attention", "global": "full_attention"}
  torch.manual_seed(0)
  model = Gemma3TextModel(
    Gemma3TextConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.width,
      intermediate_size=config.mlp_width,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      query_pre_attn_scalar=int(config.query_scalar or config.head_dim),
      rms_norm_eps=config.norm_epsilon,
      max_position_embeddings=config.max_length,
      sliding_window=sliding_window,
      layer_types=[kinds[kind] for kind in config.layer_kinds],
      rope_parameters={
        "sliding_attention": {
          "rope_type": "default",
          "rope_theta": config.rope_base_local,
        },
        "full_attention": {
          "rope_type": "default",
          "rope_theta": config.rope_base_global,
        },
      },
      use_bidirectional_attention=config.mask == "bidirectional",
      use_cache=False,
      attn_implementation="sdpa",
    )
  ).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  return model


def _hidden(model: Gemma3TextModel, tokens: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(tokens)[None].long()).last_hidden_state[0].numpy()


def _layer(state: dict[str, np.ndarray], index: int) -> dict:
  prefix = f"layers.{index}"

  def kernel(name):  # torch keeps [out, in]
    return {"kernel": state[f"{prefix}.{name}.weight"].T}

  def scale(name):
    return {"scale": state[f"{prefix}.{name}.weight"]}

  return {
    "attention": {
      "query": kernel("self_attn.q_proj"),
      "key": kernel("self_attn.k_proj"),
      "value": kernel("self_attn.v_proj"),
      "output": kernel("self_attn.o_proj"),
      "query_norm": scale("self_attn.q_norm"),
      "key_norm": scale("self_attn.k_norm"),
    },
    "mlp": {
      "gate": kernel("mlp.gate_proj"),
      "up": kernel("mlp.up_proj"),
      "down": kernel("mlp.down_proj"),
    },
    "pre_attention_norm": scale("input_layernorm"),
    "post_attention_norm": scale("post_attention_layernorm"),
    "pre_mlp_norm": scale("pre_feedforward_layernorm"),
    "post_mlp_norm": scale("post_feedforward_layernorm"),
  }


def _params(model: Gemma3TextModel, pattern: int) -> dict:
  """The model's weights as our tree: whole groups stacked, the rest beside them."""
  state = {name: value.numpy() for name, value in model.state_dict().items()}
  layers = [_layer(state, i) for i in range(model.config.num_hidden_layers)]
  whole = len(layers) // pattern * pattern
  params = {
    "embedder": {"table": state["embed_tokens.weight"]},
    "final_norm": {"scale": state["norm.weight"]},
    "groups": {
      f"layer_{i}": jax.tree.map(lambda *x: np.stack(x), *layers[i:whole:pattern])
      for i in range(pattern)
    },
  }
  if layers[whole:]:
    params["remainder"] = {f"layer_{i}": x for i, x in enumerate(layers[whole:])}
  return params


def _forward(config: TransformerConfig, params: dict, *packed: np.ndarray):
  apply = jax.jit(Transformer(config).apply)
  return np.asarray(apply({"params": params}, *packed), np.float32)


def _texts(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, _CONFIG.vocab_size, n).astype(np.int32) for n in lengths]


def _rows(rows):
  """tokens, positions and text_ids of rows that hold the given texts in order."""
  length = max(sum(map(len, row)) for row in rows)
  tokens = np.zeros((len(rows), length), np.int32)
  positions, text_ids = np.zeros_like(tokens), np.full_like(tokens, 99)
  for row, texts in enumerate(rows):
    start = 0
    for text_id, text in enumerate(texts):
      span = slice(start, start + len(text))
      tokens[row, span], text_ids[row, span] = text, text_id
      positions[row, span] = np.arange(len(text))
      start = span.stop
  return tokens, positions, text_ids


@pytest.mark.parametrize("config", [_CONFIG, _CAUSAL], ids=lambda c: c.mask)
class TestAgainstTransformers:
  def test_padded_rows(self, config):
    model = _reference(config, _WINDOW)
    texts = _texts(_LENGTHS)
    ours = _forward(config, _params(model, 3), *_rows([[text] for text in texts]))
    for row, text in enumerate(texts):
      expected = _hidden(model, text)
      assert np.abs(expected).max() > 1
      np.testing.assert_allclose(ours[row, : len(text)], expected, atol=_TOLERANCE)

  def test_packed_row(self, config):
    model = _reference(config, _WINDOW)
    texts = _texts(_LENGTHS, seed=1)
    (ours,) = _forward(config, _params(model, 3), *_rows([texts]))
    expected = np.concatenate([_hidden(model, text) for text in texts])
    np.testing.assert_allclose(ours, expected, atol=_TOLERANCE)


@pytest.mark.parametrize(
  "wrong",
  [
    {"window": (_WINDOW // 2 - 1, _WINDOW // 2)},
    {"window": (_WINDOW, _WINDOW // 2)},
    {"rope_base_local": 5000.0, "rope_base_global": 100.0},
    {"query_scalar": None},
    {"norm_epsilon": 1e-3},
  ],
  ids=lambda wrong: "+".join(wrong),
)
def test_comparison_is_sharp(wrong):
  """What it could miss changes the result far beyond the tolerance."""
  model = _reference(_CONFIG, _WINDOW)
  (text,) = _texts([40])
  other = dataclasses.replace(_CONFIG, **wrong)
  (ours,) = _forward(other, _params(model, 3), *_rows([[text]]))
  assert np.abs(ours - _hidden(model, text)).max() > 10 * _TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "block_local"])
def test_backends(backend):
  """A window of blocks, texts that cross them, padding."""
  config = dataclasses.replace(_CONFIG, attention=backend)
  model = _reference(config, _WINDOW)
  texts = _texts([200, 300, 17])
  (ours,) = _forward(config, _params(model, 3), *_rows([texts]))
  expected = np.concatenate([_hidden(model, text) for text in texts])
  np.testing.assert_allclose(ours, expected, atol=_TOLERANCE)


def test_only_whole_groups():
  config = dataclasses.replace(_CONFIG, num_layers=3)
  model = _reference(config, _WINDOW)
  (text,) = _texts([33])
  (ours,) = _forward(config, _params(model, 3), *_rows([[text]]))
  np.testing.assert_allclose(ours, _hidden(model, text), atol=_TOLERANCE)


def test_embeddinggemmas_window():
  """sliding_window 512 is 256 keys on both sides; differences begin at length 258."""
  config = dataclasses.replace(
    _CONFIG,
    num_layers=2,
    attention_pattern=("local", "global"),
    window=(256, 256),
    rope_base_local=10_000.0,
    rope_base_global=1_000_000.0,
  )
  model = _reference(config, 512)
  params = _params(model, 2)
  texts = _texts([256, 257, 258, 513, 600])
  packed = _rows([[text] for text in texts])
  ours = _forward(config, params, *packed)
  for row, text in enumerate(texts):
    expected = _hidden(model, text)
    np.testing.assert_allclose(ours[row, : len(text)], expected, atol=_TOLERANCE)
  wider = dataclasses.replace(config, window=(257, 257))
  apart = np.abs(_forward(wider, params, *packed) - ours).max(axis=(1, 2))
  assert (apart[:2] < _TOLERANCE).all()
  assert (apart[2:] > 2 * _TOLERANCE).all()


def test_bfloat16_is_finite_and_close():
  model = _reference(_CONFIG, _WINDOW)
  params = _params(model, 3)
  packed = _rows([[text] for text in _texts(_LENGTHS)])
  exact = _forward(_CONFIG, params, *packed)
  config = dataclasses.replace(_CONFIG, dtype="bfloat16")
  apply = jax.jit(Transformer(config).apply)
  rounded = apply({"params": params}, *packed)
  assert rounded.dtype == jnp.bfloat16
  rounded = np.asarray(rounded, np.float32)
  assert np.isfinite(rounded).all()
  held = packed[2] != 99
  error = np.linalg.norm((rounded - exact)[held]) / np.linalg.norm(exact[held])
  assert 1e-4 < error < 0.03  # 8 bits of mantissa, 7 layers


def test_remat_changes_no_gradient():
  config = dataclasses.replace(_CONFIG, num_layers=2, attention_pattern=("local",))
  params = _params(_reference(config, _WINDOW), 1)
  packed = [jnp.asarray(x) for x in _rows([_texts([8, 12]), _texts([20])])]

  def gradient(policy):
    model = Transformer(dataclasses.replace(config, remat=policy))

    def loss(params):
      return jnp.sum(model.apply({"params": params}, *packed) ** 3)

    return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

  kept = gradient("none")
  for policy in ("full", "dots"):
    for expected, recomputed in zip(kept, gradient(policy), strict=True):
      scale = np.abs(expected).max()
      assert scale > 0
      np.testing.assert_allclose(recomputed, expected, atol=1e-5 * scale)


_SHORT = dataclasses.replace(_CONFIG, num_layers=4)  # a scan of one, and one more


def test_vectors_in_place_of_the_table():
  params = _params(_reference(_SHORT, _WINDOW), 3)
  packed = _rows([_texts([8, 12]), _texts([20])])
  vectors = token_vectors(params["embedder"]["table"], packed[0], _SHORT)
  without = {name: value for name, value in params.items() if name != "embedder"}
  expected = _forward(_SHORT, params, *packed)
  ours = _forward(_SHORT, without, *packed, vectors)
  np.testing.assert_allclose(ours, expected, atol=_TOLERANCE)


def test_token_vectors_in_bfloat16():
  """The factor sqrt(768) is rounded too: 27.75."""
  config = dataclasses.replace(_CONFIG, width=768, dtype="bfloat16")
  table = np.random.default_rng(0).normal(size=(config.vocab_size, 768))
  vectors = token_vectors(table.astype(np.float32), np.array([[3, 5]]), config)
  assert vectors.dtype == jnp.bfloat16
  expected = jnp.asarray(table[None, [3, 5]], jnp.bfloat16) * jnp.bfloat16(27.75)
  np.testing.assert_array_equal(vectors, expected)


def test_gradient_of_vectors_scattered_is_the_tables():
  params = _params(_reference(_SHORT, _WINDOW), 3)
  tokens, *places = map(jnp.asarray, _rows([_texts([8, 12]), _texts([20])]))
  table = jnp.asarray(params["embedder"]["table"])

  def loss(table, vectors=None):
    there = {"params": {**params, "embedder": {"table": table}}}
    return jnp.sum(Transformer(_SHORT).apply(there, tokens, *places, vectors) ** 3)

  vectors, scatter = jax.vjp(lambda t: token_vectors(t, tokens, _SHORT), table)
  (ours,) = scatter(jax.jit(jax.grad(loss, argnums=1))(table, vectors))
  expected = jax.jit(jax.grad(loss))(table)
  scale = np.abs(expected).max()
  assert scale > 0
  np.testing.assert_allclose(ours, expected, atol=1e-5 * scale)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_dropout(remat):
  """Drawn by row and key, and the same again in the backward pass."""
  config = dataclasses.replace(
    _CONFIG,
    num_layers=2,
    attention_pattern=("global",),
    dropout_rate=0.5,
    remat=remat,
  )
  params = _params(_reference(config, _WINDOW), 1)
  model = Transformer(config)
  packed = _rows([_texts([16]), _texts([16])])

  @jax.jit
  def value_and_gradient(params, key):
    def loss(params):
      hidden = model.apply(
        {"params": params}, *packed, deterministic=False, rngs={"dropout": key}
      )
      return jnp.sum(hidden**3), hidden

    return jax.grad(loss, has_aux=True)(params)

  gradients, hidden = value_and_gradient(params, jax.random.key(0))
  again = value_and_gradient(params, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, (gradients, hidden), again)
  assert np.abs(hidden[0] - hidden[1]).max() > 0.1  # the same text in both rows
  _, other = value_and_gradient(params, jax.random.key(1))
  assert np.abs(other - hidden).max() > 0.1
  # The gradient is that of the outputs that were kept.
  kernel = params["groups"]["layer_0"]["mlp"]["down"]["kernel"]
  step = 1e-2 * np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)

  def moved(sign):
    at = jax.tree.map(jnp.asarray, params)
    at["groups"]["layer_0"]["mlp"]["down"]["kernel"] = kernel + sign * step
    _, hidden = value_and_gradient(at, jax.random.key(0))
    return np.sum(np.asarray(hidden, np.float64) ** 3)

  slope = np.sum(gradients["groups"]["layer_0"]["mlp"]["down"]["kernel"] * step)
  np.testing.assert_allclose((moved(1) - moved(-1)) / 2, slope, rtol=0.02)


def test_every_layer_of_a_scan_drops_its_own():
  """What the layers add differs so much that it shows which of them was dropped."""
  config = dataclasses.replace(
    _CONFIG, num_layers=2, attention_pattern=("global",), dropout_rate=0.25
  )
  params = _params(_reference(config, _WINDOW), 1)
  layer = params["groups"]["layer_0"]
  layer["post_attention_norm"]["scale"] = np.full((2, config.width), -1.0, np.float32)
  gains = np.array([[1e8], [1e4]], np.float32)
  layer["post_mlp_norm"]["scale"] = np.repeat(gains, config.width, axis=1)
  hidden = Transformer(config).apply(
    {"params": params},
    *_rows([_texts([512])]),
    deterministic=False,
    rngs={"dropout": jax.random.key(0)},
  )
  size = np.abs(hidden) / np.abs(hidden).max()
  first, second = np.mean(size > 1e-3), np.mean((size < 1e-3) & (size > 1e-7))
  np.testing.assert_allclose([first, second], [0.75, 0.25 * 0.75], atol=0.02)


@pytest.mark.parametrize("deterministic", [True, False])
def test_without_dropout(deterministic):
  """Rate 0, or deterministic: no random stream is needed, nothing is dropped."""
  config = dataclasses.replace(_SHORT, dropout_rate=0.5 if deterministic else 0.0)
  params = _params(_reference(_SHORT, _WINDOW), 3)
  packed = _rows([_texts([20])])
  hidden = Transformer(config).apply(
    {"params": params}, *packed, deterministic=deterministic
  )
  expected = Transformer(_SHORT).apply({"params": params}, *packed)
  np.testing.assert_array_equal(hidden, expected)


def test_dropout_needs_its_random_stream():
  config = dataclasses.replace(_SHORT, dropout_rate=0.5)
  params = _params(_reference(_SHORT, _WINDOW), 3)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    Transformer(config).apply(
      {"params": params}, *_rows([_texts([20])]), deterministic=False
    )


def _abstract(config: EmbedderConfig):
  """Parameters with their logical axis boxes, as shapes."""
  init = Embedder(config).init
  return jax.eval_shape(init, jax.random.key(0), abstract_packed_texts())["params"]


def _small(pooler="mean", **changes) -> EmbedderConfig:
  transformer = dataclasses.replace(_CONFIG, **changes)
  return EmbedderConfig(transformer, pooler, 4, 24, 16, (16, 8))


def _count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(tree)))


# In a process of its own: gin's registry is one a process, and others fill it too.
_READ_PRESETS = """
import json, sys
from embgemma import gin_config
gin_config.register()
configs = {}
for file in sys.argv[1:]:
  gin_config.parse([file], [], [])
  configs[file] = gin_config.resolve("EmbedderConfig").to_json()
print(json.dumps(configs))
"""


@pytest.fixture(scope="module")
def presets() -> dict[str, EmbedderConfig]:
  # Others take the model of a checkpoint.
  files = [str(p) for p in _GIN.glob("*.gin") if "\nEmbedderConfig:" in p.read_text()]
  out = subprocess.run(
    [sys.executable, "-c", _READ_PRESETS, *files],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  return {
    pathlib.Path(file).stem: EmbedderConfig.from_json(values)
    for file, values in json.loads(out).items()
  }


def test_embeddinggemma_has_its_parameters(presets):
  config = presets["embeddinggemma_300m"]
  params = _abstract(config)
  assert _count(params) == 307_581_696
  assert _count(params["encoder"]) == 302_863_104
  kinds = config.transformer.layer_kinds
  assert [i for i, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]


def test_gemma_270m_has_its_parameters(presets):
  assert _count(_abstract(presets["gemma3_270m"])["encoder"]) == 268_098_176


@pytest.mark.parametrize("pooler", ["mean", "first", "last", "attention"])
def test_every_axis_of_every_parameter_has_a_rule(pooler):
  known = {name for name, _ in LOGICAL_AXIS_RULES}
  params = _abstract(_small(pooler))

  def is_box(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
  assert len(leaves) > 40
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path)
    assert is_box(leaf), name
    assert len(leaf.names) == leaf.value.ndim, name
    assert set(leaf.names) <= known, name
    assert leaf.value.dtype == jnp.float32, name
    assert ("layers" in leaf.names) == ("groups" in name), name


@pytest.fixture
def untyped():
  """Without the type checks of tests, as users run it."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": 0}, r"TransformerConfig.vocab_size .* positive integer, got 0"),
    ({"num_layers": -1}, r"TransformerConfig.num_layers .* got -1"),
    ({"width": 1.5}, r"TransformerConfig.width .* got 1.5"),
    ({"mlp_width": "8"}, r"TransformerConfig.mlp_width .* got '8'"),
    ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
    ({"head_dim": 9}, r"head_dim must be even for RoPE, got 9"),
    ({"attention_pattern": ()}, r"attention_pattern must list .*got \(\)"),
    ({"attention_pattern": ("near",)}, r"attention_pattern must list .*'near'"),
    ({"mask": "prefix"}, r"mask must be one of .*got 'prefix'"),
    ({"window": (8,)}, r"window must be two non-negative integers.*got \(8,\)"),
    ({"window": (8, -1)}, r"window must be two non-negative integers.*-1"),
    ({"window": 8}, r"window must be two non-negative integers.*got 8"),
    ({"max_length": 0}, r"max_length must be a positive integer, got 0"),
    ({"dtype": "float16"}, r"float16 is not supported.*65,504.*'bfloat16'"),
    ({"dtype": "int8"}, r"dtype must be one of .*got 'int8'"),
    ({"remat": "some"}, r"remat must be one of .*got 'some'"),
    ({"attention": "flash"}, r"attention must be one of .*'splash'.*got 'flash'"),
    ({"dropout_rate": 1.0}, r"dropout_rate must be >= 0 and < 1, got 1.0"),
    ({"dropout_rate": -0.1}, r"dropout_rate must be >= 0 and < 1, got -0.1"),
    ({"dropout_rate": "0"}, r"dropout_rate must be >= 0 and < 1, got '0'"),
  ],
)
def test_transformer_config_errors(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(_CONFIG, **changes)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"transformer": 3}, r"transformer must be a TransformerConfig, got 3"),
    ({"pooler": "max"}, r"pooler must be one of .*got 'max'"),
    (
      {"pooler": "attention", "pooler_heads": 5},
      r"pooler_heads \(5\) must divide the encoder's width \(32\)",
    ),
    (
      {"pooler": "attention", "pooler_heads": 0},
      r"pooler_heads \(0\) must divide the encoder's width \(32\)",
    ),
    ({"hidden_width": 0}, r"hidden_width must be a positive integer, got 0"),
    ({"embedding_width": None}, r"embedding_width must be a positive .*got None"),
    ({"matryoshka_widths": (17,)}, r"matryoshka_widths: 17 is not in 1\.\.16"),
    ({"matryoshka_widths": (0,)}, r"matryoshka_widths: 0 is not in 1\.\.16"),
  ],
)
def test_embedder_config_errors(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(_small(), **changes)


def test_json_round_trip():
  config = _small("attention", dtype="bfloat16", window=(3, 0))
  again = EmbedderConfig.from_json(json.loads(json.dumps(config.to_json())))
  assert again == config
  assert hash(again) == hash(config)


@pytest.mark.parametrize("place", ["top", "transformer"])
def test_json_of_another_version(place):
  values = _small().to_json()
  (values if place == "top" else values["transformer"])["shoe_size"] = 43
  with pytest.raises(ConfigError, match="shoe_size.*another version of embgemma"):
    EmbedderConfig.from_json(values)


def test_json_without_encoder():
  values = _small().to_json()
  del values["transformer"]
  with pytest.raises(ConfigError, match="transformer.*another version of embgemma"):
    EmbedderConfig.from_json(values)
