from collections.abc import Callable

import numpy as np
import pytest

from embgemma.data.cache import CachedTask, write_examples
from embgemma.data.records import Example
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
def make_task(tmp_path_factory) -> Callable[..., CachedTask]:
  """A cache of random examples, as `cache.build` leaves it."""

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
    statistics = write_examples(directory, made, limits=(8, 8, 8))
    return CachedTask(name, 1.0, directory, statistics)

  return make
