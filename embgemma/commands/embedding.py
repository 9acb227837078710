"""The command that embeds texts."""

import argparse
import contextlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from embgemma import outputs, process
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


def _ranges(options: argparse.Namespace, width: int) -> Any:
  """[2, width] of --ranges; None without.

  Raises:
    ConfigError: the format needs none.
    DataError: the file holds something else.
  """
  import numpy as np

  from embgemma import vector_formats

  if options.ranges is None:
    return None
  if not vector_formats.needs_ranges(options.vectors):
    raise ConfigError(f"--ranges is for int8 and uint8, not {options.vectors}")
  try:
    ranges = np.load(options.ranges, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise DataError(f"--ranges={options.ranges}: cannot be read: {error}") from error
  if not isinstance(ranges, np.ndarray):
    raise DataError(f"--ranges={options.ranges}: is no single array (.npy)")
  if ranges.shape != (2, width) or ranges.dtype != np.float32:
    raise DataError(
      f"--ranges={options.ranges}: has shape {ranges.shape} and {ranges.dtype}; "
      f"vectors of width {width} need (2, {width}) and float32"
    )
  if not np.all(ranges[0] <= ranges[1]):  # nor where one is not a number
    raise DataError(f"--ranges={options.ranges}: a least value is above its largest")
  return ranges


def _calibrated(name: str, chunks: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
  """A format by the first vectors, and all vectors."""
  import numpy as np

  from embgemma import vector_formats

  chunks = iter(chunks)
  first: list[Any] = []
  for chunk in chunks:
    first.append(chunk)
    if sum(map(len, first)) >= vector_formats.CALIBRATION_VECTORS:
      break
  sample = np.concatenate(first) if first else np.zeros((0, 1), np.float32)
  kept = vector_formats.calibrated(name, sample[: vector_formats.CALIBRATION_VECTORS])
  return kept, itertools.chain(first, chunks)


def run_embed(options: argparse.Namespace) -> None:
  """Writes the vectors of a file's texts."""
  import numpy as np

  from embgemma import vector_formats
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
  ranges = _ranges(options, width)
  skipped: list[str] = []
  texts = (prompt + text for text in _input_texts(options, skipped))
  chunks: Iterable[Any] = embedder.stream(texts, width)
  own_ranges = vector_formats.needs_ranges(options.vectors) and ranges is None
  if own_ranges:
    kept, chunks = _calibrated(options.vectors, chunks)
  else:
    kept = vector_formats.VectorFormat(options.vectors, ranges)
  beside = output.with_suffix(".ranges.npy")
  with contextlib.ExitStack() as stack:
    # Both or none: vectors are nothing without the ranges that they were made by.
    if own_ranges:
      np.save(stack.enter_context(outputs.new_file(beside)), kept.ranges)
    file = stack.enter_context(outputs.new_file(output))
    count = vector_files.write(file, output, chunks, width, kept)
  if own_ranges:
    say(f"ranges of components, for queries: {beside}")
  said = (
    "" if kept.name == "float32" else f", {kept.name}, {kept.bytes(width)} bytes each"
  )
  say(f"{count:,} vectors of width {width}{said}: {output}")
  if skipped:
    say(f"skipped {len(skipped)} records:")
    for line in skipped[:MAX_LISTED_SKIPS]:
      say(f"  {line}")
