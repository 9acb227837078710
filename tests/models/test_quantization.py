"""Formats against gguf and numpy; which parameters follow which rule."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embgemma.errors import ConfigError
from embgemma.models import quantization
from embgemma.models.config import WEIGHT_FORMATS, QuantizationConfig
from embgemma.models.quantization import FORMATS

_TYPES = {
  "q4_0": gguf.GGMLQuantizationType.Q4_0,
  "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def reference(x, name):
  """Codes and values as gguf has them, of blocks along the last axis."""
  packed = gguf.quants.quantize(x, _TYPES[name])
  values = gguf.quants.dequantize(packed, _TYPES[name])
  blocks = packed.reshape(-1, 18 if name == "q4_0" else 34)[:, 2:]
  if name == "q8_0":
    codes = blocks.view(np.int8)
  else:
    codes = np.concatenate([blocks & 15, blocks >> 4], axis=1).astype(np.int8) - 8
  return codes.reshape(x.shape), values


_BLOCKS = hnp.arrays(
  np.float32,
  (4, 64),
  # Of what is next to nothing XLA makes 0, and so does a scale in float16.
  elements=st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
  | st.sampled_from([0.0, 0.5, -0.5, 1.0, -8.0]),
)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@given(x=_BLOCKS)
def test_blocks_are_ggufs_bit_for_bit(name, x):
  with np.errstate(all="ignore"):
    codes, values = reference(x, name)
  if not np.isfinite(values).all():  # a scale beyond float16
    return
  found = jax.jit(FORMATS[name].quantize, static_argnums=1)(x, -1)
  np.testing.assert_array_equal(found.codes, codes)
  np.testing.assert_array_equal(found.values(), values)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("jit", [True, False])
def test_numbers_next_to_where_codes_change(name, jit):
  """Of 6 % of these a product and a sum rounded as one give another code."""
  generator = np.random.default_rng(0)
  top, last = (8, 7) if name == "q4_0" else (127, 127)
  largest = generator.uniform(0.1, 0.2, (4096, 1)) * generator.choice(
    [-1, 1], (4096, 1)
  )
  between = generator.integers(-last, last, (4096, 31)) + 0.5
  x = np.concatenate([largest, between * largest / top], axis=1).astype(np.float32)
  quantize = FORMATS[name].quantize
  quantized = jax.jit(quantize, static_argnums=1) if jit else quantize
  found = quantized(jnp.asarray(x), -1)
  codes, values = reference(x, name)
  np.testing.assert_array_equal(found.codes, codes)
  np.testing.assert_array_equal(found.values(), values)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("jit", [True, False])
def test_of_a_kernel_blocks_are_along_input_features(name, jit):
  kernel = np.random.default_rng(0).normal(size=(3, 96, 40)).astype(np.float32)
  quantize = FORMATS[name].quantize
  found = (jax.jit(quantize, static_argnums=1) if jit else quantize)(
    jnp.asarray(kernel), -2
  )
  turned = np.ascontiguousarray(kernel.swapaxes(1, 2))  # as torch and ggml have it
  codes, values = reference(turned, name)
  np.testing.assert_array_equal(np.swapaxes(found.codes, 1, 2), codes)
  np.testing.assert_array_equal(np.swapaxes(found.values(), 1, 2), values)
  assert found.scales.shape == (3, 3, 40)
  assert found.scales.dtype == jnp.float16


@pytest.mark.parametrize(("name", "top"), [("int4_channel", 7), ("int8_channel", 127)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_channels_are_their_definition(name, top, axis):
  x = np.random.default_rng(1).normal(size=(48, 20)).astype(np.float32)
  x[3], x[:, 4] = 0, 0
  found = FORMATS[name].quantize(jnp.asarray(x), axis)
  scale = np.abs(x).max(axis, keepdims=True) / np.float32(top)
  with np.errstate(all="ignore"):
    inverse = np.where(scale == 0, 0, 1 / scale).astype(np.float32)
  codes = np.clip(np.rint(x * inverse), -top - 1, top)
  np.testing.assert_array_equal(found.codes, codes)
  np.testing.assert_array_equal(found.values(), (scale * codes).astype(np.float32))
  assert (
    np.abs(np.asarray(found.values()) - x).max() <= np.abs(x).max() / top / 2 + 1e-6
  )


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_go_straight_through(name):
  generator = np.random.default_rng(2)
  kernel, x, weight = (
    generator.normal(size=size).astype(np.float32)
    for size in ((64, 8), (5, 64), (5, 8))
  )

  def loss(kernel, x):
    return jnp.sum(
      weight * jnp.tanh(x @ quantization.straight_through(kernel, name, -2))
    )

  of_kernel, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, x)
  # By hand: all through the rounded kernel, whose gradient is the kernel's.
  rounded = np.asarray(FORMATS[name].quantize(jnp.asarray(kernel), -2).values())
  inner = weight * (1 - np.tanh(x.astype(np.float64) @ rounded) ** 2)
  np.testing.assert_allclose(of_kernel, x.T @ inner, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(of_x, inner @ rounded.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_packed_format(name):
  shape = (96, 64)
  if name in _TYPES:
    packed = gguf.quants.quantize(np.ones(shape[::-1], np.float32), _TYPES[name])
    assert FORMATS[name].bytes(shape, -2) == packed.nbytes
  else:
    assert FORMATS[name].bytes(shape, -2) == 96 * 64 * FORMATS[name].bits // 8 + 64 * 4


def params():
  shapes = {
    ("encoder", "embedder", "table"): (16, 64),
    ("encoder", "group", "attention", "query", "kernel"): (2, 64, 32),
    ("encoder", "group", "mlp", "gate", "kernel"): (2, 64, 32),
    ("encoder", "group", "norm", "scale"): (2, 64),
    ("up", "kernel"): (64, 96),
  }
  tree = {}
  for path, shape in shapes.items():
    inner = tree
    for part in path[:-1]:
      inner = inner.setdefault(part, {})
    inner[path[-1]] = np.random.default_rng(len(path)).normal(size=shape)
  return tree


@pytest.mark.parametrize(
  ("preset", "table", "attention", "other"),
  [
    (quantization.int8_block32(), "q8_0", "q8_0", "q8_0"),
    (quantization.int4_block32(), "q4_0", "q4_0", "q4_0"),
    (quantization.int4_block32(table="q8_0"), "q8_0", "q4_0", "q4_0"),
    (quantization.mixed_channel(), "int4_channel", "int8_channel", "int4_channel"),
  ],
)
def test_presets_are_the_papers(preset, table, attention, other):
  assert {
    "/".join(path): of for path, of in quantization.formats(params(), preset).items()
  } == {
    "encoder/embedder/table": table,
    "encoder/group/attention/query/kernel": attention,
    "encoder/group/mlp/gate/kernel": other,
    "up/kernel": other,
  }


def test_rounded_parameters_are_those_of_the_codes():
  preset = quantization.mixed_channel()
  rounded = quantization.rounded(jax.tree.map(jnp.float32, params()), preset)
  found = quantization.dequantized(quantization.quantized(params(), preset))
  jax.tree.map(np.testing.assert_array_equal, rounded, jax.tree.map(jnp.float32, found))


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([("layer", "q4_0")], "no parameter follows 'layer'"),
    (
      [("kernel", "q4_0"), ("gate", "q8_0")],
      "no parameter follows 'gate' .*an earlier",
    ),
    ([("kernel", "q5")], "must be .pattern, format. with one of the formats q4_0"),
    ([("(", "q4_0")], "'.' is no pattern"),
  ],
)
def test_rules_that_cannot_be_followed(rules, message):
  with pytest.raises(ConfigError, match=message):
    quantization.formats(params(), QuantizationConfig(rules))


def test_features_that_make_no_whole_blocks():
  odd = {"up": {"kernel": np.ones((48, 8))}}
  with pytest.raises(ConfigError, match="up/kernel has 48 input features, and q8_0"):
    quantization.formats(odd, quantization.int8_block32())


def test_every_format_has_a_name():
  assert tuple(FORMATS) == WEIGHT_FORMATS
