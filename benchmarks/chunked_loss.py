"""What the chunked token loss saves in memory, and what it costs in time.

    python benchmarks/chunked_loss.py --output=chunked_loss.json

Memory is the compiler's count for loss and gradients of 8,192 targets over Gemma's
vocabulary, beside what goes in and comes out; nothing is run. Time is of both losses in
turn, at a size where whole logits fit. The whole one is optax's cross-entropy with the
same z-loss. Values are compared by tests/losses/test_denoising.py.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from embgemma.losses import denoising

MIB = 2**20
Z_LOSS = 1e-4


def chunked(hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
  return denoising.cross_entropy(hidden, table, targets, weights, Z_LOSS).loss


def whole(hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
  logits = jnp.einsum(
    "td,vd->tv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  return jnp.sum(weights * (losses + Z_LOSS * log_z**2))


LOSSES: dict[str, Callable[..., Any]] = {"chunked": chunked, "whole": whole}


def compiled(name: str, tokens: int, vocab: int, width: int, dtype: str) -> Any:
  """Loss and gradients by hidden states and table."""
  shapes = (
    jax.ShapeDtypeStruct((tokens, width), dtype),
    jax.ShapeDtypeStruct((vocab, width), "float32"),
    jax.ShapeDtypeStruct((tokens,), "int32"),
    jax.ShapeDtypeStruct((tokens,), "float32"),
  )
  step = jax.jit(jax.value_and_grad(LOSSES[name], argnums=(0, 1)))
  return step.lower(*shapes).compile()


def memory(tokens: int, vocab: int, width: int, dtype: str) -> dict[str, Any]:
  """MiB that each loss needs beside its inputs and outputs."""
  sizes = {
    name: compiled(name, tokens, vocab, width, dtype).memory_analysis()
    for name in LOSSES
  }
  needed = {name: size.temp_size_in_bytes / MIB for name, size in sizes.items()}
  case = {"tokens": tokens, "vocab": vocab, "width": width, "dtype": dtype}
  print(
    f"{tokens:,} targets x {vocab:,} tokens x width {width}, {dtype}: "
    f"chunked {needed['chunked']:,.0f} MiB, whole {needed['whole']:,.0f} MiB "
    f"(logits {4 * tokens * vocab / MIB:,.0f}, table {4 * vocab * width / MIB:,.0f})"
  )
  return case | {f"{name}_mib": round(size) for name, size in needed.items()}


def speed(
  tokens: int, vocab: int, width: int, dtype: str, turns: int
) -> dict[str, Any]:
  """Tokens a second of both, in turn."""
  rng = np.random.default_rng(0)
  arrays = (
    jnp.asarray(rng.normal(size=(tokens, width)), dtype),
    jnp.asarray(rng.normal(size=(vocab, width)) * width**-0.5, "float32"),
    jnp.asarray(rng.integers(0, vocab, tokens), "int32"),
    jnp.ones(tokens, "float32"),
  )
  steps = {name: compiled(name, tokens, vocab, width, dtype) for name in LOSSES}
  rates: dict[str, list[float]] = {name: [] for name in steps}
  for turn in range(turns + 1):
    for name, step in steps.items():
      began = time.perf_counter()
      jax.block_until_ready(step(*arrays))
      if turn:
        rates[name].append(tokens / (time.perf_counter() - began))
  for name, values in rates.items():
    print(f"{name}: {describe(values)} targets/s")
  ratios = [a / b for a, b in zip(rates["chunked"], rates["whole"], strict=True)]
  print(f"chunked / whole: {statistics.median(ratios):.2f} (median of {turns} turns)")
  case = {"tokens": tokens, "vocab": vocab, "width": width, "dtype": dtype}
  return case | {"targets_per_second": rates, "median_ratio": statistics.median(ratios)}


def describe(values: Sequence[float]) -> str:
  """The median and the range."""
  return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--tokens", type=int, default=512, help="of the timed case")
  parser.add_argument("--vocab", type=int, default=65_536, help="of the timed case")
  parser.add_argument("--width", type=int, default=256, help="of the timed case")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
  options = parser.parse_args()
  timed = options.tokens, options.vocab, options.width, options.dtype
  results = {
    "device": jax.devices()[0].device_kind,
    "memory": [memory(8192, 262_144, width, options.dtype) for width in (640, 768)],
    "speed": speed(*timed, options.turns),
  }
  if options.output:
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
