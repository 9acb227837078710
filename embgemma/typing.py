"""Array annotations used across the package.

Dimension letters: B examples in a batch, M negatives a query, N texts, R rows,
L row length, D model width, E embedding width, H heads, K kv heads,
V vocabulary, W teacher width, S data shards.

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
from jaxtyping import Bool, Float, Int, UInt32

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
PyTree = Any
Params = Mapping[str, Any]
Metrics = dict[str, Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tokens", "positions", "text_ids", "starts", "lengths"],
  meta_fields=["num_shards"],
)
@dataclasses.dataclass(frozen=True)
class PackedTexts:
  """Texts laid into rows; what the embedding function takes.

  The rows of data shard s are the s-th of `num_shards` equal blocks of rows, its
  texts the s-th block of text slots, so that pooling never leaves a shard.

  Attributes:
    tokens: Token ids, 0 in padding.
    positions: Position of each token in its text, from 0; 0 in padding.
    text_ids: Slot of each token's text within its shard; N / S in padding.
    starts: First token of each text, as an index into its shard's rows laid end to
      end; 0 in an empty slot.
    lengths: Tokens of each text; 0 in an empty slot.
    num_shards: S.
  """

  tokens: Int[ArrayLike, "R L"]
  positions: Int[ArrayLike, "R L"]
  text_ids: Int[ArrayLike, "R L"]
  starts: Int[ArrayLike, " N"]
  lengths: Int[ArrayLike, " N"]
  num_shards: int


__all__ = [
  "Array",
  "ArrayLike",
  "Bool",
  "DTypeLike",
  "Float",
  "Int",
  "Metrics",
  "PackedTexts",
  "Params",
  "PyTree",
  "UInt32",
]
