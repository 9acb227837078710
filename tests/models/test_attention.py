"""Every backend against attention by its definition, in float64 numpy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from embgemma.errors import ConfigError
from embgemma.models import attention, attention_block_local, attention_mask
from embgemma.models.attention_block_local import plan
from embgemma.models.attention_mask import Band
from embgemma.models.config import TransformerConfig

# Odd, and no power of two: its root is no binary fraction.
_CONFIG = TransformerConfig(
  vocab_size=7,
  num_layers=2,
  width=8,
  mlp_width=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  attention_pattern=("local", "global"),
)
_LENGTHS = (256, 257, 258, 600)  # of blocks whole, and not
# Mask kind and window; left differs from right.
_BANDS = (
  ("bidirectional", (16, 16)),
  ("bidirectional", (3, 70)),
  ("bidirectional", (100, 0)),
  ("causal", (63, 0)),
  ("causal", (64, 9)),
)


def _config(mask="bidirectional", window=(256, 256), kv_heads=2, **changes):
  return dataclasses.replace(
    _CONFIG, mask=mask, window=window, num_kv_heads=kv_heads, **changes
  )


def _case(config: TransformerConfig, length: int, rows: int = 2, seed: int = 0):
  """Queries, keys, values, an output's gradient, and texts with padding after them."""
  rng = np.random.default_rng(seed)
  heads, kv_heads = config.num_heads, config.num_kv_heads
  shapes = [(rows, length, n, config.head_dim) for n in (heads, kv_heads, kv_heads)]
  query, key, value, gradient = (rng.normal(size=s) for s in (*shapes, shapes[0]))
  text_ids = np.full((rows, length), 9, np.int32)
  text_ids[0, : length - 5] = 4  # one long text
  ends = np.sort(rng.choice(np.arange(1, length), 4, replace=False))
  for row in range(1, rows):
    for text, (start, end) in enumerate(itertools.pairwise(ends)):
      text_ids[row, start - ends[0] : end - ends[0]] = text
  return (query, key, value, gradient), text_ids


def _allowed(config: TransformerConfig, kind: str, text_ids: np.ndarray) -> np.ndarray:
  """The mask, word by word."""
  length = text_ids.shape[1]
  query, key = np.arange(length)[:, None], np.arange(length)[None, :]
  allowed = text_ids[:, :, None] == text_ids[:, None, :]
  if kind == "local":
    left, right = config.window
    allowed &= (query - left <= key) & (key <= query + right)
  if config.mask == "causal":
    allowed &= key <= query
  return allowed


def _expected(config, kind, arrays, text_ids):
  """Output and gradients of queries, keys and values, in float64."""
  return _softmax(config, arrays, _allowed(config, kind, text_ids))


def _softmax(config, arrays, allowed):
  query, key, value, gradient = arrays
  scale = (config.query_scalar or config.head_dim) ** -0.5
  repeats = query.shape[2] // key.shape[2]
  key, value = (np.repeat(x, repeats, axis=2) for x in (key, value))
  logits = np.einsum("rqhd,rkhd->rhqk", query, key, optimize=True) * scale
  weights = np.where(allowed[:, None], np.exp(logits), 0)
  weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)  # none: zeros
  dweights = np.einsum("rqhd,rkhd->rhqk", gradient, value, optimize=True)
  mean = (weights * dweights).sum(axis=-1, keepdims=True)
  dlogits = weights * (dweights - mean) * scale

  def shared(x):  # the sum over the queries' heads of each key head
    return x.reshape(*x.shape[:2], -1, repeats, x.shape[-1]).sum(axis=3)

  return (
    np.einsum("rhqk,rkhd->rqhd", weights, value, optimize=True),
    np.einsum("rhqk,rkhd->rqhd", dlogits, key, optimize=True),
    shared(np.einsum("rhqk,rqhd->rkhd", dlogits, query, optimize=True)),
    shared(np.einsum("rhqk,rqhd->rkhd", weights, gradient, optimize=True)),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ours(config, kind, query, key, value, gradient, text_ids):
  positions = jnp.zeros_like(text_ids)
  inputs = attention.prepare(config, positions, text_ids)[kind]
  compute = functools.partial(attention.attend, config, kind, inputs=inputs)
  out, pull_back = jax.vjp(compute, query, key, value)
  return out, *pull_back(gradient)


def _fresh():
  """`_ours`, traced anew: what a test patches takes part."""
  return jax.jit(lambda *args: _ours.__wrapped__(*args), static_argnums=(0, 1))


def _check(config, kind, length, tolerance=2e-5, compute=_ours, **case):
  arrays, text_ids = _case(config, length, **case)
  expected = _expected(config, kind, arrays, text_ids)
  _close(compute, config, kind, arrays, (text_ids,), expected, tolerance)


def _close(compute, config, kind, arrays, ids, expected, tolerance):
  dtype = jnp.dtype(config.dtype)
  ours = compute(config, kind, *(jnp.asarray(x, dtype) for x in arrays), *ids)
  names = ("out", "query", "key", "value")
  for name, x, y in zip(names, ours, expected, strict=True):
    assert x.dtype == dtype
    x = np.asarray(x, np.float64)
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(), err_msg=name)


@pytest.mark.parametrize(
  ("length", "kv_heads"), [*((n, 1) for n in _LENGTHS), (257, 2), (513, 2)]
)
@pytest.mark.parametrize(("mask", "window"), _BANDS)
def test_windows(mask, window, length, kv_heads, monkeypatch):
  """In blocks, of which short rows are too few at their real size."""
  monkeypatch.setattr(attention_block_local, "_BLOCK", 64)
  config = _config(mask, window, kv_heads, attention="block_local")
  assert plan(attention_mask.band(config, "local", length), length).blocks > 3
  _check(config, "local", length, compute=_fresh())


@pytest.mark.parametrize("length", [512, 513, 600])
def test_blocks_of_the_real_size(length):
  config = _config(window=(3, 70), kv_heads=1)
  assert plan(attention_mask.band(config, "local", length), length).block == 128
  _check(config, "local", length)


@pytest.mark.parametrize("backend", ["reference", "block_local"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
  ("mask", "kind", "length"),
  [
    ("bidirectional", "global", 513),
    ("causal", "global", 258),
    # EmbeddingGemma's window: of a row of 258 one pair of columns is out of it.
    ("bidirectional", "local", 257),
    ("bidirectional", "local", 258),
    ("bidirectional", "local", 600),
  ],
)
def test_whole_rows(backend, mask, kind, length, kv_heads):
  config = _config(mask, kv_heads=kv_heads, attention=backend)
  assert plan(attention_mask.band(config, kind, length), length).blocks == 1
  _check(config, kind, length)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_reference_with_windows(kv_heads):
  _check(
    _config("bidirectional", (3, 70), kv_heads, attention="reference"), "local", 257
  )


def _memory_case(config: TransformerConfig, kind: str, length: int, memory: int):
  """Queries, keys, values, an output's gradient, ids of texts and of the memory."""
  rng = np.random.default_rng(1)
  keys = memory if kind == "across" else length + memory
  heads, kv_heads = config.num_heads, config.num_kv_heads
  sizes = ((length, heads), (keys, kv_heads), (keys, kv_heads), (length, heads))
  arrays = [rng.normal(size=(3, n, h, config.head_dim)) for n, h in sizes]

  def ids(total: int, *rows: tuple[int, ...]) -> np.ndarray:
    texts = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    return np.stack([np.pad(t, (0, total - len(t))) for t in texts]).astype(np.int32)

  # Of the second row's texts the memory has no second and nothing is padding there;
  # of the third row it has none at all.
  text_ids = ids(length, (length - 9, 5), (10, 4, length - 20), (length,))
  return arrays, text_ids, ids(memory, (3, memory - 7), (8, 0, memory - 8), ())


@pytest.mark.parametrize(
  ("backend", "kind", "length", "memory", "kv_heads"),
  [
    ("reference", "local", 40, 37, 2),
    ("reference", "across", 40, 129, 1),
    ("block_local", "local", 300, 37, 2),
    ("block_local", "global", 40, 300, 1),
    ("block_local", "across", 40, 129, 2),
    ("block_local", "across", 64, 64, 1),
  ],
)
def test_memory(backend, kind, length, memory, kv_heads, attend_with_memory):
  """Every query sees all of its text's memory, whatever the window."""
  config = _config("causal", (16, 0), kv_heads, attention=backend)
  arrays, text_ids, memory_ids = _memory_case(config, kind, length, memory)
  allowed = text_ids[:, :, None] == memory_ids[:, None, :]
  if kind == "across":
    assert not allowed.any(axis=-1).all()
  else:
    allowed = np.concatenate([_allowed(config, kind, text_ids), allowed], axis=-1)
  expected = _softmax(config, arrays, allowed)
  _close(
    attend_with_memory, config, kind, arrays, (text_ids, memory_ids), expected, 2e-5
  )


def test_query_scalar():
  _check(_config(window=(16, 16), query_scalar=3.0), "local", 300)


@pytest.mark.parametrize("length", [64, 300])
def test_bfloat16(length):
  _check(_config(window=(16, 16), dtype="bfloat16"), "local", length, tolerance=0.02)


@pytest.mark.parametrize("limit", [1, 40_000, 100_000])
def test_a_few_units_at_a_time(limit, monkeypatch):
  """Five rows of one block, and of three: the limit divides neither."""
  monkeypatch.setattr(attention_block_local, "_CPU_LOGITS", limit)
  compute = _fresh()
  config = _config(window=(16, 16))
  _check(config, "local", 64, rows=5, compute=compute)
  _check(config, "local", 300, rows=5, compute=compute)


@given(
  length=st.sampled_from([1, 2, 17, 40]),
  window=st.tuples(st.integers(0, 50), st.integers(0, 50)),
  mask=st.sampled_from(["bidirectional", "causal"]),
  kind=st.sampled_from(["local", "global"]),
  texts=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
@settings(max_examples=100)
def test_mask_is_its_definition(length, window, mask, kind, texts):
  config = _config(mask, window)
  text_ids = np.sort(np.asarray(texts[:length], np.int32))[None]
  band = attention_mask.band(config, kind, length)
  expected = _allowed(config, kind, text_ids)
  np.testing.assert_array_equal(attention_mask.dense(band, text_ids), expected)


@given(
  length=st.sampled_from([129, 384, 600]),
  band=st.tuples(st.integers(0, 200), st.integers(0, 200)),
  ends=st.lists(st.integers(1, 700), max_size=4),
)
@settings(max_examples=25)
def test_block_mask_is_the_mask(length, band, ends):
  """Each block's part of it, at the columns that the plan says; nothing elsewhere."""
  band = Band(*(min(side, length - 1) for side in band))
  text_ids = np.searchsorted(np.sort(ends), np.arange(length), side="right")[None]
  cut = plan(band, length)
  blocks = np.asarray(attention_block_local.block_mask(band, text_ids))[0]
  whole = np.zeros((cut.blocks * cut.block, length), bool)
  for i, block in enumerate(blocks):
    for column in range(cut.span):
      key = i * cut.block - cut.left + column
      seen = block[:, column]
      if 0 <= key < length:
        whole[i * cut.block : (i + 1) * cut.block, key] = seen
      else:
        assert not seen.any()
  expected = np.asarray(attention_mask.dense(band, text_ids))[0]
  np.testing.assert_array_equal(whole[:length], expected)


@pytest.mark.parametrize(
  ("band", "length", "logits"),
  [
    (Band(64, 64), 2048, 16 * 128 * 256),
    (Band(256, 256), 2048, 16 * 128 * 640),
    (Band(256, 256), 1024, 8 * 128 * 640),
    (Band(256, 256), 512, 512 * 512),  # blocks would see 640 keys
    (Band(255, 255), 256, 256 * 256),
    (Band(511, 0), 2048, 16 * 128 * 639),
  ],
)
def test_cost_is_that_of_the_window(band, length, logits):
  cut = plan(band, length)
  assert cut.blocks * cut.block * cut.span == logits


def test_no_array_of_all_logits():
  """On CPU, whatever the rows: neither direction holds [R, H, L, L]."""
  config = _config(kv_heads=1)
  arrays, text_ids = _case(config, 256, rows=64)
  shapes = [jax.ShapeDtypeStruct(x.shape, np.float32) for x in (*arrays, text_ids)]
  shapes[-1] = shapes[-1].update(dtype=np.int32)

  def memory(backend):
    chosen = dataclasses.replace(config, attention=backend)
    compiled = _ours.lower(chosen, "global", *shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * 64 * config.num_heads * 256 * 256
  assert memory("reference") > logits
  assert memory("block_local") < logits / 2


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (4, 4), (3, 1)])
def test_heads_over_an_automatic_tensor_axis(heads, kv_heads):
  """Rows by hand, heads by the compiler; 3 heads or 2 key heads cannot be in 4."""
  config = _config(window=(16, 16), kv_heads=kv_heads, num_heads=heads)
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  rows = PartitionSpec("data")

  def compute(config, kind, *arrays):
    shard = jax.shard_map(
      functools.partial(_ours.__wrapped__, config, kind),
      mesh=mesh,
      in_specs=rows,
      out_specs=rows,
      axis_names={"data"},
      check_vma=False,
    )
    return jax.jit(shard)(*arrays)

  _check(config, "local", 300, rows=4, compute=compute)


@pytest.mark.parametrize(
  ("platform", "backend"),
  [("tpu", "splash"), ("cpu", "block_local"), ("gpu", "block_local")],
)
def test_auto(platform, backend):
  assert attention.resolve(_CONFIG, platform) == _config(attention=backend)


@pytest.mark.parametrize(
  ("changes", "platform"),
  [
    ({"attention": "reference"}, "tpu"),
    ({"attention": "block_local"}, "tpu"),
    ({"attention": "splash"}, "tpu"),
    ({"attention": "cudnn", "dtype": "bfloat16"}, "gpu"),
  ],
)
def test_a_choice_stays(changes, platform):
  config = _config(**changes)
  assert attention.resolve(config, platform) == config


@pytest.mark.parametrize(
  ("changes", "platform", "message"),
  [
    ({"attention": "splash"}, "cpu", "'splash' runs on TPU, the devices are cpu"),
    ({"attention": "cudnn"}, "tpu", "'cudnn' runs on GPU, the devices are tpu"),
    ({"attention": "cudnn"}, "gpu", "'cudnn' computes in bfloat16.*is 'float32'"),
  ],
)
def test_a_choice_that_cannot_run(changes, platform, message):
  with pytest.raises(ConfigError, match=message):
    attention.resolve(_config(**changes), platform)


def test_row_lengths():
  ladder = (63, 64, 128, 200, 256)
  assert attention.row_lengths(_config(attention="splash"), ladder) == (128, 256)
  assert attention.row_lengths(_config(attention="cudnn"), ladder) == (
    64,
    128,
    200,
    256,
  )
  assert attention.row_lengths(_config(attention="block_local"), ladder) == ladder


@pytest.mark.parametrize(
  ("backend", "length", "message"),
  [
    ("splash", 200, "rows of 200 tokens; it takes multiples of 128.*'block_local'"),
    ("cudnn", 201, "rows of 201 tokens; it takes even row lengths.*'block_local'"),
  ],
)
def test_rows_of_a_wrong_length(backend, length, message):
  config = _config(attention=backend)
  arrays, text_ids = _case(config, length)
  with pytest.raises(ConfigError, match=message):
    _ours(config, "local", *(jnp.asarray(x, jnp.float32) for x in arrays), text_ids)
