"""embgemma and sentence-transformers in turn: same machine, weights, texts and batch.

    python benchmarks/speed/compare.py MODE [flags]        # --help: all of them

Examples/s, real tokens/s and peak memory of both sides, and the ratios: medians of the
alternations, A B A B, each side in a process of its own. Nothing is timed unless the
first loss (or all vectors) agree; the losses of three steps are shown. Machines differ
and drift: ratios of neighbouring turns are what counts, on a machine that does nothing
else. PAIRS below stands for JSONL files of pairs, queries of 10-20 and passages of
100-250 tokens; a vocabulary of the preset's size is trained on them.

Training, plain and against the cached loss. Gradient caching is exact: ours takes as
many microbatches as a run does by itself, unless told how large they are.
    compare.py train --preset=mini --batch=128 --pairs PAIRS --json=mini.json
    compare.py train --preset=small --batch=64 --pairs PAIRS --json=small.json
    compare.py train --preset=mini --batch=512 --cached --pairs PAIRS --json=a.json
    compare.py train --preset=small --batch=512 --cached --pairs PAIRS --json=b.json
Embedding, tokenisation included:
    compare.py embed --preset=small --texts=passages --pairs PAIRS --json=passages.json
    compare.py embed --preset=small --texts=mixed --pairs PAIRS --json=mixed.json
The input pipeline alone against what the step consumes (its cache is built with seqio):
    compare.py input --preset=mini --batch=128 --pairs PAIRS --json=input.json
One GPU, without seqio, TensorFlow, gin or grain: MFU and a profile, with caching, and
the largest batch:
    compare.py train --device=gpu --preset=embeddinggemma_300m --synthetic --mfu \\
      --batch=32 --query_tokens=512 --passage_tokens=512 --max_tokens=512 \\
      --json=gpu_512.json --profile=trace
    compare.py train --device=gpu --preset=embeddinggemma_300m --synthetic --mfu \\
      --batch=4096 --batches=1 --cached --microbatch_tokens=32768 \\
      --mini_batch 64 128 256 --json=gpu_cached.json
    compare.py largest --device=gpu --preset=embeddinggemma_300m --synthetic \\
      --batch=4096 --microbatch_tokens=32768 --json=gpu_largest.json
A plot of any of these reports:
    compare.py plot --reports *.json --output=speed.svg

`--device=cpu --synthetic --preset=tiny --batch=16` goes through the same code in a
minute.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# The weights are drawn here; a GPU's memory is for the two sides.
os.environ["JAX_PLATFORMS"] = "cpu"

import prepare
import report
import workload
from workload import Worker, WorkerError

from embgemma.errors import EmbgemmaError

CHECKED_STEPS = 3
# Largest differences of the first loss and of a vector's component, by precision.
LOSS_BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
VECTOR_BOUND = {"float32": 1e-5, "bfloat16": 3e-2}


def main() -> None:
  """Parses flags and runs one mode."""
  options = _parser().parse_args()
  if options.mode == "plot":
    reports = [json.loads(pathlib.Path(r).read_text()) for r in options.reports]
    pathlib.Path(options.output).write_text(report.svg(reports), "utf-8")
    return
  if not options.synthetic and not options.pairs:
    sys.exit("give --pairs FILE... (JSONL), or --synthetic")
  modes: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "train": train,
    "embed": embed,
    "input": feed,
    "largest": largest,
  }
  try:
    found = modes[options.mode](options)
  except (WorkerError, EmbgemmaError) as error:
    sys.exit(str(error))
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def train(options: argparse.Namespace) -> dict[str, Any]:
  """Training steps of both sides in turn."""
  folder, _ = prepare.prepare(options)
  ours, theirs = _workers(options, folder)
  tokens = options.microbatch_tokens
  ours("begin_training", batch=options.batch, microbatch_tokens=tokens)
  candidates = options.mini_batch if options.cached else [None]
  theirs("begin_training", batch=options.batch, mini_batch=candidates[0])
  agreement = _losses_agree(ours, theirs, _spec(folder), options)
  for side in (ours, theirs):  # every shape once
    side("train", steps=options.batches)
  chosen = _fastest(theirs, options.batch, candidates)
  for side in (ours, theirs):
    side("forget_peak")
  seconds = _alternate(
    {
      "ours": lambda: ours("train", steps=options.batches)["seconds"],
      "theirs": lambda: theirs("train", steps=options.batches)["seconds"],
    },
    options.alternations,
  )
  tokens = workload.Pairs.load(folder / "pairs.npz").tokens
  count = options.batch * options.batches
  packing = ours("packing")
  slots = {
    "ours": packing["slots"],
    "theirs": theirs("slots", batch=options.batch, mini_batch=chosen),
  }
  found = _header(options) | report.both_sides(ours, theirs, seconds, count, tokens)
  for name, used in slots.items():
    found["sides"][name]["real_tokens_per_slot"] = tokens / used
  found |= {"agreement": agreement, "mini_batch": chosen, "packing": packing}
  if options.mfu:
    found["mfu"] = _utilisation(ours, seconds, options)
  if options.profile:
    ours("profile", steps=options.batches, directory=options.profile)
  report.show(found)
  return found


def embed(options: argparse.Namespace) -> dict[str, Any]:
  """Embedding texts, both sides in turn."""
  folder, pairs = prepare.prepare(options)
  ours, theirs = _workers(options, folder)
  vectors = {}
  for worker in (ours, theirs):
    path = folder / f"{worker.side}.npy"
    worker("begin_embedding", kind=options.texts, vectors=str(path))
    vectors[worker.side] = np.load(path)
  difference = float(np.abs(vectors["ours"] - vectors["theirs"]).max())
  _check("a vector's component", difference, VECTOR_BOUND[prepare.precision(options)])
  sizes = [16, 32, 64, 128]
  best = min(sizes, key=lambda size: theirs("embed", batch=size))
  for side in (ours, theirs):
    side("forget_peak")
  seconds = _alternate(
    {
      "ours": lambda: ours("embed"),
      "theirs": lambda: theirs("embed", batch=best),
    },
    options.alternations,
  )
  tokens = ours("text_tokens")
  found = _header(options) | report.both_sides(
    ours, theirs, seconds, len(pairs), tokens
  )
  found |= {"agreement": {"largest_difference": difference}, "batch_size": best}
  report.show(found)
  return found


def feed(options: argparse.Namespace) -> dict[str, Any]:
  """Steps a second of the input pipeline alone, and of training."""
  folder, _ = prepare.prepare(options)
  ours = Worker("ours", folder, _environment(options))
  tokens = options.microbatch_tokens
  ours("begin_training", batch=options.batch, microbatch_tokens=tokens)
  ours("train", steps=options.batches)
  consumed = options.batches / ours("train", steps=options.batches)["seconds"]
  read = ours(
    "read",
    files=[os.path.abspath(file) for file in options.pairs],
    batch=options.batch,
    microbatch_tokens=tokens,
    seconds=options.seconds,
  )
  produced = read["steps_per_second"]
  print(
    f"{produced:.1f} steps/s read, {consumed:.2f} trained: {produced / consumed:.0f}"
  )
  found = {"input": read, "consumed_steps_per_second": consumed}
  return {**_header(options), **found, "ratio": produced / consumed}


def largest(options: argparse.Namespace) -> dict[str, Any]:
  """Doubles the batch, gradients cached, until a step does not fit."""
  trials: list[dict[str, Any]] = []
  batch = options.batch
  while batch <= options.most:
    sized = argparse.Namespace(**{**vars(options), "batch": batch, "batches": 1})
    folder, _ = prepare.prepare(sized)
    ours = Worker("ours", folder, _environment(options))
    try:
      tokens = options.microbatch_tokens
      ours("begin_training", batch=batch, microbatch_tokens=tokens)
      ours("train", steps=1)
      found = ours("train", steps=1)
      trials.append(
        {
          "batch": batch,
          "examples_per_second": batch / found["seconds"],
          "peak_bytes": ours("peak"),
          "microbatches": ours("packing")["microbatches"],
        }
      )
      print(json.dumps(trials[-1]), flush=True)
    except WorkerError as error:
      print(f"batch {batch}: {str(error)[:200]}")
      break
    finally:
      ours.close()
    batch *= 2
  return {**_header(options), "trials": trials}


def _spec(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / "spec.json").read_text())


def _environment(options: argparse.Namespace) -> dict[str, str]:
  if options.device == "cpu":
    return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
  # Both sides live on one GPU.
  return {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def _workers(options: argparse.Namespace, folder: pathlib.Path) -> list[Worker]:
  environment = _environment(options)
  return [Worker(side, folder, environment) for side in ("ours", "theirs")]


def _losses_agree(
  ours: Worker,
  theirs: Worker,
  spec: Mapping[str, Any],
  options: argparse.Namespace,
) -> dict[str, Any]:
  """The losses of the first steps on both sides.

  Theirs has 1 / width less a side in each spread-out term: a constant.
  """
  constant = 0.0
  if spec["objective"]["spread_out"]:
    constant = sum(2.0 / width for width in spec["objective"]["widths"])
  mine = ours("train", steps=CHECKED_STEPS)["losses"]
  other = [x + constant for x in theirs("train", steps=CHECKED_STEPS)["losses"]]
  print("losses, ours  ", *(f"{x:.6f}" for x in mine))
  print("losses, theirs", *(f"{x:.6f}" for x in other), flush=True)
  _check("the first loss", abs(mine[0] - other[0]), LOSS_BOUND[spec["precision"]])
  return {"ours": mine, "theirs": other}


def _check(what: str, difference: float, bound: float) -> None:
  print(f"largest difference of {what}: {difference:.1e} (bound {bound:.0e})")
  if not difference <= bound:
    sys.exit("the two sides do not compute the same; nothing was timed")


def _fastest(
  theirs: Worker, batch: int, candidates: Sequence[int | None]
) -> int | None:
  """Sets theirs to its fastest mini-batch."""
  if len(candidates) == 1:
    return candidates[0]

  def seconds(size: int | None) -> float:
    theirs("begin_training", batch=batch, mini_batch=size)
    return theirs("train", steps=1)["seconds"]

  chosen = min(candidates, key=seconds)
  theirs("begin_training", batch=batch, mini_batch=chosen)
  theirs("train", steps=1)
  return chosen


def _alternate(
  turns: Mapping[str, Callable[[], float]], alternations: int
) -> dict[str, list[float]]:
  """Seconds of each side's turns."""
  seconds: dict[str, list[float]] = {side: [] for side in turns}
  for number in range(alternations):
    for side, turn in turns.items():
      seconds[side].append(turn())
    shown = ", ".join(f"{side} {values[-1]:.2f} s" for side, values in seconds.items())
    print(f"turn {number + 1}: {shown}", flush=True)
  return seconds


def _header(options: argparse.Namespace) -> dict[str, Any]:
  shown = ("preset", "batch", "batches", "cached", "negatives", "max_tokens", "remat")
  return {
    "mode": options.mode,
    "date": datetime.date.today().isoformat(),
    "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    "python": platform.python_version(),
    **{name: getattr(options, name) for name in shown},
    "texts": options.texts if options.mode == "embed" else None,
    "device": options.device,
    "microbatch_tokens": options.microbatch_tokens,
  }


def _utilisation(
  ours: Worker, seconds: Mapping[str, Sequence[float]], options: argparse.Namespace
) -> dict[str, float]:
  """Model FLOPs utilisation: of the measured matmul rate, for real tokens alone."""
  rate = ours("matmul_rate", dtype=prepare.precision(options))
  flops = ours("flops")
  return {
    "matmul_flops_per_second": rate,
    **{side: flops / statistics.median(own) / rate for side, own in seconds.items()},
  }


def _span(text: str) -> tuple[int, int]:
  low, _, high = text.partition("-")
  return int(low), int(high or low)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("mode", choices=("train", "embed", "input", "largest", "plot"))
  add("--preset", default="mini", help="of gin/models")
  add("--pairs", nargs="*", default=[], help="JSONL files of pairs, plain or .gz")
  add("--synthetic", action="store_true", help="random token ids instead")
  add("--vocabulary", help="SentencePiece model; default: one trained on the pairs")
  add("--batch", type=int, default=128, help="examples of a step; largest: the first")
  add("--batches", type=int, default=2, help="different batches, each a step a turn")
  add("--negatives", type=int, default=0, help="hard negatives of an example")
  add("--query_tokens", type=_span, default=(10, 20), help="kept, or drawn: LOW-HIGH")
  add("--passage_tokens", type=_span, default=(100, 250), help="likewise")
  add("--max_tokens", type=int, default=256, help="of a text, beyond which it is cut")
  add("--cached", action="store_true", help="theirs by its cached loss")
  add("--microbatch_tokens", type=int, help="ours; default: what a run takes by itself")
  add("--mini_batch", type=int, nargs="*", default=[32, 64], help="theirs, cached")
  add("--no_spread_out", action="store_true", help="contrastive loss alone")
  add("--texts", choices=("passages", "mixed"), default="passages", help="embed: which")
  add("--examples", type=int, default=512, help="embed: how many")
  add("--alternations", type=int, default=5, help="turns of each side")
  add("--device", choices=("cpu", "gpu"), default="cpu")
  add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu")
  add("--remat", default="none", help="ours: none, full or dots")
  add("--their_attention", default="sdpa", help="transformers' attn_implementation")
  add("--mfu", action="store_true", help="FLOP/s against those of a matmul loop")
  add("--profile", help="folder for a trace of our steps")
  add("--seconds", type=float, default=20, help="input: time to read for")
  add("--most", type=int, default=65536, help="largest: batch to stop at")
  add("--work", default=os.path.join(tempfile.gettempdir(), "embgemma_speed"))
  add("--json", help="file for the report")
  add("--reports", nargs="*", default=[], help="plot: report files")
  add("--output", default="speed.svg", help="plot: file")
  return parser


if __name__ == "__main__":
  main()
