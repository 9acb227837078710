"""Evaluation of vectors as a store keeps them."""

import numpy as np

from embgemma import vector_formats
from embgemma.evaluation.exact_search import search
from embgemma.typing import Float, Int
from embgemma.vector_formats import CALIBRATION_VECTORS

RESCORED = 4
"""Times as many documents as wanted are found with the codes on both sides, and put in
order by the query as it is (sentence-transformers' rescore_multiplier)."""


def metric_key(metric: str, name: str, width: int) -> str:
  """Such as "ndcg@10/768", or "ndcg@10 (int8)/768" of another format than float32."""
  return f"{metric}/{width}" if name == "float32" else f"{metric} ({name})/{width}"


def kept_values(
  name: str, *vectors: Float[np.ndarray, "_ E"]
) -> tuple[Float[np.ndarray, "_ E"], ...]:
  """What the codes of vectors stand for.

  Args:
    name: Of their format; ranges are those of the last of `vectors`.
    *vectors: Of unit norm.
  """
  if name == "float32":
    return vectors
  kept = vector_formats.calibrated(name, vectors[-1][:CALIBRATION_VECTORS])
  return tuple(kept.values(kept.codes(of), of.shape[-1]) for of in vectors)


def search_kept(
  queries: Float[np.ndarray, "Q E"],
  documents: Float[np.ndarray, "N E"],
  name: str,
  k: int,
  block_size: int,
) -> Int[np.ndarray, "Q K"]:
  """Indices of the top k documents, from the best, as a store finds them.

  Args:
    queries: Unit vectors.
    documents: Unit vectors, which are kept as `name` says; calibrated on themselves.
    name: Of their format.
    k: Documents wanted.
    block_size: See `search`.
  """
  if name == "float32":
    return search(queries, documents, k, block_size)[1]
  coded, kept = kept_values(name, queries, documents)
  _, found = search(coded, kept, RESCORED * k, block_size)
  scores = np.stack(
    [kept[row] @ query for row, query in zip(found, queries, strict=True)]
  )
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(found, order, axis=1)
