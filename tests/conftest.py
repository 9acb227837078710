"""Eight virtual devices, one thread pool each test process can share."""

import gc
import os

import hypothesis
import pytest

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than what is compiled: without LLVM's optimisations, each
# program in one piece, fusions written by the emitters that are quicker themselves.
_FLAGS = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
)
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# Torch's threads wait for each other by spinning, on cores that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Two shared cores: a slow example is no failure.
hypothesis.settings.register_profile(
  "embgemma",
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("embgemma")


@pytest.fixture(scope="session")
def write_examples():
  """Writes a complete cache of examples at hand; returns its statistics."""
  from etils import epath

  from embgemma.data.bad_records import SkipLog
  from embgemma.data.shard_writer import write_parts
  from embgemma.data.task_index import finish_task

  def write(directory, examples, cut_at):
    root = epath.Path(directory)
    items = ((place, [example]) for place, example in enumerate(examples, 1))
    write_parts(root, (0, 0), items, cut_at, SkipLog(), lambda count: None)
    return finish_task(root, root.name, 1, {}, pairs=cut_at is not None)["statistics"]

  return write


def pytest_collection_finish() -> None:
  """Millions of objects are imported by now: no garbage, and slow to look through."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)
