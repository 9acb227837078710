"""Search over vectors as a store keeps them, against faiss and by definition."""

import json

import numpy as np
import pytest
from sentence_transformers.util.quantization import semantic_search_faiss

from embgemma import vector_formats
from embgemma.evaluation.retrieval import RetrievalEvaluator
from embgemma.evaluation.stored_vectors import RESCORED, search_kept
from embgemma.evaluation.sts import StsEvaluator


def unit(rows, width, seed):
  vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_signs_find_what_faiss_finds():
  queries, documents = unit(40, 64, 0), unit(500, 64, 1)
  packed = vector_formats.VectorFormat("ubinary").codes(documents)
  expected, _ = semantic_search_faiss(
    queries,
    corpus_embeddings=packed,
    corpus_precision="ubinary",
    top_k=10,
    calibration_embeddings=documents,
    rescore=True,
    rescore_multiplier=RESCORED,
    exact=True,
  )
  for name in ("binary", "ubinary"):
    found = search_kept(queries, documents, name, 10, 128)
    # At the cut of the first search distances are equal, and either may be in.
    common = [
      len({hit["corpus_id"] for hit in hits} & set(row))
      for hits, row in zip(expected, found.tolist(), strict=True)
    ]
    assert np.mean(common) > 9.7


@pytest.mark.parametrize("name", ["float16", "int8", "uint8"])
def test_finer_formats_find_nearly_the_same(name):
  queries, documents = unit(40, 64, 0), unit(500, 64, 1)
  exact = search_kept(queries, documents, "float32", 10, 128)
  found = search_kept(queries, documents, name, 10, 128)
  common = [len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]
  assert np.mean(common) > 9.7
  kept = vector_formats.calibrated(name, documents)
  values = kept.values(kept.codes(documents), 64)
  best = np.argmax(queries @ values.T, axis=1)
  assert np.mean(found[:, 0] == best) > 0.9


def test_results_have_a_key_for_each_format(tmp_path):
  path = tmp_path / "pairs.jsonl"
  records = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(30)]
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  of = {}

  def encode(texts):
    vectors = [of.setdefault(text[-3:], unit(1, 16, len(of))[0]) for text in texts]
    return np.array(vectors)

  both = RetrievalEvaluator("own", path, widths=(16, 8), vectors=("float32", "int8"))
  alone = RetrievalEvaluator("own", path, widths=(16, 8))
  found, plain = both.evaluate(encode), alone.evaluate(encode)
  assert plain.items() <= found.items()
  assert "ndcg@10 (int8)/8" in found
  assert len(found) == 2 * len(plain)


def test_similarities_of_what_is_kept(tmp_path):
  path = tmp_path / "sts.jsonl"
  generator = np.random.default_rng(0)
  records = [
    {"sentence1": f"a{i}", "sentence2": f"b{i}", "score": float(generator.uniform())}
    for i in range(40)
  ]
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  vectors = {}

  def encode(texts):
    return np.array(
      [vectors.setdefault(t, unit(1, 32, len(vectors))[0]) for t in texts]
    )

  evaluator = StsEvaluator("own", path, widths=(32,), vectors=("float32", "binary"))
  found = evaluator.evaluate(encode)
  signs = [
    np.sign([encode([evaluator.prompts.format_query(r[key])])[0] for r in records])
    for key in ("sentence1", "sentence2")
  ]
  cosines = np.sum(signs[0] * signs[1], axis=1)
  from scipy.stats import spearmanr

  gold = [record["score"] for record in records]
  assert found["spearman (binary)/32"] == pytest.approx(
    spearmanr(cosines, gold).statistic, abs=1e-9
  )
