"""Time to cache pairs: `embgemma cache` and `seqio_cache_tasks` on the same files.

    python benchmarks/caching/run.py --data=DIR --vocabulary=FILE --output=DIR

Both tokenise with the same model and cut at the same lengths; seqio writes TFRecord
through Beam's local runner, we write ArrayRecord. Time is that of the whole command,
imports included; memory the largest of its processes.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent.resolve()
FILES = {
  "debian_desc": 53_337,
  "wordnet_gloss": 40_885,
  "qa_trivia": 38_364,
  "docs_win32": 19_491,
}


def ours(options: argparse.Namespace, output: pathlib.Path, workers: int) -> list[str]:
  tasks = {name: {"path": f"train/{name}.jsonl.gz", "kind": "search"} for name in FILES}
  macros = {
    "JSONL_TASKS": tasks,
    "MAX_NEGATIVES": 0,
    "VOCABULARY": options.vocabulary,
    "CACHE_DIR": output,
  }
  stages = ("gin/models/mini.gin", "gin/stages/finetune.gin")
  return [
    *(sys.executable, "-m", "embgemma", "cache", f"--workers={workers}"),
    *(f"--gin_file={path}" for path in stages),
    *(f"--gin.{name}={value}" for name, value in macros.items()),
  ]


def seqio(options: argparse.Namespace, output: pathlib.Path, workers: int) -> list[str]:
  runner = f"--runner=DirectRunner,--direct_num_workers={workers}"
  return [
    str(pathlib.Path(sys.executable).parent / "seqio_cache_tasks"),
    f"--tasks={','.join(FILES)}",
    f"--output_cache_dir={output}",
    "--module_import=seqio_tasks",
    f"--pipeline_options={runner}",
  ]


def measure(command: list[str], options: argparse.Namespace) -> tuple[float, float]:
  """Seconds, and MiB of the largest process so far."""
  environment = {
    **os.environ,
    "PYTHONPATH": str(HERE),
    "PAIRS": str(options.data / "train"),
    "NAMES": ",".join(FILES),
    "VOCABULARY": str(options.vocabulary),
    "CUDA_VISIBLE_DEVICES": "-1",
  }
  began = time.monotonic()
  done = subprocess.run(
    command, cwd=options.data, env=environment, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(done.stderr[-4000:])
  seconds = time.monotonic() - began
  return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--vocabulary", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  examples = sum(FILES.values())
  for _ in range(options.rounds):
    # Ours first: memory is the largest that any process before had, too.
    for name, command, workers in (
      ("embgemma", ours, 1),
      ("embgemma", ours, 2),
      ("seqio", seqio, 1),
    ):
      output = options.output / "caches"
      shutil.rmtree(output, ignore_errors=True)
      seconds, memory = measure(command(options, output, workers), options)
      size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
      result = {
        "what": name,
        "workers": workers,
        "seconds": round(seconds, 1),
        "examples_per_second": round(examples / seconds),
        "MB": round(size / 1e6, 1),
        "largest_process_MiB": round(memory),
      }
      print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
