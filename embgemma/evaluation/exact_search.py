"""Exact search by inner product, in blocks."""

import numpy as np
from jaxtyping import Bool, Float, Int


def _highest(scores: Float[np.ndarray, "Q N"], k: int) -> Bool[np.ndarray, "Q N"]:
  """True at the k highest of each row; of equal scores the leftmost."""
  if k >= scores.shape[1]:
    return np.ones(scores.shape, bool)
  threshold = np.partition(scores, -k, axis=1)[:, -k, None]
  highest = scores >= threshold
  if highest.sum() > k * len(scores):
    above = scores > threshold
    room = k - above.sum(axis=1, keepdims=True)
    ties = highest & ~above
    highest = above | (ties & (np.cumsum(ties, axis=1, dtype=np.int32) <= room))
  return highest


def _search_rows(
  queries: Float[np.ndarray, "Q E"],
  documents: Float[np.ndarray, "N E"],
  k: int,
  block_size: int,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
  best = np.empty((len(queries), 0), queries.dtype)
  indices = np.empty((len(queries), 0), np.int64)
  for start in range(0, len(documents), block_size):
    # Candidates stay in document order, so that "leftmost" means the lowest index.
    block = queries @ documents[start : start + block_size].T
    scores = np.concatenate([best, block], axis=1)
    keep = _highest(scores, k)
    columns = np.nonzero(keep)[1].reshape(len(queries), min(k, scores.shape[1]))
    rows, old = np.nonzero(columns < best.shape[1])
    carried = indices[rows, columns[rows, old]]
    indices = start + columns - best.shape[1]
    indices[rows, old] = carried
    best = scores[keep].reshape(columns.shape)
  order = np.argsort(-best, axis=1, kind="stable")
  return np.take_along_axis(best, order, 1), np.take_along_axis(indices, order, 1)


def search(
  queries: Float[np.ndarray, "Q E"],
  documents: Float[np.ndarray, "N E"],
  k: int,
  block_size: int = 2048,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
  """Returns the exact top k by inner product: scores and document indices.

  K = min(k, N). Rows are in falling order of score; equal scores are in order of
  document index (trec_eval breaks ties by document name instead). At most
  block_size x (block_size + K) scores exist at a time. Scores that are equal in
  exact arithmetic may differ in their last bit between blocks, as matrix products
  round by shape.

  Raises:
    ValueError: k or block_size is below 1.
  """
  if k < 1 or block_size < 1:
    raise ValueError(f"k and block_size must be positive, got {k} and {block_size}")
  starts = range(0, max(len(queries), 1), block_size)
  parts = [
    _search_rows(queries[i : i + block_size], documents, k, block_size) for i in starts
  ]
  return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
