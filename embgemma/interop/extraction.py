"""An embedder out of a checkpoint of pretrained stacks."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore, Description
from embgemma.errors import CheckpointError
from embgemma.interop import conversion, weights
from embgemma.interop.model import Model, equal_lengths
from embgemma.models import adaptation
from embgemma.models.adaptation import Source
from embgemma.models.config import BackboneConfig, EmbedderConfig


class Extracted(NamedTuple):
  """An embedder, and where its parameters come from (`adaptation.report`)."""

  model: Model
  report: dict[str, Any]


def extract(
  path: str | os.PathLike[str],
  configure: Callable[[BackboneConfig], EmbedderConfig],
  seed: int = 0,
) -> Extracted:
  """The embedder around a checkpoint's encoder, or its decoder made bidirectional.

  Two rows of Table 2 of EmbeddingGemma (arXiv 2509.20354). Texts are cut where the
  stack's were in training.

  Args:
    path: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP, of a backbone.
    configure: Makes the embedder's configuration, such as
      `models.extraction.embedder_config`; called before weights are read.
    seed: Of heads and an attention pooler.

  Raises:
    CheckpointError: the checkpoint holds an embedder, or cannot be read.
    ConfigError: see `configure`.
  """
  directory, step = checkpoints.locate(path)
  description = checkpoints.read_description(directory)
  if isinstance(description.config, EmbedderConfig):
    raise CheckpointError(
      f"{path}: holds an embedder already; use it as it is, or give the checkpoint of "
      "an encoder-decoder, an encoder or a decoder"
    )
  config = configure(description.config)
  step = CheckpointStore(directory).resolve_step(step)
  params = weights.read(directory, step, description.config)
  source = Source(os.fspath(path), description.config, params)
  adapted = adaptation.adapt(config, jax.random.key(seed), source)
  model = Model(
    Description(
      config,
      equal_lengths(_trained_length(description)),
      description.prompts,
    ),
    checkpoints.read_vocabulary(directory),
    dict(adapted.params),
    adapted.notes,
    directory,
    step,
  )
  return Extracted(model, adaptation.report(adapted))


def _trained_length(description: Description) -> int:
  """Most tokens of a text that the stack was trained on."""
  config = description.config
  has_encoder = isinstance(config, BackboneConfig) and config.encoder is not None
  side = "inputs" if has_encoder else "targets"
  return description.lengths.get(side, description.max_length)


def write(extracted: Extracted, directory: pathlib.Path) -> None:
  """Writes an embedder as a checkpoint directory, with its report beside model.json.

  Raises:
    OSError: the directory cannot be written.
  """
  conversion.write_checkpoint(extracted.model, directory)
  content = json.dumps(extracted.report, indent=1) + "\n"
  (directory / adaptation.REPORT_FILE).write_text(content)
