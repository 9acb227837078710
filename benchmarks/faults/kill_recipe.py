"""SIGKILL of a recipe and all its processes at random moments: the same parameters.

    python benchmarks/faults/kill_recipe.py --output=DIR [--kills=5]

Runs gin/recipes/tiny.gin once undisturbed, then in another directory, killed again and
again as a machine that loses power is, then to its end. Compared are the weights of the
soup, its export, and the scores of all trials. Both start with empty caches.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from embgemma.interop import conversion

RECIPE = "gin/recipes/tiny.gin"


def start(output: pathlib.Path, name: str) -> subprocess.Popen[bytes]:
  """The recipe, with its own cache; what it prints is in NAME.log."""
  log = (output / f"{name}.log").open("ab")
  command = [sys.executable, "-m", "embgemma", "recipe", f"--gin_file={RECIPE}"]
  directory = f"--gin.RECIPE_DIR={output / name}"
  environment = {**os.environ, "EMBGEMMA_CACHE": str(output / f"{name}_cache")}
  return subprocess.Popen(
    [*command, directory, "--jobs=2"],
    stdout=log,
    stderr=subprocess.STDOUT,
    env=environment,
  )


def descendants(process: int) -> list[int]:
  """A process and all below it (Linux)."""
  parents = {}
  for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = status.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    parents[int(status.parent.name)] = int(fields[1])
  found = [process]
  for each in found:
    found += [child for child, parent in parents.items() if parent == each]
  return found


def killed(process: subprocess.Popen[bytes], seconds: float) -> bool:
  """Whether it was killed after that time, with all below it, before its end."""
  try:
    if process.wait(seconds):
      sys.exit(f"ended with {process.returncode}")
  except subprocess.TimeoutExpired:
    for each in descendants(process.pid):
      os.kill(each, signal.SIGKILL)
    process.wait()
    return True
  return False


def finish(process: subprocess.Popen[bytes]) -> None:
  if process.wait():
    sys.exit(f"ended with {process.returncode}; see its log")


def running(directory: pathlib.Path) -> str:
  """Stages that were at work."""
  try:
    stages = json.loads((directory / "recipe.json").read_text())["stages"]
  except FileNotFoundError:
    return "none"
  return ", ".join(name for name, of in stages.items() if of["state"] == "running")


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Whether weights, export and trials are equal, bit for bit."""
  weights = [
    conversion.open_embedder(str(path / "soup")).params for path in (one, other)
  ]
  equal = jax.tree.all(jax.tree.map(np.array_equal, *weights))
  exports = [
    (path / "embedder" / "model.safetensors").read_bytes() for path in (one, other)
  ]
  trials = []
  for path in (one, other):
    found = json.loads((path / "search" / "search.json").read_text())["trials"]
    trials.append([(trial["rates"], trial["scores"]) for trial in found])
  return equal and exports[0] == exports[1] and trials[0] == trials[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--kills", type=int, default=5)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  output = options.output.resolve()
  output.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()
  finish(start(output, "whole"))
  seconds = time.monotonic() - began
  print(f"undisturbed: {seconds:.0f} s", flush=True)
  draw = random.Random(options.seed)
  kills = 0
  while kills < options.kills:
    # Every kill gets a stretch of its own, so that they fall all over the recipe.
    wait = draw.uniform(0.2, 1.8) * seconds / (options.kills + 1)
    if not killed(start(output, "killed"), wait):
      break
    kills += 1
    print(f"killed after {wait:.0f} s in {running(output / 'killed')}", flush=True)
  finish(start(output, "killed"))
  equal = same(output / "whole", output / "killed")
  print(f"recipe: {kills} kills, the same: {equal}")
  sys.exit(not equal)


if __name__ == "__main__":
  main()
