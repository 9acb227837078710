"""Commands about training a stage: train, explain, precompile."""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from embgemma import flags, outputs, process
from embgemma.commands.configuration import configure
from embgemma.commands.messages import say
from embgemma.errors import DataError


def run_train(
  options: argparse.Namespace, bindings: Sequence[str], command_line: Sequence[str]
) -> None:
  """Trains a stage, or goes on with it; caches its tasks first."""
  from embgemma import gin_config
  from embgemma.training import distributed, loop, stages
  from embgemma.training.distributed import Processes
  from embgemma.training.stopping import Stopped

  processes = Processes(
    options.coordinator_address, options.process_count, options.process_index
  )
  configure(options, bindings)
  arguments = gin_config.train_arguments()
  # What does not belong together is said before minutes of tokenising.
  stages.make_stage(*(arguments[name] for name in ("model", "objective", "data")))
  process.keep_compilations()
  if options.multiprocess or processes.count is not None:
    distributed.initialize(processes)
  if distributed.is_first():
    ensure_cached(arguments["data"], command_line)
  else:
    _wait_for_cache(arguments["data"])
  try:
    with distributed.lost_peers():
      loop.train(**arguments, operative_gin=gin_config.operative_config())
  except Stopped as stopped:
    say(f"embgemma: {stopped}; the same command resumes")
    raise SystemExit(128 + stopped.signum) from None


def ensure_cached(data: Any, command_line: Sequence[str]) -> None:
  """Has the tasks of a stage cached, in a process of its own: TensorFlow ends with it.

  Args:
    data: CachedData of the stage.
    command_line: Flags of its configuration.

  Raises:
    DataError: the process was killed.
    SystemExit: it said what is wrong, and ended.
  """
  from embgemma.data import cache

  if cache.manifest(data) is not None:
    return
  say("tokenising the tasks (once)")
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  kept = flags.without_process_flags(command_line)
  command = [sys.executable, "-m", "embgemma", "cache", *kept]
  code = process.run_child(command, environment)
  if code < 0:
    raise DataError(
      f"caching was killed by signal {-code} (9: perhaps out of memory); complete "
      "caches are kept, the same command goes on from there"
    )
  if code:
    raise SystemExit(code)


def _wait_for_cache(data: Any) -> None:
  """Returns once the first process has built the caches; it ends with that one."""
  from embgemma.data import cache

  while cache.manifest(data) is None:
    time.sleep(1)


def run_explain(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Prints what a stage is and costs, before any compute."""
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.training.explain import explain

  configure(options, bindings)
  explain(**gin_config.train_arguments(allowed=("MODEL_DIR",)), console=Console())


def run_precompile(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Compiles a stage's step for hardware that is not there, and prints its costs."""
  topologies = options.topology.split(",")
  process.use_virtual_devices(topologies)
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.training import precompile, precompile_report
  from embgemma.training.step_plan import text_lengths

  configure(options, bindings)
  per_chip = options.batch_per_chip
  given = options.batch_size or per_chip
  flag = "batch_per_chip" if per_chip else "batch_size"
  counts = flags.counts(flag, given) if given else []
  # The number of steps shapes no program.
  gin_config.set_missing(TRAIN_STEPS=10**6, **({"BATCH_SIZE": 1} if given else {}))
  unread = gin_config.set_missing_data()
  arguments = gin_config.train_arguments(allowed=("MODEL_DIR",))
  batch_size = arguments.pop("batch_size")
  counts = counts or [batch_size]
  lengths = text_lengths(
    arguments["data"], options.query_tokens, options.passage_tokens, cached=not unread
  )
  costs = precompile.precompile(
    topologies,
    lambda topology: [n * topology.devices if per_chip else n for n in counts],
    lengths.lengths,
    say,
    **arguments,
  )
  if options.output:
    values = {"lengths": lengths.name, "steps": [cost.to_json() for cost in costs]}
    with outputs.new_file(pathlib.Path(options.output)) as file:
      file.write(json.dumps(values, indent=1).encode() + b"\n")
  console = Console()
  if options.compare:
    precompile_report.print_comparison(costs, lengths.name, console)
  else:
    for cost in costs:
      precompile_report.print_step(cost, lengths.name, console)
