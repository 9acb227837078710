"""SIGKILL at random moments: what `cache`, `teach` and `mine` leave is the same.

    python benchmarks/faults/kill_data.py --checkpoint=MODEL_DIR --output=DIR

Each command runs once undisturbed, then again and again, killed with all its processes
after a random part of the time that took, until it was killed as often as asked; then
to its end. Compared are the bytes of caches and of mined files, and of teacher vectors
which vector each text has.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from embgemma.data.teacher_vectors import TeacherVectors

FILES = 12
PAIRS = 2500  # a file


def write_pairs(directory: pathlib.Path) -> None:
  """Files of pairs, some of whose texts occur twice."""
  draw = random.Random(0)
  words = [f"{a}{b}" for a in ["river", "stone", "cloud", "engine"] for b in range(200)]
  directory.mkdir(parents=True, exist_ok=True)
  for number in range(FILES):
    with (directory / f"{number:02d}.jsonl").open("w") as file:
      for _ in range(PAIRS):
        text = " ".join(draw.choices(words, k=12))
        record = {"query": " ".join(text.split()[:4]), "positive": text}
        file.write(json.dumps(record) + "\n")


def contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file() and path.name != ".lock" and "teachers" not in path.parts
  }


def mined(directory: pathlib.Path) -> dict[str, bytes]:
  """Without how long each task took, and where it lies."""
  files = contents(directory)
  report = json.loads(files.pop("report.json"))
  for task in report["tasks"].values():
    del task["seconds"]
  del files["tasks.gin"]
  return {**files, "report": json.dumps(report["tasks"], sort_keys=True).encode()}


def vectors(directory: pathlib.Path) -> dict[str, bytes]:
  (task,) = (directory / "tasks").iterdir()
  taught = TeacherVectors(task, "own")
  values, has = taught.gather(np.arange(len(taught)))
  return {"vectors": values.tobytes(), "has": has.tobytes()}


def wait(command: list[str], seconds: float | None) -> bool:
  """Whether the command ended before it was killed."""
  process = subprocess.Popen(
    command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
  )
  try:
    _, said = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return False
  if process.returncode:
    sys.exit(said.decode()[-3000:])
  return True


def check(
  name: str,
  command: Callable[[pathlib.Path], list[str]],
  found: Callable[[pathlib.Path], dict[str, bytes]],
  output: pathlib.Path,
  kills: int,
  draw: random.Random,
) -> pathlib.Path:
  """Prints whether what killed runs left is what an undisturbed one did."""
  whole, killed = output / f"{name}_whole", output / f"{name}_killed"
  began = time.monotonic()
  wait(command(whole), None)
  seconds = time.monotonic() - began
  done = 0
  while done < kills:
    if wait(command(killed), draw.uniform(0.1, 1.0) * seconds):
      shutil.rmtree(killed)  # ended first: from the beginning
      shutil.copytree(output / f"{name}_seed", killed)
    else:
      done += 1
  wait(command(killed), None)
  same = found(whole) == found(killed)
  print(f"{name}: {seconds:.0f} s undisturbed, {kills} kills, the same: {same}")
  if not same:
    sys.exit(1)
  return whole


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--kills", type=int, default=10)
  options = parser.parse_args()
  draw, output = random.Random(1), options.output.resolve()
  shutil.rmtree(output, ignore_errors=True)
  write_pairs(output / "pairs")
  for name in ("cache", "mine", "teach"):
    (output / f"{name}_seed").mkdir()
    if name != "teach":
      shutil.copytree(output / f"{name}_seed", output / f"{name}_killed")

  def flags(cache: pathlib.Path) -> list[str]:
    tasks = {"pairs": {"path": str(output / "pairs" / "*.jsonl"), "kind": "search"}}
    return [
      "--gin_file=gin/models/from_checkpoint.gin",
      "--gin_file=gin/stages/finetune.gin",
      f"--gin.INITIAL_CHECKPOINT_PATH={options.checkpoint}",
      f"--gin.JSONL_TASKS={tasks}",
      f"--gin.CACHE_DIR={cache}",
    ]

  def embgemma(command: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "embgemma", command, *more]

  def cache(directory: pathlib.Path) -> list[str]:
    return embgemma("cache", *flags(directory), "--workers=2")

  def teach(directory: pathlib.Path) -> list[str]:
    own = ("--gin.TEACHER=own", f"--teacher={options.checkpoint}")
    return embgemma("teach", *flags(directory), *own)

  def mine(directory: pathlib.Path) -> list[str]:
    own = (f"--searcher={options.checkpoint}", f"--output={directory}")
    return embgemma("mine", *flags(output / "unused"), *own)

  cached = check("cache", cache, contents, output, options.kills, draw)
  for name in ("teach_seed", "teach_whole", "teach_killed"):
    shutil.copytree(cached, output / name, dirs_exist_ok=True)
  check("teach", teach, vectors, output, options.kills, draw)
  check("mine", mine, mined, output, options.kills, draw)


if __name__ == "__main__":
  main()
