"""Time and peak memory of mining in corpora of 100,000 and 500,000 passages.

    python benchmarks/data_engine/mining_memory.py --data=DIR --searcher=MODEL_DIR \\
      --output=DIR

Passages are distinct positives of the sets of pairs, queries 2,000 of one; BM25, and
the searcher's vectors, exact and by ANN. Memory is the largest of the command's
process, which holds JAX and the model: what it needs (anonymous), and all that is
resident, with pages of the mapped corpus and its vectors, which the kernel may drop.
100,000 against 500,000 passages shows what grows with the corpus.
"""

import argparse
import gzip
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
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


def measure(command: list[str]) -> tuple[float, dict[str, int]]:
  """Seconds, and the largest MiB of the process by kind, as seen every 50 ms."""
  began = time.monotonic()
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    largest = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
      for name in largest:
        if found := re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE):
          largest[name] = max(largest[name], int(found[1]))
      time.sleep(0.05)
    if process.returncode:
      errors.seek(0)
      sys.exit(errors.read().decode()[-3000:])
  return time.monotonic() - began, {k: v // 1024 for k, v in largest.items()}


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
        "MiB": memory["RssAnon"],
        "MiB resident": memory["VmHWM"],
        "recall": task["recall"],
      }
      print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
