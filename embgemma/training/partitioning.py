"""The mesh, and which of its axes each logical axis of an array is split over."""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from embgemma.errors import ConfigError
from embgemma.typing import PyTree

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis (or axes, or None: whole on every device). Every axis
# that a parameter names must be here.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("layers", None),
  ("vocab", "tensor"),
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
    fsdp: Devices along which the batch and the parameters' `embed` axis are split.
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

  def batch_sharding(self, mesh: Mesh) -> NamedSharding:
    """Leading axis of every array of a batch, split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(dict(self.rules)["batch"]))


def data_shards(mesh: Mesh) -> int:
  """Parts that a batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]
