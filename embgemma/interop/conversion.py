"""Checkpoint directories and foreign formats, to and from a `Model`."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from flax import traverse_util

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore
from embgemma.errors import CheckpointError
from embgemma.interop import gemma, sentence_transformers, t5gemma2, weights
from embgemma.interop.layout import NumpyTree
from embgemma.interop.model import Model
from embgemma.models import lora
from embgemma.models.config import EmbedderConfig

_LOADERS: Mapping[str, Callable[[pathlib.Path, pathlib.Path | None], Model]] = {
  "hf": sentence_transformers.load,
  "gemma": gemma.load,
  "t5gemma2": t5gemma2.load,
}


def load(
  source_format: str, source: pathlib.Path, tokenizer: pathlib.Path | None = None
) -> Model:
  """A model of another format.

  Args:
    source_format: "hf", "gemma" or "t5gemma2".
    source: Its directory.
    tokenizer: A SentencePiece model to take instead of the directory's.

  Raises:
    CheckpointError: see the loaders.
  """
  if not source.is_dir():
    raise CheckpointError(f"{source}: no directory; give the one with the weights")
  return _LOADERS[source_format](source, tokenizer)


def open_embedder(
  path: str | os.PathLike[str],
  check: Callable[[EmbedderConfig], None] = lambda config: None,
  codes: bool = False,
) -> Model:
  """The embedder of a checkpoint or of a Hugging Face directory.

  Averaged parameters where a run kept them; adapters are merged.

  Args:
    path: A MODEL_DIR, MODEL_DIR/checkpoints/STEP, or a directory that
      `sentence_transformers.load` reads.
    check: Raises for a configuration that the caller has no use for; of a checkpoint
      before its weights are read.
    codes: Whether weights of 4 and 8 bits may stay codes (`Quantized`), which
      an Embedder takes as they are.

  Raises:
    CheckpointError: there is no embedder, or it is damaged.
  """
  directory, step = checkpoints.locate(path)
  if checkpoints.is_checkpoint(directory) or not sentence_transformers.is_model(
    directory
  ):
    return _read_checkpoint(directory, step, check, codes)
  model = load("hf", directory)
  check(model.description.embedder)
  return dataclasses.replace(model, directory=directory)


def _read_checkpoint(
  directory: pathlib.Path,
  step: int | None,
  check: Callable[[EmbedderConfig], None],
  codes: bool,
) -> Model:
  description = checkpoints.read_description(directory)
  try:
    config = description.embedder
  except CheckpointError as error:
    raise CheckpointError(f"{directory}: {error}") from error
  check(config)
  step = CheckpointStore(directory).resolve_step(step)
  if codes and weights.holds_codes(directory, step):
    params = weights.read_codes(directory, step, config)
  else:
    params = weights.read(directory, step, config)
  vocabulary = checkpoints.read_vocabulary(directory)
  merged, config = lora.merge(params, config)
  description = dataclasses.replace(description, config=config)
  return Model(description, vocabulary, dict(merged), directory=directory, step=step)


def write_checkpoint(model: Model, directory: pathlib.Path) -> None:
  """Writes a model as a checkpoint directory at step 0.

  One without a lineage is the first of its own.

  Raises:
    OSError: the directory cannot be written.
  """
  description = model.description
  if not description.lineage:
    description = dataclasses.replace(description, lineage=_digest(model.params))
  with plain_errors():
    checkpoints.write_description(directory, description, model.vocabulary, "")
    checkpoints.write_weights(directory, model.params)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
  """What the system said of a failed write, for what is no run.

  A checkpoint's own message is about a run, which keeps what it has and resumes.
  """
  try:
    yield
  except CheckpointError as error:
    if isinstance(error.__cause__, OSError):
      raise error.__cause__ from None
    raise


def _digest(params: NumpyTree) -> str:
  """16 hexadecimal digits that identify parameters."""
  found = hashlib.blake2b(digest_size=8)
  for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
    found.update(f"{path} {leaf.shape} ".encode())
    found.update(np.ascontiguousarray(leaf).data)
  return found.hexdigest()
