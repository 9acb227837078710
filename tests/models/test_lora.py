"""Adapters against float64, and a whole embedder with them against PEFT's."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import traverse_util
from transformers import Gemma3TextConfig, Gemma3TextModel

from embgemma.errors import ConfigError
from embgemma.models import layers, lora
from embgemma.models.config import EmbedderConfig, LoraConfig, TransformerConfig
from embgemma.models.embedder import Embedder, init_params
from embgemma.training.partitioning import LOGICAL_AXIS_RULES
from embgemma.typing import PackedTexts

# Two groups of two in the scan and a remainder; alpha / rank is no power of two.
LORA = LoraConfig(rank=3, alpha=5.0)
CONFIG = EmbedderConfig(
  transformer=TransformerConfig(
    vocab_size=61,
    num_layers=5,
    width=16,
    mlp_width=20,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    attention_pattern=("local", "global"),
    window=(4, 4),
    max_length=64,
  ),
  hidden_width=24,
  embedding_width=12,
  matryoshka_widths=(12,),
  lora=LORA,
)
BASE = dataclasses.replace(CONFIG, lora=None)
# Compiling takes longer than running.
QUICK = {"xla_backend_optimization_level": 0}
PARTS = {
  "self_attn.q_proj": "attention/query",
  "self_attn.k_proj": "attention/key",
  "self_attn.v_proj": "attention/value",
  "self_attn.o_proj": "attention/output",
  "mlp.gate_proj": "mlp/gate",
  "mlp.up_proj": "mlp/up",
  "mlp.down_proj": "mlp/down",
}
NORMS = {
  "self_attn.q_norm": "attention/query_norm",
  "self_attn.k_norm": "attention/key_norm",
  "input_layernorm": "pre_attention_norm",
  "post_attention_layernorm": "post_attention_norm",
  "pre_feedforward_layernorm": "pre_mlp_norm",
  "post_feedforward_layernorm": "post_mlp_norm",
}


def flat(params) -> dict[str, jax.Array]:
  return traverse_util.flatten_dict(params, sep="/")


@functools.cache
def fresh(config):
  init = jax.jit(functools.partial(init_params, config), compiler_options=QUICK)
  return init(jax.random.key(3))


def some_params(config=CONFIG):
  """Fresh parameters, but for adapters and norms that do something."""
  values = dict(flat(nn.unbox(fresh(config))))
  rng = np.random.default_rng(0)
  for name in sorted(values):
    if name.endswith(("/lora_b", "/scale")):
      values[name] = jnp.asarray(0.3 * rng.normal(size=values[name].shape), jnp.float32)
  return traverse_util.unflatten_dict(values, sep="/")


def texts(count=3, length=14) -> PackedTexts:
  rng = np.random.default_rng(0)
  return PackedTexts(
    tokens=rng.integers(1, 61, (count, length), dtype=np.int32),
    positions=np.tile(np.arange(length, dtype=np.int32), (count, 1)),
    text_ids=np.tile(np.arange(count, dtype=np.int32)[:, None], (1, length)),
    starts=np.arange(count, dtype=np.int32) * length,
    lengths=np.full((count,), length, np.int32),
  )


@functools.cache
def compiled(config):
  return jax.jit(Embedder(config).embed, compiler_options=QUICK)


def embed(config, params) -> np.ndarray:
  return np.asarray(compiled(config)(params, texts()))


def adapter_gradients(config, params, weights):
  """Of sum(vectors * weights)."""
  base, adapters = lora.split(params)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def gradients(adapters, base, packed):
    def loss(adapters):
      joined = traverse_util.unflatten_dict(flat(base) | flat(adapters), sep="/")
      return jnp.sum(Embedder(config).embed(joined, packed) * weights)

    return jax.grad(loss)(adapters)

  return flat(gradients(adapters, base, texts()))


def test_a_linear_map_in_float64():
  rng = np.random.default_rng(0)
  x, w, a, b, g = (
    rng.normal(size=shape) for shape in ((2, 5, 8), (8, 6), (8, 3), (3, 6), (2, 5, 6))
  )
  module = layers.Linear(6, ("embed", "mlp"), jnp.float32)

  def loss(adapters):
    params = {"kernel": jnp.float32(w), **adapters}
    y = module.apply({"params": lora.scaled(params, LORA)}, jnp.float32(x))
    return jnp.sum(y * jnp.float32(g)), y

  adapters = {"lora_a": jnp.float32(a), "lora_b": jnp.float32(b)}
  gradients, y = jax.grad(loss, has_aux=True)(adapters)
  scale = 5 / 3
  np.testing.assert_allclose(y, x @ w + scale * (x @ a @ b), rtol=1e-4, atol=1e-5)
  rows_x, rows_g = x.reshape(-1, 8), g.reshape(-1, 6)
  expected = {
    "lora_a": scale * rows_x.T @ (rows_g @ b.T),
    "lora_b": scale * (rows_x @ a).T @ rows_g,
  }
  for name, value in expected.items():
    np.testing.assert_allclose(gradients[name], value, rtol=1e-4, atol=1e-4)


def layer_values(params, index: int) -> dict[str, np.ndarray]:
  """One layer's parameters, out of the scan's stack or the remainder."""
  encoder = params["encoder"]
  whole = CONFIG.transformer.num_layers // 2 * 2
  if index >= whole:
    return flat(encoder["remainder"][f"layer_{index - whole}"])
  stacked = flat(encoder["groups"][f"layer_{index % 2}"])
  return {name: value[index // 2] for name, value in stacked.items()}


def peft_model(params) -> torch.nn.Module:
  """transformers' stack with PEFT's adapters and our values, float64."""
  cfg = CONFIG.transformer
  kinds = {"local": "sliding_attention", "global": "full_attention"}
  stack = Gemma3TextModel(
    Gemma3TextConfig(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.width,
      intermediate_size=cfg.mlp_width,
      num_hidden_layers=cfg.num_layers,
      num_attention_heads=cfg.num_heads,
      num_key_value_heads=cfg.num_kv_heads,
      head_dim=cfg.head_dim,
      query_pre_attn_scalar=cfg.head_dim,
      rms_norm_eps=cfg.norm_epsilon,
      max_position_embeddings=cfg.max_length,
      sliding_window=2 * cfg.window[0],
      layer_types=[kinds[kind] for kind in cfg.layer_kinds],
      rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
      },
      use_bidirectional_attention=True,
      use_cache=False,
      attn_implementation="sdpa",
    )
  )
  adapters = peft.LoraConfig(
    r=LORA.rank,
    lora_alpha=LORA.alpha,
    target_modules=[name.rpartition(".")[2] for name in PARTS],
  )
  model = peft.get_peft_model(stack, adapters).double().eval()
  values = {
    "embed_tokens.weight": params["encoder"]["embedder"]["table"],
    "norm.weight": params["encoder"]["final_norm"]["scale"],
  }
  for index in range(cfg.num_layers):
    ours = layer_values(params, index)
    for name, part in PARTS.items():
      prefix = f"layers.{index}.{name}"
      values[f"{prefix}.base_layer.weight"] = ours[f"{part}/kernel"].T
      values[f"{prefix}.lora_A.default.weight"] = ours[f"{part}/lora_a"].T
      values[f"{prefix}.lora_B.default.weight"] = ours[f"{part}/lora_b"].T
    for name, part in NORMS.items():
      values[f"layers.{index}.{name}.weight"] = ours[f"{part}/scale"]
  state = {
    f"base_model.model.{name}": torch.tensor(np.asarray(value, np.float64))
    for name, value in values.items()
  }
  model.load_state_dict(state)
  return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_embedder_is_pefts():
  params = some_params()
  model = peft_model(params)
  tokens = torch.from_numpy(np.asarray(texts().tokens)).long()
  hidden = model(input_ids=tokens).last_hidden_state.mean(1)
  for name in ("projection_up", "projection_down"):
    hidden = hidden @ torch.tensor(np.asarray(params[name]["kernel"], np.float64))
  vectors = torch.nn.functional.normalize(hidden, dim=-1)
  weights = np.random.default_rng(1).normal(size=vectors.shape)
  (vectors * torch.from_numpy(weights)).sum().backward()

  np.testing.assert_allclose(embed(CONFIG, params), vectors.detach(), atol=1e-5)
  without = embed(BASE, lora.split(params)[0])
  assert np.abs(without - vectors.detach().numpy()).max() > 0.1

  gradients = traverse_util.unflatten_dict(
    adapter_gradients(CONFIG, params, weights.astype(np.float32)), sep="/"
  )
  theirs = dict(model.named_parameters())
  for index in range(CONFIG.transformer.num_layers):
    ours = layer_values(gradients, index)
    for name, part in PARTS.items():
      for side in "AB":
        full = f"base_model.model.layers.{index}.{name}.lora_{side}.default.weight"
        expected = theirs[full].grad.numpy().T
        found = ours[f"{part}/lora_{side.lower()}"]
        assert np.abs(expected).max() > 1e-3, full
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5, err_msg=full)


def test_a_fresh_model_is_its_base_bit_for_bit():
  base, params = nn.unbox(fresh(BASE)), nn.unbox(fresh(CONFIG))
  jax.tree.map(np.testing.assert_array_equal, lora.split(params)[0], base)
  packed = jax.device_put(texts())
  # Operation by operation: XLA may fuse, and so round, two programs differently.
  with jax.disable_jit():
    expected = Embedder(BASE).embed(base, packed)
    np.testing.assert_array_equal(Embedder(CONFIG).embed(params, packed), expected)


def test_shapes_axes_and_start():
  boxed = flat(fresh(CONFIG))
  adapters = {n: x for n, x in boxed.items() if n.endswith(("/lora_a", "/lora_b"))}
  # Seven maps in each of two stacked layers and one layer of the remainder.
  assert len(adapters) == 2 * 7 * 3
  down = "encoder/groups/layer_1/mlp/down"
  assert adapters[f"{down}/lora_a"].value.shape == (2, 20, 3)
  assert adapters[f"{down}/lora_a"].names == ("layers", "mlp", "lora")
  assert adapters[f"{down}/lora_b"].value.shape == (2, 3, 16)
  assert adapters[f"{down}/lora_b"].names == ("layers", "lora", "embed")
  assert adapters["encoder/remainder/layer_0/mlp/down/lora_a"].names == ("mlp", "lora")
  rules = dict(LOGICAL_AXIS_RULES)
  assert all(axis in rules for box in adapters.values() for axis in box.names)
  drawn = []
  for name, box in adapters.items():
    assert box.value.dtype == jnp.float32
    if name.endswith("/lora_b"):
      assert not box.value.any()
    else:
      relative = np.asarray(box.value).ravel() * box.value.shape[-2] ** 0.5
      assert np.abs(relative).max() <= 1
      drawn.append(relative)
  # Uniform in +-1: a third is its variance. No two adapters are alike.
  assert np.concatenate(drawn).var() == pytest.approx(1 / 3, rel=0.1)
  assert len({values[0] for values in drawn}) == len(drawn)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_merging_keeps_the_vectors(place):
  params = jax.tree.map(place, some_params())
  merged, config = lora.merge(params, CONFIG)
  assert config == BASE
  kernel = "encoder/groups/layer_0/mlp/up/kernel"
  assert isinstance(flat(merged)[kernel], type(flat(params)[kernel]))
  assert jax.tree.structure(merged) == jax.tree.structure(lora.split(params)[0])
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(merged))
  np.testing.assert_allclose(embed(BASE, merged), embed(CONFIG, params), atol=1e-5)

  w, a, b = (
    np.asarray(flat(params)[kernel.replace("kernel", name)], np.float64)
    for name in ("kernel", "lora_a", "lora_b")
  )
  np.testing.assert_allclose(flat(merged)[kernel], w + 5 / 3 * (a @ b), atol=1e-6)
  assert merged["projection_up"]["kernel"] is params["projection_up"]["kernel"]
  assert lora.merge(merged, BASE)[0] is merged


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_changes_no_gradient(remat):
  params = some_params()
  weights = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
  other = dataclasses.replace(
    CONFIG, transformer=dataclasses.replace(CONFIG.transformer, remat=remat)
  )
  expected = adapter_gradients(CONFIG, params, weights)
  found = adapter_gradients(other, params, weights)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_heads_and_pooler_can_have_adapters():
  config = dataclasses.replace(
    CONFIG,
    pooler="attention",
    lora=LoraConfig(rank=2, alpha=4.0, targets=["^projection_", "pooler/.*/value"]),
  )
  params = some_params(config)
  names = {name.rpartition("/")[0] for name in flat(lora.split(params)[1])}
  assert names == {"projection_up", "projection_down", "pooler/attention/value"}
  merged, base = lora.merge(params, config)
  np.testing.assert_allclose(embed(base, merged), embed(config, params), atol=1e-5)
  assert np.abs(embed(base, lora.split(params)[0]) - embed(base, merged)).max() > 0.01


def test_bfloat16_adapters_run_in_the_compute_dtype():
  config = dataclasses.replace(
    CONFIG, transformer=dataclasses.replace(CONFIG.transformer, dtype="bfloat16")
  )
  params = some_params()
  jaxpr = jax.make_jaxpr(Embedder(config).embed)(params, texts())
  rank_products = [
    line for line in str(jaxpr).splitlines() if "dot_general" in line and ",3]" in line
  ]
  assert rank_products
  assert all(":bf16[" in line for line in rank_products)
  apart = np.abs(embed(config, params) - embed(CONFIG, params)).max()
  assert 0 < apart < 0.1


def test_targets_without_a_map():
  config = dataclasses.replace(CONFIG, lora=LoraConfig(targets=("mlp/up", "attn/q")))
  with pytest.raises(
    ConfigError, match="'attn/q' matches no linear map.*encoder/groups/layer_0"
  ):
    jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"rank": 0}, "LoraConfig.rank"),
    ({"alpha": 0.0}, "LoraConfig.alpha"),
    ({"alpha": float("inf")}, "LoraConfig.alpha"),
    ({"targets": ()}, "LoraConfig.targets"),
    ({"targets": "mlp"}, "LoraConfig.targets"),
    ({"targets": ("(",)}, "is no pattern"),
  ],
)
def test_configuration_refuses(arguments, message):
  with pytest.raises(ConfigError, match=message):
    LoraConfig(**arguments)


def test_configuration_in_json():
  for config in (CONFIG, BASE):
    kept = json.loads(json.dumps(config.to_json()))
    assert EmbedderConfig.from_json(kept) == config
  kept = BASE.to_json()
  del kept["lora"]  # as checkpoints were written before
  assert EmbedderConfig.from_json(kept) == BASE
