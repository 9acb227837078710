"""Commands that embed with a checkpoint: embed, eval."""

import argparse
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from embgemma import outputs, process
from embgemma.commands.configuration import configure
from embgemma.commands.messages import say, say_notes
from embgemma.errors import ConfigError, DataError


def _input_texts(options: argparse.Namespace, skipped: list[str]) -> Iterator[str]:
  """Texts of --input, line by line."""
  from embgemma.data.files import read_lines
  from embgemma.data.jsonl import decode_line, parse_json_line, string_field

  path = options.input
  is_jsonl = path.removesuffix(".gz").endswith((".jsonl", ".json"))
  for number, line in read_lines(path):
    try:
      if is_jsonl:
        record = parse_json_line(path, number, line)
        text = string_field(record, options.field, f"{path}:{number}")
      else:
        text = decode_line(path, number, line)
      if not text.strip():
        raise DataError(f"{path}:{number}: empty text")
    except DataError as error:
      if options.on_bad_record == "fail":
        raise DataError(f"{error} (--on_bad_record=skip leaves it out)") from error
      skipped.append(str(error))
      continue
    yield text


def run_embed(options: argparse.Namespace) -> None:
  """Writes the vectors of a file's texts."""
  from embgemma.data.bad_records import MAX_LISTED_SKIPS
  from embgemma.inference import vector_files
  from embgemma.inference.embedder import CheckpointEmbedder

  process.keep_compilations()
  output = pathlib.Path(options.output)
  vector_files.check_name(output)
  embedder = CheckpointEmbedder(
    options.checkpoint, options.max_length, options.tokens_per_batch
  )
  say_notes(embedder.notes)
  prompt = embedder.prompt(options.prompt)
  width = embedder.check_width(options.dim)
  skipped: list[str] = []
  texts = (prompt + text for text in _input_texts(options, skipped))
  with outputs.new_file(output) as file:
    count = vector_files.write(file, output, embedder.stream(texts, width), width)
  say(f"{count:,} vectors of width {width}: {output}")
  if skipped:
    say(f"skipped {len(skipped)} records:")
    for line in skipped[:MAX_LISTED_SKIPS]:
      say(f"  {line}")


def evaluation_entries(data: Iterable[str]) -> dict[str, dict[str, str]]:
  """NAME=PATH[:KIND] as entries of `evaluation.suite.evaluators`."""
  entries = {}
  for item in data:
    name, separator, path = item.partition("=")
    if not separator or not name or not path:
      raise ConfigError(f"--data={item}: write NAME=PATH or NAME=PATH:KIND")
    head, colon, kind = path.rpartition(":")
    if colon and head and head != "builtin" and "/" not in kind:
      entries[name] = {"path": head, "kind": kind}
    else:
      entries[name] = {"path": path}
  return entries


def _declared(options: argparse.Namespace, bindings: Sequence[str]) -> dict[str, Any]:
  """EVALUATIONS of the gin files given, if there are any."""
  if not options.gin_file and not bindings:
    return {}
  from embgemma import gin_config

  configure(options, bindings)
  return dict(gin_config.declared_data()["evaluations"])


def run_eval(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Prints how well a checkpoint does on evaluation data."""
  from rich.console import Console

  from embgemma.evaluation import suite
  from embgemma.evaluation.report import results_table
  from embgemma.inference.embedder import CheckpointEmbedder

  entries = _declared(options, bindings) | evaluation_entries(options.data)
  if not entries:
    raise ConfigError(
      "nothing to evaluate on: give --data=NAME=PATH[:KIND], or a --gin_file with "
      "EVALUATIONS"
    )
  process.keep_compilations()
  embedder = CheckpointEmbedder(
    options.checkpoint, options.max_length, options.tokens_per_batch
  )
  say_notes(embedder.notes)
  widths = embedder.description.embedder.matryoshka_widths
  if options.widths:
    try:
      widths = tuple(int(width) for width in options.widths.split(","))
    except ValueError as error:
      raise ConfigError(f"--widths={options.widths}: write 768,128") from error
  evaluators = suite.evaluators(entries, widths)
  for evaluator in evaluators:
    evaluator.check()
  columns = {embedder.name: {e.name: e.evaluate(embedder.encode) for e in evaluators}}
  if options.bm25:
    columns["BM25"] = suite.bm25_results(evaluators)
  if options.output:
    with outputs.new_file(pathlib.Path(options.output)) as file:
      file.write(json.dumps(columns, indent=1).encode() + b"\n")
  Console().print(results_table(columns))
