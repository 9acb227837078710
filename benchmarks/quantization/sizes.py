"""Bytes of EmbeddingGemma's weights in each format, beside the released files' sizes.

    python benchmarks/quantization/sizes.py

From shapes alone. The released sizes (Hugging Face, in MB of 10^6 bytes) include
vocabulary and settings: some 6.6 MB in GGUF (norms are among the weights here); and in
LiteRT the computation graph, 0.2 MB of ours.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from flax import traverse_util

from embgemma.models import quantization
from embgemma.models.config import QuantizationConfig
from embgemma.models.embedder import abstract_params
from embgemma.models.quantization import FORMATS

sys.path.append(str(Path(__file__).parents[1] / "speed"))
import workload  # (reads presets without gin)

_GGUF_METADATA = 6.55
_ROWS: Mapping[str, tuple[QuantizationConfig, bool, str, float, float]] = {
  # rules, with heads, released file, its MB, MB of what is no weight
  "int8_block32": (
    quantization.int8_block32(),
    True,
    "ggml-org Q8_0.gguf",
    333.6,
    _GGUF_METADATA,
  ),
  "int8_block32, no heads": (
    quantization.int8_block32(),
    False,
    "ggml-org qat-q8_0.gguf",
    328.6,
    _GGUF_METADATA,
  ),
  "int4_block32, table q8_0, no heads": (
    quantization.int4_block32(table="q8_0"),
    False,
    "ggml-org qat-q4_0.gguf",
    277.9,
    _GGUF_METADATA,
  ),
  "int4_block32": (quantization.int4_block32(), True, "none", math.nan, 0.0),
  "mixed_channel": (
    quantization.mixed_channel(),
    True,
    "litert-community, sequences of 256",
    179.1,
    0.0,
  ),
}


def megabytes(rules: QuantizationConfig, heads: bool) -> tuple[float, dict[str, float]]:
  """Of all weights, and of each group."""
  config = workload.preset("embeddinggemma_300m")
  shapes = abstract_params(dataclasses.replace(config, quantization=rules))
  formats = quantization.formats(shapes, rules)
  groups: dict[str, float] = {}
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    name = "/".join(path)
    if "projection_" in name and not heads:
      continue
    size = 4 * math.prod(leaf.shape)
    if path in formats:
      axis = quantization.input_axis(path)
      size = FORMATS[formats[path]].bytes(leaf.shape, axis)
    group = (
      "table" if path[-1] == "table" else "heads" if "projection_" in name else "layers"
    )
    groups[group] = groups.get(group, 0.0) + size / 1e6
  return sum(groups.values()), groups


def main() -> None:
  print("| format | weights, MB | table | layers | heads | released | MB | explained |")
  print("|---|---:|---:|---:|---:|---|---:|---:|")
  for name, (rules, heads, released, size, other) in _ROWS.items():
    total, groups = megabytes(rules, heads)
    parts = [f"{groups.get(group, 0):.1f}" for group in ("table", "layers", "heads")]
    shown = "–" if math.isnan(size) else f"{size}"
    left = "–" if math.isnan(size) else f"{size - total - other:+.1f} left"
    print(
      f"| {name} | {total:.1f} | {' | '.join(parts)} | {released} | {shown} | {left} |"
    )


if __name__ == "__main__":
  main()
