"""Poolers against float64 numpy, text by text; packing must not show."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import packing
from embgemma.models.config import POOLERS, EmbedderConfig, TransformerConfig
from embgemma.models.embedder import Embedder, abstract_packed_texts
from embgemma.models.poolers import Pooler
from embgemma.typing import PackedTexts

_TEXTS = 8
_LENGTH = 16
_WIDTH = 12
_HEADS = 3
# Shapes never change, so that each pooler compiles once.
_TEXT_LENGTHS = st.lists(
  st.integers(0, _LENGTH), min_size=_TEXTS, max_size=_TEXTS
).filter(any)


def _packed(texts, one_a_row=False) -> PackedTexts:
  """Token arrays, some of them empty, in as many rows and slots as texts."""
  lengths = np.array([len(text) for text in texts])
  layout = packing.best_fit(lengths, _LENGTH)
  row, offset = layout.row, layout.offset
  if one_a_row:
    row, offset = np.arange(_TEXTS), np.zeros(_TEXTS, int)
  (given_texts,) = np.nonzero(lengths)
  # A text's slot is its number, so that empty ones stay empty.
  placement = packing.Placement(
    given_texts, row[given_texts], offset[given_texts], given_texts
  )
  shape = packing.GroupShape(_LENGTH, 1, _TEXTS, _TEXTS)
  packed = packing.place_texts([texts[i] for i in given_texts], [placement], shape)
  return jax.tree.map(lambda array: array[0], packed)


def _random_texts(lengths, seed=0, vocabulary=50):
  rng = np.random.default_rng(seed)
  return [rng.integers(1, vocabulary, n).astype(np.int32) for n in lengths]


def _scatter(states, packed: PackedTexts) -> np.ndarray:
  """The states of texts at their places in [R, L, D]; noise in padding."""
  rng = np.random.default_rng(1)
  hidden = rng.normal(size=(*packed.tokens.shape, _WIDTH)).astype(np.float32)
  flat = hidden.reshape(-1, _WIDTH)
  for start, state in zip(packed.starts, states, strict=True):
    flat[start : start + len(state)] = state
  return hidden


def _expected(kind, state, params) -> np.ndarray:
  x = state.astype(np.float64)
  if kind == "mean":
    return x.mean(axis=0)
  if kind == "first":
    return x[0]
  if kind == "last":
    return x[-1]
  weights = params["params"]["attention"]
  key = (x @ np.float64(weights["key"]["kernel"])).reshape(len(x), _HEADS, -1)
  value = (x @ np.float64(weights["value"]["kernel"])).reshape(len(x), _HEADS, -1)
  query = np.float64(weights["query"]).reshape(_HEADS, -1)
  logits = np.sum(key * query, axis=-1) / np.sqrt(_WIDTH)
  scores = np.exp(logits - logits.max(axis=0))
  scores /= scores.sum(axis=0)
  return np.sum(scores[..., None] * value, axis=0).reshape(-1)


@functools.cache
def _pooler(kind):
  pooler = Pooler(kind, _HEADS)
  packed = _packed(_random_texts([1] * _TEXTS))
  hidden = jnp.zeros((*packed.tokens.shape, _WIDTH))
  params = nn.unbox(jax.jit(pooler.init)(jax.random.key(0), hidden, packed))
  return jax.jit(pooler.apply), jax.device_get(params)


@pytest.mark.parametrize("kind", POOLERS)
@settings(max_examples=20, deadline=None)
@given(lengths=_TEXT_LENGTHS)
def test_pools_each_text_alone(kind, lengths):
  apply, params = _pooler(kind)
  rng = np.random.default_rng(2)
  states = [rng.normal(size=(n, _WIDTH)).astype(np.float32) for n in lengths]
  packed = _packed(_random_texts(lengths))
  pooled = apply(params, _scatter(states, packed), packed)
  assert pooled.dtype == jnp.float32
  assert np.isfinite(pooled).all()
  for vector, state in zip(pooled, states, strict=True):
    if len(state):
      expected = _expected(kind, state, params)
      np.testing.assert_allclose(vector, expected, atol=2e-6)
    elif kind in ("mean", "attention"):
      np.testing.assert_array_equal(vector, 0)


@pytest.mark.parametrize("kind", POOLERS)
def test_pools_bfloat16_in_float32(kind):
  """A mean rounded to bfloat16 on the way would be 100 times further off."""
  apply, params = _pooler(kind)
  rng = np.random.default_rng(3)
  states = [
    np.asarray(jnp.asarray(rng.normal(size=(16, _WIDTH)), jnp.bfloat16), np.float32)
    for _ in range(_TEXTS)
  ]
  packed = _packed(_random_texts([16] * _TEXTS))
  hidden = jnp.asarray(_scatter(states, packed), jnp.bfloat16)
  for vector, state in zip(apply(params, hidden, packed), states, strict=True):
    np.testing.assert_allclose(vector, _expected(kind, state, params), atol=5e-6)


def test_attention_pooler_with_scores_far_apart():
  """Texts whose scores no common maximum could hold in float32."""
  apply, params = _pooler("attention")
  rng = np.random.default_rng(4)
  scales = [1e-2, 1.0, 1e2, 1e3, 1e3, 1e2, 1.0, 1e-2]
  states = [s * rng.normal(size=(5, _WIDTH)).astype(np.float32) for s in scales]
  packed = _packed(_random_texts([5] * _TEXTS))
  hidden = _scatter(states, packed)
  pooled = apply(params, hidden, packed)
  for vector, state in zip(pooled, states, strict=True):
    expected = _expected("attention", state, params)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(vector, expected, atol=1e-4 * scale)
  gradient = jax.grad(lambda h: jnp.sum(apply(params, h, packed) ** 2))(hidden)
  assert np.isfinite(gradient).all()


def _embedder(kind, num_layers):
  config = EmbedderConfig(
    TransformerConfig(
      vocab_size=50,
      num_layers=num_layers,
      width=24,
      mlp_width=32,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      attention_pattern=("local", "global"),
      window=(3, 3),
    ),
    kind,
    _HEADS,
    hidden_width=20,
    embedding_width=16,
    matryoshka_widths=(16,),
  )
  model = Embedder(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0), abstract_packed_texts())
  rng = np.random.default_rng(5)

  def draw(leaf):
    return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)

  return model, jax.tree.map(draw, nn.unbox(shapes)["params"])


@functools.cache
def _embed(kind):
  model, params = _embedder(kind, num_layers=2)
  return functools.partial(jax.jit(model.embed), params)


@pytest.mark.parametrize("kind", POOLERS)
@settings(max_examples=10, deadline=None)
@given(lengths=_TEXT_LENGTHS, seed=st.integers(0, 2**31))
def test_packing_does_not_show(kind, lengths, seed):
  embed = _embed(kind)
  texts = _random_texts(lengths, seed)
  packed = embed(_packed(texts))
  alone = embed(_packed(texts, one_a_row=True))
  assert np.isfinite(packed).all()
  for ours, expected, text in zip(packed, alone, texts, strict=True):
    if len(text):
      np.testing.assert_allclose(ours, expected, atol=1e-5)
      np.testing.assert_allclose(np.linalg.norm(ours), 1, atol=1e-5)
    elif kind in ("mean", "attention"):
      np.testing.assert_array_equal(ours, 0)


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_empty_slots_have_finite_gradients(kind):
  model, params = _embedder(kind, num_layers=1)
  packed = _packed(_random_texts([0, 3, 0, 16, 0, 0, 5, 0]))

  def loss(params, packed):
    vectors = model.embed(params, packed)
    # Not the norms, whose gradient is zero; empty slots count as the others do.
    return jnp.sum(vectors * jnp.arange(vectors.size).reshape(vectors.shape))

  gradients = jax.jit(jax.grad(loss))(params, packed)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
  assert np.abs(gradients["projection_down"]["kernel"]).max() > 0
