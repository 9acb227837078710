"""Building caches: cleaning, vocabulary, then every shard of every task.

All that takes long leaves files behind (`shard_writer`, `cleaning`) and runs on an
executor; what is there already is not made again. TensorFlow comes in only where a
task's source needs it.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from embgemma import outputs
from embgemma.data import cache, cleaning, files, shard_writer, task_index, tokenization
from embgemma.data.bad_records import SkipLog
from embgemma.data.cache import DamagedCacheError, Manifest
from embgemma.data.config import CachedData, DataConfig
from embgemma.data.executors import Count, Executor, InProcess
from embgemma.data.task_examples import TaskExamples, open_tasks
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import DataError

_REPORT_SECONDS = 10.0

Log = Callable[[str], None]


def build(config: CachedData, log: Log, executor: Executor | None = None) -> Manifest:
  """Builds what is missing of the configuration's caches.

  Args:
    config: The mixture.
    log: Takes lines of progress.
    executor: Where shards are read; None is this process.

  Raises:
    DataError: a bad record, an empty task or an unreadable source. Complete caches and
      parts of others stay: the same call goes on after them.
    ConfigError: a mixture, module or prompt that does not exist.
  """
  config.manifest_path()  # refuses files and modules that are not there, at once
  executor = executor or InProcess()
  tasks = open_tasks(config)
  if config.cleaning:
    _clean(config, tasks, executor, log)
  _ensure_vocabulary(config, tasks, log)
  path = config.vocabulary_path()
  fingerprint = SentencePieceVocabulary(cache.local_copy(path)).fingerprint
  directories = {
    task.name: config.task_directory(task.name, fingerprint) for task in tasks
  }
  roots = {name: config.cache_root / own for name, own in directories.items()}
  missing = [task for task in tasks if not _is_complete(roots[task.name])]
  with _locked([roots[task.name] for task in missing], log):
    for task in missing:
      _drop_damaged(roots[task.name], log)
    # Another process may have built them meanwhile.
    left = [task for task in missing if not _is_complete(roots[task.name])]
    work = {task.name: (task, roots[task.name]) for task in left}
    _write_tasks(config, work, executor, log)
  for name, directory in directories.items():
    if config.task_directory(name, fingerprint) != directory:
      raise DataError(
        f"task {name!r}: a file of its source changed while it was read; run the "
        "command again"
      )
  entries = [
    {"name": task.name, "rate": task.rate, "directory": directories[task.name]}
    for task in tasks
  ]
  with files.new_file(config.manifest_path()) as made:
    made.write_text(json.dumps({"tasks": entries}, indent=1))
  built = cache.manifest(config)
  assert built is not None
  return built


def _is_complete(directory: epath.Path) -> bool:
  """Whether a task's cache is whole."""
  try:
    return cache.read_index(directory) is not None
  except DamagedCacheError:
    return False


def _drop_damaged(directory: epath.Path, log: Log) -> None:
  """Has a damaged cache no longer count as complete; its lock is held."""
  try:
    cache.read_index(directory)
  except DamagedCacheError as error:
    log(f"{error.path} is damaged: writing the task again")
    (directory / "index.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directories: Sequence[epath.Path], log: Log) -> Iterator[None]:
  """Holds the directories against other processes of this machine."""
  with contextlib.ExitStack() as stack:
    for directory in sorted(directories):  # one order: no two wait for each other
      directory.mkdir(parents=True, exist_ok=True)
      if not files.is_remote(directory):
        stack.enter_context(_lock(directory, log))
    yield


@contextlib.contextmanager
def _lock(directory: epath.Path, log: Log) -> Iterator[None]:
  def busy() -> None:
    log(f"waiting for the process that caches {directory.name}")

  with outputs.locked(pathlib.Path(directory, ".lock"), busy):
    for path in directory.glob(".*.*"):  # left by a killed process
      path.unlink()
    yield


def _write_tasks(
  config: CachedData,
  missing: Mapping[str, tuple[TaskExamples, epath.Path]],
  executor: Executor,
  log: Log,
) -> None:
  """Writes shards wherever the executor runs; completes each task after its last."""
  jobs = []
  shards = sum(task.num_shards for task, _ in missing.values())
  threads = executor.job_threads(shards)
  vocabulary = str(config.vocabulary_path())
  for name, (task, root) in missing.items():
    decisions = cache.cleaning_directory(config, name)
    jobs += [
      shard_writer.ShardJob(
        config,
        task.alone(shard),
        shard,
        str(root),
        vocabulary,
        None if decisions is None else str(decisions),
        threads,
      )
      for shard in range(task.num_shards)
    ]
  left = {name: task.num_shards for name, (task, _) in missing.items()}
  progress = _Progress("cached", len(jobs), log)
  for number in executor.run(shard_writer.write_shard, jobs, progress.count):
    job = jobs[number]
    left[job.task.name] -= 1
    progress.shard_done()
    if not left[job.task.name]:
      _finish(config, job.task, epath.Path(job.directory), log)


def _finish(
  config: CachedData, task: TaskExamples, directory: epath.Path, log: Log
) -> None:
  dropped = {}
  if (decisions := cache.cleaning_directory(config, task.name)) is not None:
    dropped = cleaning.report(decisions)["dropped"]
  pairs = isinstance(config, DataConfig)
  index = task_index.finish_task(directory, task.name, task.num_shards, dropped, pairs)
  statistics = index["statistics"]
  line = (
    f"cached {task.name}: {statistics['examples']:,} examples, "
    f"{statistics['tokens']:,} tokens"
  )
  if "documents" in statistics:
    line += f", of {statistics['documents']:,} documents"
  if statistics["duplicates"]:
    line += f", {statistics['duplicates']:,} duplicates"
  log(line)
  if statistics["skipped"]:
    log(f"skipped {statistics['skipped']} bad records of {task.name}:")
    for listed in index["skipped"]:
      log(f"  {listed}")


@dataclasses.dataclass
class _Progress:
  """Says now and then how many of the shards are done, and examples of them all.

  Attributes:
    what: Is done to them.
    total: Shards.
    log: Takes lines.
  """

  what: str
  total: int
  log: Log
  finished: int = 0
  examples: int = 0
  said: float = dataclasses.field(default_factory=time.monotonic)

  def count(self, examples: int) -> None:
    self.examples = examples
    self._say()

  def shard_done(self) -> None:
    self.finished += 1
    self._say()

  def _say(self) -> None:
    now = time.monotonic()
    if now - self.said <= _REPORT_SECONDS or self.finished == self.total:
      return
    self.said = now
    shards = f"{self.finished:,} of {self.total:,} shards"
    self.log(f"{self.what} {shards}, {self.examples:,} examples so far")


@dataclasses.dataclass(frozen=True)
class _ScanJob:
  """One shard of a task for the cleaners to look at."""

  cleaners: tuple[cleaning.Cleaner, ...]
  task: TaskExamples
  shard: int
  directory: str


def _scan(job: _ScanJob, count: Count) -> None:
  def counted(examples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, example in enumerate(examples, 1):
      count(number)
      yield example

  with contextlib.closing(job.task.examples(job.shard, SkipLog())) as examples:
    cleaning.scan(counted(examples), job.cleaners, job.directory, job.shard)


def _clean(
  config: CachedData, tasks: Sequence[TaskExamples], executor: Executor, log: Log
) -> None:
  """Decides what cleaning leaves out of each task."""
  cleaners = tuple(config.cleaning)
  for cleaner in cleaners:
    cleaner.check()
  directories = {
    task.name: config.cache_root / config.cleaned_directory(task.name) for task in tasks
  }
  undecided = [
    task for task in tasks if not cleaning.is_decided(directories[task.name])
  ]
  with _locked([directories[task.name] for task in undecided], log):
    # Another process may have decided meanwhile.
    jobs = [
      _ScanJob(cleaners, task.alone(shard), shard, str(directories[task.name]))
      for task in undecided
      if not cleaning.is_decided(directories[task.name])
      for shard in range(task.num_shards)
    ]
    left = {task.name: task.num_shards for task in tasks}
    progress = _Progress("scanned", len(jobs), log)
    for number in executor.run(_scan, jobs, progress.count):
      task = jobs[number].task
      left[task.name] -= 1
      progress.shard_done()
      if not left[task.name]:
        report = cleaning.decide(cleaners, directories[task.name], task.num_shards)
        first, *others = cleaning.report_lines(report)
        for line in (f"{task.name}: {first}", *others):
          log(line)


def _ensure_vocabulary(
  config: CachedData, tasks: Sequence[TaskExamples], log: Log
) -> None:
  """Trains the mixture's own vocabulary unless it has one."""
  path = config.vocabulary_path()
  if path.exists():
    return
  assert config.vocabulary_size is not None  # or the file would be there
  log(f"training a vocabulary of {config.vocabulary_size:,} pieces")
  with (
    contextlib.closing(_texts(config, tasks)) as texts,
    files.new_file(path) as made,
  ):
    train_vocabulary(
      texts, config.vocabulary_size, made, sentinels=config.sentinels_trained
    )


def _texts(
  config: CachedData, tasks: Sequence[TaskExamples]
) -> Generator[str, None, None]:
  """All that would be tokenised."""
  for task in tasks:
    decisions = cache.cleaning_directory(config, task.name)
    for shard in range(task.num_shards):
      with contextlib.closing(
        cache.kept(config, task, shard, SkipLog(), decisions)
      ) as examples:
        for _, example in examples:
          if not isinstance(config, DataConfig):
            yield example["text"]
            continue
          yield from tokenization.pair_texts(
            example, task.kind, config.prompt_table, task.unique_ids
          ).prompted
