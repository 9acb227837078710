"""The examples of a run's tasks: seqio's where a task needs it, else read directly."""

import dataclasses
from collections.abc import Generator, Mapping
from typing import Any, Protocol, runtime_checkable

from embgemma.data import sources
from embgemma.data.bad_records import SkipLog
from embgemma.data.config import CachedData


@runtime_checkable
class TaskExamples(Protocol):
  """The examples of one task, in shards; can be pickled.

  Attributes:
    name: Of the task.
    kind: Of its prompts; None is each record's own.
    rate: Its explicit weight in the mixture.
    symmetric: Whether query and positive may change places.
    unique_ids: Whether texts end with an id of their example.
    num_shards: Pieces that can be read alone, each in its order.
  """

  @property
  def name(self) -> str: ...

  @property
  def kind(self) -> str | None: ...

  @property
  def rate(self) -> float: ...

  @property
  def symmetric(self) -> bool: ...

  @property
  def unique_ids(self) -> bool: ...

  @property
  def num_shards(self) -> int: ...

  def alone(self, shard: int) -> "TaskExamples":
    """The task for a process that reads this shard only: less to send."""
    ...

  def examples(
    self, shard: int, skipped: SkipLog
  ) -> Generator[dict[str, Any], None, None]:
    """Examples as of `record_formats.pair_example` or `text_example`, in order.

    Args:
      shard: From 0.
      skipped: Takes the records that are left out.

    Raises:
      DataError: a bad record, or one that cannot be read.
    """
    ...


@dataclasses.dataclass(frozen=True)
class PythonTask:
  """A task of a source that needs no TensorFlow; see `TaskExamples`."""

  name: str
  kind: str | None
  rate: float
  symmetric: bool
  unique_ids: bool
  source: sources.PythonSource
  shards: Mapping[int, sources.Shard]
  num_shards: int
  on_bad_record: str

  def alone(self, shard: int) -> "PythonTask":
    return dataclasses.replace(self, shards={shard: self.shards[shard]})

  def examples(
    self, shard: int, skipped: SkipLog
  ) -> Generator[dict[str, Any], None, None]:
    yield from self.source.read(self.shards[shard], self.on_bad_record, skipped)


def open_tasks(config: CachedData) -> list[TaskExamples]:
  """The tasks that a run reads.

  Args:
    config: The mixture.

  Raises:
    ConfigError: a mixture, module or task that does not exist.
    DataError: the files of a task cannot be found.
  """
  declared = sorted(config.selected(), key=lambda task: task.name)  # as seqio's are
  alone = config.mixture_or_task_name in (task.name for task in declared)
  if config.modules or not all(
    isinstance(task.source, sources.PythonSource) for task in declared
  ):
    # Tens of seconds and a gigabyte: paid only where a task needs it.
    from embgemma.data import seqio_registry

    return seqio_registry.register(config)
  opened: list[TaskExamples] = []
  for task in declared:
    assert isinstance(task.source, sources.PythonSource)
    shards = dict(enumerate(task.source.shards()))
    rate = 1.0 if alone else float(task.rate)
    own = (task.name, task.kind, rate, task.symmetric, task.unique_ids)
    opened.append(
      PythonTask(*own, task.source, shards, len(shards), config.on_bad_record)
    )
  return opened
