"""Retrieval, similarity and classification metrics as pure functions.

A ranked list holds document ids, best first, without repeats. Judgements map a
document id to its grade; grades of 0 and below mean "not relevant".
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from embgemma.typing import ArrayLike

Ranking = Sequence[Hashable]
Judgements = Mapping[Any, int]  # of hashable ids


def _gains(ranking: Ranking, judgements: Judgements, k: int) -> list[int]:
  return [max(judgements.get(document, 0), 0) for document in ranking[:k]]


def _discounted(gains: Sequence[int]) -> float:
  return math.fsum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def ndcg(ranking: Ranking, judgements: Judgements, k: int) -> float:
  """Normalised discounted cumulative gain of the first k, in 0..1.

  The gain is the grade itself and the discount log2(rank + 1), as trec_eval's
  `ndcg_cut` and BEIR have it (not 2^grade - 1). The ideal list is all judged
  documents. 0 where nothing is relevant.
  """
  ideal = sorted((grade for grade in judgements.values() if grade > 0), reverse=True)
  if not ideal:
    return 0.0
  return _discounted(_gains(ranking, judgements, k)) / _discounted(ideal[:k])


def reciprocal_rank(ranking: Ranking, judgements: Judgements, k: int) -> float:
  """1 / rank of the first relevant document among the first k; 0 if there is none.

  The mean over queries is MRR@k (BEIR's `mrr` custom metric).
  """
  gains = _gains(ranking, judgements, k)
  return next((1.0 / rank for rank, gain in enumerate(gains, 1) if gain), 0.0)


def recall(ranking: Ranking, judgements: Judgements, k: int) -> float:
  """Share of the relevant documents that are among the first k, in 0..1.

  As trec_eval's `recall`: with more than k relevant documents 1 is out of reach.
  0 where nothing is relevant.
  """
  relevant = sum(grade > 0 for grade in judgements.values())
  found = sum(gain > 0 for gain in _gains(ranking, judgements, k))
  return found / relevant if relevant else 0.0


def spearman(a: Shaped[ArrayLike, " N"], b: Shaped[ArrayLike, " N"]) -> float:
  """Spearman's rank correlation in -1..1; tied values share their mean rank.

  0 where either side is constant: such scores order nothing, and a mean over
  tasks stays defined (`scipy.stats.spearmanr` gives NaN).
  """
  from scipy import stats  # half a second to import

  ranks = [stats.rankdata(side) - (len(side) + 1) / 2 for side in (a, b)]
  norm = math.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
  return float(np.clip(ranks[0] @ ranks[1] / norm, -1.0, 1.0)) if norm else 0.0


def average_precision(
  scores: Shaped[ArrayLike, " N"], labels: Shaped[ArrayLike, " N"]
) -> float:
  """Average precision of scores that should be high where the label is 1, in 0..1.

  Sum over thresholds of precision times the gain in recall, one threshold per
  distinct score, so that the order of ties is of no matter (scikit-learn's
  `average_precision_score`). 0 where no label is 1.
  """
  order = np.argsort(-np.asarray(scores), kind="stable")
  scores, hits = np.asarray(scores)[order], np.cumsum(np.asarray(labels)[order] > 0)
  if not len(hits) or hits[-1] == 0:
    return 0.0
  last_of_tie = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
  found = hits[last_of_tie]
  precision = found / (last_of_tie + 1)
  return float(np.sum(precision * np.diff(found, prepend=0)) / hits[-1])
