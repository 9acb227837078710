"""What a searcher is, and exact search by inner product on JAX's devices."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from embgemma.mining.corpus import Collection

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Hits:
  """The best passages of queries, best first; of equal ones in order of the corpus.

  Attributes:
    passages: int64 [Q, K]; -1 where there are no more.
    similarities: float32 [Q, K], the searcher's own; -inf where there is none.
    positives: Of each query, float32 [n]: similarities of `Collection.positives`.
  """

  passages: np.ndarray
  similarities: np.ndarray
  positives: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Places:
  """Directories for pieces of work.

  Attributes:
    own: Of one collection and one searcher or judge.
    shared: By all collections of a run.
  """

  own: pathlib.Path
  shared: pathlib.Path


@runtime_checkable
class Search(Protocol):
  """An index that is ready."""

  def __call__(self, queries: Int[np.ndarray, " Q"], depth: int) -> Hits:
    """The best `depth` passages of queries of the collection."""
    ...


@runtime_checkable
class Searcher(Protocol):
  """Finds passages for queries.

  Attributes:
    name: For logs and reports.
    fingerprint: Of what its results depend on beside the collection.
    similarity_range: Ends of the histograms of its similarities.
  """

  @property
  def name(self) -> str: ...

  @property
  def fingerprint(self) -> str: ...

  @property
  def similarity_range(self) -> tuple[float, float]: ...

  def open(
    self, collection: Collection, kind: str | None, places: Places, log: Log
  ) -> Search:
    """An index of the collection, made unless it is there.

    Args:
      collection: Of a task.
      kind: Of the task.
      places: For pieces.
      log: Takes lines of progress.
    """
    ...


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _merge(
  best: jax.Array,
  indices: jax.Array,
  queries: jax.Array,
  block: jax.Array,
  start: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The best of what was found and of a block, of which `count` rows are there."""
  scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
  scores = jnp.where(jnp.arange(len(block)) < count, scores, -jnp.inf)
  depth = best.shape[1]
  # Of equal scores top_k takes the leftmost: found before, then in order of the block.
  best, chosen = jax.lax.top_k(jnp.concatenate([best, scores], axis=1), depth)
  old = jnp.take_along_axis(indices, jnp.minimum(chosen, depth - 1), axis=1)
  return best, jnp.where(chosen < depth, old, start + chosen - depth)


def exact_search(
  queries: Float[np.ndarray, "Q W"],
  passages: int,
  read: Callable[[int, int], Float[np.ndarray, "C W"]],
  depth: int,
  block: int,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
  """The `depth` highest inner products of each query, and whose they are.

  Products are float32 at full precision on every platform. Equal scores are in order of
  the passages; K = depth, filled up with -inf and -1. Queries are split over all local
  devices, which hold one block of passages and Q x (K + block) scores.

  Args:
    queries: All that are searched at once.
    passages: Number of them, below 2**31.
    read: Gives the vectors of passages from one number up to another.
    depth: K.
    block: Passages scored at a time.
  """
  devices = jax.local_devices()
  mesh = Mesh(np.array(devices), ("queries",))
  split = NamedSharding(mesh, PartitionSpec("queries"))
  whole = NamedSharding(mesh, PartitionSpec())
  # Powers of two: a last, smaller block of queries compiles a smaller program.
  rows = 1 << (len(queries) - 1).bit_length()
  rows = -(-rows // len(devices)) * len(devices)
  width, block = queries.shape[1], min(block, passages)
  padded = np.zeros((rows, width), np.float32)
  padded[: len(queries)] = queries
  placed = jax.device_put(padded, split)
  best = jax.device_put(np.full((rows, depth), -np.inf, np.float32), split)
  indices = jax.device_put(np.full((rows, depth), -1, np.int32), split)
  for start in range(0, passages, block):
    stop = min(start + block, passages)
    vectors = np.zeros((block, width), np.float32)
    vectors[: stop - start] = read(start, stop)
    # Dispatched, not waited for: the host reads the next block meanwhile.
    best, indices = _merge(
      best,
      indices,
      placed,
      jax.device_put(vectors, whole),
      np.int32(start),
      np.int32(stop - start),
    )
  found = np.asarray(indices)[: len(queries)].astype(np.int64)
  return np.asarray(best)[: len(queries)], found
