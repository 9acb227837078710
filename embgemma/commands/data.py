"""Commands that make what stages train on: cache, teach, mine."""

import argparse
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from embgemma import process
from embgemma.commands.configuration import arguments_of_data, pairs_of
from embgemma.commands.messages import said_errors, say
from embgemma.errors import ConfigError, DataError


def run_cache(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Builds what is missing of a stage's caches."""
  _build(arguments_of_data(options, bindings)["data"], _executor(options))


def _executor(options: argparse.Namespace) -> Any:
  """Where the shards of a cache are read."""
  from embgemma.data import executors

  if options.pipeline_options is not None:
    try:
      return executors.BeamPipeline(tuple(shlex.split(options.pipeline_options)))
    except ValueError as error:
      raise ConfigError(
        f"--pipeline_options={options.pipeline_options}: {error}; check its quotes"
      ) from error
  return executors.ProcessPool(options.workers)


def _build(data: Any, executor: Any = None) -> None:
  from embgemma.data import cache_builder

  try:
    with process.own_stderr() as stderr:
      cache_builder.build(
        data, lambda line: print(line, file=stderr, flush=True), executor
      )
  except (OSError, RuntimeError) as error:
    # ArrayRecord gives what the system said in a RuntimeError.
    if isinstance(error, RuntimeError) and "write() failed" not in str(error):
      raise
    raise DataError(
      f"{data.cache_root}: the cache cannot be written: {error}; free space or choose "
      "another CACHE_DIR. Complete caches are untouched."
    ) from error


def run_teach(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Gives the texts of a stage's caches the vectors of a teacher."""
  from embgemma.teaching.teach import teach
  from embgemma.teaching.teachers import ApiLimits, open_teacher

  arguments = arguments_of_data(options, bindings)
  data = pairs_of(arguments, options.command)
  if data.teacher is None:
    raise ConfigError("give the vectors a name: --gin.TEACHER=NAME")
  given = ("price", "texts_per_minute", "tokens_per_minute")
  limits = {name: getattr(options, name) for name in given}
  limits = {name: value for name, value in limits.items() if value is not None}
  process.keep_compilations()
  # What cannot work is said before anything is embedded.
  teacher = open_teacher(options.teacher, options.width, ApiLimits(**limits))
  arguments["objective"].check(arguments["model"].embedding_width, teacher.width)
  _build(data)
  with said_errors(f"the vectors of {data.teacher!r}"):
    report = teach(
      data,
      teacher,
      data.teacher,
      options.dtype,
      say,
      shard=(options.shard_index, options.shard_count),
      tasks=options.tasks.split(",") if options.tasks else None,
      max_cost=options.max_cost,
    )
  for task in report.tasks:
    state = task.remark or ("ready" if task.ready else "not all embedded yet")
    say(f"{task.name}: {task.texts:,} texts, {state}")
  say(f"{report.embedded:,} texts embedded, {report.stored:,} vectors in all")


def run_mine(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Writes JSONL of a stage's tasks with hard negatives."""
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.mining.mine import mine

  data = pairs_of(arguments_of_data(options, bindings), options.command)
  rules = gin_config.resolve("MiningOptions")
  process.keep_compilations()
  searcher = _searcher(options.searcher)
  judge = _teacher(options.judge) if options.judge else None
  with said_errors(options.output):
    report = mine(
      data,
      searcher,
      judge,
      rules,
      pathlib.Path(options.output),
      say,
      overwrite=options.overwrite,
      keep_work=options.keep_work,
    )
  console = Console()
  for table in report.tables():
    console.print(table)


def _teacher(spec: str) -> Any:
  from embgemma.teaching.teachers import open_teacher

  if spec.startswith("gemini:"):
    raise ConfigError(
      f"{spec}: costs money, and mining makes no estimate; only `embgemma teach` does"
    )
  return open_teacher(spec, None)


def _searcher(spec: str) -> Any:
  from embgemma import gin_config

  if spec == "bm25":
    return gin_config.resolve("Bm25Searcher")
  from embgemma.mining.vectors import EmbeddedTexts

  return gin_config.resolve("VectorSearcher", texts=EmbeddedTexts(_teacher(spec)))
