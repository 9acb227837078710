"""Checkpoints of codes: what is written, read, and embedded with."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embgemma import checkpoints, soup
from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import codes, conversion, layout, quantizing, weights
from embgemma.interop.model import Model
from embgemma.models import quantization
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import abstract_params
from embgemma.models.quantization import Quantized

CONFIG = EmbedderConfig(
  transformer=TransformerConfig(
    vocab_size=420,
    num_layers=3,  # one group of the scan and a remainder
    width=32,
    mlp_width=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    attention_pattern=("local", "global"),
    window=(8, 8),
    max_length=64,
  ),
  hidden_width=64,
  embedding_width=32,
  matryoshka_widths=(32, 16),
)
PRESETS = {
  "int8_block32": quantization.int8_block32(),
  "int4_block32": quantization.int4_block32(),
  "mixed_channel": quantization.mixed_channel(),
}
TEXTS = ["one text", "another text, a little longer than the first", "a third"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = ["some text to train a vocabulary on, and then some more of it"]
  vocabulary = train_vocabulary(texts, 420, path, sentinels=4)
  params = layout.allocate(abstract_params(CONFIG))
  generator = np.random.default_rng(0)
  for leaf in jax.tree.leaves(params):
    leaf[...] = 0.3 * generator.standard_normal(leaf.shape)
  lengths = {"query": 32, "positive": 64, "negatives": 64}
  return Model(Description(CONFIG, lengths, PROMPTS), vocabulary, params)


def written(model, rules, directory):
  quantized = quantizing.quantize(model, rules)
  quantizing.write(quantized, directory)
  return quantized


@given(
  hnp.arrays(
    np.int8,
    st.tuples(st.integers(1, 5), st.integers(1, 7)),
    elements=st.integers(-8, 7),
  )
)
def test_codes_of_4_bits_come_back(values):
  packed = codes._packed(values)
  assert packed.size == -(-values.size // 2)
  np.testing.assert_array_equal(codes._unpacked(packed, values.shape), values)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_read_is_what_was_quantized(preset, model, tmp_path):
  rules = PRESETS[preset]
  quantized = written(model, rules, tmp_path)
  config = checkpoints.read_description(tmp_path).embedder
  assert config == dataclasses.replace(CONFIG, quantization=rules)
  found = weights.read_codes(tmp_path, 0, config)
  jax.tree.map(np.testing.assert_array_equal, found, quantized.model.params)
  kinds = {leaf.codes.dtype for leaf in _leaves(found) if isinstance(leaf, Quantized)}
  assert kinds == {np.dtype(np.int8)}
  values = weights.read(tmp_path, 0, config)
  expected = jax.device_get(quantization.rounded(model.params, rules))
  jax.tree.map(np.testing.assert_array_equal, values, expected)


def _leaves(params):
  return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))


def test_a_soup_of_codes_is_refused(model, tmp_path):
  for name in ("one", "other"):
    written(model, quantization.int8_block32(), tmp_path / name)
  with pytest.raises(CheckpointError, match="one: holds weights of 4 or 8 bits"):
    soup.choose([str(tmp_path / "one"), str(tmp_path / "other")])


@pytest.mark.parametrize("preset", PRESETS)
def test_texts_are_embedded_with_codes(preset, model, tmp_path):
  rules = PRESETS[preset]
  written(model, rules, tmp_path / "codes")
  embedder = CheckpointEmbedder(tmp_path / "codes")
  assert quantization.is_quantized(embedder._params)
  rounded = jax.device_get(quantization.rounded(model.params, rules))
  conversion.write_checkpoint(
    dataclasses.replace(model, params=rounded), tmp_path / "rounded"
  )
  expected = CheckpointEmbedder(tmp_path / "rounded").encode(TEXTS)
  np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-6)
  conversion.write_checkpoint(model, tmp_path / "plain")
  plain = CheckpointEmbedder(tmp_path / "plain").encode(TEXTS)
  assert np.abs(plain - expected).max() > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_are_those_of_what_is_stored(preset, model, tmp_path):
  quantized = written(model, PRESETS[preset], tmp_path)
  size = sum(row.bytes for row in quantized.rows)
  arrays = jax.tree.leaves(codes.stored(quantized.model.params))
  assert sum(array.nbytes for array in arrays) == size
  report = json.loads((tmp_path / quantizing.REPORT_FILE).read_text())
  assert sum(row["bytes"] for row in report) == size
  assert sum(row["values"] for row in report) == model.size
  by_name = {row["name"]: row for row in report}
  table = by_name["encoder/embedder/table"]
  of = model.params["encoder"]["embedder"]["table"].astype(np.float64)
  kept = quantized.model.params["encoder"]["embedder"]["table"].values()
  expected = np.sqrt(np.mean((kept - of) ** 2) / np.mean(of**2))
  assert table["error"] == pytest.approx(expected, rel=1e-4)
  for printed in quantizing.tables(quantized):
    assert printed.row_count


def test_an_export_is_of_the_values(model, tmp_path):
  rules = PRESETS["int4_block32"]
  written(model, rules, tmp_path)
  opened = conversion.open_embedder(tmp_path)
  assert not quantization.is_quantized(opened.params)
  flat = traverse_util.flatten_dict(opened.params)
  assert {leaf.dtype for leaf in flat.values()} == {np.dtype(np.float32)}
  again = quantizing.quantize(opened, rules)
  jax.tree.map(
    np.testing.assert_array_equal,
    again.model.params,
    weights.read_codes(tmp_path, 0, opened.description.embedder),
  )
