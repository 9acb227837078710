"""Checkpoint directories and foreign formats, to and from a `Model`."""

import dataclasses
import os
import pathlib

import jax
import numpy as np

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointPolicy, CheckpointStore
from embgemma.errors import CheckpointError
from embgemma.interop import gemma, sentence_transformers, t5gemma2
from embgemma.interop.model import Model
from embgemma.models import lora
from embgemma.models.embedder import abstract_params

SOURCES = ("hf", "gemma", "t5gemma2")


def load(
  source_format: str, source: pathlib.Path, tokenizer: pathlib.Path | None = None
) -> Model:
  """A model of another format.

  Args:
    source_format: One of SOURCES.
    source: Its directory.
    tokenizer: A SentencePiece model to take instead of the directory's.

  Raises:
    CheckpointError: see the loaders.
  """
  if not source.is_dir():
    raise CheckpointError(f"{source}: no directory; give the one with the weights")
  if source_format == "gemma":
    return gemma.load(source, tokenizer)
  if source_format == "t5gemma2":
    return t5gemma2.load(source, tokenizer)
  return sentence_transformers.load(source, tokenizer)


def open_embedder(path: str | os.PathLike[str]) -> Model:
  """The embedder of a checkpoint or of a Hugging Face directory.

  Averaged parameters where a run kept them; adapters are merged.

  Args:
    path: A MODEL_DIR, MODEL_DIR/checkpoints/STEP, or a directory that
      `sentence_transformers.load` reads.

  Raises:
    CheckpointError: there is no embedder, or it is damaged.
  """
  directory, step = checkpoints.locate(path)
  if checkpoints.is_checkpoint(directory) or not sentence_transformers.is_model(
    directory
  ):
    return _read_checkpoint(directory, step)
  model = load("hf", directory)
  _ = model.description.embedder
  return dataclasses.replace(model, directory=directory)


def _read_checkpoint(directory: pathlib.Path, step: int | None) -> Model:
  description = checkpoints.read_description(directory)
  config = description.embedder
  store = CheckpointStore(directory)
  step = store.resolve_step(step)
  # On the host, whatever accelerator there is.
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
    abstract_params(config),
  )
  item = store.shipped_item(step)
  params = jax.tree.map(np.asarray, store.restore(step, {item: abstract})[item])
  vocabulary = checkpoints.read_vocabulary(directory)
  merged, config = lora.merge(params, config)
  description = dataclasses.replace(description, config=config)
  return Model(description, vocabulary, dict(merged), directory=directory, step=step)


def write_checkpoint(model: Model, directory: pathlib.Path) -> None:
  """Writes a model as a checkpoint directory at step 0.

  Raises:
    CheckpointError: the directory cannot be written.
  """
  checkpoints.write_description(directory, model.description, model.vocabulary, "")
  store = CheckpointStore(directory, CheckpointPolicy())
  store.save(0, model.params)
  store.close()
