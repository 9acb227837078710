"""Several processes, one run: who writes, what they agree on, and how one ends.

Every process runs the same steps on its own devices and reads its own part of each
batch. The first alone writes logs, results and descriptions; Orbax's checkpoints are
everyone's.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from embgemma.errors import ConfigError

# A peer that says nothing for so long is gone.
_HEARTBEAT_SECONDS = 30
# What collectives say when the other side has closed or stopped answering.
_LOST_PEER = (
  "Connection closed by peer",
  "Connection reset by peer",
  "Gloo",
  "heartbeat",
  "coordination service",
  "CoordinationService",
  "NCCL",
  "Socket",
  "DEADLINE_EXCEEDED",
  "UNAVAILABLE",
)


@dataclasses.dataclass(frozen=True)
class Processes:
  """Which process of how many this is.

  Attributes:
    coordinator_address: HOST:PORT of the first process; None asks the cluster (Cloud
      TPU, Slurm, GKE and others that JAX knows).
    count: Processes; None asks the cluster.
    index: This process's, from 0; None asks the cluster.
  """

  coordinator_address: str | None = None
  count: int | None = None
  index: int | None = None

  def __post_init__(self):
    given = [v is not None for v in (self.coordinator_address, self.count, self.index)]
    if any(given) and not all(given):
      raise ConfigError(
        "--coordinator_address, --process_count and --process_index go together; "
        "where the cluster knows them, give --multiprocess alone"
      )
    if self.count is not None and not 0 <= (self.index or 0) < self.count:
      raise ConfigError(f"--process_index {self.index} is not in 0..{self.count - 1}")


def initialize(processes: Processes) -> None:
  """Joins the other processes; before anything else of JAX.

  Raises:
    ConfigError: they cannot be found.
  """
  # Without it processes on CPUs cannot talk; other platforms do not look at it.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      processes.coordinator_address,
      processes.count,
      processes.index,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(
      f"the processes of the run did not find each other: {reason}; start all "
      "of them, with the same --coordinator_address and --process_count and a "
      "--process_index each"
    ) from error


def is_first() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def any_process(flag: bool) -> bool:
  """Whether the flag is set in any process; all of them must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def first_says(flag: bool) -> bool:
  """The first process's flag; all of them must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def wait_for_all(point: str) -> None:
  """Returns once every process has come to this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(point)


@contextlib.contextmanager
def lost_peers() -> Iterator[None]:
  """Turns what the end of another process raises into an exit with one message.

  A process that waits for a lost one in JAX's own shutdown would not end: it leaves
  at once. Complete checkpoints are untouched.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
    if jax.process_count() == 1 or not any(s in str(error) for s in _LOST_PEER):
      raise
    _leave(error)


def _leave(error: Exception) -> NoReturn:
  reason = str(error).strip().splitlines()[0]
  message = (
    "embgemma: error: lost contact with another process of the run "
    f"({reason[:200]}); look at its log, then start all processes again: they resume "
    "from the last complete checkpoint"
  )
  print(message, file=sys.stderr, flush=True)
  os._exit(1)
