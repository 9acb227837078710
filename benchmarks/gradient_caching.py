"""What gradient caching costs in time, and what it does to memory.

    python benchmarks/gradient_caching.py --preset=mini --tokens=8192

Times a step of 512 examples with all activations kept and with gradient caching, in
turn, and compares the memory of programs for 512 and 8,192 examples. Random token ids:
queries of 10 to 24 tokens, passages of 100 to 256. Gradients are compared by
tests/training/test_gradient_cache.py.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from embgemma import gin_config
from embgemma.data.bad_records import SkipLog
from embgemma.data.cache import CachedTask
from embgemma.data.reader import StepSource
from embgemma.data.records import Example
from embgemma.data.schedule import RecordSchedule
from embgemma.data.shard_writer import write_parts
from embgemma.data.task_index import finish_task
from embgemma.losses.objective import Nce, Objective, SpreadOut
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import on_platform
from embgemma.training import partitioning
from embgemma.training.learners import EmbeddingLearner
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import Partitioner
from embgemma.training.train_state import abstract_state
from embgemma.training.train_step import make_train_step

MIB = 2**20


def make_task(directory: pathlib.Path, examples: int) -> CachedTask:
  """A cache of random pairs."""
  rng = np.random.default_rng(0)

  def example() -> Example:
    lengths = rng.integers(10, 25), rng.integers(100, 257)
    tokens = tuple(rng.integers(5, 8000, n, dtype=np.int32) for n in lengths)
    return Example(tokens, rng.integers(0, 2**63, 2, dtype=np.uint64))

  root, limits = epath.Path(directory), (25, 257, 257)
  items = ((place, [example()]) for place in range(1, examples + 1))
  write_parts(root, (0, 0), items, limits, SkipLog(), lambda count: None)
  index = finish_task(root, "random", 1, {}, pairs=True)
  return CachedTask("random", 1.0, root, index["statistics"])


class Case:
  """A compiled step, its state and its batch."""

  def __init__(self, config: EmbedderConfig, task: CachedTask, batch: int, tokens: Any):
    mesh = Partitioner(data=1).mesh(jax.devices()[:1])
    widths = config.matryoshka_widths
    objective = Objective((Nce(widths=widths), SpreadOut(widths=widths)))
    learner, optimizer = EmbeddingLearner(config, objective), OptimizerConfig()
    init, abstract = abstract_state(
      learner, optimizer, 1000, False, Partitioner(data=1), mesh
    )
    schedule = RecordSchedule([task], batch, 0, config.transformer.vocab_size)
    source = StepSource(schedule, microbatch_tokens=tokens)
    packed = source.batch(0).arrays
    self.shapes = [group.tokens.shape for group in packed.groups]
    self.pairs = partitioning.place_batch(packed, learner.batch_specs, mesh)
    step: Any = make_train_step(learner, optimizer, 1000, mesh, abstract)
    self.compiled = step.lower(abstract, self.pairs).compile()
    self.init = init
    self.state: Any = None

  def seconds(self) -> float:
    """Of one step."""
    if self.state is None:
      self.state = self.init(jax.random.key(0))
      self.seconds()
    jax.block_until_ready(self.state)
    began = time.perf_counter()
    self.state, _ = self.compiled(self.state, self.pairs)
    jax.block_until_ready(self.state)
    return time.perf_counter() - began

  def bytes(self) -> int:
    """Most that the program holds: what goes in, and what it needs beside."""
    sizes = self.compiled.memory_analysis()
    return (
      sizes.argument_size_in_bytes
      + sizes.output_size_in_bytes
      - sizes.alias_size_in_bytes
      + sizes.temp_size_in_bytes
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--preset", default="mini")
  parser.add_argument("--tokens", type=int, default=8192, help="of a microbatch")
  parser.add_argument("--turns", type=int, default=5)
  options = parser.parse_args()
  gin_config.register()
  files = [f"gin/models/{options.preset}.gin"]
  gin_config.parse(files, ["TransformerConfig.dtype=float32"], [])
  config = gin_config.resolve("EmbedderConfig")
  config = on_platform(config, jax.devices()[0].platform)
  with tempfile.TemporaryDirectory() as directory:
    task = make_task(pathlib.Path(directory), 8192)
    small = Case(config, task, 512, options.tokens)
    large = Case(config, task, 8192, options.tokens)
    vectors = {batch: 4 * 2 * batch * config.embedding_width for batch in (512, 8192)}
    for batch, case in ((512, small), (8192, large)):
      print(
        f"{batch:,} examples: {case.shapes}, {case.bytes() / MIB:,.0f} MiB, of which "
        f"the embeddings are {vectors[batch] / MIB:,.0f}"
      )
    whole = large.bytes() / small.bytes()
    # The embeddings and their gradient.
    rest = (large.bytes() - 2 * vectors[8192]) / (small.bytes() - 2 * vectors[512])
    print(f"memory 8,192 / 512: {whole:.3f}; embeddings and gradient aside {rest:.3f}")
    del large
    kept = Case(config, task, 512, None)
    print(f"uncached: {kept.bytes() / MIB:,.0f} MiB")
    turns = [(kept.seconds(), small.seconds()) for _ in range(options.turns + 1)][1:]
    for uncached, cached in turns:
      print(f"uncached {uncached:.2f} s, cached {cached:.2f} s")
    ratio = statistics.median(cached / uncached for uncached, cached in turns)
    print(f"cached / uncached: {ratio:.3f} (median)")


if __name__ == "__main__":
  main()
