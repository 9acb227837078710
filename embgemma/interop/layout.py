"""Where each tensor of a Gemma 3 stack lies in our parameter tree.

Every other format keeps one tensor a layer; ours stacks the layers of a scan. A
`Tensor` is one of the other format: its name and shape there, and what of ours it
holds. All conversions are lists of these.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from embgemma.errors import CheckpointError
from embgemma.models.config import TransformerConfig
from embgemma.models.transformer import Transformer

LAYER_PARAMETERS = (
  "attention/query/kernel",
  "attention/key/kernel",
  "attention/value/kernel",
  "attention/output/kernel",
  "attention/query_norm/scale",
  "attention/key_norm/scale",
  "mlp/gate/kernel",
  "mlp/up/kernel",
  "mlp/down/kernel",
  "pre_attention_norm/scale",
  "post_attention_norm/scale",
  "pre_mlp_norm/scale",
  "post_mlp_norm/scale",
)
"""Parameters of one block, by their path in it."""

MAX_LISTED = 10
"""Names that a message lists before it counts."""

NumpyTree = dict[str, Any]
"""A nested dict of float32 arrays."""


@dataclasses.dataclass(frozen=True)
class Slot:
  """One tensor of one layer in our tree.

  Attributes:
    path: Keys from the root of the tree to a leaf.
    index: Along the leaf's leading `layers` axis; None where it has none.
    shape: Of the tensor: [in, out] for kernels.
  """

  path: tuple[str, ...]
  index: int | None
  shape: tuple[int, ...]

  def view(self, tree: Mapping[str, Any]) -> np.ndarray:
    """The tensor in a tree; writing to it writes the tree."""
    leaf: Any = tree
    for key in self.path:
      leaf = leaf[key]
    return leaf if self.index is None else leaf[self.index]


@dataclasses.dataclass(frozen=True)
class Part:
  """What of ours a tensor holds: `slot` is `pick` of the tensor."""

  slot: Slot
  pick: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of another format."""

  name: str
  shape: tuple[int, ...]
  parts: Sequence[Part]


@runtime_checkable  # for the type checks of tests
class TensorSource(Protocol):
  """Named tensors, read one at a time."""

  @property
  def location(self) -> str:
    """What messages call it."""

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Of every tensor."""

  def read(self, name: str) -> np.ndarray:
    """The tensor; float32 or bfloat16."""


def identity(array: np.ndarray) -> np.ndarray:
  return array


@functools.cache  # a second of tracing
def abstract_stack(config: TransformerConfig) -> Mapping[str, Any]:
  """Shapes of a stack's parameters, token table included."""
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids, ids, ids)
  return nn.unbox(shapes)["params"]


def allocate(abstract: Mapping[str, Any]) -> NumpyTree:
  """Uninitialised float32 arrays of the given shapes."""
  return jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), dict(abstract))


def stack_slots(config: TransformerConfig, root: tuple[str, ...]) -> dict[str, Slot]:
  """Every tensor of a stack by a plain name.

  Args:
    config: Of the stack.
    root: Path of the stack in the whole tree, such as ("encoder",).

  Returns:
    "table", "final_norm" and "LAYER/PARAMETER", such as
    "3/attention/query/kernel", to slots.

  Raises:
    CheckpointError: the stack is no Gemma 3, which the other formats hold.
  """
  if not config.query_key_norm:
    raise CheckpointError(
      "a stack without norms of queries and keys (TransformerConfig.query_key_norm is "
      "False) cannot be converted: the formats here hold Gemma 3"
    )
  shapes = abstract_stack(config)
  period = len(config.attention_pattern)
  stacked = config.num_layers // period * period

  def slot(path: tuple[str, ...], index: int | None = None) -> Slot:
    leaf: Any = shapes
    for key in path:
      leaf = leaf[key]
    shape = leaf.shape if index is None else leaf.shape[1:]
    return Slot((*root, *path), index, shape)

  slots = {
    "table": slot(("embedder", "table")),
    "final_norm": slot(("final_norm", "scale")),
  }
  for layer in range(config.num_layers):
    for parameter in LAYER_PARAMETERS:
      keys = tuple(parameter.split("/"))
      if layer < stacked:
        path = ("groups", f"layer_{layer % period}", *keys)
        slots[f"{layer}/{parameter}"] = slot(path, layer // period)
      else:
        path = ("remainder", f"layer_{layer - stacked}", *keys)
        slots[f"{layer}/{parameter}"] = slot(path)
  return slots


def check_names(
  tensors: Iterable[Tensor],
  source: TensorSource,
  ignored: Mapping[str, str] | None = None,
) -> None:
  """Accounts for every tensor of a source.

  Args:
    tensors: What the model needs.
    source: What there is.
    ignored: Names that may be there and are not read, to the reason why.

  Raises:
    CheckpointError: tensors are missing, unknown, or of another shape; by name.
  """
  expected = {tensor.name: tensor.shape for tensor in tensors}
  found = {n: s for n, s in source.shapes.items() if n not in (ignored or {})}
  problems = [f"missing: {name}" for name in expected if name not in found]
  problems += [f"unknown: {name}" for name in found if name not in expected]
  problems += [
    f"misshapen: {name} is {list(found[name])}, the configuration says {list(shape)}"
    for name, shape in expected.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]
  if problems:
    shown = "\n  ".join(problems[:MAX_LISTED])
    rest = len(problems) - MAX_LISTED
    more = f"\n  … and {rest} more" if rest > 0 else ""
    raise CheckpointError(
      f"{source.location}: its tensors are not those of its configuration:\n"
      f"  {shown}{more}\nThe files are incomplete or belong to another model; "
      "nothing was imported."
    )


def fill(tree: NumpyTree, tensors: Iterable[Tensor], source: TensorSource) -> None:
  """Reads tensors into our tree, one at a time.

  Raises:
    CheckpointError: a tensor cannot be read, or holds NaN or infinity.
  """
  for tensor in tensors:
    array = source.read(tensor.name)
    # NaN and infinity reach the extremes; a mask would be a copy.
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
      raise CheckpointError(
        f"{source.location}: {tensor.name} holds NaN or infinity; the file is damaged "
        "or the model diverged. Download it again, or take an earlier checkpoint."
      )
    for part in tensor.parts:
      part.slot.view(tree)[...] = part.pick(array)
