"""ONNX in onnxruntime against our own embedder."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest

from embgemma import outputs
from embgemma.errors import ConfigError
from embgemma.interop import onnx_export

pytestmark = pytest.mark.slow


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
def exported(export_model, tmp_path_factory):
  directory = tmp_path_factory.mktemp("onnx")
  onnx_export.write(export_model, directory, "float32", 64, "# card")
  return directory


@pytest.mark.parametrize("count", [1, 3])
def test_vectors_are_ours(count, exported, export_model, export_texts, export_vectors):
  for rows in (slice(count), slice(-count, None)):
    texts = export_texts[rows]
    found = embedded(exported / "onnx" / "model.onnx", export_model, texts)
    np.testing.assert_allclose(found, export_vectors[rows], atol=2e-5)


def test_a_directory_is_complete_without_weights_twice(exported):
  names = {path.name for path in exported.iterdir()}
  assert {"onnx", "tokenizer.json", "config.json", "README.md"} <= names
  assert not list(exported.rglob("*.safetensors"))
  assert outputs._holds_model(exported)


def test_int8_is_close_and_small(
  exported, export_model, export_texts, export_vectors, tmp_path
):
  onnx_export.write(export_model, tmp_path, "int8", 64)
  path = tmp_path / "onnx" / "model_quantized.onnx"
  found = embedded(path, export_model, export_texts)
  cosines = np.sum(found * export_vectors, axis=1)
  assert cosines.min() > 0.98
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  sizes = [
    sum(tensor.ByteSize() for tensor in onnx.load(model).graph.initializer)
    for model in (path, exported / "onnx" / "model.onnx")
  ]
  assert sizes[0] < 0.3 * sizes[1]


def test_a_long_row_costs_others_nothing(
  export_model, export_texts, export_vectors, tmp_path
):
  """Each row of the token table has its own scale."""
  model = export_model
  table = model.params["encoder"]["embedder"]["table"]
  params = {**model.params, "encoder": {**model.params["encoder"]}}
  longer = table.copy()
  longer[-1] *= 1000  # of a piece that no text has
  params["encoder"]["embedder"] = {"table": longer}
  other = dataclasses.replace(model, params=params)
  onnx_export.write(other, tmp_path, "int8", 64)
  found = embedded(tmp_path / "onnx" / "model_quantized.onnx", model, export_texts)
  assert np.sum(found * export_vectors, axis=1).min() > 0.98


def test_other_dtypes():
  with pytest.raises(ConfigError, match="onnx has float32 and int8"):
    onnx_export.check_exportable("bfloat16")
