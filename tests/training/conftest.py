import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath

from embgemma.data import teacher_vectors
from embgemma.data.cache import CachedTask
from embgemma.data.records import Example
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.vector_store import VectorStore
from embgemma.losses.objective import Nce, Objective, SpreadOut
from embgemma.models.config import EmbedderConfig, TransformerConfig

CONFIG = EmbedderConfig(
  transformer=TransformerConfig(
    vocab_size=64,
    num_layers=3,  # one full group of the scan and a remainder
    width=16,
    mlp_width=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention_pattern=("local", "global"),
    window=(8, 8),
    max_length=64,
  ),
  hidden_width=32,
  embedding_width=16,
  matryoshka_widths=(16, 8),
)


@pytest.fixture(scope="session")
def config() -> EmbedderConfig:
  return CONFIG


@pytest.fixture(scope="session")
def objective() -> Objective:
  # A mild temperature: float32's rounding is not amplified beyond comparison.
  return Objective((Nce(widths=(16, 8), temperature=0.5), SpreadOut(widths=(16, 8))))


@pytest.fixture(scope="module")
def make_task(tmp_path_factory, write_examples) -> Callable[..., CachedTask]:
  """A cache of random examples, as a build leaves it."""

  def make(name: str, examples: int, negatives: int, seed: int = 0) -> CachedTask:
    rng = np.random.default_rng(seed)

    def example() -> Example:
      # Some have fewer negatives than others.
      count = 2 + int(rng.integers(0, negatives + 1))
      lengths = [4, 6, *[3] * (count - 2)]
      tokens = tuple(rng.integers(1, 64, n, dtype=np.int32) for n in lengths)
      return Example(tokens, rng.integers(0, 2**63, count, dtype=np.uint64))

    directory = tmp_path_factory.mktemp(name)
    made = (example() for _ in range(examples))
    statistics = write_examples(directory, made, (8, 8, 8))
    return CachedTask(name, 1.0, epath.Path(directory), statistics)

  return make


@pytest.fixture(scope="session")
def teach() -> Callable[..., TeacherVectors]:
  """Random vectors of most texts of a task, in half precision."""

  def teach(task: CachedTask, width: int, name: str = "t") -> TeacherVectors:
    rng = np.random.default_rng(0)
    directory = pathlib.Path(task.directory)
    store = VectorStore.create_or_open(directory / name, width, "float16", "random")
    given = (task.lengths() > 0) & (rng.random(task.lengths().shape) < 0.8)
    vectors = rng.normal(size=(int(given.sum()), width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store.add(np.arange(len(vectors), dtype=np.uint64), vectors.astype(np.float16))
    rows = np.where(given, np.cumsum(given).reshape(given.shape) - 1, -1)
    teacher_vectors.write(directory, name, store, rows.shape, [rows])
    return TeacherVectors(directory, name)

  return teach
