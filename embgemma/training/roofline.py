"""How long a compiled step should take on a chip, and what bounds it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from embgemma.data.packing import GroupShape
from embgemma.data.sequence_packing import SequenceShape
from embgemma.training.hardware import HOP_SECONDS, Chip, Route, Topology, route
from embgemma.training.hlo_costs import Collective

ASSUMPTIONS = (
  "compute: matrix products at the chip's peak, float32 ones of highest precision as "
  "six bfloat16 ones; memory: bytes of HBM traffic at its full bandwidth; network: "
  "rings over all links that the group spans (lines where a v5e or v6e slice is not 16 "
  "chips long, at half the bandwidth), and 1 µs a hop. A step takes "
  "max(compute, memory) + network; overlapped, the largest of the three. MFU counts 3 "
  "forward passes over real tokens, nothing computed twice, and of a loss the output "
  "matrix alone."
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: State and batch.
    outputs: New state and metrics.
    aliased: Of the outputs, those that take the place of arguments.
    temporaries: Activations, gradients and buffers.
    code: The program.
    capacity: Of the device; None where it stands for no hardware.
    needed: What XLA says the step needs at least, where it refused to compile it for
      that; the other sizes are 0 then.
  """

  arguments: int = 0
  outputs: int = 0
  aliased: int = 0
  temporaries: int = 0
  code: int = 0
  capacity: int | None = None
  needed: int | None = None

  @property
  def peak(self) -> int:
    """The most that is held at once."""
    if self.needed is not None:
      return self.needed
    kept = self.arguments + self.outputs - self.aliased
    return kept + self.temporaries + self.code

  @property
  def fits(self) -> bool | None:
    """Whether the device holds it; None where there is no device."""
    if self.needed is not None:
      return False
    return None if self.capacity is None else self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class Exchange:
  """All collectives of a step of one kind, over the same axes.

  Attributes:
    kind: As HLO names it.
    axes: Mesh axes it goes over, joined by "+".
    devices: Of a group.
    count: How often a step runs it.
    full_bytes: Of the values, see `Collective.full_bytes`.
    sent_bytes: By each chip.
    seconds: At the bandwidth of the links in use; None without hardware.
  """

  kind: str
  axes: str
  devices: int
  count: int
  full_bytes: int
  sent_bytes: float
  seconds: float | None


def exchange(collective: Collective, mesh: Mesh, topology: Topology) -> Exchange:
  """A collective with the axes it goes over and the time it takes."""
  positions = np.unravel_index(collective.group, mesh.devices.shape)
  axes = [
    name
    for name, along in zip(mesh.axis_names, positions, strict=True)
    if len(set(along.tolist())) > 1
  ]
  seconds = None
  if topology.chip is not None:
    devices = mesh.devices.reshape(-1)
    way = route(topology, [devices[i].coords for i in collective.group])
    seconds = _seconds(collective, way)
  return Exchange(
    collective.kind,
    "+".join(axes),
    len(collective.group),
    collective.count,
    collective.full_bytes,
    collective.sent_bytes,
    seconds,
  )


def _seconds(collective: Collective, way: Route) -> float:
  passes = 2 if collective.kind == "all-reduce" else 1
  hops = collective.count * passes * way.hops
  return collective.sent_bytes / way.bandwidth + hops * HOP_SECONDS


@dataclasses.dataclass(frozen=True)
class StepCosts:
  """What one step costs, counted from the compiled program.

  Attributes:
    topology: Its name.
    mesh: Size of each axis.
    batch_size: Examples of a step, over all devices.
    tokens: Real tokens of a step, over all devices.
    slots: Token slots of a step, padding included, over all devices.
    groups: Rows of one shard, by their shape.
    memory: Of one device.
    flops: Of matrix products, all devices together, as written.
    bf16_flops: The same, float32 products as the bfloat16 ones they are made of.
    model_flops: Three forward passes over the real tokens.
    hbm_bytes: Moved on one device.
    exchanges: Collectives.
    unknown_loops: Loops of unknown length, counted once: costs are too low then.
    compile_seconds: What compiling took here.
    chip: None for virtual devices.
  """

  topology: str
  mesh: dict[str, int]
  batch_size: int
  tokens: int
  slots: int
  groups: tuple[GroupShape | SequenceShape, ...]
  memory: Memory
  flops: float
  bf16_flops: float
  model_flops: float
  hbm_bytes: int
  exchanges: tuple[Exchange, ...]
  unknown_loops: int
  compile_seconds: float
  chip: Chip | None

  @property
  def devices(self) -> int:
    return int(np.prod(list(self.mesh.values())))

  @property
  def compiled(self) -> bool:
    """Whether there is a program: XLA makes none that does not fit."""
    return self.memory.needed is None

  @property
  def times(self) -> dict[str, float] | None:
    """Seconds that compute, memory and network take; None without hardware."""
    if self.chip is None or not self.compiled:
      return None
    return {
      "compute": self.bf16_flops / self.devices / self.chip.flops,
      "memory": self.hbm_bytes / self.chip.hbm_bandwidth,
      "network": sum(e.seconds or 0.0 for e in self.exchanges),
    }

  @property
  def bound(self) -> str | None:
    """Which of `times` is the longest."""
    times = self.times
    return None if times is None else max(times, key=lambda name: times[name])

  @property
  def seconds(self) -> float | None:
    """Of a step whose network traffic overlaps with nothing."""
    times = self.times
    if times is None:
      return None
    return max(times["compute"], times["memory"]) + times["network"]

  @property
  def overlapped_seconds(self) -> float | None:
    """Of a step whose network traffic overlaps with everything."""
    return None if self.times is None else max(self.times.values())

  @property
  def mfu(self) -> float | None:
    """Model FLOPs over what the chips could do in that time (arXiv 2204.02311)."""
    if self.chip is None or self.seconds is None:
      return None
    return self.model_flops / (self.seconds * self.devices * self.chip.flops)

  def to_json(self) -> dict[str, Any]:
    """All of it, derived numbers included, as JSON values."""
    values = dataclasses.asdict(self)
    values["chip"] = None if self.chip is None else self.chip.name
    values["memory"] |= {"peak": self.memory.peak, "fits": self.memory.fits}
    seconds = self.seconds
    return values | {
      "times": self.times,
      "bound": self.bound,
      "seconds": seconds,
      "overlapped_seconds": self.overlapped_seconds,
      "examples_per_second": None if seconds is None else self.batch_size / seconds,
      "tokens_per_second": None if seconds is None else self.tokens / seconds,
      "mfu": self.mfu,
    }


def weak_scaling(costs: Sequence[StepCosts]) -> list[float | None]:
  """Efficiency of each step against the smallest slice of the same kind of chip.

  Time of a step there over the time here, at equally many examples a chip; None where
  there is no smaller slice to compare with.
  """
  smallest: dict[tuple[str, float], StepCosts] = {}

  def key(cost: StepCosts) -> tuple[str, float] | None:
    if cost.chip is None or cost.seconds is None:
      return None
    return (cost.chip.name, cost.batch_size / cost.devices)

  for cost in costs:
    if (k := key(cost)) is not None:
      smallest[k] = min(smallest.get(k, cost), cost, key=lambda c: c.devices)
  found: list[float | None] = []
  for cost in costs:
    k = key(cost)
    base = None if k is None else smallest[k]
    if base is None or base.devices == cost.devices:
      found.append(None)
    else:
      assert base.seconds is not None
      assert cost.seconds is not None
      found.append(base.seconds / cost.seconds)
  return found
