"""The command that makes a page of what other commands left behind."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from embgemma import outputs, process
from embgemma.commands.embedding import evaluation_entries
from embgemma.commands.messages import say
from embgemma.errors import ConfigError

_MAPPED_TEXTS = 300  # of each set


def run_report(options: argparse.Namespace) -> None:
  """Writes HTML, and Markdown if asked for."""
  try:
    from embgemma.reporting import page, records
  except ModuleNotFoundError as error:
    raise ConfigError(
      f"`embgemma report` needs {error.name}: pip install 'embgemma[report]'"
    ) from error
  if bool(options.map) != bool(options.checkpoint):
    raise ConfigError("--map=NAME=PATH[:KIND] and --checkpoint=DIR go together")
  output = pathlib.Path(options.output)
  if output.is_dir() or output.suffix != ".html":
    raise ConfigError(f"--output={output}: give the path of an .html file")
  found = records.read(options.directories)
  places = {}
  if options.map:
    places = page.principal_components(_vectors(options.checkpoint, options.map))
  title = options.title or pathlib.Path(options.directories[0]).resolve().name
  made = page.page(found, title, places)
  for path, text in ((output, made.html()), (options.markdown, made.markdown())):
    if path:
      with outputs.new_file(pathlib.Path(path)) as file:
        file.write(text.encode())
      say(str(path))


def _vectors(checkpoint: str, data: Sequence[str]) -> Mapping[str, Any]:
  """Of the first documents of each set."""
  from embgemma.evaluation import suite
  from embgemma.evaluation.retrieval import RetrievalEvaluator
  from embgemma.inference.embedder import CheckpointEmbedder

  process.keep_compilations()
  embedder = CheckpointEmbedder(checkpoint)
  vectors = {}
  for each in suite.evaluators(evaluation_entries(data), (1,)):
    if not isinstance(each, RetrievalEvaluator):
      raise ConfigError(
        f"--map: {each.name} is no retrieval set; only those have texts"
      )
    each.check()
    vectors[each.name] = embedder.encode(each.passages[:_MAPPED_TEXTS])
  return vectors
