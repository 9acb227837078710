"""How many false negatives the positive-aware rule catches, on sets with labels.

    python benchmarks/data_engine/false_negatives.py --data=DIR --searcher=MODEL_DIR \
      --output=DIR

Utterances of intents: any other of the same intent is a false negative. Sections of
documentation: any other of the same page is taken for one. Labels are hidden from
mining, which takes all candidates it finds, without and with the rule; then those that
have the query's own label are counted.
"""

import argparse
import collections
import gzip
import json
import pathlib
import subprocess
import sys

EXAMPLES = 6000
SETS = {"intents": "classification", "docs_win32": "search"}


def label_of(record: dict[str, str]) -> str:
  """The intent, or the page that a section's title begins with."""
  return record.get("label") or record["query"].partition(": ")[0]


def hide_labels(source: pathlib.Path, path: pathlib.Path) -> dict[str, str]:
  """Writes records without labels; returns the label of each text."""
  labels: dict[str, set[str]] = collections.defaultdict(set)
  with gzip.open(source, "rt") as file, path.open("w") as out:
    for number, line in enumerate(file):
      if number == EXAMPLES:
        break
      record = json.loads(line)
      for text in (record["query"], record["positive"]):
        labels[text].add(label_of(record))
      kept = {key: record[key] for key in ("query", "positive")}
      out.write(json.dumps(kept) + "\n")
  return {text: own.pop() for text, own in labels.items() if len(own) == 1}


def mined(
  options: argparse.Namespace, name: str, pairs: pathlib.Path, share: float | None
) -> pathlib.Path:
  output = options.output / f"{name}_{share}"
  tasks = {"pairs": {"path": str(pairs), "kind": SETS[name]}}
  settings = {"depth": 50, "negatives": 49, "max_share": share}
  command = [
    *(sys.executable, "-m", "embgemma", "mine"),
    "--gin_file=gin/models/from_checkpoint.gin",
    "--gin_file=gin/stages/finetune.gin",
    f"--gin.INITIAL_CHECKPOINT_PATH={options.searcher}",
    f"--gin.JSONL_TASKS={tasks}",
    *(f"--gin.MiningOptions.{name}={value}" for name, value in settings.items()),
    f"--searcher={options.searcher}",
    f"--output={output}",
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    sys.exit(done.stderr[-3000:])
  return output / "pairs.jsonl.gz"


def count(path: pathlib.Path, labels: dict[str, str]) -> collections.Counter[str]:
  """Candidates of the query's own label, and of others."""
  found: collections.Counter[str] = collections.Counter()
  with gzip.open(path, "rt") as file:
    for line in file:
      record = json.loads(line)
      own = labels.get(record["query"])
      for text in record["negatives"]:
        if own and text in labels:
          found["false" if labels[text] == own else "true"] += 1
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("data", "searcher", "output"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  for name in SETS:
    pairs = options.output / f"{name}.jsonl"
    labels = hide_labels(options.data / "train" / f"{name}.jsonl.gz", pairs)
    before = count(mined(options, name, pairs, None), labels)
    print(f"{name}: {before['false']:,} false, {before['true']:,} true negatives")
    for share in (0.95, 0.9, 0.8):
      after = count(mined(options, name, pairs, share), labels)
      caught = {kind: 1 - after[kind] / before[kind] for kind in ("false", "true")}
      left = after["false"] / max(1, after.total())
      print(
        f"below {share:.0%} of the positive: dropped {caught['false']:.1%} of the "
        f"false, {caught['true']:.1%} of the true; {left:.1%} of what is left is false"
      )


if __name__ == "__main__":
  main()
