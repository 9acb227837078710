"""Teachers of this machine against the models that they are."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embgemma.data import prompts
from embgemma.errors import CheckpointError, ConfigError, DataError
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.teaching.teachers import (
  ApiLimits,
  Input,
  Teacher,
  open_teacher,
  unit_prefix,
)


def _encode(teacher: Teacher, texts, kind: str) -> np.ndarray:
  """Queries, then documents with and without titles."""
  queries = [teacher.query(text, kind) for text in texts]
  titled = [teacher.document(text, "a title", kind) for text in texts]
  return teacher.encode(queries + titled + [teacher.document(texts[0], None, kind)])


def _formatted(texts, kind: str) -> list[str]:
  own = prompts.TASK_PROMPTS[kind]
  titled = [own.format_document(text, "a title") for text in texts]
  queries = [own.format_query(text) for text in texts]
  return queries + titled + [own.format_document(texts[0])]


def _unit_prefix(vectors: np.ndarray, width: int) -> np.ndarray:
  cut = vectors[:, :width].astype(np.float64)
  return cut / np.sqrt((cut**2).sum(axis=1, keepdims=True))


def test_a_checkpoint_is_its_embedder(checkpoint, texts):
  full, teacher = open_teacher(str(checkpoint), None), open_teacher(str(checkpoint), 8)
  expected = CheckpointEmbedder(checkpoint).encode(_formatted(texts, "search"))
  vectors = _encode(teacher, texts, "search")
  assert vectors.dtype == np.float32
  np.testing.assert_allclose(vectors, _unit_prefix(expected, 8), atol=1e-6)
  assert full.width == 16
  assert full.encode([]).shape == (0, 16)


def test_prompts_of_a_checkpoint(checkpoint, exported, tmp_path):
  own = open_teacher(str(checkpoint), None)
  # What was released names 14; two more are known from its card.
  directory = shutil.copytree(exported, tmp_path / "released")
  _set_prompts(directory, dict(prompts.OFFICIAL_PROMPTS))
  released = open_teacher(str(directory), None)
  for kind, templates in prompts.TASK_PROMPTS.items():
    for teacher in (own, released):
      assert teacher.query("x", kind) == Input(templates.format_query("x"))
      for title in (None, "t"):
        expected = Input(templates.format_document("x", title))
        assert teacher.document("x", title, kind) == expected
  assert own.query("x", "document/query") == Input("title: none | text: x")


def test_a_checkpoint_without_a_prompt(exported, tmp_path):
  directory = shutil.copytree(exported, tmp_path / "own")
  _set_prompts(directory, {"query": "ask: ", "document": "say: "})
  teacher = open_teacher(str(directory), None)
  assert teacher.query("x", None) == Input("ask: x")
  assert teacher.document("x", "t", "search") == Input("say: t x")
  with pytest.raises(
    ConfigError, match=r"'STS' does not exist.*sentence_transformers:"
  ):
    teacher.query("x", "similarity")


def _set_prompts(directory: pathlib.Path, table: dict, default=None) -> None:
  path = directory / "config_sentence_transformers.json"
  config = json.loads(path.read_text())
  config |= {"prompts": table, "default_prompt_name": default}
  path.write_text(json.dumps(config))


@pytest.mark.parametrize("width", [None, 8])
def test_sentence_transformers_is_its_own_encode(exported, texts, width):
  teacher = open_teacher(f"sentence_transformers:{exported}", width)
  model = SentenceTransformer(str(exported), device="cpu")
  for kind in ("search", "similarity"):
    expected = model.encode(
      _formatted(texts, kind), normalize_embeddings=True, truncate_dim=width
    )
    np.testing.assert_allclose(_encode(teacher, texts, kind), expected, atol=2e-6)


def _exported_with(exported, tmp_path, table: dict, default=None) -> pathlib.Path:
  directory = shutil.copytree(exported, tmp_path / "model")
  _set_prompts(directory, table, default)
  return directory


def test_prompts_of_another_model(exported, tmp_path, texts):
  """The prompts of its sides for retrieval; none where it has none for the task."""
  table = {"query": "ask: ", "passage": "say: ", "Classification": "sort: "}
  directory = _exported_with(exported, tmp_path, table)
  teacher = open_teacher(f"sentence_transformers:{directory}", None)
  model = SentenceTransformer(str(directory), device="cpu")
  for kind in ("search", "code", "reranking"):
    (query,) = teacher.encode([teacher.query(texts[0], kind)])
    (passage,) = teacher.encode([teacher.document(texts[0], None, kind)])
    np.testing.assert_allclose(query, model.encode_query(texts[0]), atol=2e-6)
    np.testing.assert_allclose(passage, model.encode_document(texts[0]), atol=2e-6)
  for side in (
    teacher.query(texts[0], "similarity"),
    teacher.query(texts[0], "bitext"),
  ):
    np.testing.assert_allclose(
      teacher.encode([side])[0], model.encode(texts[0]), atol=2e-6
    )
  assert teacher.query("x", "classification").task == "sort: "
  assert teacher.document("x", "t", "classification") == Input("t x", "sort: ")
  assert teacher.query("x", "passage/query").task == "say: "


def test_prompts_are_left_out_of_the_mean_where_the_model_says_so(
  exported, tmp_path, texts
):
  directory = _exported_with(exported, tmp_path, {"query": "ask: "}, default="query")
  path = directory / "1_Pooling" / "config.json"
  pooling = json.loads(path.read_text()) | {"include_prompt": False}
  path.write_text(json.dumps(pooling))
  teacher = open_teacher(f"sentence_transformers:{directory}", None)
  model = SentenceTransformer(str(directory), device="cpu")
  vectors = teacher.encode([teacher.query(text, "search") for text in texts])
  expected = model.encode(texts, prompt_name="query")
  np.testing.assert_allclose(vectors, expected, atol=2e-6)
  # It matters here.
  joined = model.encode([f"ask: {text}" for text in texts], prompt="")
  assert np.abs(joined - expected).max() > 1e-3
  # The default stands in for prompts that it lacks.
  assert teacher.query("x", "similarity").task == "ask: "


@pytest.mark.parametrize("spec", ["{}", "sentence_transformers:{}"])
def test_a_fingerprint_is_of_what_vectors_depend_on(exported, tmp_path, spec):
  directory = shutil.copytree(exported, tmp_path / "model")
  first = open_teacher(spec.format(exported), None).fingerprint
  (directory / "README.md").write_text("a card")
  assert open_teacher(spec.format(directory), None).fingerprint == first
  assert open_teacher(spec.format(directory), 8).fingerprint != first
  path = next(directory.rglob("*.safetensors"))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  assert open_teacher(spec.format(directory), None).fingerprint != first


def test_the_fingerprint_of_a_checkpoint_is_of_one_step(checkpoint, tmp_path):
  directory = shutil.copytree(checkpoint, tmp_path / "moved")
  first = open_teacher(str(checkpoint), None).fingerprint
  (directory / "operative.gin").write_text("# another")
  (directory / "evaluations.json").write_text("{}")
  assert open_teacher(str(directory), None).fingerprint == first
  assert open_teacher(str(directory / "checkpoints" / "0"), None).fingerprint == first
  model = json.loads((directory / "model.json").read_text())
  model["prompts"]["query"] = "ask: "
  (directory / "model.json").write_text(json.dumps(model))
  assert open_teacher(str(directory), None).fingerprint != first


def test_keys():
  keys = {
    Input("a").key(),
    Input("a", "b").key(),
    Input("b", "a").key(),
    Input("").key(),
  }
  assert len(keys) == 4
  assert all(0 < key < 2**64 for key in keys)


def test_unit_prefix():
  vectors = np.array([[3, 4, 12], [0, 0, 5]], np.float32)
  np.testing.assert_allclose(unit_prefix(vectors, 2), [[0.6, 0.8], [0, 0]], atol=1e-7)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("nowhere", "no such directory; give a checkpoint's, sentence_transformers:DIR or"),
    ("sentence_transformers:nowhere", "nowhere: no such directory"),
    ("openai:model", "no such directory"),
  ],
)
def test_no_such_teacher(spec, message):
  with pytest.raises(ConfigError, match=message):
    open_teacher(spec, None)


def test_widths_that_a_teacher_lacks(checkpoint, exported):
  for spec in (str(checkpoint), f"sentence_transformers:{exported}"):
    with pytest.raises(ConfigError, match=r"width 17 is not in 1\.\.16"):
      open_teacher(spec, 17)
    with pytest.raises(ConfigError, match="width 0 must be at least 1"):
      open_teacher(spec, 0)
  with pytest.raises(ConfigError, match="attempts 0 must be above 0"):
    ApiLimits(attempts=0)


def test_directories_that_are_no_models(tmp_path):
  with pytest.raises(CheckpointError):
    open_teacher(str(tmp_path), None)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(DataError, match="sentence-transformers cannot read it"):
    open_teacher(f"sentence_transformers:{tmp_path}", None)


def test_missing_extras(monkeypatch, exported):
  monkeypatch.setitem(sys.modules, "sentence_transformers", None)
  with pytest.raises(ConfigError, match=r"needs embgemma\[teach\]: pip install '"):
    open_teacher(f"sentence_transformers:{exported}", None)
  monkeypatch.setitem(sys.modules, "google.genai", None)
  monkeypatch.setitem(os.environ, "GEMINI_API_KEY", "secret")
  with pytest.raises(ConfigError, match=r"needs embgemma\[gemini\]: pip install '"):
    open_teacher("gemini:gemini-embedding-001", None)
