"""The command that measures checkpoints."""

import argparse
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from embgemma import flags, outputs, process
from embgemma.commands import benchmark
from embgemma.commands.configuration import configure
from embgemma.commands.messages import say_notes
from embgemma.errors import ConfigError
from embgemma.models.config import VECTOR_FORMATS

if TYPE_CHECKING:
  from embgemma.inference.embedder import CheckpointEmbedder

# Flags that only one of the two kinds of evaluation reads.
_OF_SETS = (
  *("data", "gin_file", "output", "bm25", "intervals", "against"),
  *("xor_retrieve", "corpus", "xtreme_up", "query_prompt", "split"),
)
_OF_BENCHMARKS = (
  *("results", "mteb_data", "model_name", "task_lengths", "joined_titles"),
)


def _refuse(options: argparse.Namespace, names: Sequence[str], kind: str) -> None:
  given = [f"--{name}" for name in names if getattr(options, name)]
  if given:
    raise ConfigError(f"{', '.join(given)}: not for {kind}; they are another command")


def evaluation_entries(data: Iterable[str]) -> dict[str, dict[str, str]]:
  """NAME=PATH[:KIND] as entries of `evaluation.suite.evaluators`."""
  entries = {}
  for item in data:
    name, separator, path = item.partition("=")
    if not separator or not name or not path:
      raise ConfigError(f"--data={item}: write NAME=PATH or NAME=PATH:KIND")
    if name in entries:
      raise ConfigError(
        f"--data={item}: there is another {name!r}; give it a name of its own"
      )
    head, colon, kind = path.rpartition(":")
    if colon and head and head not in ("builtin", "mteb") and "/" not in kind:
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
  if options.benchmark or options.tasks or options.task_modules:
    if bindings:
      raise ConfigError("--benchmark, --tasks and --task_modules take no --gin flags")
    _refuse(options, _OF_SETS, "--benchmark, --tasks and --task_modules")
    benchmark.run_benchmark(options)
    return
  _refuse(options, _OF_BENCHMARKS, "sets of --data and EVALUATIONS")
  from rich.console import Console

  from embgemma.evaluation import suite
  from embgemma.evaluation.report import intervals_table, results_table
  from embgemma.evaluation.vector_cache import VectorCache

  entries = _declared(options, bindings) | evaluation_entries(options.data)
  benchmark.check_crosslingual(options)
  if not (entries or options.xor_retrieve or options.xtreme_up):
    raise ConfigError(
      "nothing to evaluate on: give --data=NAME=PATH[:KIND], a --gin_file with "
      "EVALUATIONS, --benchmark, --xor_retrieve or --xtreme_up"
    )
  process.keep_compilations()
  embedder = _embedder(options, options.checkpoint)
  widths = embedder.description.embedder.matryoshka_widths
  if options.widths:
    widths = flags.counts("widths", options.widths)
  vectors = _vectors(options)

  def made(own: "CheckpointEmbedder") -> Sequence[suite.Evaluator]:
    return suite.evaluators(entries, widths, vectors, own.description.prompts)

  evaluators = made(embedder)
  for evaluator in evaluators:
    evaluator.check()
  sampled = suite.sampled(evaluators)
  sampling = options.intervals or options.against
  if sampling and not sampled:
    raise ConfigError("--intervals and --against are for sets of --data or EVALUATIONS")
  embedders = {options.checkpoint: embedder}
  if options.against:
    embedders[options.against] = _embedder(options, options.against)
    if len(set(map(os.path.realpath, embedders))) == 1:
      raise ConfigError("--against: is --checkpoint itself")
  columns, samples = {}, {}
  for path, own in embedders.items():
    name = _full_name(path, own) if options.against else own.name
    name = path if name in columns else name
    encode = VectorCache(own.encode) if sampling else own.encode
    asked = evaluators if own is embedder else made(own)
    results = {each.name: each.evaluate(encode) for each in asked}
    if sampling:
      samples[name] = [each.sample(encode) for each in suite.sampled(asked)]
    results |= benchmark.crosslingual_results(options, own, widths)
    columns[name] = results
  if options.bm25:
    columns["BM25"] = suite.bm25_results(evaluators)
  if options.output:
    with outputs.new_file(pathlib.Path(options.output)) as file:
      file.write(json.dumps(columns, indent=1).encode() + b"\n")
  console = Console()
  console.print(results_table(columns))
  if samples:
    metrics = [(each.name, each.main_metric) for each in sampled]
    console.print(intervals_table(metrics, samples, max(widths)))


def _full_name(path: str, embedder: "CheckpointEmbedder") -> str:
  """Of one checkpoint among several: its directory's name, and its step."""
  place = pathlib.Path(path).resolve()
  directory = place.parents[1] if place.parent.name == "checkpoints" else place
  return " ".join(dict.fromkeys((directory.name, embedder.name)))


def _vectors(options: argparse.Namespace) -> list[str]:
  """The formats of --vectors."""
  vectors: list[str] = options.vectors.split(",")
  unknown = sorted(set(vectors) - set(VECTOR_FORMATS))
  if unknown:
    raise ConfigError(
      f"--vectors={options.vectors}: there are {', '.join(VECTOR_FORMATS)}, got "
      f"{', '.join(unknown)}"
    )
  if vectors != ["float32"] and (options.xor_retrieve or options.xtreme_up):
    raise ConfigError("--vectors is for sets of --data and EVALUATIONS, and for mteb's")
  return vectors


def _embedder(options: argparse.Namespace, path: str) -> "CheckpointEmbedder":
  from embgemma.inference.embedder import CheckpointEmbedder

  embedder = CheckpointEmbedder(path, options.max_length, options.tokens_per_batch)
  say_notes(embedder.notes)
  return embedder
