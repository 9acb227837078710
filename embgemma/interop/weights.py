"""The weights of a checkpoint directory, on the host."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from embgemma.checkpoints import CheckpointStore
from embgemma.errors import CheckpointError
from embgemma.interop import codes, layout
from embgemma.interop.layout import NumpyTree
from embgemma.models import adaptation, quantization
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.typing import Params


def read(
  directory: pathlib.Path, step: int, config: EmbedderConfig | BackboneConfig
) -> NumpyTree:
  """The parameters that a step ships: averaged, where its run kept that.

  Float32 arrays of the caller's own, adapters beside their kernels; of codes what they
  stand for.

  Args:
    directory: A MODEL_DIR.
    step: From `CheckpointStore.resolve_step`.
    config: Of the checkpoint.

  Raises:
    CheckpointError: see `CheckpointStore`.
  """
  store = CheckpointStore(directory)
  item = store.shipped_item(step)
  if item == codes.ITEM:
    values = quantization.dequantized(read_codes(directory, step, config))
    return jax.tree.map(np.array, values)
  # Asked for as numpy arrays, they stay on the host, and whole once.
  abstract = layout.allocate(_abstract_params(config))
  return store.restore(step, {item: abstract})[item]


def holds_codes(directory: pathlib.Path, step: int) -> bool:
  """Whether a step has weights of 4 or 8 bits in place of float32."""
  return CheckpointStore(directory).shipped_item(step) == codes.ITEM


def read_codes(
  directory: pathlib.Path, step: int, config: EmbedderConfig | BackboneConfig
) -> dict[str, Any]:
  """The parameters of a step that `holds_codes`, as `Quantized` where they are.

  Args:
    directory: A MODEL_DIR.
    step: From `CheckpointStore.resolve_step`.
    config: Of the checkpoint.

  Raises:
    CheckpointError: see `CheckpointStore`; or the model has no formats.
  """
  if not isinstance(config, EmbedderConfig):
    raise CheckpointError(f"{directory}: codes of what is no embedder; it is damaged")
  tree = codes.abstract(config)
  restored = CheckpointStore(directory).restore(step, {codes.ITEM: tree})[codes.ITEM]
  return codes.loaded(restored, config)


@functools.cache  # a second of tracing
def _abstract_params(config: EmbedderConfig | BackboneConfig) -> Params:
  return adaptation.abstract_params(config)
