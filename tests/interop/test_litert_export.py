"""LiteRT's interpreter against our own embedder, where its converter is installed."""

import dataclasses

import numpy as np
import pytest
from flax import traverse_util

from embgemma import outputs
from embgemma.errors import ConfigError
from embgemma.interop import litert_export
from embgemma.models import quantization
from embgemma.models.config import QuantizationConfig

LENGTH = 64


@pytest.fixture(scope="module")
def interpreter(export_model, tmp_path_factory):
  pytest.importorskip("litert_torch", reason="wants an environment of its own")
  from ai_edge_litert.interpreter import Interpreter

  def make(dtype):
    directory = tmp_path_factory.mktemp("litert")
    litert_export.write(export_model, directory, dtype, LENGTH, "# card")
    names = {path.name for path in directory.iterdir()}
    assert {"model.tflite", "tokenizer.json", "config.json", "README.md"} <= names
    assert not list(directory.rglob("*.safetensors"))
    assert outputs._holds_model(directory), "--overwrite replaces it"
    return Interpreter(str(directory / "model.tflite"))

  return make


def embedded(interpreter, model, texts):
  run = interpreter.get_signature_runner()
  rows = []
  for tokens in model.vocabulary.encode_batch(texts, LENGTH):
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(tokens)] = tokens
    mask = np.int32(np.arange(LENGTH) < len(tokens))[None]
    rows.append(run(input_ids=ids, attention_mask=mask)["sentence_embedding"][0])
  return np.stack(rows)


def test_vectors_are_ours(interpreter, export_model, export_texts, export_vectors):
  found = embedded(interpreter("float32"), export_model, export_texts)
  np.testing.assert_allclose(found, export_vectors, atol=2e-5)


def test_codes_are_ours(interpreter, export_model, export_texts, export_vectors):
  mixed = interpreter("mixed_channel")
  found = embedded(mixed, export_model, export_texts)
  assert np.sum(found * export_vectors, axis=1).min() > 0.9
  params = quantization.quantized(export_model.params, quantization.mixed_channel())
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
def test_what_it_refuses(dtype, rules, message, export_model):
  config = dataclasses.replace(export_model.description.embedder, quantization=rules)
  with pytest.raises(ConfigError, match=message):
    litert_export.check_exportable(config, dtype)
