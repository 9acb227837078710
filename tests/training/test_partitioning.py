import json
import os
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from embgemma.errors import ConfigError
from embgemma.training.learners import EmbeddingLearner
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import (
  BATCH_AXES,
  LOGICAL_AXIS_RULES,
  MESH_AXES,
  Partitioner,
  data_shards,
  gather,
  manual_axes,
  manual_specs,
  own_shards,
  sum_gradients,
)
from embgemma.training.train_state import abstract_state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
  ("partitioner", "shape", "shards"),
  [
    (Partitioner(), (8, 1, 1), 8),
    (Partitioner(data=1, fsdp=-1), (1, 8, 1), 8),
    (Partitioner(data=2, fsdp=2, tensor=2), (2, 2, 2), 4),
    (Partitioner(tensor=4), (2, 1, 4), 2),
  ],
)
def test_mesh(partitioner, shape, shards):
  mesh = partitioner.mesh()
  assert mesh.axis_names == MESH_AXES
  assert mesh.devices.shape == shape
  assert data_shards(mesh) == shards
  assert own_shards(mesh) == list(range(shards))


def test_mesh_of_given_devices():
  mesh = Partitioner().mesh(jax.devices()[2:5])
  assert [d.id for d in mesh.devices.flat] == [2, 3, 4]


@pytest.mark.parametrize(
  "partitioner",
  [
    Partitioner(data=3),
    Partitioner(data=4),
    Partitioner(data=16),
    Partitioner(data=-1, fsdp=-1),
    Partitioner(data=-1, tensor=3),
    Partitioner(data=0),
    Partitioner(data=-2),
    Partitioner(data=8, fsdp=0),
    Partitioner(data=-1, fsdp=0),
  ],
)
def test_mesh_that_does_not_divide(partitioner):
  with pytest.raises(ConfigError, match="does not divide 8 devices"):
    partitioner.mesh()


def boxed(shape: tuple[int, ...], *names: str | None) -> nn.LogicallyPartitioned:
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names)


def spec(partitioner: Partitioner, leaf: nn.LogicallyPartitioned) -> P:
  tree = {"layer": {"kernel": leaf}}
  shardings = partitioner.state_shardings(tree, partitioner.mesh())
  return shardings["layer"]["kernel"].spec


def test_axes_follow_the_rules():
  partitioner = Partitioner(data=2, fsdp=2, tensor=2)
  assert spec(partitioner, boxed((8, 4), "embed", "mlp")) == P("fsdp", "tensor")
  assert spec(partitioner, boxed((3, 8), "layers", "embed")) == P(None, "fsdp")
  assert spec(partitioner, boxed((3, 8), None, "embed")) == P(None, "fsdp")
  # A factored statistic has fewer axes than its parameter.
  assert spec(partitioner, boxed((8,), "embed", "mlp")) == P()


def test_an_array_without_axes_is_whole_everywhere():
  partitioner = Partitioner()
  sharding = partitioner.state_shardings(
    jax.ShapeDtypeStruct((3,), np.float32), partitioner.mesh()
  )
  assert sharding.is_fully_replicated


def test_axis_without_a_rule():
  with pytest.raises(ConfigError, match=r"parameter layer/kernel: .*'depth'.*no rule"):
    spec(Partitioner(), boxed((8, 8), "embed", "depth"))


def test_axis_claimed_twice():
  with pytest.raises(
    ConfigError, match=r"parameter layer/kernel .*\['tensor'\].*twice"
  ):
    spec(Partitioner(data=4, tensor=2), boxed((8, 8), "heads", "mlp"))


def test_axis_that_the_mesh_does_not_divide():
  with pytest.raises(
    ConfigError, match=r"parameter layer/kernel: axis 'embed' of size 6 .* 4 devices"
  ):
    spec(Partitioner(data=2, fsdp=4), boxed((6, 8), "embed", "mlp"))


def test_rules_can_be_changed():
  rules = (*(r for r in LOGICAL_AXIS_RULES if r[0] != "embed"), ("embed", None))
  partitioner = Partitioner(data=2, fsdp=4, rules=rules)
  assert spec(partitioner, boxed((6, 8), "embed", "mlp")) == P(None, "tensor")


@pytest.mark.parametrize(
  ("name", "partitioner"),
  [
    ("data8", Partitioner(data=8)),
    ("fsdp8", Partitioner(data=1, fsdp=8)),
    ("data2_fsdp2_tensor2", Partitioner(data=2, fsdp=2, tensor=2)),
  ],
)
def test_golden_shardings(name, partitioner, config, objective):
  """EMBGEMMA_UPDATE_GOLDEN=1 writes the files instead of comparing them."""
  _, state = abstract_state(
    EmbeddingLearner(config, objective),
    OptimizerConfig(),
    10,
    True,
    partitioner,
    partitioner.mesh(),
  )
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.sharding.spec)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
  }
  path = GOLDEN / f"shardings_{name}.json"
  if os.environ.get("EMBGEMMA_UPDATE_GOLDEN"):
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(found.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
  assert json.loads(json.dumps(found)) == json.loads(path.read_text())


@pytest.mark.parametrize(
  "partitioner",
  [Partitioner(), Partitioner(data=4, fsdp=2), Partitioner(data=2, fsdp=2, tensor=2)],
)
def test_gathered_parameters_and_summed_gradients(partitioner):
  """Whole parameters on every device; the sum over shards, split as they are."""
  mesh = partitioner.mesh()
  tree = {"kernel": boxed((8, 4), "embed", "mlp"), "scale": boxed((3,), None)}
  shardings = partitioner.state_shardings(tree, mesh)
  values = {"kernel": np.arange(32.0).reshape(8, 4), "scale": np.arange(3.0)}
  params = jax.device_put(values, shardings)
  specs = manual_specs(params, mesh)

  def on_shard(params):
    whole = gather(params, specs)
    number = jax.lax.axis_index(BATCH_AXES)
    return sum_gradients(jax.tree.map(lambda x: x * (1.0 + number), whole), specs)

  summed = jax.jit(
    jax.shard_map(
      on_shard,
      mesh=mesh,
      in_specs=(specs,),
      out_specs=specs,
      axis_names=manual_axes(mesh),
      check_vma=False,
    )
  )(params)
  shards = data_shards(mesh)
  for name, value in values.items():
    expected = value * shards * (shards + 1) / 2
    np.testing.assert_array_equal(summed[name], expected)
  assert summed["kernel"].sharding.shard_shape((8, 4))[0] == 8 // partitioner.fsdp
