"""Where jobs run that leave their results in files: here, in processes, or on Beam.

A job is a picklable argument of a function of a module, whose result is a file that is
whole or not there: to run one twice, or again after it was killed, does no harm.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embgemma import errors
from embgemma.errors import ConfigError, DataError, EmbgemmaError

_COUNTED_SECONDS = 1.0  # between looks at what processes have done

Count = Callable[[int], None]
"""Takes a number of examples that grows."""

Job = Callable[[Any, Count], None]
"""Works on its first argument; tells the other how many of its examples are done."""


@runtime_checkable
class Executor(Protocol):
  """Runs jobs."""

  def job_threads(self, jobs: int) -> int:
    """Threads that each of so many jobs should use; -1 is one a core."""
    ...

  def run(self, function: Job, jobs: Sequence[Any], count: Count) -> Iterator[int]:
    """Runs a function on each job; yields their numbers as they end.

    Args:
      function: Of a module.
      jobs: What it is run on.
      count: Takes how many examples of all jobs are done, where that can be known.

    Raises:
      EmbgemmaError: that of the first job which fails. Others may have ended by then.
    """
    ...


@dataclasses.dataclass(frozen=True)
class InProcess:
  """One after another, in this process."""

  def job_threads(self, jobs: int) -> int:
    return -1

  def run(self, function: Job, jobs: Sequence[Any], count: Count) -> Iterator[int]:
    earlier = latest = 0

    def count_own(examples: int) -> None:
      nonlocal latest
      latest = earlier + examples
      count(latest)

    for number, job in enumerate(jobs):
      function(job, count_own)
      earlier = latest
      yield number


@dataclasses.dataclass(frozen=True)
class ProcessPool:
  """In processes of this machine, which end with this one.

  Attributes:
    workers: Processes.
  """

  workers: int

  def __post_init__(self):
    if self.workers < 1:
      raise ConfigError(f"--workers={self.workers}: give 1 or more")

  def job_threads(self, jobs: int) -> int:
    return -1 if min(self.workers, jobs) < 2 else 1

  def run(self, function: Job, jobs: Sequence[Any], count: Count) -> Iterator[int]:
    if self.workers == 1 or len(jobs) < 2:
      yield from InProcess().run(function, jobs, count)
      return
    context = multiprocessing.get_context("spawn")  # threads and TensorFlow: no fork
    with (
      tempfile.NamedTemporaryFile() as file,
      concurrent.futures.ProcessPoolExecutor(
        min(self.workers, len(jobs)), context, begin_worker
      ) as pool,
    ):
      # Shared memory without a lock, which a killed worker could hold.
      counts = np.memmap(file.name, np.int64, "w+", shape=len(jobs))
      numbers = {
        pool.submit(_counted, function, file.name, n, job): n
        for n, job in enumerate(jobs)
      }
      waiting = set(numbers)
      try:
        while waiting:
          ended, waiting = concurrent.futures.wait(
            waiting, _COUNTED_SECONDS, concurrent.futures.FIRST_COMPLETED
          )
          count(int(counts.sum()))
          for future in ended:
            future.result()
            yield numbers[future]
      except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
          "a worker was killed (perhaps out of memory: lower --workers); what is "
          "complete is kept, the same command goes on from there"
        ) from error
      except BaseException:
        # What runs is whole or not there: nobody waits for it.
        for process in multiprocessing.active_children():
          process.kill()
        raise


def _counted(function: Job, path: str, number: int, job: Any) -> None:
  """Runs a job that counts in its place of a file."""
  counts = np.memmap(path, np.int64, "r+")
  function(job, functools.partial(counts.__setitem__, number))


def begin_worker(*unused: Any) -> None:
  """Leaves signals to the parent process, and ends with it even if it is killed."""
  del unused
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class BeamPipeline:
  """As an Apache Beam pipeline: Dataflow, Flink, Spark or its local runners.

  Workers must see the paths that jobs read and write: gs:// or a shared file system.

  Attributes:
    options: Of the pipeline, such as ("--runner=DataflowRunner", "--region=…").
  """

  options: Sequence[str] = ()

  def job_threads(self, jobs: int) -> int:
    return 1  # how many share a machine is the runner's matter

  def run(self, function: Job, jobs: Sequence[Any], count: Count) -> Iterator[int]:
    del count  # a runner shows its progress
    try:
      import apache_beam as beam
      from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
      raise ConfigError(
        "--pipeline_options needs embgemma[beam]: pip install 'embgemma[beam]'"
      ) from error
    if not jobs:
      return
    try:
      with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
        (
          pipeline
          | "Jobs" >> beam.Create(list(jobs))
          | "Spread" >> beam.Reshuffle()
          | "Run" >> beam.Map(function, _ignore)
        )
    except EmbgemmaError:
      raise
    except Exception as error:
      raise _own_error(error) from error
    yield from range(len(jobs))


def _ignore(examples: int) -> None:
  """Counts nothing."""
  del examples


def _own_error(error: Exception) -> Exception:
  """The error of ours that a runner wrapped in a message; itself if there is none."""
  pattern = r"embgemma\.errors\.(\w+): (.*?)(?: \[while running|\n|$)"
  found = re.search(pattern, str(error), re.DOTALL)
  if found is None:
    return error
  return getattr(errors, found[1])(found[2].replace("\\n", "\n").strip())
