"""What hard negatives and distillation give a small model in a short training.

Negatives are mined with a better model; then the same checkpoint is finetuned for the
same steps with random, mined, and filtered negatives, and, on the filtered, with
embedding matching to that model's vectors, with and without those of negatives. The
arms of distillation are run from random weights, too.

    python benchmarks/data_engine/run.py --data=DIR --start=MODEL_DIR \
      --teacher=MODEL_DIR --output=DIR

Every part is an `embgemma` command whose output is kept as NAME.log. Run again after a
stop it goes on; what is complete is not done again.
"""

import argparse
import gzip
import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from embgemma.evaluation.suite import main_scores, read_results

HERE = pathlib.Path(__file__).parent.resolve()
SEEDS = (0, 1)
DISTILL = {"TEACHER": "mini", "TERMS": "(@Nce(), @SpreadOut(), @EmbeddingMatching())"}
NO_NEGATIVES = {**DISTILL, "EmbeddingMatching.roles": ("query", "positive")}
FINETUNED = "gin/models/from_checkpoint.gin"
RANDOM = "random_weights.gin"
# Of each arm: its model, the set of its negatives, and what it binds.
ARMS: Mapping[str, tuple[str, str, Mapping[str, object]]] = {
  "no hard negatives": (FINETUNED, "filtered", {"MAX_NEGATIVES": 0}),
  "random negatives": (FINETUNED, "random", {}),
  "mined": (FINETUNED, "mined", {}),
  "mined, filtered": (FINETUNED, "filtered", {}),
  "+ distillation (Q, P+)": (FINETUNED, "filtered", NO_NEGATIVES),
  "+ distillation (Q, P+, P-)": (FINETUNED, "filtered", DISTILL),
  "random weights": (RANDOM, "filtered", {}),
  "random weights + distillation (Q, P+)": (RANDOM, "filtered", NO_NEGATIVES),
  "random weights + distillation (Q, P+, P-)": (RANDOM, "filtered", DISTILL),
}


def embgemma(options: argparse.Namespace, name: str, *arguments: str) -> None:
  """Runs a command from the directory of the data, its output in a file."""
  print(f"{name}: embgemma {' '.join(arguments)}", flush=True)
  log = options.output / f"{name}.log"
  command = [sys.executable, "-m", "embgemma", *arguments]
  with log.open("a") as file:
    code = subprocess.call(
      command, cwd=options.data, stdout=file, stderr=subprocess.STDOUT
    )
  if code:
    sys.exit(f"{name} ended with {code}; see {log}")


def flags(
  options: argparse.Namespace, files: Sequence[str], **macros: object
) -> list[str]:
  values = {
    "INITIAL_CHECKPOINT_PATH": options.start,
    "CACHE_DIR": options.output / "cache",
    **macros,
  }
  return [
    f"--gin_search_paths={HERE},{options.output}",
    *(f"--gin_file={file}" for file in files),
    *(f"--gin.{name}={value}" for name, value in values.items()),
  ]


def mine(options: argparse.Namespace, name: str, share: float | None) -> None:
  output = options.output / name
  embgemma(
    options,
    f"mine_{name}",
    "mine",
    *flags(options, ["pairs.gin"], **{"MiningOptions.max_share": share}),
    f"--searcher={options.teacher}",
    f"--output={output}",
  )


def random_negatives(options: argparse.Namespace) -> None:
  """The filtered sets with another example's positive in place of each negative."""
  source, output = options.output / "filtered", options.output / "random"
  output.mkdir(exist_ok=True)
  for path in source.glob("*.jsonl.gz"):
    with gzip.open(path, "rt") as file:
      records = [json.loads(line) for line in file]
    draw = random.Random(0)
    lines = []
    for record in records:
      other = draw.choice(records)
      while other["positive"] == record["positive"]:
        other = draw.choice(records)
      lines.append(json.dumps({**record, "negatives": [other["positive"]]}))
    (output / path.name).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
  tasks = (source / "tasks.gin").read_text().replace(str(source), str(output))
  (output / "tasks.gin").write_text(tasks)


def scores(run: pathlib.Path) -> dict[str, float]:
  """Main metric of each dev set at the largest width, after the last step, in %."""
  results = read_results(run / "evaluations.json")
  last = main_scores(results[max(results, key=int)])
  return {task: 100 * score for task, score in last.items()}


def table(runs: Mapping[str, Sequence[pathlib.Path]]) -> str:
  """Means over seeds, as Markdown."""
  rows = []
  for name, directories in runs.items():
    by_seed = [scores(directory) for directory in directories]
    means = [float(np.mean(list(found.values()))) for found in by_seed]
    each = [float(np.mean([found[task] for found in by_seed])) for task in by_seed[0]]
    spread = f"{np.mean(means):.2f} ({min(means):.2f}–{max(means):.2f})"
    rows.append([name, *(f"{v:.2f}" for v in each), spread])
  heads = ["arm", *scores(next(iter(runs.values()))[0]), "mean (seeds)"]
  lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("data", "start", "teacher", "output"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  mine(options, "mined", None)
  mine(options, "filtered", 0.95)
  random_negatives(options)
  files = ["finetune.gin", "filtered/tasks.gin", FINETUNED]
  teach = flags(options, files, TEACHER="mini", MODEL_DIR="unused")
  embgemma(options, "teach", "teach", *teach, f"--teacher={options.teacher}")
  runs: dict[str, list[pathlib.Path]] = {}
  for seed in SEEDS:
    for number, (arm, (model, sets, macros)) in enumerate(ARMS.items()):
      run = options.output / f"run_{number}_{seed}"
      files = ["finetune.gin", f"{sets}/tasks.gin", model]
      own = flags(options, files, MODEL_DIR=run, RANDOM_SEED=seed, **macros)
      embgemma(options, run.name, "train", *own)
      runs.setdefault(arm, []).append(run)
  print(table(runs))


if __name__ == "__main__":
  main()
