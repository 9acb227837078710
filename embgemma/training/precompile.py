"""Compiles the step of a run for devices that are not there, and counts its costs."""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from embgemma.errors import ConfigError
from embgemma.training.flops import traced_flops
from embgemma.training.hardware import Topology, parse_topology
from embgemma.training.hlo_costs import HloCosts, hlo_costs
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.roofline import Memory, StepCosts, exchange
from embgemma.training.step_plan import StepPlan, abstract_run, plan_step
from embgemma.training.train_step import make_train_step
from embgemma.typing import PyTree

# Else libtpu looks for the TPU it runs on, and complains of finding none.
_LIBTPU_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # to compile takes no chip from anyone
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
# The program for virtual devices is looked at, never run.
_FAST_CPU = {"xla_backend_optimization_level": 0}
_TOO_LARGE = re.compile(
  r"(?:Used |HLO temporaries \()([\d.]+)([KMG]?)\)? (?:of|exceeds)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def precompile(
  topologies: Sequence[str],
  batch_sizes: Callable[[Topology], Sequence[int]],
  lengths: np.ndarray,
  say: Callable[[str], None],
  **run: Any,
) -> list[StepCosts]:
  """Costs of a step on each topology, at each batch size, topology by topology.

  Args:
    topologies: See `hardware.parse_topology`.
    batch_sizes: Examples of a step, over all devices of a topology.
    lengths: See `step_plan.TextLengths`.
    say: Is told what is compiled.
    run: Arguments of `loop.train`.

  Raises:
    ConfigError: a topology does not exist or cannot be compiled for here; see also
      `plan_step`.
  """
  parsed = [parse_topology(name) for name in topologies]
  slices = [(topology, topology_devices(topology)) for topology in parsed]
  plans = []
  for topology, devices in slices:
    abstract = abstract_run(devices, **run)
    memory = None if topology.chip is None else topology.chip.hbm_bytes
    for batch_size in batch_sizes(topology):
      plan = plan_step(abstract, memory, batch_size, lengths, **run)
      plans.append((topology, plan))
  costs = []
  # Compiling takes minutes: only once everything is known to be possible.
  for topology, plan in plans:
    say(f"compiling for {topology.name}, batch {plan.batch_size:,}")
    costs.append(step_costs(topology, plan, **run))
  return costs


def topology_devices(topology: Topology) -> list[jax.Device]:
  """The devices of a topology, to compile for.

  Raises:
    ConfigError: libtpu is missing, the slice does not exist, or this process has fewer
      virtual devices.
  """
  if topology.chip is None:
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
      raise ConfigError(
        f"--topology={topology.name}: this process has {len(devices)} CPU devices; set "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}"
      )
    return devices[: topology.devices]
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"--topology={topology.name}: compiling for a TPU needs libtpu; run "
      "`pip install embgemma[tpu]`"
    )
  for name, value in _LIBTPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name
    )
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"--topology={topology.name}: no such slice: {error}") from error
  return list(description.devices)


def step_costs(
  topology: Topology,
  plan: StepPlan,
  *,
  optimizer: OptimizerConfig,
  train_steps: int,
  ema_decay: float | None = None,
  **unused: Any,
) -> StepCosts:
  """Costs of a planned step, counted from the program that XLA makes of it.

  Args:
    topology: Of the plan's devices.
    plan: Of the step.
    optimizer: As `loop.train` takes it, and so on.
  """
  del unused
  run, mesh = plan.run, plan.run.mesh
  step: Any = make_train_step(
    run.learner, optimizer, train_steps, mesh, run.state, ema_decay
  )
  traced = step.trace(run.state, abstract_batch(plan))
  flops = traced_flops(traced.jaxpr)
  began = time.monotonic()
  memory, costs = _compiled(traced, topology, mesh.size)
  return StepCosts(
    topology=topology.name,
    mesh=dict(mesh.shape),
    batch_size=plan.batch_size,
    tokens=plan.batch.tokens,
    slots=plan.slots,
    groups=plan.batch.groups,
    memory=memory,
    flops=flops.counted,
    bf16_flops=flops.passes,
    model_flops=plan.model_flops,
    hbm_bytes=costs.hbm_bytes,
    exchanges=tuple(exchange(c, mesh, topology) for c in costs.collectives),
    unknown_loops=costs.unknown_loops + flops.unknown_loops,
    compile_seconds=time.monotonic() - began,
    chip=topology.chip,
  )


def abstract_batch(plan: StepPlan) -> PyTree:
  """A planned step's batch: shapes, dtypes and shardings."""

  def placed(spec: PartitionSpec, leaves: PyTree) -> PyTree:
    sharding = NamedSharding(plan.run.mesh, spec)
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      leaves,
    )

  return jax.tree.map(placed, plan.run.learner.batch_specs, plan.batch.arrays)


def _compiled(traced: Any, topology: Topology, devices: int) -> tuple[Memory, HloCosts]:
  """Memory and costs of a program; of one that XLA finds too large, what it needs."""
  capacity = None if topology.chip is None else topology.chip.hbm_bytes
  try:
    options = _FAST_CPU if topology.chip is None else None
    compiled = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    needed = _TOO_LARGE.search(str(error))
    if not needed:
      raise
    number, unit = needed.groups()
    size = int(float(number) * _UNITS[unit])
    return Memory(capacity=capacity, needed=size), HloCosts(0, (), 0)
  sizes = compiled.memory_analysis()
  memory = Memory(
    arguments=sizes.argument_size_in_bytes,
    outputs=sizes.output_size_in_bytes,
    aliased=sizes.alias_size_in_bytes,
    temporaries=sizes.temp_size_in_bytes,
    code=sizes.generated_code_size_in_bytes,
    capacity=capacity,
  )
  return memory, hlo_costs(compiled.as_text(), devices)
