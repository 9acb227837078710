import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

AXES = ("data", "fsdp")


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


@pytest.fixture(scope="session")
def mesh() -> Mesh:
  devices = jax.devices()
  assert len(devices) >= 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
  return Mesh(np.array(devices[:8]).reshape(4, 2), AXES)


@pytest.fixture(scope="session")
def on_one() -> Callable[..., tuple]:
  """Loss, metrics, gradients of `f(rows, params, axes)` with all rows on a device."""

  @functools.cache
  def compiled(f: Callable[..., tuple]) -> Callable[..., tuple]:
    step = jax.value_and_grad(lambda x: f(*x, ()), has_aux=True, allow_int=True)
    return jax.jit(step)

  def run(f: Callable[..., tuple], rows: Any, params: Any = ()) -> tuple:
    (loss, metrics), gradients = compiled(f)((rows, params))
    return loss, metrics, floats(gradients)

  return run


@pytest.fixture(scope="session")
def on_eight(mesh) -> Callable[..., tuple]:
  """The same with an eighth of the rows on each device, as a training step does it."""
  split, whole = PartitionSpec(AXES), PartitionSpec()

  @functools.cache
  def compiled(f: Callable[..., tuple]) -> Callable[..., tuple]:
    step = jax.value_and_grad(lambda x: f(*x, AXES), has_aux=True, allow_int=True)

    def shard(rows: Any, params: Any) -> tuple:
      (share, metrics), gradients = step((rows, params))
      own, shared = floats(gradients)
      each = jax.tree.map(lambda x: x[None], (share, metrics))
      return each, own, jax.lax.psum(shared, AXES)

    specs = {"in_specs": (split, whole), "out_specs": (split, split, whole)}
    return jax.jit(jax.shard_map(shard, mesh=mesh, check_vma=False, **specs))

  def run(f: Callable[..., tuple], rows: Any, params: Any = ()) -> tuple:
    (shares, metrics), *gradients = compiled(f)(rows, params)
    for name, values in metrics.items():
      np.testing.assert_array_equal(values, np.full(8, values[0]), err_msg=name)
    metrics = {name: values[0] for name, values in metrics.items()}
    return np.sum(shares), metrics, tuple(gradients)

  return run


def floats(tree: Any) -> Any:
  """The tree without the gradients of integers and flags, which are no numbers."""
  return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, tree)


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
  """Relative errors of arrays, by their norms."""

  def check(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(expected)]
    for x, y in zip(jax.tree.leaves(actual), leaves, strict=True):
      assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-12

  return check
