"""Where the parameters of adapted models come from, and that they do the same there."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from embgemma.errors import CheckpointError
from embgemma.models import adaptation, embedder, encoder_decoder, lora
from embgemma.models.adaptation import Adapted, Origin, Source, adapt
from embgemma.models.config import (
  BackboneConfig,
  EmbedderConfig,
  LoraConfig,
  TransformerConfig,
)
from embgemma.models.transformer import Transformer
from embgemma.typing import PackedSequences

# A full group of two and one layer left over.
_CAUSAL = TransformerConfig(
  vocab_size=31,
  num_layers=3,
  width=16,
  mlp_width=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  attention_pattern=("local", "global"),
  mask="causal",
  window=(5, 0),
)
_BIDIRECTIONAL = dataclasses.replace(_CAUSAL, mask="bidirectional", window=(3, 2))
_WIDE = dataclasses.replace(_BIDIRECTIONAL, width=20, num_layers=4)

_DECODER = BackboneConfig(decoder=_CAUSAL)
_MERGED = BackboneConfig(_BIDIRECTIONAL, _CAUSAL)
_SEPARATE = BackboneConfig(
  _BIDIRECTIONAL, _CAUSAL, cross_attention="separate", shared_table=False
)
_UNBALANCED = dataclasses.replace(_SEPARATE, encoder=_WIDE)
_EMBEDDER = EmbedderConfig(
  _BIDIRECTIONAL,
  pooler="attention",
  hidden_width=8,
  embedding_width=4,
  matryoshka_widths=(4,),
)
_ADAPTERS = dataclasses.replace(_EMBEDDER, lora=LoraConfig(rank=2))

_CROSS = r"/(cross_attention/|(pre|post)_cross_attention_norm/)"
_HEADS = r"^(pooler|projection_up|projection_down)/"


@functools.cache
def shapes(config: Any) -> Any:
  module = embedder if isinstance(config, EmbedderConfig) else encoder_decoder
  return module.abstract_params(config)


@functools.cache
def source(config: Any, name: str = "A") -> Source:
  """A checkpoint of random numbers, norms and all."""
  rng = np.random.default_rng(len(name))

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return 0.3 * rng.normal(size=leaf.shape).astype(np.float32)

  return Source(name, config, jax.tree.map(draw, shapes(config)))


def named(configs: tuple[Any, ...]) -> Iterator[tuple[Any, str]]:
  return zip(configs, ("A", "BB"), strict=False)


@functools.cache
def adapted(target: Any, *configs: Any) -> Adapted:
  """From sources named A and BB."""
  sources = [source(config, name) for config, name in named(configs)]
  return adapt(target, jax.random.key(0), *sources)


def flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def random(found: Adapted) -> set[str]:
  return {path for path, origin in found.sources.items() if origin is None}


def sequences(empty_encoder: bool = False) -> PackedSequences:
  """Two rows of two examples, with padding."""
  rng = np.random.default_rng(0)

  def rows(lengths: tuple[int, int], size: int) -> tuple[np.ndarray, ...]:
    ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    arrays = rng.integers(1, 31, len(ids)), positions, ids
    return tuple(
      np.tile(np.pad(x, (0, size - len(x))).astype(np.int32), (2, 1)) for x in arrays
    )

  inputs, input_positions, input_ids = rows((9, 4), 16)
  targets, target_positions, target_ids = rows((8, 11), 20)
  return PackedSequences(
    inputs=inputs,
    input_positions=input_positions,
    input_ids=0 * input_ids if empty_encoder else input_ids,
    targets=targets,
    decoder_inputs=targets,
    target_positions=target_positions,
    target_ids=target_ids,
    weights=(target_ids > 0).astype(np.float32),
  )


@functools.partial(jax.jit, static_argnums=0)
def encoded(config: TransformerConfig, params: Any) -> jax.Array:
  packed = sequences()
  return Transformer(config).apply(
    {"params": params}, packed.inputs, packed.input_positions, packed.input_ids
  )


logits = jax.jit(encoder_decoder.logits, static_argnums=0)


@pytest.mark.parametrize("target", [_MERGED, _SEPARATE, _EMBEDDER])
def test_the_encoder_is_the_sources_stack_without_its_mask(target):
  config = target.encoder if target is not _EMBEDDER else target.transformer
  decoder = source(_DECODER).params["decoder"]
  expected = encoded(_BIDIRECTIONAL, decoder)
  actual = encoded(config, adapted(target, _DECODER).params["encoder"])
  np.testing.assert_array_equal(actual, expected)
  assert np.max(np.abs(encoded(_CAUSAL, decoder) - expected)) > 0.1


@pytest.mark.parametrize("target", [_MERGED, _SEPARATE])
def test_without_inputs_the_decoder_is_the_decoder_only_model(target):
  packed = sequences(empty_encoder=True)
  expected = logits(_DECODER, source(_DECODER).params, packed)
  params = adapted(target, _DECODER).params
  real = packed.weights > 0
  actual = logits(target, params, packed)
  np.testing.assert_allclose(actual[real], expected[real], rtol=1e-5, atol=1e-5)
  read = logits(target, params, sequences())
  assert np.max(np.abs(read - actual)[real]) > 0.1


@pytest.mark.parametrize(
  ("target", "sources", "expected"),
  [
    (_MERGED, (_DECODER,), None),
    (_SEPARATE, (_DECODER,), None),
    (_SEPARATE, (_MERGED,), None),
    (_SEPARATE, (_SEPARATE,), None),
    (_MERGED, (_SEPARATE,), None),
    (_MERGED, (_DECODER, _DECODER), None),
    (_DECODER, (_MERGED,), None),
    (_DECODER, (_EMBEDDER,), None),
    (_UNBALANCED, (BackboneConfig(encoder=_WIDE), _DECODER), _CROSS),
    (_EMBEDDER, (_DECODER,), _HEADS),
    (_EMBEDDER, (_MERGED,), _HEADS),
    (_EMBEDDER, (_EMBEDDER,), None),
    (_ADAPTERS, (_EMBEDDER,), lora.PATTERN),
  ],
)
def test_every_parameter_has_a_source_or_is_named_random(target, sources, expected):
  found = adapted(target, *sources)
  expected_shapes = {path: leaf.shape for path, leaf in flat(shapes(target)).items()}
  leaves = flat(found.params)
  assert {path: leaf.shape for path, leaf in leaves.items()} == expected_shapes
  assert found.sources.keys() == leaves.keys()
  trees = {name: flat(source(config, name).params) for config, name in named(sources)}
  for path, origin in found.sources.items():
    assert leaves[path].dtype == np.float32
    if origin is not None:
      assert leaves[path] is trees[origin.checkpoint][origin.path]
  assert random(found) == {
    path for path in leaves if expected and re.search(expected, path)
  }
  every = {Origin(name, path) for name, tree in trees.items() for path in tree}
  used = {origin for origin in found.sources.values() if origin}
  assert used | found.unused.keys() == every
  assert not used & found.unused.keys()
  assert all(size == trees[at[0]][at[1]].size for at, size in found.unused.items())


def test_sides_come_from_the_side_that_fits():
  both = adapted(_SEPARATE, _DECODER)
  layer = "groups/layer_1"
  attention = f"decoder/{layer}/attention/key/kernel"
  norm = f"decoder/{layer}/post_attention_norm/scale"
  for path, origin in {
    f"encoder/{layer}/attention/key/kernel": attention,
    attention: attention,
    f"decoder/{layer}/cross_attention/key/kernel": attention,
    f"decoder/{layer}/post_cross_attention_norm/scale": norm,
    "encoder/embedder/table": "decoder/embedder/table",
    "decoder/embedder/table": "decoder/embedder/table",
    "decoder/remainder/layer_0/cross_attention/key_norm/scale": (
      "decoder/remainder/layer_0/attention/key_norm/scale"
    ),
  }.items():
    assert both.sources[path] == Origin("A", origin)
  two = adapted(_MERGED, _DECODER, _DECODER)
  assert {path.split("/")[0]: at.checkpoint for path, at in two.sources.items()} == {
    "encoder": "A",
    "decoder": "BB",
  }
  alone = adapted(_DECODER, _MERGED)
  assert alone.sources["decoder/embedder/table"].path == "encoder/embedder/table"
  kept = adapted(_SEPARATE, _SEPARATE)
  assert all(path == origin.path for path, origin in kept.sources.items())
  embedded = adapted(_EMBEDDER, _MERGED)
  assert all(o is None or p == o.path for p, o in embedded.sources.items())
  assert {origin.path.split("/")[0] for origin in embedded.unused} == {"decoder"}


def test_cross_attention_of_another_width_is_random_as_in_a_new_model():
  found = adapted(_UNBALANCED, BackboneConfig(encoder=_WIDE), _DECODER)
  leaves = flat(found.params)
  key = leaves["decoder/groups/layer_0/cross_attention/key/kernel"]
  assert key.shape == (1, _WIDE.width, 12)
  assert 0.5 < np.std(key) * _WIDE.width**0.5 < 1.5
  norm = leaves["decoder/groups/layer_0/pre_cross_attention_norm/scale"]
  np.testing.assert_array_equal(norm, 0)


@pytest.mark.parametrize(
  ("target", "sources", "most"),
  [
    (_MERGED, (_DECODER,), 0),
    (_UNBALANCED, (BackboneConfig(encoder=_WIDE), _DECODER), 8),
    (_EMBEDDER, (_DECODER,), 5),
    (_ADAPTERS, (_EMBEDDER,), 14),
  ],
)
def test_warm_up_patterns_find_what_is_random(target, sources, most):
  found = adapted(target, *sources)
  patterns = adaptation.warm_up_patterns(found.sources)
  matched = {p for p in found.sources if any(re.search(x, p) for x in patterns)}
  assert matched == random(found)
  assert len(patterns) == most


def test_a_pattern_never_finds_what_has_a_source():
  at = Origin("A", "x")
  sources = {
    "decoder/groups/layer_0/mlp/up/kernel": None,
    "decoder/remainder/layer_1/mlp/up/kernel": at,
  }
  patterns = adaptation.warm_up_patterns(sources)
  assert [[bool(re.search(x, p)) for p in sources] for x in patterns] == [[True, False]]


@pytest.mark.parametrize("field", ["width", "head_dim", "vocab_size"])
def test_another_shape_is_refused_with_both(field):
  size = 2 * getattr(_CAUSAL, field)
  target = BackboneConfig(decoder=dataclasses.replace(_CAUSAL, **{field: size}))
  with pytest.raises(CheckpointError) as error:
    adapt(target, jax.random.key(0), source(_DECODER))
  message = str(error.value)
  assert f"decoder: {field} is {size // 2} in the decoder of A, {size} here" in message
  shapes = r"^  decoder/\S+: (\(.*\)) in the decoder of A, (\(.*\)) here$"
  found = re.findall(shapes, message, re.MULTILINE)
  assert 1 <= len(found) <= 10
  assert all(there != here for there, here in found)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("num_layers", 5),
    ("attention_pattern", ("global", "local")),
    ("query_key_norm", False),
  ],
)
def test_other_layers_are_refused_whatever_their_shapes(field, value):
  target = BackboneConfig(decoder=dataclasses.replace(_CAUSAL, **{field: value}))
  with pytest.raises(CheckpointError, match=f"decoder: {field} is .* in the decoder"):
    adapt(target, jax.random.key(0), source(_DECODER))


def test_a_missing_parameter_is_named():
  whole = source(_DECODER)
  leaves = flat(whole.params)
  del leaves["decoder/final_norm/scale"]
  params = traverse_util.unflatten_dict(leaves, sep="/")
  with pytest.raises(CheckpointError) as error:
    adapt(_MERGED, jax.random.key(0), dataclasses.replace(whole, params=params))
  for side in ("encoder", "decoder"):
    line = f"  {side}/final_norm/scale: missing in the decoder of A, (16,) here\n"
    assert line in str(error.value)


def test_what_shapes_do_not_tell_is_noted():
  def notes(target: Any, *sources: Any) -> tuple[str, ...]:
    return adapted(target, *sources).notes

  assert notes(_MERGED, _DECODER) == ()
  other = dataclasses.replace(
    _BIDIRECTIONAL, rope_base_global=5e3, query_scalar=6.0, dtype="bfloat16"
  )
  assert notes(BackboneConfig(other, _CAUSAL), _DECODER) == (
    "encoder: rope_base_global is 1000000.0 in the decoder of A, 5000.0 here",
  )
  longer = dataclasses.replace(_CAUSAL, window=(7, 0))
  assert notes(BackboneConfig(decoder=longer), _DECODER) == (
    "decoder: window is (5, 0) in the decoder of A, (7, 0) here",
  )
  wider = dataclasses.replace(_BIDIRECTIONAL, window=(5, 5))
  assert notes(BackboneConfig(wider, _CAUSAL), _DECODER) == (
    "encoder: its window is (5, 5); half of (5, 0), with which it was trained, is "
    "(3, 3)",
  )
  one_sided = dataclasses.replace(_BIDIRECTIONAL, window=(5, 0))
  (note,) = notes(BackboneConfig(encoder=one_sided), _DECODER)
  assert note == "encoder: its window (5, 0) is one-sided, as of a causal stack"
  (note,) = notes(_MERGED, _DECODER, _DECODER)
  assert note.startswith("decoder: it shares decoder/embedder/table of A, and was")


def test_the_report_counts_every_parameter():
  found = adapted(_UNBALANCED, BackboneConfig(encoder=_WIDE), _DECODER)
  report = json.loads(json.dumps(adaptation.report(found)))
  total = sum(leaf.size for leaf in jax.tree.leaves(found.params))
  parts = {(x["part"], x["from"]): x["parameters"] for x in report["parts"]}
  assert sum(parts.values()) == report["parameters"] == total
  assert parts["decoder cross-attention", "random"] == 3 * (
    2 * 16 * 24 + 2 * 20 * 12 + 2 * 6
  )
  assert parts["decoder cross-attention norms", "random"] == 3 * 2 * 16
  assert parts["encoder token table", "A, encoder token table"] == 31 * 20
  assert report["sources"].keys() == found.sources.keys()
  assert report["sources"]["decoder/final_norm/scale"] == {
    "checkpoint": "BB",
    "path": "decoder/final_norm/scale",
  }
  path = "decoder/groups/layer_0/cross_attention/query/kernel"
  assert report["sources"][path] == "random"
  lines = adaptation.report_text(report).splitlines()
  (line,) = (line for line in lines if line.startswith("decoder feed-forward "))
  assert line.split("  ")[-2:] == [f"{3 * 3 * 16 * 24:,}", "BB, decoder feed-forward"]
  assert f"{total:,}" in lines[-1]


def test_the_report_says_what_is_not_used():
  text = adaptation.report_text(adaptation.report(adapted(_EMBEDDER, _MERGED)))
  assert f"not used: A, decoder feed-forward, {3 * 3 * 16 * 24:,}" in text
  assert re.search(r"^projection_up +128  random$", text, re.MULTILINE)


def test_shapes_are_sources_too():
  params = shapes(_DECODER)
  found = adapt(_MERGED, jax.random.key(0), Source("A", _DECODER, params))
  assert found.sources == adapted(_MERGED, _DECODER).sources
  leaf = found.params["encoder"]["final_norm"]["scale"]
  assert leaf is params["decoder"]["final_norm"]["scale"]


def test_adapters_of_a_source_are_merged():
  found = adapted(BackboneConfig(encoder=_BIDIRECTIONAL), _ADAPTERS)
  leaves = flat(source(_ADAPTERS).params)
  path = "encoder/groups/layer_0/mlp/up"
  low_rank = leaves[f"{path}/lora_a"] @ leaves[f"{path}/lora_b"]
  expected = leaves[f"{path}/kernel"] + _ADAPTERS.lora.scale * low_rank
  kernel = flat(found.params)[f"{path}/kernel"]
  np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
  assert jnp.max(jnp.abs(kernel - leaves[f"{path}/kernel"])) > 0.1
