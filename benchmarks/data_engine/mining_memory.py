"""Time and peak memory of mining in corpora of 100,000 and 500,000 passages.

    python benchmarks/data_engine/mining_memory.py --data=DIR --searcher=MODEL_DIR \\
      --output=DIR

Passages are distinct positives of the sets of pairs, queries 2,000 of one; BM25, and
the searcher's vectors, exact and by ANN. Memory is the largest resident size of the
command's process, which holds JAX and the model: 100,000 against 500,000 passages shows
what grows with the corpus.
"""

import argparse
import gzip
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

SIZES = (100_000, 500_000)


def positives(data: pathlib.Path) -> Iterator[str]:
  """Distinct texts, without the set that queries are of."""
  seen: set[int] = set()
  for path in sorted((data / "train").glob("*.jsonl.gz")):
    if path.name in ("sts_scored.jsonl.gz", "docs_react.jsonl.gz"):
      continue
    with gzip.open(path, "rt") as file:
      for line in file:
        text = json.loads(line)["positive"]
        if hash(text) not in seen:
          seen.add(hash(text))
          yield text


def measure(command: list[str]) -> tuple[float, float]:
  """Seconds, and MiB of the process; a child of its own, so that none before counts."""
  script = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
  )
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", script, *command], capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(done.stderr[-3000:])
  return time.monotonic() - began, int(done.stdout.split()[-1]) / 1024


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("data", "searcher", "output"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  queries = {
    "react": {
      "path": str(options.data / "train" / "docs_react.jsonl.gz"),
      "kind": "search",
      "limit": 2000,
    }
  }
  for size in SIZES:
    corpus = options.output / f"corpus_{size}.jsonl"
    with corpus.open("w") as file:
      for _, text in zip(range(size), positives(options.data), strict=False):
        file.write(json.dumps({"text": text}) + "\n")
    for name, searcher, more in (
      ("bm25", "bm25", []),
      ("exact", options.searcher, []),
      ("ann", options.searcher, ["--gin.VectorSearcher.ann_above=50000"]),
    ):
      output = options.output / "mined"
      shutil.rmtree(output, ignore_errors=True)
      command = [
        *(sys.executable, "-m", "embgemma", "mine"),
        "--gin_file=gin/models/from_checkpoint.gin",
        "--gin_file=gin/stages/finetune.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH={options.searcher}",
        f"--gin.JSONL_TASKS={queries}",
        f"--gin.MiningOptions.corpus={corpus}",
        f"--searcher={searcher}",
        f"--output={output}",
        *more,
      ]
      seconds, memory = measure(command)
      task = json.loads((output / "report.json").read_text())["tasks"]["react"]
      result = {
        "searcher": name,
        "passages": task["passages"],
        "seconds": round(seconds),
        "MiB": round(memory),
        "recall": task["recall"],
      }
      print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
