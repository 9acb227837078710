"""What a given time on this machine buys: embgemma beside sentence-transformers.

    python benchmarks/quality/run.py --data=DIR --output=DIR [--minutes=30]

Both train the `mini` preset from the same random weights, with the same tokenizer, on
the pairs of benchmarks/real_text/ in proportion to their numbers, 128 a step. Each
side has its own standard recipe: here that of gin/stages/prefinetune.gin, there
theirs.py. The clock counts all that a process does, from its start with cold caches to
the model on disk. A pilot of each says how many steps fit; then they take turns, one
halted (SIGSTOP) while the other runs, a half of its time each. Both are evaluated by
`embgemma eval`. Needs datasets, accelerate and sentence-transformers.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from embgemma import gin_config
from embgemma.data import prompts
from embgemma.data.bad_records import SkipLog
from embgemma.data.task_examples import open_tasks
from embgemma.evaluation.suite import main_scores

HERE = pathlib.Path(__file__).parent.resolve()
DATA = HERE.parent / "real_text"
CONFIG = (f"--gin_search_paths={DATA}", "--gin_file=prefinetune.gin")
BATCH, WIDTHS = 128, (512, 256, 128)
PILOT_STEPS = {"ours": 200, "theirs": 24}
SPARE = 0.98  # of the time is planned for


class Side:
  """A training in a process group that can be halted, and the seconds it ran."""

  def __init__(self, command: Sequence[str], options: argparse.Namespace, log: str):
    self._log = (options.output / log).open("wb")
    self._command, self._cwd = command, options.data
    self._child: subprocess.Popen[bytes] | None = None
    environment = {**os.environ, "EMBGEMMA_CACHE": str(options.output / "home")}
    self._environment = environment
    self.seconds = 0.0

  def run(self, seconds: float | None = None) -> None:
    """Runs for that long, or to the end.

    Raises:
      SystemExit: it failed.
    """
    began = time.monotonic()
    if self._child is None:
      self._child = subprocess.Popen(
        self._command,
        cwd=self._cwd,
        env=self._environment,
        stdout=self._log,
        stderr=subprocess.STDOUT,
        process_group=0,
      )
    else:
      os.killpg(self._child.pid, signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._child.wait(seconds)
    if self._child.returncode is None:
      os.killpg(self._child.pid, signal.SIGSTOP)
    elif self._child.returncode:
      sys.exit(f"{self._log.name}: ended with {self._child.returncode}")
    self.seconds += time.monotonic() - began


def ours(options: argparse.Namespace, name: str, steps: int) -> Side:
  values = {
    "MODEL_DIR": options.output / name,
    "INITIAL_CHECKPOINT_PATH": options.output / "init",
    "VOCABULARY": options.output / "init" / "tokenizer.model",
    "CACHE_DIR": options.output / f"{name}_cache",
    "TRAIN_STEPS": steps,
    "BATCH_SIZE": BATCH,
    "MIXTURE_RATES": "proportional",
    "EVALUATIONS": {},
    "CHECKPOINT_STEPS": 10**6,
  }
  shutil.rmtree(options.output / "home", ignore_errors=True)  # compiled programs
  flags = [f"--gin.{key}={value}" for key, value in values.items()]
  command = (sys.executable, "-m", "embgemma", "train", *CONFIG, *flags)
  return Side(command, options, f"{name}.log")


def theirs(options: argparse.Namespace, name: str, steps: int, bf16: bool) -> Side:
  command = [
    *(sys.executable, str(HERE / "theirs.py")),
    f"--model={options.output / 'init_hf'}",
    f"--pairs={options.output / 'pairs'}",
    f"--output={options.output / name}",
    f"--steps={steps}",
    f"--batch={BATCH}",
    f"--rate={options.their_rate}",
    f"--widths={','.join(map(str, WIDTHS))}",
    *(["--bf16"] if bf16 else []),
  ]
  return Side(command, options, f"{name}.log")


def their_speed(options: argparse.Namespace, name: str) -> float:
  """Steps a second, but for the first few."""
  lines = (options.output / name / "steps.txt").read_text().splitlines()
  times = [float(line.split()[1]) for line in lines]
  return 1 / statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


def our_speed(options: argparse.Namespace, name: str) -> float:
  """Steps a second, as the last half of the log has it: before, shapes are compiled."""
  found = re.findall(
    r"([\d,.]+) examples/s", (options.output / f"{name}.log").read_text()
  )
  late = [float(each.replace(",", "")) for each in found[len(found) // 2 :]]
  return statistics.median(late) / BATCH


def planned(minutes: float, side: Side, speed: float, steps: int) -> int:
  """Steps that fit in the time, start and end included."""
  overhead = max(0.0, side.seconds - steps / speed)
  print(f"  {speed:.3f} steps/s, {overhead:.0f} s beside them", flush=True)
  return int((60 * minutes * SPARE - overhead) * speed)


def embgemma(options: argparse.Namespace, *arguments: str) -> None:
  subprocess.run(
    (sys.executable, "-m", "embgemma", *arguments), cwd=options.data, check=True
  )


def prepare(options: argparse.Namespace) -> None:
  """The weights that both start from, and the pairs as text with their prompts."""
  init = options.output / "init"
  # A rate so small leaves the random weights as they are.
  values = {
    "MODEL_DIR": init,
    "TRAIN_STEPS": 1,
    "LEARNING_RATE": 1e-30,
    "BATCH_SIZE": 8,
  }
  values |= {"CACHE_DIR": options.output / "init_cache"}
  flags = [f"--gin.{key}={value}" for key, value in values.items()]
  flags.append("--gin.EVALUATIONS={}")
  embgemma(options, "train", *CONFIG, *flags)
  hf = options.output / "init_hf"
  embgemma(options, "export", "--to=hf", f"--checkpoint={init}", f"--output={hf}")
  os.chdir(options.data)
  gin_config.register()
  gin_config.parse(["prefinetune.gin"], ["MODEL_DIR=unused"], [str(DATA)])
  (options.output / "pairs").mkdir()
  for task in open_tasks(gin_config.train_arguments()["data"]):
    write_pairs(task, options.output / "pairs")


def write_pairs(task: Any, directory: pathlib.Path) -> None:
  """Pairs and triples of a task, in files of their own: columns must be the same."""
  style = prompts.TASK_PROMPTS[task.kind]
  files: dict[str, Any] = {}
  for shard in range(task.num_shards):
    for example in task.examples(shard, SkipLog()):
      title = example["title"] or None
      row = {
        "anchor": style.format_query(example["query"]),
        "positive": style.format_document(example["positive"], title),
      }
      name = f"{task.name}_pairs"
      if example["negatives"]:
        row["negative"] = style.format_document(example["negatives"][0])
        name = f"{task.name}_triples"
      if name not in files:
        files[name] = (directory / f"{name}.jsonl").open("w", encoding="utf-8")
      files[name].write(json.dumps(row) + "\n")
  for file in files.values():
    file.close()


def evaluate(options: argparse.Namespace, name: str, path: pathlib.Path) -> Any:
  output = options.output / f"{name}.json"
  sets = gin_config.train_arguments(allowed=("MODEL_DIR",))["evaluations"]
  data = [f"--data={key}={of['path']}:{of['kind']}" for key, of in sets.items()]
  embgemma(
    options,
    *("eval", f"--checkpoint={path}", f"--output={output}", "--max_length=128"),
    f"--widths={','.join(map(str, WIDTHS))}",
    *data,
  )
  return next(iter(json.loads(output.read_text()).values()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--minutes", type=float, default=30)
  parser.add_argument("--their_rate", type=float, default=1.5e-3)
  options = parser.parse_args()
  options.data, options.output = options.data.resolve(), options.output.resolve()
  options.output.mkdir(parents=True)
  prepare(options)
  print("pilots", flush=True)
  pilot = ours(options, "our_pilot", PILOT_STEPS["ours"])
  pilot.run()
  speed = our_speed(options, "our_pilot")
  our_steps = planned(options.minutes, pilot, speed, PILOT_STEPS["ours"])
  their_steps, bf16 = 0, False
  for wanted in (False, True):
    name = f"their_pilot_{'bf16' if wanted else 'float32'}"
    pilot = theirs(options, name, PILOT_STEPS["theirs"], wanted)
    pilot.run()
    speed = their_speed(options, name)
    steps = planned(options.minutes, pilot, speed, PILOT_STEPS["theirs"])
    if steps > their_steps:
      their_steps, bf16 = steps, wanted
  print(f"ours {our_steps} steps, theirs {their_steps}, bfloat16: {bf16}", flush=True)
  sides = {
    "ours": ours(options, "ours", our_steps),
    "theirs": theirs(options, "theirs", their_steps, bf16),
  }
  half = 30 * options.minutes
  for seconds in (half, None):
    for name, side in sides.items():
      side.run(seconds)
      print(f"{name}: {side.seconds:.0f} s", flush=True)
  results = {
    "untrained": evaluate(options, "eval_init", options.output / "init"),
    "embgemma": evaluate(options, "eval_ours", options.output / "ours"),
    "sentence-transformers": evaluate(
      options, "eval_theirs", options.output / "theirs" / "model"
    ),
  }
  print_table(results)


def print_table(results: Any) -> None:
  """Main metrics in percent at the widest and narrowest width."""
  columns = [(name, width) for width in (WIDTHS[0], WIDTHS[-1]) for name in results]
  print(f"| | {' | '.join(f'{name} {width}' for name, width in columns)} |")
  print("|---|" + "---:|" * len(columns))
  scores = {
    (name, width): main_scores(
      {
        task: {key: v for key, v in metrics.items() if key.endswith(f"/{width}")}
        for task, metrics in results[name].items()
      }
    )
    for name, width in columns
  }
  sets = list(scores[columns[0]])
  for task in sets:
    row = [f"{100 * scores[column][task]:.2f}" for column in columns]
    print(f"| {task} | {' | '.join(row)} |")
  means = [100 * statistics.mean(scores[column].values()) for column in columns]
  print(f"| mean | {' | '.join(f'{mean:.2f}' for mean in means)} |")


if __name__ == "__main__":
  main()
