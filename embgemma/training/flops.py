"""FLOPs: of a traced function, as written, and of a model, as papers count them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.extend import core

from embgemma.models.config import EmbedderConfig, TransformerConfig

# bfloat16 matmuls that a TPU makes of one float32 matmul (jax.lax.Precision).
_PASSES = {
  jax.lax.Precision.DEFAULT: 1,
  jax.lax.Precision.HIGH: 3,
  jax.lax.Precision.HIGHEST: 6,
}


@dataclasses.dataclass(frozen=True)
class Flops:
  """Work of matrix products.

  Attributes:
    counted: 2 m n k of each product, over all devices.
    passes: The same with a float32 product of higher precision counted as the several
      bfloat16 products that a TPU makes of it; what compute time follows from.
    unknown_loops: Loops whose length is not known before they run; counted once.
  """

  counted: float = 0.0
  passes: float = 0.0
  unknown_loops: int = 0

  def __add__(self, other: "Flops") -> "Flops":
    return Flops(
      self.counted + other.counted,
      self.passes + other.passes,
      self.unknown_loops + other.unknown_loops,
    )

  def times(self, count: int) -> "Flops":
    """Of `count` repetitions."""
    return Flops(self.counted * count, self.passes * count, self.unknown_loops)


def traced_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> Flops:
  """FLOPs of the matrix products of a jaxpr, over all devices.

  Counted as written: what rematerialisation and gradient caching compute twice counts
  twice, masked attention logits count, elementwise work does not. A scan's body counts
  as often as it runs, a shard_map's once a shard, of a cond the dearest branch, a
  Pallas kernel by its cost estimate or else once a grid point.

  Args:
    jaxpr: Of `jax.jit(f).trace(...)`.
  """
  total = Flops()
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    total += _equation_flops(equation)
  return total


def _equation_flops(equation: core.JaxprEqn) -> Flops:
  params = equation.params
  match equation.primitive.name:
    case "dot_general":
      return _dot_flops(equation)
    case "scan":
      return traced_flops(params["jaxpr"]).times(params["length"])
    case "while":
      body = traced_flops(params["body_jaxpr"]) + traced_flops(params["cond_jaxpr"])
      return body + Flops(unknown_loops=1) if body.counted else body
    case "cond":
      branches = [traced_flops(branch) for branch in params["branches"]]
      return max(branches, key=lambda flops: flops.passes)
    case "shard_map":
      sizes = params["mesh"].shape
      # A nested shard_map is entered once a shard of the axes it adds.
      name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
      shards = math.prod(sizes[axis] for axis in params[name])
      return traced_flops(params["jaxpr"]).times(shards)
    case "pallas_call":
      estimate = params["cost_estimate"]
      if estimate is not None:
        return Flops(float(estimate.flops), float(estimate.flops))
      grid = math.prod(int(size) for size in params["grid_mapping"].grid)
      return traced_flops(params["jaxpr"]).times(grid)
  total = Flops()
  for inner in _inner_jaxprs(params):
    total += traced_flops(inner)
  return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  """The function that a call-like primitive applies, such as jit's or remat's."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if hasattr(getattr(params.get(name), "jaxpr", params.get(name)), "eqns"):
      yield params[name]


def _dot_flops(equation: core.JaxprEqn) -> Flops:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left, right, result = (
    cast(jax.core.ShapedArray, v.aval) for v in (*equation.invars, *equation.outvars)
  )
  depth = math.prod(left.shape[axis] for axis in contracted)
  counted = 2.0 * math.prod(result.shape) * depth
  precision = equation.params["precision"]
  passes = 1
  if isinstance(precision, tuple) and left.dtype == right.dtype == np.float32:
    passes = max(_PASSES[p] for p in precision)
  return Flops(counted, counted * passes)


def forward_flops(config: EmbedderConfig, lengths: np.ndarray) -> float:
  """FLOPs that embedding texts takes, padding and masked keys left out.

  Two for each parameter of a matrix and token, and four for each head dimension and
  pair of a query and a key that it sees (arXiv 2001.08361, section 2.1, with the pairs
  counted exactly). A training step is three times that (arXiv 2204.02311, appendix B):
  what model FLOPs utilisation relates to the peak. Token lookup, pooling and the loss
  are left out.

  Args:
    config: The model.
    lengths: Tokens of each text.
  """
  transformer = config.transformer
  lengths = np.asarray(lengths, np.int64)
  width, hidden = transformer.width, config.hidden_width
  heads = width * hidden + hidden * config.embedding_width if hidden else 0
  pairs = sum(
    float(visible_pairs(transformer, kind, lengths).sum())
    for kind in transformer.layer_kinds
  )
  tokens = float(lengths.sum())
  return (
    2.0 * matmul_parameters(transformer) * tokens
    + 4.0 * transformer.num_heads * transformer.head_dim * pairs
    + 2.0 * heads * np.count_nonzero(lengths)
  )


def matmul_parameters(config: TransformerConfig) -> int:
  """Parameters of the layers' matrices."""
  attention = config.width * config.head_dim * 2
  attention *= config.num_heads + config.num_kv_heads
  return config.num_layers * (attention + 3 * config.width * config.mlp_width)


def visible_pairs(
  config: TransformerConfig, kind: str, lengths: np.ndarray
) -> np.ndarray:
  """Pairs of a query and a key that a layer of this kind lets attend, for each text."""
  longest = int(lengths.max(initial=0))
  left, right = config.window if kind == "local" else (longest, longest)
  if config.mask == "causal":
    right = 0

  def seen(window: int) -> np.ndarray:
    # Keys on one side: 0 + 1 + … up to the window, for each of n queries.
    ramp = np.minimum(lengths, window + 1)
    return ramp * (ramp - 1) // 2 + (lengths - ramp) * window

  return lengths + seen(left) + seen(right)
