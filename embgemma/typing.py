"""Array annotations used across the package.

Dimension letters: B examples in a batch, M negatives a query, N texts, R rows,
L row length (I of an encoder, T of a decoder that reads it), D model width,
E embedding width, H heads, K kv heads or microbatches, V vocabulary, W teacher width,
S data shards.

Shapes and dtypes in signatures are checked at run time in tests only
(`--jaxtyping-packages` in pyproject.toml).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped, UInt32, UInt64

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
PyTree = Any
Leaf = Any  # an array, or what JAX's trees hold in its place: a shape, a sharding
Params = Mapping[str, Any]
Metrics = dict[str, Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tokens", "positions", "text_ids", "starts", "lengths"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedTexts:
  """Texts laid into rows; what the embedding function takes: one shard's.

  Over a mesh the arrays of the shards lie end to end, [S * R, L] and [S * N]; K
  microbatches of one shape are stacked, [K, R, L] and [K, N]. Slots and places count
  within one microbatch of one shard all the same.

  Attributes:
    tokens: int32 [R, L], token ids, 0 in padding.
    positions: int32 [R, L], place of each token in its text, from 0; 0 in padding.
    text_ids: int32 [R, L], slot of each token's text; N in padding.
    starts: int32 [N], first token of each text, as an index into the rows laid end
      to end; 0 in an empty slot.
    lengths: int32 [N], tokens of each text; 0 in an empty slot.
  """

  tokens: Leaf
  positions: Leaf
  text_ids: Leaf
  starts: Leaf
  lengths: Leaf


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "inputs",
    "input_positions",
    "input_ids",
    "targets",
    "decoder_inputs",
    "target_positions",
    "target_ids",
    "weights",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedSequences:
  """Examples laid into rows on both sides of an encoder-decoder: one shard's.

  An example's input and target lie in the same row and have the same id there. K
  microbatches of one shape are stacked, [K, R, L]; over a mesh the shards' rows lie
  end to end.

  Attributes:
    inputs: int32 [R, I], encoder tokens, 0 in padding; None, as the two after it, of
      a decoder alone.
    input_positions: int32 [R, I], place of each token in its input, from 0; 0 in
      padding.
    input_ids: int32 [R, I], which example of the row, from 1; 0 in padding.
    targets: int32 [R, T], what is predicted; 0 in padding.
    decoder_inputs: int32 [R, T], targets shifted right within each example, BOS
      first; 0 in padding.
    target_positions: int32 [R, T], place of each token in its target, from 0; 0 in
      padding.
    target_ids: int32 [R, T], which example of the row, from 1; 0 in padding.
    weights: float32 [R, T], 1 where a target counts, else 0.
  """

  inputs: Leaf
  input_positions: Leaf
  input_ids: Leaf
  targets: Leaf
  decoder_inputs: Leaf
  target_positions: Leaf
  target_ids: Leaf
  weights: Leaf


__all__ = [
  "Array",
  "ArrayLike",
  "Bool",
  "DTypeLike",
  "Float",
  "Int",
  "Leaf",
  "Metrics",
  "PackedSequences",
  "PackedTexts",
  "Params",
  "PyTree",
  "Shaped",
  "UInt32",
  "UInt64",
]
