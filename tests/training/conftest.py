import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from array_record.python import array_record_module

from embgemma.data.cache import CachedTask, Example, encode_example
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


@pytest.fixture
def make_task(tmp_path: pathlib.Path) -> Callable[..., CachedTask]:
  """A cache of random examples, as `cache.build` leaves it."""

  def make(name: str, examples: int, negatives: int, seed: int = 0) -> CachedTask:
    rng = np.random.default_rng(seed)
    directory = tmp_path / name
    directory.mkdir()
    writer = array_record_module.ArrayRecordWriter(
      str(directory / "examples-00000.array_record"), "group_size:1"
    )
    for _ in range(examples):
      # Some examples have fewer negatives than others; lengths are nearly the same,
      # so that batches have few shapes and compile once or twice.
      count = 2 + int(rng.integers(0, negatives + 1))
      lengths = [4, 6, *[3] * (count - 2)]
      tokens = tuple(rng.integers(1, 64, n, dtype=np.int32) for n in lengths)
      hashes = rng.integers(0, 2**63, count, dtype=np.uint64)
      writer.write(encode_example(Example(tokens, hashes)))
    writer.close()
    statistics = {
      "examples": examples,
      "max_token_id": 63,
      "max_negatives": negatives,
    }
    return CachedTask(name, 1.0, directory, statistics)

  return make
