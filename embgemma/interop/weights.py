"""The weights of a checkpoint directory, on the host."""

import functools
import pathlib

from embgemma.checkpoints import CheckpointStore
from embgemma.interop import layout
from embgemma.interop.layout import NumpyTree
from embgemma.models import adaptation
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.typing import Params


def read(
  directory: pathlib.Path, step: int, config: EmbedderConfig | BackboneConfig
) -> NumpyTree:
  """The parameters that a step ships: averaged, where its run kept that.

  Float32 arrays of the caller's own, adapters beside their kernels.

  Args:
    directory: A MODEL_DIR.
    step: From `CheckpointStore.resolve_step`.
    config: Of the checkpoint.

  Raises:
    CheckpointError: see `CheckpointStore`.
  """
  store = CheckpointStore(directory)
  item = store.shipped_item(step)
  # Asked for as numpy arrays, they stay on the host, and whole once.
  abstract = layout.allocate(_abstract_params(config))
  return store.restore(step, {item: abstract})[item]


@functools.cache  # a second of tracing
def _abstract_params(config: EmbedderConfig | BackboneConfig) -> Params:
  return adaptation.abstract_params(config)
