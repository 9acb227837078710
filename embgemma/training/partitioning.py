"""The mesh, and which of its axes each logical axis of an array is split over.

The batch is split over `data` and `fsdp`, the parameters over `fsdp`. A step gathers
them once, sums gradients on its own device, and splits the sum again once: what it
sends does not grow with microbatches, and moments stay split (ZeRO, arXiv 1910.02054).
`tensor` is left to the compiler.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from embgemma.data.packing import PackedPairs
from embgemma.errors import ConfigError
from embgemma.typing import PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis (or axes, or None: whole on every device). Every axis
# that a parameter names must be here.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("layers", None),
  # Rows of the table, not columns: a few columns of many rows waste a TPU's tiles.
  ("vocab", ("fsdp", "tensor")),
  ("table", None),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv", None),  # Gemma's one key/value head cannot be split by heads
  ("head_dim", None),
  ("mlp", "tensor"),
  ("projection", "tensor"),
  ("embedding", None),
  ("lora", None),  # ranks are small; the other axis of an adapter may be split
  ("teacher", None),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """Builds the mesh and shardings of a run.

  Attributes:
    data: Devices along which only the batch is split; -1 is all that remain.
    fsdp: Devices along which the batch, parameters and moments are split.
    tensor: Devices along which heads, mlp and vocabulary are split.
    rules: Logical axis rules.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = LOGICAL_AXIS_RULES

  def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices, or all there are.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [self.data, self.fsdp, self.tensor]
    known = math.prod(size for size in shape if size != -1)
    described = dict(zip(MESH_AXES, shape, strict=True))
    fits = (
      shape.count(-1) <= 1
      and all(size == -1 or size >= 1 for size in shape)
      and len(devices) % known == 0
    )
    if fits and -1 in shape:
      shape[shape.index(-1)] = len(devices) // known
    if not fits or math.prod(shape) != len(devices):
      raise ConfigError(
        f"mesh {described} does not divide {len(devices)} devices; choose "
        "Partitioner.data, fsdp and tensor so that their product is the number of "
        "devices (one of them may be -1)"
      )
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)

  def state_shardings(self, boxed: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of an abstract state whose parameters carry logical axis names.

    Args:
      boxed: Tree of ShapeDtypeStruct, in flax's LogicallyPartitioned boxes.
      mesh: From `mesh`.

    Returns:
      The unboxed tree's NamedShardings.

    Raises:
      ConfigError: an axis without a rule, a mesh axis claimed twice, or a dimension
        that the mesh does not divide; the message has the parameter's path.
    """

    def sharding(path, leaf):
      if not isinstance(leaf, nn.LogicallyPartitioned):
        return NamedSharding(mesh, PartitionSpec())
      if len(leaf.names) != leaf.value.ndim:
        # A factored optimizer statistic: small, whole on every device.
        return NamedSharding(mesh, PartitionSpec())
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      spec = self._spec(leaf.names, leaf.value.shape, mesh, name)
      return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
      sharding, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )

  def _spec(
    self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, path: str
  ) -> PartitionSpec:
    rules = dict(self.rules)
    spec: list[str | tuple[str, ...] | None] = []
    claimed: set[str] = set()
    for name, size in zip(names, shape, strict=True):
      if name is not None and name not in rules:
        raise ConfigError(
          f"parameter {path}: logical axis {name!r} has no rule; add it to "
          "Partitioner.rules"
        )
      # Adafactor's placeholders are of size 1: whole on every device.
      axes = rules[name] if name is not None and size != 1 else None
      flat = (axes,) if isinstance(axes, str) else tuple(axes or ())
      twice = claimed & set(flat)
      if twice:
        raise ConfigError(
          f"parameter {path} {tuple(names)}: mesh axes {sorted(twice)} claimed twice; "
          "change Partitioner.rules"
        )
      claimed |= set(flat)
      parts = math.prod(mesh.shape[axis] for axis in flat)
      if size % parts:
        raise ConfigError(
          f"parameter {path}: axis {name!r} of size {size} is not divided by the "
          f"{parts} devices of mesh axes {flat}; change the mesh or the rules"
        )
      spec.append(axes)
    return PartitionSpec(*spec)


def data_shards(mesh: Mesh) -> int:
  """Parts that a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def bytes_per_device(tree: PyTree) -> int:
  """Bytes of the tree's arrays on one device, by their shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def own_shards(mesh: Mesh) -> list[int]:
  """Data shards that lie, wholly or in part, on this process's devices."""
  processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
  mine = np.any(processes == jax.process_index(), axis=-1)
  return np.flatnonzero(mine.reshape(-1)).tolist()


def manual_axes(mesh: Mesh) -> frozenset[str]:
  """Mesh axes that a step handles itself; a split `tensor` axis is the compiler's."""
  return frozenset(a for a in MESH_AXES if a != "tensor" or mesh.shape[a] == 1)


def pairs_specs() -> PackedPairs:
  """How the arrays of a batch are split: a prefix of its tree."""
  rows = PartitionSpec(BATCH_AXES)
  return PackedPairs(
    groups=PartitionSpec(None, BATCH_AXES),
    slots=rows,
    query_hash=rows,
    positive_hash=rows,
    negative_mask=rows,
    teacher=rows,
    teacher_mask=rows,
  )


def place_batch(batch: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
  """The global batch on the mesh, from what this process's shards hold of it.

  Args:
    batch: Numpy arrays.
    specs: How they are split: a prefix of the tree.
    mesh: Of the step.
  """

  def place(spec: PartitionSpec, values: PyTree) -> PyTree:
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
      return jax.device_put(values, sharding)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x), values
    )

  return jax.tree.map(place, specs, batch)


def manual_specs(shardings: PyTree, mesh: Mesh) -> PyTree:
  """PartitionSpecs over the axes that a step handles itself, of a tree of arrays."""
  manual = manual_axes(mesh)

  def kept(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    flat = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return tuple(axis for axis in flat if axis in manual) or None

  return jax.tree.map(
    lambda leaf: PartitionSpec(*map(kept, leaf.sharding.spec)), shardings
  )


def _split_dimension(spec: PartitionSpec) -> int | None:
  """The dimension that is split over fsdp."""
  found = [i for i, axes in enumerate(spec) if "fsdp" in (axes or ())]
  return found[0] if found else None


def gather(params: PyTree, specs: PyTree) -> PyTree:
  """Whole parameters from their parts; inside shard_map.

  Args:
    params: This device's parts.
    specs: Of `manual_specs`.
  """

  def whole(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    dimension = _split_dimension(spec)
    if dimension is None or jax.lax.axis_size("fsdp") == 1:
      return x
    return jax.lax.all_gather(x, "fsdp", axis=dimension, tiled=True)

  return jax.tree.map(whole, params, specs)


def sum_gradients(gradients: PyTree, specs: PyTree) -> PyTree:
  """Gradients summed over the batch, split as the parameters; inside shard_map.

  Args:
    gradients: Of whole parameters, of this device's part of the batch.
    specs: Of `manual_specs`.
  """

  def total(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    dimension = _split_dimension(spec)
    if dimension is None or jax.lax.axis_size("fsdp") == 1:
      return jax.lax.psum(x, BATCH_AXES)
    own = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(own, "data")

  return jax.tree.map(total, gradients, specs)
