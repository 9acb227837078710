"""What training with rounded weights costs: a step's time beside that of a plain step.

    python benchmarks/quantization/step_cost.py [--preset=mini] [--batch=128]

The same random pairs, a query of 8 to 32 tokens, a positive and a hard negative of 32
to 128; each format trains a few steps in turn, in one process; medians over rounds.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from embgemma.models import quantization

sys.path.append(str(Path(__file__).parents[1] / "speed"))
import ours
import workload

SPANS = [(8, 32), (32, 128), (32, 128)]
FORMATS = {
  "float32": None,
  "int8_block32": quantization.int8_block32(),
  "int4_block32": quantization.int4_block32(),
  "mixed_channel": quantization.mixed_channel(),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--preset", default="mini")
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--steps", type=int, default=4, help="of a format in a round")
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()
  config = workload.preset(options.preset, remat="none")
  pairs = workload.synthetic_pairs(
    config.transformer.vocab_size, options.batch * options.steps, SPANS
  )
  sides = {}
  with tempfile.TemporaryDirectory() as made:
    pairs.save(Path(made) / "pairs.npz")
    for name, rules in FORMATS.items():
      own = dataclasses.replace(config, quantization=rules)
      spec = {
        "model": own.to_json(),
        "objective": {
          "widths": list(config.matryoshka_widths),
          "temperature": 0.05,
          "hardness": 5.0,
          "spread_out": True,
        },
        "optimizer": {"rate": 1e-4},
      }
      sides[name] = ours.Ours(spec, Path(made))
      sides[name].begin_training(options.batch, None)
      sides[name].train(options.steps)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
      for name, side in sides.items():
        seconds[name].append(side.train(options.steps)["seconds"] / options.steps)
  plain = np.array(seconds["float32"])
  print("| format | seconds a step | of plain | smallest | largest |")
  print("|---|---:|---:|---:|---:|")
  for name, values in seconds.items():
    ratios = np.array(values) / plain
    cells = (np.median(values), np.median(ratios), ratios.min(), ratios.max())
    print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
  main()
