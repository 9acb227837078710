"""TPU's splash attention: interpreted on CPU, and compiled for an absent TPU."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from embgemma.errors import ConfigError
from embgemma.models import attention, attention_mask, attention_splash
from embgemma.models.config import TransformerConfig
from embgemma.models.transformer import Transformer

_CONFIG = TransformerConfig(
  vocab_size=31,
  num_layers=3,
  width=16,
  mlp_width=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=16,
  attention_pattern=("local", "global"),
  attention="splash",
  remat="full",
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, request):
  if "compiled" in request.fixturenames:
    return
  backend = attention._BACKENDS["splash"]
  attend = functools.partial(attention_splash.attend, interpret=True)
  monkeypatch.setitem(attention._BACKENDS, "splash", backend._replace(attend=attend))


@pytest.fixture
def compiled():
  """The kernel as it is on TPU."""


def _arrays(config, rows, length):
  rng = np.random.default_rng(0)
  heads, kv_heads = config.num_heads, config.num_kv_heads
  shapes = [(rows, length, n, config.head_dim) for n in (heads, kv_heads, kv_heads)]
  arrays = [rng.normal(size=s).astype(config.dtype) for s in (*shapes, shapes[0])]
  # One text a row and padding; three texts and padding.
  text_ids = np.full((rows, length), 9, np.int32)
  text_ids[0, : length - 3] = 0
  text_ids[1:, : length - 40] = np.searchsorted(
    [70, 333], np.arange(length - 40), side="right"
  )
  return arrays, text_ids


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(config, kind, query, key, value, gradient, text_ids):
  inputs = attention.prepare(config, jnp.zeros_like(text_ids), text_ids)[kind]
  compute = functools.partial(attention.attend, config, kind, inputs=inputs)
  out, pull_back = jax.vjp(compute, query, key, value)
  return out, *pull_back(gradient)


def _close(ours, expected, tolerance):
  for x, y in zip(ours, expected, strict=True):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
  ("mask", "window", "kind", "kv_heads", "length"),
  [
    ("bidirectional", (64, 64), "local", 1, 512),
    ("bidirectional", (256, 256), "local", 1, 512),
    ("bidirectional", (256, 256), "local", 2, 512),
    ("bidirectional", (64, 100), "local", 2, 384),
    ("bidirectional", (600, 70), "local", 1, 256),
    ("bidirectional", (64, 64), "global", 1, 512),
    ("causal", (64, 64), "local", 1, 512),
    ("causal", (511, 0), "local", 1, 512),
    ("causal", (64, 64), "global", 2, 512),
  ],
)
def test_against_reference(mask, window, kind, kv_heads, length):
  config = dataclasses.replace(
    _CONFIG, mask=mask, window=window, num_heads=2 * kv_heads, num_kv_heads=kv_heads
  )
  arrays, text_ids = _arrays(config, 2, length)
  reference = dataclasses.replace(config, attention="reference")
  expected = _run(reference, kind, *arrays, text_ids)
  _close(_run(config, kind, *arrays, text_ids), expected, 1e-5)


@pytest.mark.parametrize(
  ("kind", "kv_heads", "length", "memory"),
  [
    ("local", 2, 128, 384),
    ("global", 1, 256, 128),
    ("across", 2, 128, 384),
  ],
)
def test_memory_against_reference(kind, kv_heads, length, memory, attend_with_memory):
  config = dataclasses.replace(
    _CONFIG,
    mask="causal",
    window=(100, 0),
    num_heads=2 * kv_heads,
    num_kv_heads=kv_heads,
  )
  (query, key, value, gradient), text_ids = _arrays(config, 3, length)
  more = _arrays(config, 3, memory)[0]
  if kind == "across":
    key, value = more[1:3]
  else:
    key = np.concatenate([key, more[1]], axis=1)
    value = np.concatenate([value, more[2]], axis=1)
  # The first row's text and no padding; the second's first text alone; nothing of the
  # third row's texts.
  memory_ids = np.full((3, memory), 9, np.int32)
  memory_ids[0], memory_ids[1, :50] = 0, 0
  arrays = (query, key, value, gradient, text_ids, memory_ids)
  reference = dataclasses.replace(config, attention="reference")
  expected = attend_with_memory(reference, kind, *arrays)
  _close(attend_with_memory(config, kind, *arrays), expected, 1e-5)


@pytest.mark.parametrize(("length", "memory"), [(128, 100), (100, 128)])
@pytest.mark.parametrize("kind", ["local", "across"])
def test_memories_of_a_wrong_length(kind, length, memory, attend_with_memory):
  arrays, text_ids = _arrays(_CONFIG, 2, length)
  keys = memory if kind == "across" else length + memory
  key, value = _arrays(_CONFIG, 2, keys)[0][1:3]
  memory_ids = np.zeros((2, memory), np.int32)
  with pytest.raises(
    ConfigError, match="rows of 100 tokens; it takes multiples of 128"
  ):
    attend_with_memory(
      _CONFIG, kind, arrays[0], key, value, arrays[3], text_ids, memory_ids
    )


def test_window_is_exact():
  """A window one narrower or wider on either side is another result."""
  arrays, text_ids = _arrays(_CONFIG, 2, 512)

  def out(window, backend):
    config = dataclasses.replace(_CONFIG, window=window, attention=backend)
    return np.asarray(_run(config, "local", *arrays, text_ids)[0])

  ours = out((64, 100), "splash")
  for window in ((63, 100), (65, 100), (64, 99), (64, 101)):
    assert np.abs(out(window, "reference") - ours).max() > 1e-3


def test_bfloat16():
  config = dataclasses.replace(_CONFIG, window=(64, 64), dtype="bfloat16")
  arrays, text_ids = _arrays(config, 2, 256)
  reference = dataclasses.replace(config, attention="reference")
  expected = _run(reference, "local", *arrays, text_ids)
  _close(_run(config, "local", *arrays, text_ids), expected, 0.03)


@pytest.mark.parametrize(
  ("window", "length", "block"),
  [
    ((256, 256), 512, 256),
    ((256, 256), 2048, 256),
    ((256, 256), 384, 128),
    ((64, 64), 1024, 128),
    ((4096, 4096), 2048, 512),
    ((4096, 4096), 768, 256),
    ((511, 0), 2048, 512),
    ((300, 0), 2048, 256),
  ],
)
def test_blocks(window, length, block):
  config = dataclasses.replace(_CONFIG, window=window)
  band = attention_mask.band(config, "local", length)
  sizes = attention_splash._block_sizes(band, length)
  assert sizes.has_backward_blocks
  assert sizes.block_q == sizes.block_kv == sizes.block_kv_dq == block


def test_blocks_out_of_reach_are_not_visited():
  """The grid of a row of 8 blocks has 3 columns for a window of one block."""
  band = attention_mask.band(
    dataclasses.replace(_CONFIG, window=(128, 128)), "local", 1024
  )
  kernel = kernels.make_splash_mqa(
    attention_splash._heads_mask(band, 1024, 2),
    block_sizes=attention_splash._block_sizes(band, 1024),
    head_shards=1,
    q_seq_shards=1,
  )
  for info in (kernel.fwd_mask_info, kernel.dq_mask_info):
    assert info.block_mask.shape[-1] == 3


def _stack_gradients(config, mesh, axis_names):
  """Gradients of a scanned stack, rows split over "data"."""
  model = Transformer(config)

  def shard(params, *packed):
    def loss(params):
      hidden = model.apply({"params": params}, *packed).astype(jnp.float32)
      return jnp.sum(jnp.sin(hidden))

    return jax.tree.map(lambda g: jax.lax.psum(g, "data"), jax.grad(loss)(params))

  return jax.shard_map(
    shard,
    mesh=mesh,
    in_specs=(PartitionSpec(), *(PartitionSpec("data"),) * 3),
    out_specs=PartitionSpec(),
    axis_names=axis_names,
    check_vma=False,
  )


@pytest.mark.parametrize("tensor", [1, 2])
def test_in_a_stack_over_a_mesh(tensor):
  """Scanned, rematerialised, rows by hand; heads by hand or by the compiler."""
  config = dataclasses.replace(
    _CONFIG, num_layers=2, attention_pattern=("local",), window=(30, 40)
  )
  mesh = jax.make_mesh((2, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  axis_names = {"data"} if tensor > 1 else {"data", "tensor"}
  rng = np.random.default_rng(0)
  _, text_ids = _arrays(config, 2, 128)
  tokens = rng.integers(0, config.vocab_size, text_ids.shape).astype(np.int32)
  positions = np.broadcast_to(np.arange(128, dtype=np.int32), text_ids.shape)
  packed = (tokens, positions, text_ids)
  params = nn.unbox(Transformer(config).init(jax.random.key(0), *packed)["params"])
  gradients = [
    jax.jit(
      _stack_gradients(dataclasses.replace(config, attention=backend), mesh, axis_names)
    )(params, *packed)
    for backend in ("reference", "splash")
  ]
  for expected, ours in zip(*map(jax.tree.leaves, gradients), strict=True):
    scale = np.abs(expected).max()
    assert scale > 0
    np.testing.assert_allclose(ours, expected, atol=1e-4 * scale)


@pytest.fixture
def tpu_devices(monkeypatch):
  """Sixteen chips of TPU v5e, for compilation only."""
  pytest.importorskip("libtpu")
  # Do not ask a cloud's metadata server what machine this is.
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
  return np.asarray(topology.devices)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tensor", [1, 2])
def test_compiles_for_tpu(tensor, tpu_devices):
  """At EmbeddingGemma's widths, one layer of each kind."""
  config = TransformerConfig(
    vocab_size=256,
    num_layers=4,
    width=768,
    mlp_width=1152,
    num_heads=3,
    num_kv_heads=1,
    head_dim=256,
    attention_pattern=("local", "global"),
    dtype="bfloat16",
    remat="full",
  )
  config = attention.resolve(config, "tpu")
  mesh = Mesh(tpu_devices.reshape(-1, tensor), ("data", "tensor"))
  axis_names = {"data"} if tensor > 1 else {"data", "tensor"}
  packed = [
    jax.ShapeDtypeStruct(
      (2 * mesh.shape["data"], 512),
      jnp.int32,
      sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
  ] * 3
  whole = NamedSharding(mesh, PartitionSpec())
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), *packed)
  params = jax.tree.map(lambda x: x.update(sharding=whole), nn.unbox(shapes)["params"])
  step = _stack_gradients(config, mesh, axis_names)
  text = jax.jit(step).lower(params, *packed).compile().as_text()
  # Of each kind: forward, forward again, queries' gradient, keys' and values'.
  assert text.count('custom_call_target="tpu_custom_call"') == 8


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["local", "across"])
def test_memory_compiles_for_tpu(kind, tpu_devices, attend_with_memory):
  """At EmbeddingGemma's head width; rows are longer on one side than on the other."""
  config = dataclasses.replace(
    _CONFIG,
    num_heads=3,
    head_dim=256,
    mask="causal",
    window=(511, 0),
    dtype="bfloat16",
  )
  whole = NamedSharding(Mesh(tpu_devices.flat[:1], ("data",)), PartitionSpec())
  keys = 1024 if kind == "across" else 512 + 1024
  heads = [(512, 3), (keys, 1), (keys, 1), (512, 3)]
  shapes = [((2, n, h, 256), jnp.bfloat16) for n, h in heads]
  shapes += [((2, 512), jnp.int32), ((2, 1024), jnp.int32)]
  arrays = [jax.ShapeDtypeStruct(s, dtype, sharding=whole) for s, dtype in shapes]
  text = attend_with_memory.lower(config, kind, *arrays).compile().as_text()
  # Forward, queries' gradient, keys' and values'.
  assert text.count('custom_call_target="tpu_custom_call"') == 3
