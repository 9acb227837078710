"""Sums and rows over the whole batch, of which a device shard holds a part.

Inside `jax.shard_map(check_vma=False)` over mesh axes `axes`, a term returns its
shard's share of the loss: the loss is the sum of the shares, and the gradient of a
share by the shard's rows is that of the loss, since there `psum` transposes to `psum`
and `all_gather` to a sum scattered over shards. What depends on the whole batch alone
is therefore divided by the number of shards. Without axes, the rows are the batch.
"""

from collections.abc import Sequence

import jax

from embgemma.typing import PyTree


def shards(axes: Sequence[str]) -> int:
  """The number of shards of the batch."""
  return jax.lax.axis_size(tuple(axes)) if axes else 1


def total(x: PyTree, axes: Sequence[str]) -> PyTree:
  """The sum over shards of each array."""
  return jax.lax.psum(x, tuple(axes)) if axes else x


def gather(x: PyTree, axes: Sequence[str]) -> PyTree:
  """The rows of all shards, in the order of `jax.P(axes)`."""
  return jax.lax.all_gather(x, tuple(axes), tiled=True) if axes else x


def first_row(rows: int, axes: Sequence[str]) -> jax.Array | int:
  """The place in `gather` of the shard's first row, where each shard has `rows`."""
  return jax.lax.axis_index(tuple(axes)) * rows if axes else 0
