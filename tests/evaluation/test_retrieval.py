import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import ndcg_score

from embgemma.data.prompts import TaskPrompts
from embgemma.errors import ConfigError, DataError, TrainingError
from embgemma.evaluation import exact_search, retrieval
from embgemma.evaluation.retrieval import RetrievalData, RetrievalEvaluator

CORPUS = [
  {"_id": "d0", "title": "Rivers", "text": "The Danube."},
  {"_id": "d1", "text": "The Alps."},
  {"_id": "d2", "title": "", "text": "The Rhine."},
]
QUERIES = [
  {"_id": "q0", "text": "which river", "language": "en"},
  {"_id": "q1", "text": "welcher Berg", "language": "de"},
  {"_id": "q2", "text": "of another split"},
]
QRELS = "query-id\tcorpus-id\tscore\nq0\td0\t2\nq0\td2\t1\nq1\td1\t1\n"


def write_jsonl(path, records):
  text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
  opener = gzip.open if path.suffix == ".gz" else open
  with opener(path, "wb") as file:
    file.write(text.encode())
  return path


def write_beir(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, end=""):
  write_jsonl(folder / f"corpus.jsonl{end}", corpus)
  write_jsonl(folder / f"queries.jsonl{end}", queries)
  (folder / "qrels.tsv").write_text(qrels, encoding="utf-8")
  return folder


@pytest.mark.parametrize("end", ["", ".gz"])
def test_read_beir(tmp_path, end):
  data = retrieval.read_beir(write_beir(tmp_path, end=end))
  assert data == RetrievalData(
    ids=["d0", "d1", "d2"],
    texts=["The Danube.", "The Alps.", "The Rhine."],
    titles=["Rivers", "", ""],
    queries={"q0": "which river", "q1": "welcher Berg"},
    qrels={"q0": {"d0": 2, "d2": 1}, "q1": {"d1": 1}},
    languages={"q0": "en", "q1": "de"},
  )


def test_read_beir_splits(tmp_path):
  write_beir(tmp_path)
  (tmp_path / "qrels.tsv").unlink()
  folder = tmp_path / "qrels"
  folder.mkdir()
  with pytest.raises(DataError, match=r"no qrels.tsv and no qrels/\*.tsv"):
    retrieval.read_beir(tmp_path)
  header = "query-id\tcorpus-id\tscore\r\n"
  (folder / "test.tsv").write_text(header + "q0\td0\t1\r\n", newline="")
  assert list(retrieval.read_beir(tmp_path).queries) == ["q0"]
  (folder / "dev.tsv").write_text(header + "q2\td1\t1\n")
  with pytest.raises(DataError, match=r"several splits \(dev, test\); name one"):
    retrieval.read_beir(tmp_path)
  assert list(retrieval.read_beir(tmp_path, "dev").queries) == ["q2"]
  with pytest.raises(DataError, match=r"no qrels/train\.tsv"):
    retrieval.read_beir(tmp_path, "train")


def test_queries_without_a_relevant_document_are_left_out(tmp_path):
  write_beir(tmp_path, qrels=QRELS + "q2\td0\t0\n")
  assert "q2" not in retrieval.read_beir(tmp_path).queries


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"corpus": []}, r"corpus.jsonl: the corpus is empty"),
    ({"corpus": [{"text": "x"}]}, r"corpus.jsonl:1: no \"_id\"; the record has"),
    ({"corpus": [{"_id": "d0"}]}, r"corpus.jsonl:1: no \"text\""),
    ({"corpus": [{"_id": 0, "text": "x"}]}, r":1: \"_id\" must be a string, got int"),
    ({"corpus": [CORPUS[0], CORPUS[0]]}, r":2: _id 'd0' is already on line 1"),
    ({"queries": [{"_id": "q0", "text": 3}]}, r"queries.jsonl:1: \"text\" must be"),
    ({"queries": QUERIES[1:]}, r"qrels.tsv:2: query 'q0' is not in the queries file"),
    ({"corpus": CORPUS[:2]}, r"qrels.tsv:3: document 'd2' is not in the corpus"),
    ({"qrels": ""}, r"qrels.tsv: no query has a relevant document"),
    ({"qrels": "h\th\th\nq0\td0\t0\n"}, r"no query has a relevant document"),
    ({"qrels": "q0\td0\t1\n"}, r"qrels.tsv:1: no header; add one"),
    ({"qrels": QRELS + "q1\td0\n"}, r"qrels.tsv:5: 2 columns; a row is query-id"),
    ({"qrels": QRELS + "q1 d0 1\n"}, r"qrels.tsv:5: 1 columns"),
    ({"qrels": QRELS + "q1\td0\thigh\n"}, r"qrels.tsv:5: score 'high'"),
    ({"qrels": QRELS + "q1\td1\t2\n"}, r"qrels.tsv:5: .* has two scores; keep one"),
  ],
)
def test_read_beir_says_where_and_what(tmp_path, changed, message):
  write_beir(tmp_path, **changed)
  with pytest.raises(DataError, match=message):
    retrieval.read_beir(tmp_path)


def test_read_beir_bytes_that_are_no_text(tmp_path):
  write_beir(tmp_path)
  (tmp_path / "qrels.tsv").write_bytes(QRELS.encode() + b"q1\t\xff\t1\n")
  with pytest.raises(DataError, match=r"qrels.tsv:5: invalid UTF-8 at byte 3"):
    retrieval.read_beir(tmp_path)
  (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "d0", "text": "\xff"}\n')
  with pytest.raises(DataError, match=r"corpus.jsonl:1: invalid UTF-8"):
    retrieval.read_beir(tmp_path)
  (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "d0", "text": "\\ud800"}\n')
  with pytest.raises(DataError, match=r"corpus.jsonl:1: \"text\" holds a lone"):
    retrieval.read_beir(tmp_path)
  (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "d0", "te\n')
  with pytest.raises(DataError, match=r"corpus.jsonl:1: malformed JSON"):
    retrieval.read_beir(tmp_path)
  (tmp_path / "corpus.jsonl").unlink()
  with pytest.raises(DataError, match=r"no corpus.jsonl or corpus.jsonl.gz"):
    retrieval.read_beir(tmp_path)


def test_read_pairs_merges_queries_and_positives(tmp_path):
  pairs = [
    {"query": "river", "positive": "Danube", "title": "Rivers", "language": "en"},
    {"query": "mountain", "positive": "Alps", "negatives": ["Danube"]},
    {"query": "river", "positive": "Rhine"},
    {"query": "stream", "positive": "Danube", "title": "Rivers"},
    {"query": "stream", "positive": "Danube"},
  ]
  data = retrieval.read_pairs(write_jsonl(tmp_path / "pairs.jsonl.gz", pairs))
  assert data == RetrievalData(
    ids=["d0", "d1", "d2", "d3"],
    texts=["Danube", "Alps", "Rhine", "Danube"],
    titles=["Rivers", "", "", ""],
    queries={"q0": "river", "q1": "mountain", "q2": "stream"},
    qrels={"q0": {"d0": 1, "d2": 1}, "q1": {"d1": 1}, "q2": {"d0": 1, "d3": 1}},
    languages={"q0": "en"},
  )


def test_read_pairs_takes_bitext(tmp_path):
  rows = [{"sentence1": "Guten Tag", "sentence2": "Good day"}]
  data = retrieval.read_pairs(write_jsonl(tmp_path / "bitext.jsonl", rows))
  assert data.queries == {"q0": "Guten Tag"}
  assert data.texts == ["Good day"]


@pytest.mark.parametrize(
  ("records", "message"),
  [
    ([], "no pairs; the corpus is empty"),
    ([{"query": "a", "positive": "b"}, {"query": "a"}], r":2: no \"positive\""),
    ([{"text": "a"}], r":1: no \"query\"; the record has \['text'\]"),
    ([{"sentence1": "a"}], r":1: no \"sentence2\""),
    ([{"query": ["a"], "positive": "b"}], r":1: \"query\" must be a string, got list"),
    ([{"query": "a", "positive": "b", "title": 1}], r":1: \"title\" must be a string"),
  ],
)
def test_read_pairs_says_where_and_what(tmp_path, records, message):
  path = write_jsonl(tmp_path / "pairs.jsonl", records)
  with pytest.raises(DataError, match=f"pairs.jsonl.*{message}"):
    retrieval.read_pairs(path)


# Small integers: products are exact in float32, so that ties are ties.
matrices = st.tuples(st.integers(1, 7), st.integers(1, 25), st.integers(1, 4)).flatmap(
  lambda s: st.tuples(
    *(
      hnp.arrays(np.float32, (rows, s[2]), elements=st.integers(-2, 2))
      for rows in s[:2]
    )
  )
)


@given(matrices, st.integers(1, 30), st.integers(1, 30))
def test_search_equals_brute_force(sides, k, block_size):
  queries, documents = sides
  scores, indices = exact_search.search(queries, documents, k, block_size)
  full = queries.astype(np.float64) @ documents.astype(np.float64).T
  expected = np.argsort(-full, axis=1, kind="stable")[:, :k]
  np.testing.assert_array_equal(indices, expected)
  np.testing.assert_array_equal(scores, np.take_along_axis(full, expected, 1))


def test_search_never_holds_the_whole_matrix():
  sizes = []

  class Counted(np.ndarray):
    def __matmul__(self, other):
      product = np.asarray(self) @ np.asarray(other)
      sizes.append(product.size)
      return product

  rng = np.random.default_rng(0)
  queries = rng.standard_normal((20, 8), np.float32).view(Counted)
  exact_search.search(
    queries, rng.standard_normal((50, 8), np.float32), 3, block_size=8
  )
  assert max(sizes) == 64
  assert sum(sizes) == 20 * 50


@pytest.mark.parametrize(("k", "block_size"), [(0, 4), (4, 0)])
def test_search_refuses_empty_lists_and_blocks(k, block_size):
  ones = np.ones((2, 2), np.float32)
  with pytest.raises(ValueError, match="must be positive"):
    exact_search.search(ones, ones, k, block_size)


def test_self_match_is_dropped_unless_judged():
  data = RetrievalData(
    ids=["a", "b", "c"],
    texts=["", "", ""],
    titles=["", "", ""],
    queries={"a": "", "b": "", "c": ""},
    qrels={"a": {"b": 1}, "b": {"b": 1}, "c": {"a": 1, "c": 0}},
  )
  rankings = retrieval.without_self_matches(data, {q: ["a", "b", "c"] for q in "abc"})
  assert rankings == {"a": ["b", "c"], "b": ["a", "b", "c"], "c": ["a", "b"]}


def test_ranking_metrics_are_means_over_queries_and_languages(tmp_path):
  data = retrieval.read_beir(write_beir(tmp_path))
  rankings = {"q0": ["d2", "d1", "d0"], "q1": ["d0", "d1"]}
  values = retrieval.ranking_metrics(data, rankings, k=2, recall_k=3, by_language=True)
  first = 1 / (2 + 1 / np.log2(3))
  second = 1 / np.log2(3)
  assert values == pytest.approx(
    {
      "ndcg@2": (first + second) / 2,
      "ndcg@2:en": first,
      "ndcg@2:de": second,
      "mrr@2": 0.75,
      "mrr@2:en": 1.0,
      "mrr@2:de": 0.5,
      "recall@2": 0.75,
      "recall@2:en": 0.5,
      "recall@2:de": 1.0,
      "recall@3": 1.0,
      "recall@3:en": 1.0,
      "recall@3:de": 1.0,
    }
  )


class TableEncoder:
  """Random unit vectors by text; remembers what it was asked."""

  def __init__(self, width=16):
    self.width, self.calls, self.table = width, [], {}
    self.rng = np.random.default_rng(0)

  def __call__(self, texts):
    self.calls.append(list(texts))
    for text in texts:
      vector = self.rng.standard_normal(self.width)
      self.table.setdefault(text, vector / np.linalg.norm(vector))
    return np.array([self.table[text] for text in texts], np.float32)


def random_collection(queries=30, documents=200):
  rng = np.random.default_rng(1)
  ids = [f"d{i}" for i in range(documents)]
  return RetrievalData(
    ids=ids,
    texts=[f"text {i}" for i in range(documents)],
    titles=["" if i % 2 else f"title {i}" for i in range(documents)],
    queries={f"q{i}": f"question {i}" for i in range(queries)},
    qrels={
      f"q{i}": {d: int(rng.integers(1, 4)) for d in rng.choice(ids, 12, replace=False)}
      for i in range(queries)
    },
  )


def test_evaluator_equals_float64_reference_at_each_width():
  data, encode = random_collection(), TableEncoder()
  prompts = TaskPrompts(query="QuestionAnswering", document="document")
  values = RetrievalEvaluator(
    "toy", data, prompts, widths=(16, 5), block_size=7
  ).evaluate(encode)
  assert len(encode.calls) == 2
  assert encode.calls[0][0] == "task: question answering | query: question 0"
  assert encode.calls[1][:2] == [
    "title: title 0 | text: text 0",
    "title: none | text: text 1",
  ]
  gains = np.array(
    [[grades.get(d, 0) for d in data.ids] for grades in data.qrels.values()]
  )
  for width in (16, 5):
    queries, documents = (
      np.array([encode.table[text][:width] for text in texts]) for texts in encode.calls
    )
    cosine = queries @ documents.T / np.linalg.norm(documents, axis=1)
    assert values[f"ndcg@10/{width}"] == pytest.approx(
      ndcg_score(gains, cosine, k=10), abs=1e-9
    )
    hits = np.take_along_axis(gains > 0, np.argsort(-cosine, axis=1), 1)
    for k in (10, 100):
      assert values[f"recall@{k}/{width}"] == pytest.approx(
        hits[:, :k].sum(1).mean() / 12
      )
    first = np.where(hits[:, :10].any(1), 1 / (1 + hits.argmax(1)), 0)
    assert values[f"mrr@10/{width}"] == pytest.approx(first.mean())
  assert set(values) == {
    f"{name}/{width}"
    for name in ("ndcg@10", "mrr@10", "recall@10", "recall@100")
    for width in (16, 5)
  }


def test_dropped_self_match_leaves_k_documents():
  data = RetrievalData(
    ids=["a", "b", "c"],
    texts=["same", "other", "third"],
    titles=["", "", ""],
    queries={"a": "same"},
    qrels={"a": {"b": 1}},
  )
  vectors = {"same": [1, 0], "other": [0.8, 0.6], "third": [0, 1]}

  def encode(texts):
    return np.array([vectors[text] for text in texts], np.float32)

  prompts = TaskPrompts("none", "none")
  evaluator = RetrievalEvaluator("t", data, prompts, widths=(2,), k=1, recall_k=1)
  assert evaluator.evaluate(encode)["ndcg@1/2"] == 1.0


def test_evaluator_reads_a_folder_or_pairs_when_asked(tmp_path):
  evaluator = RetrievalEvaluator("toy", str(tmp_path / "beir"), widths=(16,))
  with pytest.raises(DataError, match=r"beir: no such file or folder; give .*'toy'"):
    evaluator.check()
  (tmp_path / "beir").mkdir()
  write_beir(tmp_path / "beir")
  evaluator.check()
  assert evaluator.evaluate(TableEncoder())["recall@100/16"] == 1.0
  pairs = write_jsonl(tmp_path / "p.jsonl", [{"query": "a", "positive": "b"}])
  evaluator = RetrievalEvaluator("toy", pairs, widths=(16,))
  assert evaluator.evaluate(TableEncoder())["ndcg@10/16"] == 1.0
  with pytest.raises(ConfigError, match="split needs a BEIR folder"):
    RetrievalEvaluator("toy", pairs, split="dev").check()


@pytest.mark.parametrize("widths", [(), (0,), (-1, 8), (8, 8)])
def test_widths_that_cannot_work(widths):
  with pytest.raises(ConfigError, match="toy: widths"):
    RetrievalEvaluator("toy", random_collection(), widths=widths).check()


@pytest.mark.parametrize("setting", ["k", "recall_k", "block_size"])
def test_cutoffs_that_cannot_work(setting):
  with pytest.raises(ConfigError, match="must be positive"):
    RetrievalEvaluator("toy", random_collection(), **{setting: 0}).check()


def test_width_above_the_embeddings_fails_before_the_corpus_is_embedded():
  encode = TableEncoder(width=16)
  evaluator = RetrievalEvaluator("toy", random_collection(), widths=(32, 16))
  with pytest.raises(ConfigError, match="width 32 exceeds the embedding width 16"):
    evaluator.evaluate(encode)
  assert len(encode.calls) == 1


def test_embeddings_that_are_not_finite():
  def encode(texts):
    vectors = np.ones((len(texts), 4), np.float32)
    vectors[3] = np.nan
    return vectors

  evaluator = RetrievalEvaluator("toy", random_collection(), widths=(4,))
  with pytest.raises(TrainingError, match=r"text 3 is not finite \(1 of 30"):
    evaluator.evaluate(encode)


def test_prefix_has_unit_norm_and_survives_zeros():
  vectors = np.array([[3, 4, 12], [0, 0, 1]], np.float32)
  np.testing.assert_allclose(retrieval.prefix(vectors, 2), [[0.6, 0.8], [0, 0]])
