"""Kills training at random moments, resumes it, and compares the end bit for bit.

    python benchmarks/faults/kill_resume.py --kills 10 [-- TRAIN FLAGS]

Without flags it trains the quickstart with small steps. Every start reads ahead with
another number of threads or processes, which must not matter. It exits with 1 if an
interrupted run ends in anything but the uninterrupted run's parameters and optimizer
state.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

QUICKSTART = (
  "--gin_file=gin/recipes/quickstart.gin",
  "--gin.TRAIN_STEPS=60",
  "--gin.BATCH_SIZE=16",
  "--gin.TASK_FEATURE_LENGTHS={'query': 32, 'positive': 64, 'negatives': 64}",
  "--gin.CHECKPOINT_STEPS=5",
  "--gin.EVALUATIONS={}",
)
READERS = (
  "--gin.train.reader_workers=2",
  "--gin.train.reader_threads=1",
  "--gin.train.reader_threads=4",
)


@dataclasses.dataclass(frozen=True)
class Training:
  """One training command, to be run in directories of its own.

  Attributes:
    flags: Of `embgemma train`, without MODEL_DIR.
    environment: Of the process; None is this one's.
  """

  flags: tuple[str, ...]
  environment: Mapping[str, str] | None = None

  def start(self, model_dir: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    """The running process; stderr and stdout go to MODEL_DIR.log."""
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "embgemma", "train", *self.flags, *more]
    with open(model_dir.with_suffix(".log"), "a") as log:
      return subprocess.Popen(
        [*command, f"--gin.MODEL_DIR={model_dir}"],
        stdout=log,
        stderr=log,
        text=True,
        env=self.environment,
      )

  def finish(self, model_dir: pathlib.Path, *more: str) -> None:
    """Runs to the end.

    Raises:
      RuntimeError: with the log, if the command fails.
    """
    if self.start(model_dir, *more).wait():
      raise RuntimeError(model_dir.with_suffix(".log").read_text())


def saved_steps(model_dir: pathlib.Path) -> list[int]:
  """Complete checkpoints, oldest first."""
  found = (model_dir / "checkpoints").glob("*")
  return sorted(int(path.name) for path in found if path.name.isdigit())


def final_state(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint by its path."""
  step = saved_steps(model_dir)[-1]
  directory = (model_dir / "checkpoints" / str(step)).absolute()
  items = sorted({"params", "ema", "training"} & {p.name for p in directory.iterdir()})
  arrays = {"step": np.int64(step)}
  for item in items:
    with ocp.StandardCheckpointer() as reader:
      metadata = ocp.StandardCheckpointHandler().metadata(directory / item)
      # Onto this process's first device, whatever wrote it.
      sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      target = jax.tree.map(
        lambda x, sharding=sharding: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding
        ),
        metadata.tree,
      )
      tree = reader.restore(directory / item, target)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      arrays[f"{item}/{name}"] = np.asarray(leaf)
  return arrays


def differences(
  found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> list[str]:
  """Paths of arrays that are not the same to the last bit."""
  return sorted(
    name
    for name in found.keys() | expected.keys()
    if name not in found
    or name not in expected
    or found[name].dtype != expected[name].dtype
    or found[name].tobytes() != expected[name].tobytes()
  )


@dataclasses.dataclass(frozen=True)
class Kill:
  """Where one `kill -9` struck.

  Attributes:
    model_dir: Of the run.
    seconds: After its process started.
    saved: Steps on disk then.
  """

  model_dir: pathlib.Path
  seconds: float
  saved: list[int]


def kill_and_resume(
  training: Training,
  work_dir: pathlib.Path,
  kills: int,
  seed: int,
  longest: float,
  readers: Sequence[str] = READERS,
) -> tuple[list[Kill], list[pathlib.Path]]:
  """Runs that were killed `kills` times in all, and brought to their end.

  Args:
    training: What to run.
    work_dir: Of the runs.
    kills: Processes killed; as many runs as that takes.
    seed: Of the moments.
    longest: Seconds within which a process is killed; an uninterrupted run's time.
    readers: Flags of one start after the other, in turn.

  Returns:
    The kills and the directories of the finished runs.
  """
  moments, struck, finished = random.Random(seed), [], []
  starts = 0
  while len(struck) < kills or not finished:
    model_dir = work_dir / f"killed-{len(finished)}"
    while model_dir not in finished:
      process = training.start(model_dir, readers[starts % len(readers)])
      starts += 1
      began = time.monotonic()
      try:
        wait = moments.uniform(0, longest) if len(struck) < kills else None
        code = process.wait(wait)
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        seconds = time.monotonic() - began
        struck.append(Kill(model_dir, seconds, saved_steps(model_dir)))
      else:
        if code:
          raise RuntimeError(model_dir.with_suffix(".log").read_text())
        finished.append(model_dir)
  return struck, finished


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--work_dir", type=pathlib.Path, help="kept if given")
  parser.add_argument("flags", nargs="*", help="of `embgemma train`, after --")
  options = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as temporary:
    work_dir = options.work_dir or pathlib.Path(temporary)
    # Compiled once: more of the kills strike at training.
    programs = {
      "JAX_COMPILATION_CACHE_DIR": str(work_dir / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    training = Training(tuple(options.flags) or QUICKSTART, {**programs, **os.environ})
    # The first run fills the caches of tokens; the second is what others should be.
    training.finish(work_dir / "first")
    began = time.monotonic()
    training.finish(work_dir / "whole")
    longest = time.monotonic() - began
    expected = final_state(work_dir / "whole")
    failed = differences(final_state(work_dir / "first"), expected)
    print(
      f"uninterrupted: {longest:.1f} s; two of them differ in {failed or 'nothing'}"
    )
    struck, finished = kill_and_resume(
      training, work_dir, options.kills, options.seed, longest
    )
    for kill in struck:
      print(
        f"{kill.model_dir.name}: killed at {kill.seconds:.1f} s, saved {kill.saved}"
      )
    for model_dir in finished:
      different = differences(final_state(model_dir), expected)
      print(f"{model_dir.name}: differs in {different or 'nothing'}")
      failed += different
  print(f"{len(struck)} kills, {len(finished)} runs, {len(expected)} arrays compared")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
