import itertools
import math
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.evaluation import bm25
from embgemma.evaluation.retrieval import RetrievalData


def collection(texts, queries, ids=None, titles=None):
  ids = ids or [f"d{i}" for i in range(len(texts))]
  return RetrievalData(
    ids=ids,
    texts=texts,
    titles=titles or [""] * len(texts),
    queries=queries,
    qrels={query: {ids[0]: 1} for query in queries},
  )


@pytest.mark.parametrize(
  ("text", "terms"),
  [
    ("A cat, a DOG!", ["a", "cat", "a", "dog"]),
    ("ＦＵＬＬ－ｗｉｄｔｈ ﬁle", ["full", "width", "file"]),
    ("Straße STRASSE", ["strasse", "strasse"]),
    ("concat_dim(x1)", ["concat", "dim", "x1"]),
    ("東京都へ", ["東京", "京都", "都へ"]),
    ("Python入門 3章", ["python", "入門", "3", "章"]),
    ("ｶﾞﾗｽ", ["ガラ", "ラス"]),
    ("한국어 책", ["한국", "국어", "책"]),
    # Vowel signs and viramas belong to their word.
    ("हिन्दी में", ["हिन्दी", "में"]),
    # A Thai consonant keeps its vowel and tone marks: three units.
    ("ที่นี่", ["ที่นี่"]),
    ("soft\u00adware", ["software"]),
    ("e\u0301te\u0301", ["été"]),
    ("… — !", []),
  ],
)
def test_tokenize(text, terms):
  expected = [unicodedata.normalize("NFKC", term) for term in terms]
  assert bm25.tokenize(text) == expected


@given(st.text())
def test_tokenize_loses_no_letter_or_digit(text):
  folded = unicodedata.normalize("NFKC", text).casefold()
  kept = set("".join(bm25.tokenize(text)))
  assert {char for char in folded if char.isalnum()} <= kept


def lucene_scores(documents, query, k1, b):
  """Kamphuis et al. 2020, table 1, "Lucene (accurate)"."""
  terms = [text.split() for text in documents]
  average = sum(map(len, terms)) / len(terms)
  scores = []
  for document in terms:
    counts, score = Counter(document), 0.0
    for term in query.split():
      n = sum(term in other for other in terms)
      idf = math.log(1 + (len(terms) - n + 0.5) / (n + 0.5))
      length = k1 * (1 - b + b * len(document) / average)
      score += idf * counts[term] / (counts[term] + length)
    scores.append(score)
  return scores


@given(
  st.lists(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12).map(" ".join),
    min_size=1,
    max_size=8,
  ),
  st.lists(st.sampled_from("abcxyz"), max_size=4).map(" ".join),
  st.sampled_from([(0.9, 0.4), (1.5, 0.75)]),
)
def test_ranking_equals_the_formula(documents, query, parameters):
  ranking = bm25.bm25_search(collection(documents, {"q": query}), 100, *parameters)["q"]
  scores = lucene_scores(documents, query, *parameters)
  matching = {f"d{i}" for i, score in enumerate(scores) if score > 0}
  assert set(ranking) == matching
  assert len(ranking) == len(matching)
  ranked = [scores[int(identifier[1:])] for identifier in ranking]
  # The index holds float32, which may swap scores closer than its rounding.
  assert all(a >= b - 1e-5 for a, b in itertools.pairwise(ranked))


def test_equal_scores_are_in_order_of_the_collection():
  data = collection(["b c", "a b", "a c", "a b"], {"q": "a"})
  assert bm25.bm25_search(data)["q"] == ["d1", "d2", "d3"]
  assert bm25.bm25_search(data, k=2)["q"] == ["d1", "d2"]


def test_titles_are_searched():
  data = collection(["x", "y"], {"q": "danube"}, titles=["", "Danube"])
  assert bm25.bm25_search(data)["q"] == ["d1"]


def test_self_match_leaves_k_documents():
  data = collection(["z", "a a", "a b"], {"d1": "a"})
  assert bm25.bm25_search(data, k=1)["d1"] == ["d2"]


@pytest.mark.parametrize("texts", [["…", "!"], ["a", "b"]])
def test_query_that_matches_nothing(texts):
  data = collection(texts, {"q": "unheard of", "empty": "?"})
  assert bm25.bm25_search(data) == {"q": [], "empty": []}
  assert bm25.bm25_metrics(data)["ndcg@10"] == 0.0


def test_metrics_have_keys_without_width():
  data = collection(["東京の川", "大阪の山", "京都の寺"], {"q": "東京", "r": "京都の"})
  data.languages = {"q": "ja"}
  values = bm25.bm25_metrics(data, by_language=True)
  assert values["mrr@10:ja"] == 1.0
  # "京都の寺" shares two bigrams with r; "東京の川" none.
  assert values["mrr@10"] == 0.5
  assert "recall@100" in values
