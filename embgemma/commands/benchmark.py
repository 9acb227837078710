"""`embgemma eval` on benchmarks: of mteb, XOR-Retrieve, XTREME-UP."""

import argparse
import logging
import pathlib
import re
from typing import Any

from embgemma.commands.messages import say, say_notes
from embgemma.errors import ConfigError, DataError, of_extra


def run_benchmark(options: argparse.Namespace) -> None:
  """Writes results in mteb's layout, and prints them."""
  logging.getLogger("mteb").setLevel(logging.ERROR)
  with of_extra("`embgemma eval --benchmark`", "eval"):
    import mteb  # noqa: F401
  from rich.console import Console

  from embgemma import flags, process
  from embgemma.evaluation import mteb_runner
  from embgemma.evaluation.mteb_runner import TASK_LENGTHS, BenchmarkModel

  if not options.results:
    raise ConfigError("--results=DIR: where results go, in mteb's layout")
  wanted_lengths = _task_lengths(options.task_lengths)
  chosen = mteb_runner.tasks(
    options.benchmark, _names(options.tasks), _names(options.task_modules)
  )
  if not chosen:
    raise ConfigError("no tasks: give --benchmark, --tasks or --task_modules")
  unknown = sorted(wanted_lengths.keys() - {task.metadata.name for task in chosen})
  if unknown:
    raise ConfigError(f"--task_lengths: {', '.join(unknown)}: not among the tasks")
  try:
    pathlib.Path(options.results).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"--results={options.results}: {error.strerror}") from error
  if options.mteb_data:
    for name in mteb_runner.use_local_data(chosen, pathlib.Path(options.mteb_data)):
      say(f"{name}: not in {options.mteb_data}; from the hub or its cache")
  process.keep_compilations()
  embedder = _embedder(options)
  say_notes(embedder.notes)
  description = embedder.description
  widths: Any = description.embedder.matryoshka_widths
  if options.widths:
    widths = flags.counts("widths", options.widths)
  model = BenchmarkModel(
    name=_model_name(options),
    revision=embedder.fingerprint,
    full_width=description.embedder.embedding_width,
    max_length=description.embedder.transformer.max_length,
    prompts=description.prompts,
    encoder=embedder.cut_at,
    titles=not options.joined_titles,
  )
  lengths = {task: min(own, model.max_length) for task, own in TASK_LENGTHS.items()}
  outcomes = mteb_runner.run(
    model,
    chosen,
    widths,
    pathlib.Path(options.results),
    task_lengths=lengths | wanted_lengths,
    length=options.max_length or min(mteb_runner.DEFAULT_LENGTH, model.max_length),
    vectors=_names(options.vectors),
    said=_say_outcome,
  )
  Console().print(_table(outcomes, chosen))
  say(f"{model.name}, revision {model.revision}: {options.results}")
  failed = [each for each in outcomes if each.error]
  if failed:
    lines = [f"  {_named(each)}: {each.error}" for each in failed]
    raise DataError(
      f"{len(failed)} of {len(outcomes)} evaluations failed; the others are complete, "
      "and the same command does only these again:\n" + "\n".join(lines)
    )


def _embedder(options: argparse.Namespace) -> Any:
  import jax

  from embgemma.inference.embedder import CheckpointEmbedder

  devices = jax.devices()
  return CheckpointEmbedder(
    options.checkpoint,
    tokens_per_batch=options.tokens_per_batch,
    devices=None if devices[0].platform == "cpu" else devices,
  )


def _names(text: str | None) -> list[str]:
  return [name for name in (text or "").split(",") if name]


def _task_lengths(text: str | None) -> dict[str, int]:
  """TASK=TOKENS,… of --task_lengths."""
  found = {}
  for item in _names(text):
    match = re.fullmatch(r"(.+)=([1-9]\d*)", item)
    if match is None:
      raise ConfigError(f"--task_lengths={item}: write TASK=2048,OTHER=1024")
    found[match[1]] = int(match[2])
  return found


def _model_name(options: argparse.Namespace) -> str:
  """ORGANISATION/MODEL, as mteb wants it."""
  default = f"embgemma/{pathlib.Path(options.checkpoint).resolve().name}"
  name = options.model_name or default
  if not re.fullmatch(r"[^/\s]+/[^/\s]+", name):
    raise ConfigError(f"--model_name={name}: write ORGANISATION/MODEL")
  return str(name)


def _say_outcome(outcome: Any) -> None:
  if outcome.error:
    say(f"{_named(outcome)}: failed: {outcome.error}")
  elif outcome.seconds:
    rate = outcome.texts / outcome.seconds
    texts = f", {outcome.texts:,} texts, {rate:,.0f}/s" if outcome.texts else ""
    say(f"{_named(outcome)}: {100 * outcome.score:.2f}, {outcome.seconds:.1f} s{texts}")


def _named(outcome: Any) -> str:
  return f"{outcome.task} (width {_column(outcome)})"


def _column(outcome: Any) -> str:
  """Width, and what vectors are kept as."""
  kept = "" if outcome.vectors == "float32" else f" {outcome.vectors}"
  return f"{outcome.width}{kept}"


def _table(outcomes: Any, chosen: Any) -> Any:
  """Tasks by widths and formats of vectors, with the benchmark's means."""
  from rich.table import Table

  from embgemma.evaluation import benchmark_scores

  types = {task.metadata.name: task.metadata.type for task in chosen}
  models: dict[str, dict[str, float]] = {_column(each): {} for each in outcomes}
  for each in outcomes:
    if each.score is not None:
      models[_column(each)][each.task] = each.score
  heads, rows = benchmark_scores.tasks_table(models, types)
  table = Table()
  for index, head in enumerate(heads):
    table.add_column(head, justify="left" if index < 2 else "right")
  for row in rows:
    table.add_row(*row)
  table.add_section()
  found = benchmark_scores.standings(models, types).values()
  percent = benchmark_scores.percent
  table.add_row("Mean(Task)", "", *(percent(each.mean_task) for each in found))
  table.add_row("Mean(Type)", "", *(percent(each.mean_type) for each in found))
  return table


def check_crosslingual(options: argparse.Namespace) -> None:
  """Refuses flags of XOR-Retrieve and XTREME-UP that do not go together.

  Raises:
    ConfigError: naming them.
  """
  if bool(options.xor_retrieve) != bool(options.corpus):
    raise ConfigError("--xor_retrieve=QUESTIONS and --corpus=PASSAGES go together")
  if options.xor_retrieve:
    with of_extra("--xor_retrieve", "eval"):
      import nltk  # noqa: F401


def crosslingual_results(
  options: argparse.Namespace, embedder: Any, widths: Any
) -> Any:
  """Results by task, of those that the flags ask for."""
  from embgemma.data.prompts import TaskPrompts
  from embgemma.evaluation import crosslingual

  found: dict[str, Any] = {}
  if not (options.xor_retrieve or options.xtreme_up):
    return found
  for width in widths:
    embedder.check_width(width)
  chosen = TaskPrompts(
    options.query_prompt or "query", table=embedder.description.prompts
  )
  if options.xor_retrieve:
    found |= crosslingual.evaluate_xor_retrieve(
      embedder.encode,
      chosen,
      widths,
      pathlib.Path(options.xor_retrieve),
      pathlib.Path(options.corpus),
      lambda passages: say(f"{passages:,} passages"),
    )
  if options.xtreme_up:
    directory = pathlib.Path(options.xtreme_up)
    found |= crosslingual.evaluate_xtreme_up(
      embedder.encode, chosen, widths, directory, options.split or "test"
    )
  return found
