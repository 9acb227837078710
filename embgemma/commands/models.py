"""Commands that make one model of others: import, soup, extract, quantize, export."""

import argparse
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from embgemma import flags, outputs, process
from embgemma.commands.evaluation import evaluation_entries
from embgemma.commands.messages import say, say_notes
from embgemma.errors import ConfigError


def run_import(options: argparse.Namespace) -> None:
  """Writes the checkpoint of a model in another format."""
  from embgemma.interop import conversion

  source, output = pathlib.Path(options.source), pathlib.Path(options.output)
  outputs.check_directory(output, options.overwrite, source)
  tokenizer = pathlib.Path(options.tokenizer) if options.tokenizer else None
  model = conversion.load(options.source_format, source, tokenizer)
  with outputs.new_directory(output) as directory:
    conversion.write_checkpoint(model, directory)
  _say_converted(model, model.notes, output)


def run_soup(options: argparse.Namespace) -> None:
  """Writes the mean of checkpoints."""
  from embgemma import soup

  if options.greedy != bool(options.data):
    raise ConfigError("--greedy and --data=NAME=PATH[:KIND] go together")
  if options.greedy and options.weights:
    raise ConfigError("--weights with --greedy: a greedy soup chooses by itself")
  output = pathlib.Path(options.output)
  for path in options.checkpoints:
    outputs.check_directory(output, options.overwrite, path)
  ingredients = soup.choose(options.checkpoints, options.last)
  different = options.allow_different_init
  if options.greedy:
    model, trials = soup.greedy(ingredients, _held_out_score(options.data), different)
    lines = [str(trial) for trial in trials]
    listed = [trial.to_json() for trial in trials]
  else:
    shares = _soup_weights(options.weights, len(ingredients))
    model = soup.average(ingredients, shares, different)
    lines = [str(ingredient) for ingredient in ingredients]
    listed = [ingredient.to_json() for ingredient in ingredients]
    if shares:
      lines = [f"{s:g} of {line}" for s, line in zip(shares, lines, strict=True)]
      listed = [{**i, "weight": s} for i, s in zip(listed, shares, strict=True)]
  with outputs.new_directory(output) as directory:
    soup.write(model, listed, directory)
  print("the mean of", *lines, sep="\n  ")
  _say_converted(model, model.notes, output)


def _soup_weights(given: str | None, count: int) -> list[float] | None:
  if given is None:
    return None
  try:
    weights = [float(weight) for weight in given.split(",")]
  except ValueError:
    weights = []
  if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
    raise ConfigError(
      f"--weights={given}: write a number above 0 for each of the {count} checkpoints, "
      "separated by commas"
    )
  return weights


def _held_out_score(data: Sequence[str]) -> Callable[[Any], float]:
  """The mean over evaluation sets of a model's main metrics, 0 to 1."""
  import jax

  from embgemma.evaluation import suite
  from embgemma.inference.embedder import TextEncoder

  process.keep_compilations()
  entries = evaluation_entries(data)
  for evaluator in suite.evaluators(entries, (1,)):
    evaluator.check()
  encoders: list[TextEncoder] = []  # one for all: they are of one model

  def score(model: Any) -> float:
    config, length = model.description.embedder, model.description.max_length
    if not encoders:
      encoders.append(TextEncoder(config, model.vocabulary, length))
    params = jax.device_put(model.params)  # once, not once a batch
    encode = functools.partial(encoders[0].encode, params)
    table = model.description.prompts
    evaluators = suite.evaluators(entries, (config.embedding_width,), table=table)
    return suite.mean_score({each.name: each.evaluate(encode) for each in evaluators})

  return score


def run_extract(options: argparse.Namespace) -> None:
  """Writes the embedder that pretrained stacks become."""
  from embgemma.interop import extraction
  from embgemma.models.adaptation import report_text
  from embgemma.models.extraction import embedder_config

  output = pathlib.Path(options.output)
  outputs.check_directory(output, options.overwrite, options.checkpoint)
  if not 0 <= options.seed < 2**32:
    raise ConfigError(f"--seed={options.seed}: write a number from 0 to {2**32 - 1}")
  widths = flags.counts("widths", options.widths) if options.widths else None
  configure = functools.partial(
    embedder_config,
    hidden_width=_hidden_width(options.hidden_width),
    embedding_width=options.embedding_width,
    matryoshka_widths=widths,
    pooler=options.pooler,
  )
  extracted = extraction.extract(options.checkpoint, configure, options.seed)
  with outputs.new_directory(output) as directory:
    extraction.write(extracted, directory)
  print(report_text(extracted.report))
  _say_converted(extracted.model, (), output)


def _hidden_width(value: str | None) -> int | Literal["default"] | None:
  """What `embedder_config` takes for --hidden_width."""
  if value is None:
    return "default"
  if value == "none":
    return None
  if not re.fullmatch(r"[1-9]\d*", value):
    raise ConfigError(f"--hidden_width={value}: write 3072, or none for no heads")
  return int(value)


def _say_converted(model: Any, notes: Iterable[str], output: pathlib.Path) -> None:
  say_notes(notes)
  say(f"{model.size:,} parameters: {output}")


def run_quantize(options: argparse.Namespace) -> None:
  """Writes a checkpoint whose weights are codes of 4 and 8 bits."""
  from rich.console import Console

  from embgemma.interop import conversion, quantizing
  from embgemma.models import quantization

  output = pathlib.Path(options.output)
  outputs.check_directory(output, options.overwrite, options.checkpoint)
  model = conversion.open_embedder(options.checkpoint)
  trained = model.description.embedder.quantization
  rules = trained
  if options.format != "trained":
    rules = getattr(quantization, options.format)()
  if trained not in (None, rules):
    say(f"note: trained for other formats than {options.format}: {_formats(trained)}")
  if rules is None:
    raise ConfigError(
      f"{options.checkpoint}: was not trained in a format of 4 or 8 bits; give "
      "--format=int8_block32, int4_block32 or mixed_channel"
    )
  quantized = quantizing.quantize(model, rules)
  with outputs.new_directory(output) as directory:
    quantizing.write(quantized, directory)
  for table in quantizing.tables(quantized):
    Console().print(table)
  say_notes(model.notes)
  say(f"{model.size:,} parameters in {quantized.bytes / 1e6:,.1f} MB: {output}")


def _formats(rules: Any) -> str:
  return ", ".join(dict.fromkeys(name for _, name in rules.rules))


def run_export(options: argparse.Namespace) -> None:
  """Writes a checkpoint's model in another format."""
  if options.target_format == "gguf":
    _export_gguf(options)
  else:
    _export_directory(options)


def _rounding_notes(model: Any, dtype: str) -> Iterable[str]:
  """That a model trained with rounded weights is written otherwise."""
  rules = model.description.embedder.quantization
  if rules is not None and dtype != "trained":
    yield (
      f"trained for weights of {_formats(rules)}, written as {dtype}: results of the "
      "run are of the former"
    )


def _export_directory(options: argparse.Namespace) -> None:
  """hf, onnx, litert: what starts from a sentence-transformers directory."""
  from embgemma.evaluation import model_card
  from embgemma.interop import (
    conversion,
    litert_export,
    onnx_export,
    sentence_transformers_writer,
  )

  output = pathlib.Path(options.output)
  target, dtype = options.target_format, options.dtype
  if target == "hf" and dtype not in ("float32", "bfloat16"):
    raise ConfigError(
      f"--dtype={dtype}: hf has float32 and bfloat16; the others are of other formats, "
      "and Gemma 3's activations exceed the largest float16 (65,504)"
    )
  if target == "onnx":
    onnx_export.check_exportable(dtype)
  outputs.check_directory(output, options.overwrite, options.checkpoint)

  def check(config: Any) -> None:
    sentence_transformers_writer.check_exportable(config, options.max_length)
    if target == "litert":
      litert_export.check_exportable(config, dtype)

  model = conversion.open_embedder(options.checkpoint, check)
  length = options.max_length or model.description.max_length
  card = model_card.model_card(model, output.resolve().name, dtype, length, target)
  write = {
    "hf": sentence_transformers_writer.write,
    "onnx": onnx_export.write,
    "litert": litert_export.write,
  }[target]
  with outputs.new_directory(output) as directory:
    notes = write(model, directory, dtype, length, card)
  _say_converted(model, (*model.notes, *notes, *_rounding_notes(model, dtype)), output)


def _export_gguf(options: argparse.Namespace) -> None:
  from embgemma.interop import conversion, gguf_file

  output = pathlib.Path(options.output)
  if options.max_length is not None:
    raise ConfigError("--max_length: llama.cpp takes its context's length; leave out")
  outputs.check_file(output, options.overwrite)
  if options.dtype not in gguf_file.TYPE_OF_DTYPE:
    raise ConfigError(
      f"--dtype={options.dtype}: gguf has {', '.join(gguf_file.TYPE_OF_DTYPE)}"
    )
  weight_type = gguf_file.TYPE_OF_DTYPE[options.dtype]

  def check(config: Any) -> None:
    gguf_file.check_exportable(config, weight_type)

  model = conversion.open_embedder(options.checkpoint, check)
  with outputs.new_path(output) as path:
    gguf_file.write(model, path, weight_type)
  _say_converted(model, (*model.notes, *_rounding_notes(model, options.dtype)), output)
