"""What a run that starts from a checkpoint takes from it: model, vocabulary, widths."""

import dataclasses
import pathlib
from collections.abc import Sequence

from embgemma import checkpoints
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import EmbedderConfig, LoraConfig


def checkpoint_model(
  path: str | None,
  dtype: str | None = None,
  remat: str = "none",
  window: Sequence[int] | None = None,
  matryoshka_widths: Sequence[int] | None = None,
  lora: LoraConfig | None = None,
) -> EmbedderConfig:
  """The configuration of a checkpoint's embedder, with what training may change.

  Args:
    path: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP.
    dtype: Of computation; None is the checkpoint's.
    remat: As in TransformerConfig.
    window: As in TransformerConfig; None is the checkpoint's.
    matryoshka_widths: Widths trained to stand alone; None is the checkpoint's.
    lora: Adapters to train; None is the checkpoint's, if it has any.

  Raises:
    ConfigError: no path, or a value that does not fit the model.
    CheckpointError: the checkpoint cannot be read, or holds no embedder.
  """
  _, config = _embedder(path)
  transformer = dataclasses.replace(
    config.transformer,
    remat=remat,
    dtype=dtype or config.transformer.dtype,
    window=window or config.transformer.window,
  )
  return dataclasses.replace(
    config,
    transformer=transformer,
    matryoshka_widths=matryoshka_widths or config.matryoshka_widths,
    lora=lora or config.lora,
  )


def checkpoint_vocabulary(path: str | None) -> str:
  """The path of a checkpoint's SentencePiece model.

  Raises:
    ConfigError: no path.
    CheckpointError: the checkpoint cannot be read, or holds no embedder.
  """
  return str(_embedder(path)[0] / "tokenizer.model")


def checkpoint_widths(path: str | None) -> tuple[int, ...]:
  """The Matryoshka widths of a checkpoint's embedder.

  Raises:
    ConfigError: no path.
    CheckpointError: the checkpoint cannot be read, or holds no embedder.
  """
  return tuple(_embedder(path)[1].matryoshka_widths)


def _embedder(path: str | None) -> tuple[pathlib.Path, EmbedderConfig]:
  """Directory and configuration of a checkpoint's embedder."""
  if not path:
    raise ConfigError(
      "no checkpoint to take the model from; give --gin.INITIAL_CHECKPOINT_PATH=…"
    )
  directory, _ = checkpoints.locate(path)
  try:
    return directory, checkpoints.read_description(directory).embedder
  except CheckpointError as error:
    raise CheckpointError(f"INITIAL_CHECKPOINT_PATH {path}: {error}") from error
