"""BM25 on the same collections: what an embedder has to beat."""

import numpy as np

from embgemma.data.words import tokenize
from embgemma.evaluation.retrieval import (
  RetrievalData,
  ranking_metrics,
  without_self_matches,
)


def bm25_search(
  data: RetrievalData, k: int = 100, k1: float = 0.9, b: float = 0.4
) -> dict[str, list[str]]:
  """Returns the ids of the best k documents of each query, best first.

  A document is its title and text. Documents that share no term with the query are
  not ranked; equal scores are in order of the collection. A document with the
  query's own id is left out (see `without_self_matches`).

  The score is Lucene's (Kamphuis et al. 2020, "Which BM25 do you mean?") with
  k1 = 0.9, b = 0.4, the values of BEIR's baseline (Thakur et al. 2021, section 4;
  Anserini's defaults). Lucene's own defaults are 1.2 and 0.75, bm25s' 1.5 and 0.75.
  BEIR scores title and text as two fields, and stems English; we do neither.
  """
  # Importing bm25s runs an operation on JAX's default device.
  import bm25s

  corpus = [
    tokenize(f"{title} {text}")
    for title, text in zip(data.titles, data.texts, strict=True)
  ]
  if not any(corpus):
    return {query: [] for query in data.queries}
  index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
  index.index(corpus, create_empty_token=False, show_progress=False)
  rankings = {}
  for query, text in data.queries.items():
    scores = index.get_scores_from_ids(index.get_tokens_ids(tokenize(text)))
    matched = np.flatnonzero(scores > 0)
    # One more than needed, as a self-match may drop out.
    best = matched[np.argsort(-scores[matched], kind="stable")[: k + 1]]
    rankings[query] = [data.ids[i] for i in best]
  kept = without_self_matches(data, rankings)
  return {query: list(ranking[:k]) for query, ranking in kept.items()}


def bm25_metrics(
  data: RetrievalData, k: int = 10, recall_k: int = 100, by_language: bool = False
) -> dict[str, float]:
  """BM25's nDCG@k, MRR@k and recalls, in 0..1, by key such as "ndcg@10".

  The keys have no width; `report` sets them beside an embedder's at every width.
  """
  rankings = bm25_search(data, max(k, recall_k))
  return ranking_metrics(data, rankings, k, recall_k, by_language)
