import pytest

from embgemma.errors import ConfigError
from embgemma.training import hardware


@pytest.mark.parametrize(
  ("name", "devices"),
  [("v5e:4x4", 16), ("v5e:16x16", 256), ("v5p:4x4x4", 64), ("v6e:16x16", 256)],
)
def test_tpu_names(name, devices):
  topology = hardware.parse_topology(name)
  assert topology.devices == devices
  assert topology.chip is not None
  assert topology.chip.name == name.split(":")[0]


def test_virtual_devices_stand_for_no_chip():
  topology = hardware.parse_topology("cpu:8")
  assert (topology.chip, topology.devices) == (None, 8)


@pytest.mark.parametrize(
  "name",
  ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "h100:8", "v9:2x2", "v5e:0x4", "cpu:"],
)
def test_unknown_names(name):
  with pytest.raises(ConfigError, match=r"no such topology.*v5e:4x4.*v5p:4x4x4"):
    hardware.parse_topology(name)


def grid(width, height):
  return [(x, y, 0) for y in range(height) for x in range(width)]


def test_routes():
  """One-way GB/s: 50 a link; rings (both ways) only where v5e's side of 16 is whole."""
  small, pod = hardware.parse_topology("v5e:4x4"), hardware.parse_topology("v5e:16x16")
  assert hardware.route(small, grid(4, 4)) == hardware.Route(100e9, 6)
  assert hardware.route(small, grid(4, 1)) == hardware.Route(50e9, 3)
  assert hardware.route(pod, grid(16, 16)) == hardware.Route(200e9, 16)
  assert hardware.route(pod, grid(16, 1)) == hardware.Route(100e9, 8)
  assert hardware.route(pod, grid(4, 1)) == hardware.Route(50e9, 3)
  cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
  # A v5p cube closes rings in all three dimensions: 4,800 Gbit/s.
  assert hardware.route(hardware.parse_topology("v5p:4x4x4"), cube) == hardware.Route(
    600e9, 6
  )
