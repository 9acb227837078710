"""The cache: each task tokenised once into ArrayRecord, and reading it.

A task's directory holds `examples-SSSSS-PPPPP.array_record` (source shard, part of it),
`lengths.npy`, `hashes.npy` and, once it is complete, `index.json`. An example is a pair
with its negatives, or a segment of a document. `lengths.npy` holds the lengths of every
example's texts, 0 where there is none, and `hashes.npy` their content hashes: batches
are planned from them without reading texts. Reading needs no TensorFlow;
`cache_builder` writes, and may.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from etils import epath

from embgemma import outputs
from embgemma.data import cleaning, tokenization
from embgemma.data.bad_records import SkipLog, leave_out
from embgemma.data.cache_dirs import user_cache_dir
from embgemma.data.config import CachedData, DataConfig
from embgemma.data.files import fingerprint, is_remote
from embgemma.data.fingerprints import digest
from embgemma.data.mixture import mixture_rates
from embgemma.data.task_examples import TaskExamples
from embgemma.errors import DataError


@dataclasses.dataclass(frozen=True)
class CachedTask:
  """A complete cache of one task.

  Attributes:
    name: The task's.
    rate: Its weight in the mixture.
    directory: Where its files lie.
    statistics: What `index.json` says: see `task_index`.
    symmetric: Whether query and positive may change places.
    unique_ids: Whether the texts of different examples are always different to the
      loss: see `tasks.Task`.
  """

  name: str
  rate: float
  directory: epath.Path | pathlib.Path
  statistics: dict[str, Any]
  symmetric: bool = False
  unique_ids: bool = False

  @property
  def paths(self) -> list[str]:
    return sorted(str(p) for p in self.directory.glob("*.array_record"))

  @property
  def texts(self) -> int:
    """Texts of an example: 2 + max_negatives; 1 of segments."""
    return 2 + self.statistics.get("max_negatives", -1)

  def lengths(self) -> np.ndarray:
    """Tokens of each example's texts [examples, texts], memory-mapped.

    Raises:
      DataError: they are missing, or not those of the examples.
    """
    return self._table("lengths.npy")

  def hashes(self) -> np.ndarray:
    """Content hashes of each example's texts, uint64 [examples, texts], likewise.

    Of texts without prompts, positives after their titles; 0 where there is none.

    Raises:
      DataError: see `lengths`.
    """
    return self._table("hashes.npy")

  def _table(self, name: str) -> np.ndarray:
    expected = (self.statistics["examples"], self.texts)
    try:
      table = np.load(local_copy(epath.Path(self.directory) / name), mmap_mode="r")
    except (OSError, ValueError) as error:
      raise DataError(f"{name} cannot be read ({error})") from error
    if table.shape != expected:
      raise DataError(f"{name} is {table.shape}, its examples are {expected}")
    return table


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Complete caches of a mixture, and its vocabulary's file."""

  tasks: tuple[CachedTask, ...]
  vocabulary: pathlib.Path


def local_copy(path: epath.Path) -> pathlib.Path:
  """The file itself, or a copy of a remote one that can be memory-mapped.

  Copies lie in the user's cache directory, named by what the file was when copied.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  version = digest(fingerprint(os.fspath(path)))
  mirror = pathlib.Path(user_cache_dir(), "remote", version, path.name)
  if not mirror.exists():
    with outputs.new_path(mirror) as made:
      path.copy(made, overwrite=True)
  return mirror


class DamagedCacheError(DataError):
  """A task's cache is not whole.

  Args:
    path: Of the file that is missing or damaged.
    message: As of a DataError.
  """

  def __init__(self, path: epath.Path, message: str):
    super().__init__(message)
    self.path = path


def read_index(directory: epath.Path) -> dict[str, Any] | None:
  """The index of a complete task cache; None if there is none.

  Raises:
    DamagedCacheError: the cache is there but damaged.
  """
  path = directory / "index.json"
  if not path.exists():
    return None
  try:
    index = json.loads(path.read_text())
    files, _ = index["files"], index["statistics"]
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise DamagedCacheError(
      path, f"{directory}: damaged cache ({error}); delete the directory to rebuild it"
    ) from error
  if damaged := damaged_files(directory, files):
    raise DamagedCacheError(
      directory / damaged[0],
      f"{directory / damaged[0]}: missing, or not of the {files[damaged[0]]} bytes "
      "that the index says; `embgemma cache` with the same flags writes it again",
    )
  return index


def damaged_files(directory: epath.Path, files: dict[str, int]) -> list[str]:
  """Names of those that are missing or of another size."""
  sizes = {}
  for name in files:
    with contextlib.suppress(OSError):
      sizes[name] = (directory / name).stat().length
  return [name for name, size in files.items() if sizes.get(name) != size]


def manifest(config: CachedData) -> Manifest | None:
  """The complete caches of a configuration; None if they must be built first.

  Raises:
    DataError: a cache is damaged.
    ConfigError: RATES is none.
  """
  path = config.manifest_path()
  if not path.exists():
    return None
  try:
    entries = json.loads(path.read_text())["tasks"]
    listed = [(entry["name"], entry["rate"], entry["directory"]) for entry in entries]
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise DataError(f"{path}: damaged ({error}); delete it to rebuild it") from error
  declared = {task.name: task for task in config.tasks}
  tasks = []
  for name, rate, relative in listed:
    directory = config.cache_root / relative
    index = read_index(directory)
    if index is None:
      return None
    flags = {}
    if own := declared.get(name):
      flags = {"symmetric": own.symmetric, "unique_ids": own.unique_ids}
    tasks.append(CachedTask(name, rate, directory, index["statistics"], **flags))
  rates = mixture_rates(tasks, config.rates)
  rated = (
    dataclasses.replace(task, rate=rate)
    for task, rate in zip(tasks, rates, strict=True)
    if rate > 0
  )
  return Manifest(tuple(rated), local_copy(config.vocabulary_path()))


def cleaning_directory(config: CachedData, task: str) -> epath.Path | None:
  """What the cleaners of a configuration decided of a task; None if there are none."""
  if not config.cleaning:
    return None
  return config.cache_root / config.cleaned_directory(task)


def kept(
  config: CachedData,
  task: TaskExamples,
  shard: int,
  skipped: SkipLog,
  decisions: epath.Path | None,
) -> Generator[tuple[int, dict[str, Any]], None, None]:
  """Examples of a shard that are cached, each with its place in the shard.

  Args:
    config: Of the run.
    task: Of the run.
    shard: Of the task.
    skipped: Takes what is left out as bad.
    decisions: `cleaning_directory` of the task; None without cleaning.

  Raises:
    DataError: see `TaskExamples.examples`; a kind that no prompts are for.
  """
  drops = iter(() if decisions is None else cleaning.dropped(decisions, shard).tolist())
  dropped = next(drops, None)
  own_kinds = isinstance(config, DataConfig) and task.kind is None
  table = config.prompt_table
  with contextlib.closing(task.examples(shard, skipped)) as examples:
    for index, example in enumerate(examples):
      if index == dropped:
        dropped = next(drops, None)
        continue
      if own_kinds:
        try:
          tokenization.example_prompts(example, None, table)
        except DataError as error:
          leave_out(error, config.on_bad_record, skipped)
          continue
      yield index, example


def kept_examples(config: DataConfig, task: TaskExamples) -> Iterator[dict[str, Any]]:
  """The texts of a task's cached examples, in the order of its records.

  Args:
    config: Of a complete cache.
    task: Of the configuration.

  Raises:
    DataError: see `TaskExamples.examples`.
  """
  skipped = SkipLog()
  decisions = cleaning_directory(config, task.name)
  for shard in range(task.num_shards):
    for _, example in kept(config, task, shard, skipped, decisions):
      listed = {key for key in ("negatives", "negative_titles") if key in example}
      yield example | {key: example[key][: config.max_negatives] for key in listed}
