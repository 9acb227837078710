"""BM25 in segments: bm25s over the whole corpus is the reference."""

import bm25s
import numpy as np
import pytest

from embgemma.data.task_examples import open_tasks
from embgemma.data.words import tokenize
from embgemma.errors import ConfigError
from embgemma.mining.bm25 import Bm25Searcher
from embgemma.mining.corpus import build_collection
from embgemma.mining.searchers import Places


@pytest.fixture
def collection(make_config, tmp_path):
  generator = np.random.default_rng(0)
  words = [f"w{i}" for i in range(40)]
  records = []
  for number in range(60):
    own = generator.choice(words, generator.integers(1, 30)).tolist()
    query = generator.choice(words, 4).tolist()
    records.append({"query": f"{number} " + " ".join(query), "positive": " ".join(own)})
  records[7]["title"] = "w1 w2"
  for number in range(20, 25):
    records[number]["positive"] = "!" * (number - 10)  # no term at all: a whole segment
  records[31]["positive"] = records[50]["positive"] = "w3 w3 w5"
  records[50]["title"] = ""
  records[33]["positive"] = "w5 w3 w3"  # scores as 31 does
  records[0]["query"] = "w3 w5"
  records[2]["query"] = "nothing known"
  (task,) = open_tasks(make_config(words=records))
  return build_collection(tmp_path / "collection", task, ())


def _reference(collection, k1, b):
  texts = [collection.passage(i) for i in range(collection.passages)]
  terms = [tokenize(f"{each.title} {each.text}") for each in texts]
  index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
  index.index(terms, create_empty_token=False, show_progress=False)
  queries = [tokenize(collection.query(i)[0]) for i in range(collection.queries)]
  return np.array(
    [index.get_scores_from_ids(index.get_tokens_ids(query)) for query in queries]
  )


@pytest.mark.parametrize("segment", [1, 5, 17, 1000])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.0)])
def test_segments_score_as_the_whole_corpus(collection, tmp_path, segment, k1, b):
  searcher = Bm25Searcher(k1, b, segment)
  places = Places(tmp_path / "index", tmp_path)
  search = searcher.open(collection, None, places, [].append)
  queries = np.arange(collection.queries)
  hits = search(queries, 12)
  expected = _reference(collection, k1, b)
  for query in queries:
    there = hits.passages[query] >= 0
    found, scores = hits.passages[query][there], hits.similarities[query][there]
    assert len(found) == min(12, np.count_nonzero(expected[query]))
    np.testing.assert_allclose(scores, expected[query][found], rtol=1e-5)
    best = np.sort(expected[query])[::-1][: len(found)]
    np.testing.assert_allclose(scores, best, rtol=1e-5)
    known = collection.positives(int(query))
    np.testing.assert_allclose(hits.positives[query], expected[query][known], rtol=1e-5)
  assert not (hits.passages[2] >= 0).any()


def test_of_equal_scores_the_first(collection, tmp_path):
  for segment in (4, 1000):
    searcher = Bm25Searcher(segment=segment)
    places = Places(tmp_path / str(segment), tmp_path)
    hits = searcher.open(collection, None, places, [].append)(np.array([0, 1]), 40)
    there = hits.passages[0] >= 0
    scores, found = hits.similarities[0][there], hits.passages[0][there]
    equal = np.flatnonzero(np.diff(scores) == 0)
    assert len(equal)
    assert (found[equal] < found[equal + 1]).all()


def test_an_index_is_made_once(collection, tmp_path):
  places = Places(tmp_path / "index", tmp_path)
  lines: list[str] = []
  for _ in range(2):
    Bm25Searcher(segment=30).open(collection, None, places, lines.append)
  assert sum("indexed" in line for line in lines) == 1


@pytest.mark.parametrize("values", [(0.0, 0.4, 9), (0.9, 1.0, 9), (0.9, 0.4, 0)])
def test_values_out_of_range(values):
  with pytest.raises(ConfigError, match="BM25 needs"):
    Bm25Searcher(*values)
