"""Building caches: cleaning, vocabulary, then every shard of every task.

All that takes long leaves files behind (`task_writer`, `cleaning`) and runs on an
executor; what is there already is not made again. TensorFlow comes in only where a
task's source needs it.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from etils import epath

from embgemma import outputs
from embgemma.data import cache, cleaning, files, task_writer, tokenization
from embgemma.data.cache import Manifest
from embgemma.data.executors import Executor, InProcess
from embgemma.data.sources import SkipLog
from embgemma.data.task_examples import TaskExamples, open_tasks
from embgemma.data.tasks import CachedData, DataConfig
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary

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
  config.manifest_path()  # Refuses files and modules that are not there, at once.
  executor = executor or InProcess()
  tasks = open_tasks(config)
  if config.cleaning:
    _clean(config, tasks, executor, log)
  _ensure_vocabulary(config, tasks, log)
  vocabulary = SentencePieceVocabulary(cache.local_copy(config.vocabulary_path()))
  directories = [
    config.task_directory(task.name, vocabulary.fingerprint) for task in tasks
  ]
  roots = [config.cache_root / directory for directory in directories]
  missing = [
    (task, root)
    for task, root in zip(tasks, roots, strict=True)
    if not _is_complete(root, log)
  ]
  with _locked([root for _, root in missing], log):
    # Another process may have built them meanwhile.
    _write_tasks(config, [m for m in missing if not _is_complete(m[1])], executor, log)
  entries = [
    {
      "name": task.name,
      "rate": task.rate,
      "symmetric": task.symmetric,
      "directory": directory,
    }
    for task, directory in zip(tasks, directories, strict=True)
  ]
  with files.new_file(config.manifest_path()) as path:
    path.write_text(json.dumps({"tasks": entries}, indent=1))
  built = cache.manifest(config)
  assert built is not None
  return built


def _is_complete(directory: epath.Path, log: Log | None = None) -> bool:
  """Whether a task's cache is whole; a damaged one no longer counts as complete."""
  path = directory / "index.json"
  if not path.exists():
    return False
  try:
    sizes = json.loads(path.read_text())["files"]
  except (ValueError, KeyError, TypeError, OSError):
    sizes = {path.name: -1}
  damaged = cache.damaged_files(directory, sizes)
  if not damaged:
    return True
  if log is not None:
    log(f"{directory / damaged[0]} is damaged: writing the task again")
  path.unlink()
  return False


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
  missing: Sequence[tuple[TaskExamples, epath.Path]],
  executor: Executor,
  log: Log,
) -> None:
  """Writes shards wherever the executor runs; completes each task after its last."""
  threads = -1 if isinstance(executor, InProcess) else 1
  jobs = [
    task_writer.ShardJob(config, task, shard, str(root), threads)
    for task, root in missing
    for shard in range(task.num_shards)
  ]
  left = {task.name: task.num_shards for task, _ in missing}
  progress = _Progress(len(jobs), log)
  for number in executor.run(task_writer.write_shard, jobs):
    job = jobs[number]
    left[job.task.name] -= 1
    progress.done()
    if not left[job.task.name]:
      _finish(config, job.task, epath.Path(job.directory), log)


def _finish(
  config: CachedData, task: TaskExamples, directory: epath.Path, log: Log
) -> None:
  dropped = {}
  if config.cleaning:
    report = cleaning.report(cache.cleaning_directory(config, task.name))
    dropped = report["dropped"]
  pairs = isinstance(config, DataConfig)
  index = task_writer.finish_task(directory, task.name, task.num_shards, dropped, pairs)
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
  """Says now and then how many of the shards are done."""

  total: int
  log: Log
  finished: int = 0
  said: float = dataclasses.field(default_factory=time.monotonic)

  def done(self) -> None:
    self.finished += 1
    now = time.monotonic()
    if now - self.said > _REPORT_SECONDS and self.finished < self.total:
      self.said = now
      self.log(f"cached {self.finished:,} of {self.total:,} shards")


@dataclasses.dataclass(frozen=True)
class _ScanJob:
  """One shard of a task for the cleaners to look at."""

  config: CachedData
  task: TaskExamples
  shard: int


def _scan(job: _ScanJob) -> None:
  directory = cache.cleaning_directory(job.config, job.task.name)
  examples = job.task.examples(job.shard, SkipLog())
  with contextlib.closing(examples):
    cleaning.scan(examples, job.config.cleaning, directory, job.shard)


def _clean(
  config: CachedData, tasks: Sequence[TaskExamples], executor: Executor, log: Log
) -> None:
  """Decides what cleaning leaves out of each task."""
  for cleaner in config.cleaning:
    cleaner.check()
  undecided = {
    task.name: directory
    for task in tasks
    if not cleaning.is_decided(directory := cache.cleaning_directory(config, task.name))
  }
  for directory in undecided.values():
    directory.mkdir(parents=True, exist_ok=True)
  jobs = [
    _ScanJob(config, task, shard)
    for task in tasks
    if task.name in undecided
    for shard in range(task.num_shards)
  ]
  left = {task.name: task.num_shards for task in tasks}
  for number in executor.run(_scan, jobs):
    task = jobs[number].task
    left[task.name] -= 1
    if not left[task.name]:
      report = cleaning.decide(config.cleaning, undecided[task.name], task.num_shards)
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
    for shard in range(task.num_shards):
      with contextlib.closing(cache.kept(config, task, shard, SkipLog())) as examples:
        for _, example in examples:
          if not isinstance(config, DataConfig):
            yield example["text"]
            continue
          yield from tokenization.pair_texts(
            example, task.kind, config.prompt_table
          ).prompted
