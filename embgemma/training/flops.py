"""FLOPs: of a traced function, as written, and of a model, as papers count them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.extend import core

from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.typing import Int

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
  width, hidden = config.transformer.width, config.hidden_width
  heads = width * hidden + hidden * config.embedding_width if hidden else 0
  texts = np.count_nonzero(lengths)
  return _stack_flops(config.transformer, lengths) + 2.0 * heads * texts


def sequence_flops(config: BackboneConfig, sizes: Int[np.ndarray, "n 2"]) -> float:
  """FLOPs that scoring targets takes, counted as `forward_flops` counts.

  The decoder reads the encoder in each of its layers. Merged attention makes keys and
  values of the encoder's states by the decoder's own kernels, and a target sees those
  of its example beside the targets before it (arXiv 2512.14856); separate attention
  has queries and an output of its own as well (arXiv 2504.06225). The output matrix,
  which the sum of arXiv 2001.08361 leaves out, counts as any other, 2 V D a target:
  with a large vocabulary it is much of a step. Of the loss nothing else counts.

  Args:
    config: The model, with a decoder.
    sizes: Tokens of inputs and targets of each example.
  """
  decoder = config.decoder
  assert decoder is not None
  inputs, targets = np.asarray(sizes, np.int64).T
  output = 2.0 * decoder.vocab_size * decoder.width * float(targets.sum())
  total = _stack_flops(decoder, targets) + output
  if config.encoder is None:
    return total
  heads = decoder.num_heads * decoder.head_dim
  keys_values = 2 * config.encoder.width * decoder.num_kv_heads * decoder.head_dim
  reading = 2.0 * keys_values * float(inputs.sum())
  reading += 4.0 * heads * float((inputs * targets).sum())
  if config.cross_attention == "separate":
    reading += 2.0 * 2 * decoder.width * heads * float(targets.sum())
  return total + _stack_flops(config.encoder, inputs) + decoder.num_layers * reading


def _stack_flops(config: TransformerConfig, lengths: np.ndarray) -> float:
  """Of the layers over texts of these lengths."""
  lengths = np.asarray(lengths, np.int64)
  pairs = sum(
    float(visible_pairs(config, kind, lengths).sum()) for kind in config.layer_kinds
  )
  products = 2.0 * matmul_parameters(config) * float(lengths.sum())
  return products + 4.0 * config.num_heads * config.head_dim * pairs


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
