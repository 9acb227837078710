import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from embgemma.training.hardware import parse_topology
from embgemma.training.hlo_costs import Collective
from embgemma.training.roofline import (
  Exchange,
  Memory,
  StepCosts,
  exchange,
  weak_scaling,
)

V5E = parse_topology("v5e:4x4")


def costs(topology="v5e:4x4", batch_size=1024, **changes) -> StepCosts:
  parsed = parse_topology(topology)
  assert parsed.chip is not None
  values = StepCosts(
    topology=topology,
    mesh={"data": parsed.devices, "fsdp": 1, "tensor": 1},
    batch_size=batch_size,
    tokens=100_000,
    slots=110_000,
    groups=(),
    memory=Memory(
      arguments=10, outputs=6, aliased=5, temporaries=4, code=1, capacity=16
    ),
    flops=parsed.devices * 197e12 * 0.2,
    bf16_flops=parsed.devices * 197e12 * 0.4,
    model_flops=parsed.devices * 197e12 * 0.1,
    hbm_bytes=int(819e9 * 0.3),
    exchanges=(Exchange("all-reduce", "data", 16, 1, 0, 0.0, 0.1),),
    unknown_loops=0,
    compile_seconds=1.0,
    chip=parsed.chip,
  )
  return dataclasses.replace(values, **changes)


def test_times_by_hand():
  cost = costs()
  assert cost.times == pytest.approx({"compute": 0.4, "memory": 0.3, "network": 0.1})
  assert cost.bound == "compute"
  assert cost.seconds == pytest.approx(0.5)
  assert cost.overlapped_seconds == pytest.approx(0.4)
  assert cost.mfu == pytest.approx(0.1 / 0.5)
  values = cost.to_json()
  assert values["examples_per_second"] == pytest.approx(2048)
  assert values["memory"]["peak"] == 10 + 6 - 5 + 4 + 1
  assert values["memory"]["fits"] is True
  assert values["chip"] == "v5e"


def test_memory_that_xla_refuses_does_not_fit():
  memory = Memory(capacity=16, needed=20)
  assert (memory.peak, memory.fits) == (20, False)
  cost = costs(memory=memory)
  assert (cost.times, cost.seconds, cost.mfu, cost.bound) == (None,) * 4


def test_virtual_devices_have_no_times():
  cost = costs(chip=None, memory=Memory(arguments=1))
  assert cost.memory.fits is None
  assert (cost.times, cost.seconds, cost.mfu) == (None,) * 3


@dataclasses.dataclass(frozen=True)
class Chip:
  """Stands for a device of a TPU topology."""

  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  process_index: int = 0


def test_exchanges_over_axes():
  """data is four columns of the 4 x 4 slice, fsdp its rows of four."""
  chips = np.empty((4, 4, 1), object)
  for y, x in np.ndindex(4, 4):
    chips[y, x, 0] = Chip((x, y, 0))

  mesh = Mesh(chips, ("data", "fsdp", "tensor"))
  rows = Collective("all-gather", (0, 1, 2, 3), 2, 2 * 4_000_000)
  found = exchange(rows, mesh, V5E)
  assert (found.axes, found.devices, found.count) == ("fsdp", 4, 2)
  # 3/4 of the value over one link of 50 GB/s, and three hops each time.
  assert found.sent_bytes == 6e6
  assert found.seconds == pytest.approx(6e6 / 50e9 + 2 * 3 * 1e-6)
  every = Collective("all-reduce", tuple(range(16)), 1, 16_000_000)
  found = exchange(every, mesh, V5E)
  assert found.axes == "data+fsdp"
  # Twice 15/16 over the two links of a corner; six hops there and back.
  assert found.seconds == pytest.approx(30e6 / 100e9 + 2 * 6e-6)


def test_exchanges_of_virtual_devices_take_no_time():
  mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
  found = exchange(
    Collective("all-reduce", (0, 2, 4, 6), 1, 8), mesh, parse_topology("cpu:8")
  )
  assert (found.axes, found.seconds) == ("data", None)


def test_weak_scaling_compares_equal_batches_a_chip():
  small = costs()
  other = costs(batch_size=2048)
  large = costs("v5e:16x16", batch_size=16 * 1024, hbm_bytes=int(819e9 * 0.525))
  elsewhere = costs("v6e:4x4")
  efficiencies = weak_scaling([small, other, large, elsewhere])
  assert efficiencies == [None, None, pytest.approx(0.5 / 0.625), None]
