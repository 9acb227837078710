"""The command that makes a page of what other commands left behind."""

import argparse
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from embgemma import outputs, process
from embgemma.commands.evaluation import evaluation_entries
from embgemma.commands.messages import say
from embgemma.errors import ConfigError, DataError, of_extra
from embgemma.evaluation import benchmark_scores

_MAPPED_TEXTS = 300  # of each set, in the picture


def run_report(options: argparse.Namespace) -> None:
  """Writes HTML, and Markdown if asked for."""
  with of_extra("`embgemma report`", "report"):
    from embgemma.reporting import page, records
    from embgemma.reporting.spaces import principal_components
  if bool(options.map) != bool(options.checkpoint):
    raise ConfigError("--map=NAME=PATH[:KIND] and --checkpoint=DIR go together")
  output = pathlib.Path(options.output)
  if output.is_dir() or output.suffix != ".html":
    raise ConfigError(f"--output={output}: give the path of an .html file")
  if not (options.directories or options.benchmark):
    raise ConfigError("nothing to report: give DIR …, or --benchmark and --results")
  if bool(options.benchmark) != bool(options.results):
    raise ConfigError("--benchmark=NAME and --results=DIR go together")
  if options.csv and not options.benchmark:
    raise ConfigError("--csv is of a --benchmark")
  scores, types = _benchmark(options) if options.benchmark else ({}, {})
  found = records.read(options.directories)
  spaces = _spaces(options.checkpoint, options.map) if options.map else {}
  drawn = {name: space.documents[:_MAPPED_TEXTS] for name, space in spaces.items()}
  places = principal_components(drawn) if drawn else {}
  title = options.title or options.benchmark
  if options.directories and not options.title:
    title = pathlib.Path(options.directories[0]).resolve().name
  made = page.page(found, title, places, spaces, options.benchmark or "", scores, types)
  for path, text in ((output, made.html()), (options.markdown, made.markdown())):
    if path:
      with outputs.new_file(pathlib.Path(path)) as file:
        file.write(text.encode())
      say(str(path))
  if options.csv:
    rows = io.StringIO(newline="")
    benchmark_scores.write_table(rows, options.benchmark, scores, types)
    with outputs.new_file(pathlib.Path(options.csv)) as file:
      file.write(rows.getvalue().encode())
    say(options.csv)


def _benchmark(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Scores by model, and types by task."""
  from embgemma.evaluation import mteb_runner

  with of_extra("--benchmark", "eval"):
    tasks = mteb_runner.tasks(options.benchmark, (), ())
  types = {task.metadata.name: task.metadata.type for task in tasks}
  paths = [pathlib.Path(path) for path in options.results]
  folders = [path for path in paths if path.suffix != ".csv"]
  scores = benchmark_scores.read_results(folders, tasks)
  for path in paths:
    if path.suffix == ".csv":
      for model, of in benchmark_scores.read_table(path, options.benchmark).items():
        scores[model] = scores.get(model, {}) | of
  if not scores:
    raise DataError(
      f"{', '.join(options.results)}: no whole result of a task of {options.benchmark}"
    )
  return scores, types


def _spaces(checkpoint: str, data: Sequence[str]) -> Mapping[str, Any]:
  """Queries and documents of each set, as far as they are looked at."""
  from embgemma.evaluation import suite
  from embgemma.evaluation.retrieval import RetrievalEvaluator
  from embgemma.inference.embedder import CheckpointEmbedder
  from embgemma.reporting.spaces import Space

  process.keep_compilations()
  embedder = CheckpointEmbedder(checkpoint)
  spaces = {}
  table = embedder.description.prompts
  for each in suite.evaluators(evaluation_entries(data), (1,), table=table):
    if not isinstance(each, RetrievalEvaluator):
      raise ConfigError(
        f"--map: {each.name} is no retrieval set; only those have texts"
      )
    each.check()
    spaces[each.name] = Space.of(each, embedder.encode)
  return spaces
