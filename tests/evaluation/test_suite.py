"""Evaluations by name: their prompts are the model's."""

import numpy as np
import pytest

from embgemma.errors import ConfigError
from embgemma.evaluation import suite


class Asked:
  """Keeps what it is asked for."""

  def __init__(self):
    self.texts = []

  def __call__(self, texts):
    self.texts += texts
    return np.eye(len(texts), 16, dtype=np.float32)


@pytest.fixture
def files(tmp_path):
  pairs = tmp_path / "pairs.jsonl"
  pairs.write_text('{"query": "q1", "positive": "p1"}\n')
  sts = tmp_path / "sts.jsonl"
  sts.write_text(
    '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
    '{"sentence1": "c", "sentence2": "d", "score": 0}\n'
  )
  return {"pairs": str(pairs), "sts": str(sts)}


@pytest.mark.parametrize(
  ("kind", "file", "texts"),
  [
    ("search", "pairs", ["Q: q1", "title: none | text: p1"]),
    ("mine/query", "pairs", ["M: q1", "Q: p1"]),
    ("sts", "sts", ["S: a", "S: c", "S: b", "S: d"]),
    (
      "pair_classification",
      "sts",
      [f"task: sentence similarity | query: {text}" for text in "acbd"],
    ),
  ],
)
def test_prompts_are_the_models(kind, file, texts, files):
  table = {"query": "Q: ", "mine": "M: ", "STS": "S: "}
  entry = {"path": files[file], "kind": kind}
  (evaluator,) = suite.evaluators({"set": entry}, (16,), table=table)
  encode = Asked()
  evaluator.evaluate(encode)
  assert encode.texts == texts


@pytest.mark.parametrize(
  ("entry", "vectors", "message"),
  [
    ({"path": "x", "kind": "no such"}, ["float32"], "'set': unknown kind 'no such'"),
    ({"path": "x", "kind": "a/query"}, ["float32"], "prompt 'a' does not exist"),
    ("mteb:STS12", ["float32", "int8"], "for `embgemma eval --tasks`"),
    ({"kind": "sts"}, ["float32"], "needs 'path'"),
  ],
)
def test_what_is_refused(entry, vectors, message):
  with pytest.raises(ConfigError, match=message):
    suite.evaluators({"set": entry}, (16,), vectors)
