"""What formats of weights and vectors cost: of gin/recipes/ablations/quantization.gin.

    python benchmarks/quantization/table.py RECIPE_DIR [--losses=RECIPE_DIR]

A row for each model, a column for each width and kind of vectors: means over the
development sets, in percent, of all seeds, with their range; and the share of what
rounding after training loses that training with rounded weights wins back. With
--losses, of gin/recipes/ablations/losses.gin: what vectors of few bits cost with and
without the spread-out term.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from embgemma.evaluation import suite

Scores = Mapping[str, list[float]]  # of a column, by seed
_KEY = re.compile(r"(?P<metric>[^ /]+)(?: \((?P<vectors>\w+)\))?/(?P<width>\d+)")
ROWS = {
  "plain_scores": "float32",
  "int8_after_scores": "int8_block32 after training",
  "int8_scores": "int8_block32, trained",
  "int4_after_scores": "int4_block32 after training",
  "int4_scores": "int4_block32, trained",
  "mixed_after_scores": "mixed_channel after training",
  "mixed_scores": "mixed_channel, trained",
}


def scores(root: Path, stage: str) -> tuple[Scores, Scores]:
  """Of a stage's `embgemma eval`: means over sets, and each set's, by seed."""
  means, sets = defaultdict(list), defaultdict(list)
  seeds = re.compile(rf"{stage}_seed\d+")  # links to the outputs in use
  links = [link for link in sorted(root.iterdir()) if seeds.fullmatch(link.name)]
  for link in links or [root / stage]:
    (results,) = json.loads((link / "results.json").read_text()).values()
    columns = defaultdict(list)
    for task, values in results.items():
      for key, value in values.items():
        found = _KEY.fullmatch(key)
        if found and found["metric"] in suite.MAIN_METRICS:
          column = f"{found['width']} {found['vectors'] or 'float32'}"
          columns[column].append(100 * value)
          sets[f"{task} {column}"].append(100 * value)
    for column, values in columns.items():
      means[column].append(float(np.mean(values)))
  return means, sets


def row(name: str, found: Scores, columns: list[str]) -> str:
  """A line of a Markdown table; with several seeds and their range."""

  def cell(values: list[float]) -> str:
    text = f"{np.mean(values):.2f}"
    spread = f" ({min(values):.2f}–{max(values):.2f})"
    return text + (spread if len(values) > 1 else "")

  return f"| {name} | {' | '.join(cell(found[c]) for c in columns)} |"


def table(title: str, rows: Mapping[str, Scores]) -> None:
  columns = list(next(iter(rows.values())))
  print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
  for name, found in rows.items():
    print(row(name, found, columns))


def won_back(rows: Mapping[str, Scores]) -> None:
  """What is lost, and shares of it, of the columns with float32 vectors."""
  columns = [name for name in rows["float32"] if name.endswith("float32")]
  print(f"\n| lost after training; of it won back | {' | '.join(columns)} |")
  print(f"|---|{'---:|' * len(columns)}")
  for name in ("int8_block32", "int4_block32", "mixed_channel"):
    cells = []
    for column in columns:
      # By seed: the three models saw the same batches.
      whole = np.array(rows["float32"][column])
      after = np.array(rows[f"{name} after training"][column])
      trained = np.array(rows[f"{name}, trained"][column])
      lost = float(np.mean(whole - after))
      noise = float(np.ptp(whole))  # between seeds
      share = float(np.mean(trained - after)) / lost if lost > noise else None
      of_it = "less than seeds differ" if share is None else f"{100 * share:.0f} %"
      cells.append(f"{lost:.2f}; {of_it}")
    print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("recipe", type=Path)
  parser.add_argument("--losses", type=Path)
  options = parser.parse_args()
  found = {name: scores(options.recipe, stage) for stage, name in ROWS.items()}
  table("mean of the sets", {name: means for name, (means, _) in found.items()})
  won_back({name: means for name, (means, _) in found.items()})
  table(
    "each set",
    {
      name: {k: v for k, v in sets.items() if k.endswith("float32")}
      for name, (_, sets) in found.items()
    },
  )
  if options.losses:
    stages = {"all_scores": "all terms", "no_spread_out_scores": "no spread-out term"}
    terms = {name: scores(options.losses, stage)[0] for stage, name in stages.items()}
    table("mean of the sets", terms)


if __name__ == "__main__":
  main()
