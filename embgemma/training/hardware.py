"""Accelerators by their published numbers, and slices of them by name."""

import dataclasses
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

import embgemma
from embgemma import checkpoints
from embgemma.errors import ConfigError

_GIB = 2**30
SYSTEM_FILE = "system.json"


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a roofline needs to know of an accelerator.

  Attributes:
    name: As in topology names.
    flops: Peak dense bfloat16 FLOP/s.
    hbm_bytes: Memory.
    hbm_bandwidth: Bytes a second.
    link_bandwidth: Bytes a second of one link in one direction.
    links: Links of a chip.
    wrap: A dimension of a slice is a ring where its size is a multiple of this, a
      line otherwise; 0 is a switched network, where all links serve all peers.
  """

  name: str
  flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  links: int
  wrap: int


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e}. Their "bidirectional interconnect
# bandwidth per chip" (400, 1,200 and 800 GB/s) counts both directions of all links: 4
# links on a 2-D torus, 6 on a 3-D torus. A v5e or v6e slice closes rings only where it
# spans all 16 chips of a pod's side; a v5p slice is made of 4x4x4 cubes, whose optical
# switches close every ring. GPU: NVIDIA's H100 (SXM) and H200 data sheets, dense rates;
# NVLink 4 has 18 links of 25 GB/s a direction (900 GB/s in both).
CHIPS = (
  Chip("v5e", 197e12, 16 * _GIB, 819e9, 50e9, 4, 16),
  Chip("v5p", 459e12, 95 * _GIB, 2765e9, 100e9, 6, 4),
  Chip("v6e", 918e12, 32 * _GIB, 1640e9, 100e9, 4, 16),
  Chip("h100", 989e12, 80 * 10**9, 3.35e12, 25e9, 18, 0),
  Chip("h200", 989e12, 141 * 10**9, 4.8e12, 25e9, 18, 0),
)

# What one hop between neighbours costs, however short the message: "about 1 µs",
# jax-ml.github.io/scaling-book, chapter on sharded matrices.
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of an accelerator, or virtual CPU devices.

  Attributes:
    name: Such as "v5e:4x4" or "cpu:8".
    chip: None for CPU devices: they stand for no hardware.
    shape: Chips along each dimension.
  """

  name: str
  chip: Chip | None
  shape: tuple[int, ...]

  @property
  def devices(self) -> int:
    """Devices, which are chips: v5p's two cores are one device."""
    return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
  """The topology of a name such as "v5e:16x16", "v5p:4x4x4" or "cpu:8".

  Raises:
    ConfigError: no such chip, or no such slice of it.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  chips = {chip.name: chip for chip in CHIPS if chip.wrap}
  kind = match.group(1) if match else ""
  shape = tuple(int(n) for n in match.group(2).split("x")) if match else ()
  dimensions = chips[kind].links // 2 if kind in chips else 1
  if (kind != "cpu" and kind not in chips) or len(shape) != dimensions or 0 in shape:
    examples = ", ".join(
      f"{c}:{'x'.join(['4'] * (chips[c].links // 2))}" for c in chips
    )
    raise ConfigError(
      f"--topology={name}: no such topology; write CHIP:SHAPE, such as {examples} or "
      "v5e:16x16, or cpu:8 for eight virtual CPU devices"
    )
  return Topology(name, chips.get(kind), shape)


@dataclasses.dataclass(frozen=True)
class Route:
  """What a collective among some chips of a slice has to itself.

  Attributes:
    bandwidth: Bytes a second that each chip sends, over all links in use.
    hops: Neighbour-to-neighbour steps of one pass around.
  """

  bandwidth: float
  hops: int


def route(topology: Topology, coords: Sequence[Sequence[int]]) -> Route:
  """The links that a group of chips has, as the collective with the least of them.

  A group that spans a whole ring sends both ways around it; on a line its end has one
  link. Several dimensions are used at once, each with a part of the data.

  Args:
    topology: With a chip.
    coords: Of the group's chips, one entry a dimension of the slice or more.
  """
  chip = topology.chip
  assert chip is not None
  links = hops = 0
  for dimension, size in enumerate(topology.shape):
    extent = len({coord[dimension] for coord in coords})
    if extent == 1:
      continue
    ring = extent == size and size % chip.wrap == 0
    links += 2 if ring else 1
    hops += extent // 2 if ring else extent - 1
  return Route(max(links, 1) * chip.link_bandwidth, max(hops, 1))


def write_system(directory: pathlib.Path, mesh: Mesh) -> None:
  """Notes what a run works on: system.json, of its last start.

  Args:
    directory: MODEL_DIR.
    mesh: Of the run.

  Raises:
    CheckpointError: it cannot be written.
  """
  content = {
    "device_kind": mesh.devices.flat[0].device_kind,
    "devices": mesh.devices.size,
    "cores": os.cpu_count(),
    "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
    "processes": jax.process_count(),
    "versions": {
      "embgemma": embgemma.__version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
  }
  path = directory / SYSTEM_FILE
  checkpoints.write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
