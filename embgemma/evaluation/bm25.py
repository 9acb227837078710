"""BM25 on the same collections: what an embedder has to beat."""

import functools
import itertools
import re
import sys
import unicodedata

import numpy as np

from embgemma.evaluation.retrieval import (
  RetrievalData,
  ranking_metrics,
  without_self_matches,
)

# Scripts written without spaces between words, and Hangul, whose words carry
# particles: Thai, Lao, Myanmar, Hangul, Khmer, kana, Han. Lucene's CJKAnalyzer makes
# bigrams of Han, kana and Hangul; for the others it needs dictionaries.
_UNSPACED = (
  "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005\u3007"
  "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff"
  "\uf900-\ufaff\U00020000-\U0003ffff"
)
# Soft hyphen and zero-width (non-)joiner stand inside words.
_INVISIBLE = dict.fromkeys((0x00AD, 0x200C, 0x200D))


@functools.cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
  # `\w` lacks combining marks, so it would cut Hindi or Tamil words at each vowel.
  marks = "".join(
    char
    for char in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(char).startswith("M")
  )
  unit = f"[{_UNSPACED}][{marks}]*"
  word = f"(?:[^\\W_{_UNSPACED}]+[{marks}]*)+"
  return re.compile(f"((?:{unit})+)|{word}"), re.compile(unit)


def tokenize(text: str) -> list[str]:
  """Returns the terms of a text in any language, in order, with repeats.

  After NFKC and case folding a term is a run of letters, marks and digits; an
  underscore separates. Text of scripts without spaces becomes overlapping pairs of
  characters (each with its marks), as Lucene's CJKBigramFilter has it, and a lone
  character stays. No stemming, no stop words: what they gain depends on the language.
  """
  text = unicodedata.normalize("NFKC", text).casefold().translate(_INVISIBLE)
  either, unit = _patterns()
  terms = []
  for match in either.finditer(text):
    if match[1] is None:
      terms.append(match[0])
      continue
    units = unit.findall(match[1])
    pairs = [a + b for a, b in itertools.pairwise(units)]
    terms.extend(pairs or units)
  return terms


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
