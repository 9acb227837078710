"""ONNX in onnxruntime against our own embedder."""

import dataclasses

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from embgemma import outputs
from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.errors import ConfigError
from embgemma.inference.embedder import TextEncoder
from embgemma.interop import layout, onnx_export
from embgemma.interop.model import Model
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import abstract_params

pytestmark = pytest.mark.slow

CONFIG = EmbedderConfig(
  transformer=TransformerConfig(
    vocab_size=3000,
    num_layers=3,
    width=64,
    mlp_width=96,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    attention_pattern=("local", "local", "global"),
    window=(8, 8),
    max_length=64,
  ),
  hidden_width=128,
  embedding_width=64,
  matryoshka_widths=(64, 32),
)
TEXTS = [
  "one text",
  "another text, a little longer than the first one",
  "texts of many words and more " * 6,
]


@pytest.fixture(scope="module")
def model(vocabulary):
  params = layout.allocate(abstract_params(CONFIG))
  generator = np.random.default_rng(0)
  for leaf in jax.tree.leaves(params):
    leaf[...] = 0.2 * generator.standard_normal(leaf.shape)
  lengths = {"query": 64, "positive": 64, "negatives": 64}
  return Model(Description(CONFIG, lengths, PROMPTS), vocabulary, params)


def embedded(path, model, texts):
  """By onnxruntime, padded on the right."""
  tokens = model.vocabulary.encode_batch(texts, 64)
  longest = max(map(len, tokens))
  ids = np.zeros((len(texts), longest), np.int64)
  mask = np.zeros_like(ids)
  for row, own in enumerate(tokens):
    ids[row, : len(own)] = own
    mask[row, : len(own)] = 1
  session = onnxruntime.InferenceSession(path)
  assert [each.name for each in session.get_inputs()] == list(onnx_export.INPUTS)
  (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
  return found


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
  directory = tmp_path_factory.mktemp("onnx")
  onnx_export.write(model, directory, "float32", 64, "# card")
  return directory


@pytest.mark.parametrize("count", [1, 3])
def test_vectors_are_ours(count, exported, model):
  expected = TextEncoder(CONFIG, model.vocabulary, 64).encode(model.params, TEXTS)
  for texts in (TEXTS[:count], TEXTS[-count:]):
    found = embedded(exported / "onnx" / "model.onnx", model, texts)
    rows = [TEXTS.index(text) for text in texts]
    np.testing.assert_allclose(found, expected[rows], atol=2e-5)


def test_a_directory_is_complete_without_weights_twice(exported):
  names = {path.name for path in exported.iterdir()}
  assert {"onnx", "tokenizer.json", "config.json", "README.md"} <= names
  assert not list(exported.rglob("*.safetensors"))
  assert outputs._holds_model(exported)


def test_int8_is_close_and_small(exported, model, tmp_path):
  onnx_export.write(model, tmp_path, "int8", 64)
  path = tmp_path / "onnx" / "model_quantized.onnx"
  found = embedded(path, model, TEXTS)
  expected = TextEncoder(CONFIG, model.vocabulary, 64).encode(model.params, TEXTS)
  cosines = np.sum(found * expected, axis=1)
  assert cosines.min() > 0.98
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  sizes = [
    sum(tensor.ByteSize() for tensor in onnx.load(model).graph.initializer)
    for model in (path, exported / "onnx" / "model.onnx")
  ]
  assert sizes[0] < 0.3 * sizes[1]


def test_a_long_row_costs_others_nothing(model, tmp_path):
  """Each row of the token table has its own scale."""
  table = model.params["encoder"]["embedder"]["table"]
  params = {**model.params, "encoder": {**model.params["encoder"]}}
  longer = table.copy()
  longer[-1] *= 1000  # of a piece that no text has
  params["encoder"]["embedder"] = {"table": longer}
  other = dataclasses.replace(model, params=params)
  onnx_export.write(other, tmp_path, "int8", 64)
  found = embedded(tmp_path / "onnx" / "model_quantized.onnx", model, TEXTS)
  expected = TextEncoder(CONFIG, model.vocabulary, 64).encode(model.params, TEXTS)
  assert np.sum(found * expected, axis=1).min() > 0.98


def test_other_dtypes():
  with pytest.raises(ConfigError, match="onnx has float32 and int8"):
    onnx_export.check_exportable("bfloat16")
