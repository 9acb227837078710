"""Three initialisations of an embedder, at the scale of two CPU cores.

Table 2 of EmbeddingGemma (arXiv 2509.20354): an encoder from an encoder-decoder, a
decoder made bidirectional, and random parameters. A decoder is pretrained; from it one
arm goes on as a decoder and the other becomes an encoder-decoder trained with UL2, for
as many model FLOPs; then the same short contrastive training starts from each.

    python benchmarks/initialization/run.py --data=DIR --output=DIR

Every part is an `embgemma` command whose output is kept as NAME.log. Run again after a
stop it goes on from the last checkpoint; what is complete is not done again.
"""

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np

from embgemma.evaluation.suite import main_scores, read_results

HERE = pathlib.Path(__file__).parent.resolve()
PAPER = {"encoder-decoder": 60.4, "decoder": 59.7, "random": 45.2}
# By `embgemma explain` a step of UL2 has 0.69 of the model FLOPs of a causal one.
STEPS = {"decoder": 500, "decoder_more": 300, "encoder_decoder": 433, "finetune": 150}


def embgemma(data: pathlib.Path, log: pathlib.Path, *arguments: str) -> None:
  """Runs a command from the directory of the data, its output in a file."""
  print(f"{log.stem}: embgemma {' '.join(arguments)}", flush=True)
  command = [sys.executable, "-m", "embgemma", *arguments]
  with log.open("a") as file:
    code = subprocess.call(command, cwd=data, stdout=file, stderr=subprocess.STDOUT)
  if code:
    sys.exit(f"{log.stem} ended with {code}; see {log}")


def train(
  data: pathlib.Path, output: pathlib.Path, name: str, gin: str, **macros: object
) -> None:
  """One run, in a directory of its name."""
  values = {"MODEL_DIR": output / name, "CACHE_DIR": output / "cache", **macros}
  flags = [f"--gin.{key}={value}" for key, value in values.items()]
  files = [f"--gin_search_paths={HERE}", f"--gin_file={gin}.gin"]
  embgemma(data, output / f"{name}.log", "train", *files, *flags)


def scores(run: pathlib.Path) -> dict[str, float]:
  """Main metric of each dev set at the largest width, after the last step, in %."""
  results = read_results(run / "evaluations.json")
  last = main_scores(results[max(results, key=int)])
  return {task: 100 * score for task, score in last.items()}


def table(runs: Mapping[str, list[pathlib.Path]]) -> str:
  """Means over seeds, and the paper's numbers, as Markdown."""
  rows = []
  for name, directories in runs.items():
    by_seed = [scores(directory) for directory in directories]
    means = [float(np.mean(list(found.values()))) for found in by_seed]
    each = [float(np.mean([found[task] for found in by_seed])) for task in by_seed[0]]
    spread = f"{np.mean(means):.2f} ({min(means):.2f}–{max(means):.2f})"
    rows.append([name, *(f"{v:.2f}" for v in each), spread, str(PAPER[name])])
  tasks = list(scores(next(iter(runs.values()))[0]))
  heads = ["initialisation", *tasks, "mean (seeds)", "paper, Mean(Task)"]
  lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", default="0,1")
  options = parser.parse_args()
  data, output = options.data.resolve(), options.output.resolve()
  output.mkdir(parents=True, exist_ok=True)
  decoder = output / "decoder"
  vocabulary = decoder / "tokenizer.model"
  train(data, output, "decoder", "pretrain", TRAIN_STEPS=STEPS["decoder"])
  train(
    data,
    output,
    "decoder_more",
    "pretrain",
    TRAIN_STEPS=STEPS["decoder_more"],
    INITIAL_CHECKPOINT_PATH=decoder,
    VOCABULARY=vocabulary,
    LEARNING_RATE=1e-3,
    RANDOM_SEED=1,  # other batches than before
  )
  train(
    data,
    output,
    "encoder_decoder",
    "adapt",
    TRAIN_STEPS=STEPS["encoder_decoder"],
    INITIAL_CHECKPOINT_PATH=decoder,
    RANDOM_SEED=1,
  )
  starts = {
    "encoder-decoder": output / "encoder_decoder",
    "decoder": output / "decoder_more",
    "random": None,
  }
  runs: dict[str, list[pathlib.Path]] = {name: [] for name in starts}
  for seed in options.seeds.split(","):
    for name, start in starts.items():
      run = f"finetune_{name}_{seed}"
      train(
        data,
        output,
        run,
        "finetune",
        TRAIN_STEPS=STEPS["finetune"],
        INITIAL_CHECKPOINT_PATH=start,
        VOCABULARY=vocabulary,
        RANDOM_SEED=seed,
      )
      runs[name].append(output / run)
  print(table(runs))


if __name__ == "__main__":
  main()
