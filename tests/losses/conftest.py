from collections.abc import Callable

import numpy as np
import pytest


def unit(x: np.ndarray) -> np.ndarray:
  """Unit vectors in float64; zero vectors stay zero."""
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.where(norm > 0, norm, 1)


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., dict[str, np.ndarray]]:
  """A batch like trained embeddings: pairs are near, hard negatives less so."""

  def make(seed: int, batch: int, negatives: int, width: int = 768) -> dict:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=width)
    query = unit(rng.normal(size=(batch, width)) + shared)
    noise = rng.normal(size=(batch, width)) / np.sqrt(width)
    positive = unit(query + 0.8 * noise)
    noise = rng.normal(size=(batch, negatives, width)) / np.sqrt(width)
    negative = unit(query[:, None] + 1.5 * noise)
    ids = np.arange(2 * batch, dtype=np.uint32).reshape(2, batch)
    return {
      "query": query.astype(np.float32),
      "positive": positive.astype(np.float32),
      "negative": negative.astype(np.float32).reshape(batch, negatives, width),
      "negative_mask": np.ones((batch, negatives), bool),
      # Only the second word tells texts apart in half of the batches.
      "query_hash": np.stack([0 * ids[0], ids[0]], axis=-1),
      "positive_hash": np.stack([ids[1], 0 * ids[1]], axis=-1),
    }

  return make
