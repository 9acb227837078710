"""LiteRT's interpreter against our own embedder, where its converter is installed."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from embgemma import outputs
from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.errors import ConfigError
from embgemma.inference.embedder import TextEncoder
from embgemma.interop import layout, litert_export
from embgemma.interop.model import Model
from embgemma.models import quantization
from embgemma.models.config import (
  EmbedderConfig,
  QuantizationConfig,
  TransformerConfig,
)
from embgemma.models.embedder import abstract_params

LENGTH = 64
CONFIG = EmbedderConfig(
  transformer=TransformerConfig(
    vocab_size=3000,
    num_layers=3,
    width=64,
    mlp_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    attention_pattern=("local", "local", "global"),
    window=(8, 8),
    max_length=LENGTH,
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
  lengths = {"query": LENGTH, "positive": LENGTH, "negatives": LENGTH}
  return Model(Description(CONFIG, lengths, PROMPTS), vocabulary, params)


@pytest.fixture(scope="module")
def vectors(model):
  return TextEncoder(CONFIG, model.vocabulary, LENGTH).encode(model.params, TEXTS)


@pytest.fixture(scope="module")
def interpreter(model, tmp_path_factory):
  pytest.importorskip("litert_torch", reason="wants an environment of its own")
  from ai_edge_litert.interpreter import Interpreter

  def make(dtype):
    directory = tmp_path_factory.mktemp("litert")
    litert_export.write(model, directory, dtype, LENGTH, "# card")
    names = {path.name for path in directory.iterdir()}
    assert {"model.tflite", "tokenizer.json", "config.json", "README.md"} <= names
    assert not list(directory.rglob("*.safetensors"))
    assert outputs._holds_model(directory), "--overwrite replaces it"
    return Interpreter(str(directory / "model.tflite"))

  return make


def embedded(interpreter, model):
  run = interpreter.get_signature_runner()
  rows = []
  for tokens in model.vocabulary.encode_batch(TEXTS, LENGTH):
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(tokens)] = tokens
    mask = np.int32(np.arange(LENGTH) < len(tokens))[None]
    rows.append(run(input_ids=ids, attention_mask=mask)["sentence_embedding"][0])
  return np.stack(rows)


def test_vectors_are_ours(interpreter, model, vectors):
  found = embedded(interpreter("float32"), model)
  np.testing.assert_allclose(found, vectors, atol=2e-5)


def test_codes_are_ours(interpreter, model, vectors):
  mixed = interpreter("mixed_channel")
  cosines = np.sum(embedded(mixed, model) * vectors, axis=1)
  assert cosines.min() > 0.9
  params = quantization.quantized(model.params, quantization.mixed_channel())
  ours = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    if isinstance(leaf, quantization.Quantized):
      codes = np.moveaxis(np.asarray(leaf.codes, np.int8), leaf.axis, -1)
      scales = np.moveaxis(np.asarray(leaf.scales), leaf.axis, -1)[..., 0]
      # Scanned layers lie on a leading axis.
      matrices = (
        zip(codes, scales, strict=True) if codes.ndim > 2 else [(codes, scales)]
      )
      for index, (matrix, own) in enumerate(matrices):
        ours[matrix.tobytes()] = (path, index, own)
  for each in mixed.get_tensor_details():
    own = each["quantization_parameters"]["scales"]
    if own.size > 1:
      _, _, expected = ours.pop(np.int8(mixed.get_tensor(each["index"])).tobytes())
      np.testing.assert_allclose(own, expected, rtol=1e-6)
  assert not ours, "every matrix is there, whole"


@pytest.mark.parametrize(
  ("dtype", "rules", "message"),
  [
    ("bfloat16", None, "litert has float32, mixed_channel, trained"),
    ("trained", None, "was not trained in a format"),
    ("trained", quantization.int4_block32(), "token table of the model has q4_0"),
    (
      "trained",
      QuantizationConfig((("attention/query", "int8_channel"),)),
      "attention of the model has float32, int8_channel",
    ),
  ],
)
def test_what_it_refuses(dtype, rules, message):
  config = dataclasses.replace(CONFIG, quantization=rules)
  with pytest.raises(ConfigError, match=message):
    litert_export.check_exportable(config, dtype)
