"""Weights of 4 and 8 bits in a checkpoint directory: codes, not copies in float32.

Item `codes` of a step, in place of `params`: the same tree, but where a parameter has
a format there are `codes` (int8; of 4 bits two to a byte, the first in the low half)
and `scales`. Which those are follows from the model's `quantization`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from embgemma.errors import CheckpointError
from embgemma.interop.layout import NumpyTree
from embgemma.models import embedder, quantization
from embgemma.models.config import EmbedderConfig
from embgemma.models.quantization import FORMATS, Quantized

ITEM = "codes"
_CODES, _SCALES = "codes", "scales"


def stored(params: Mapping[str, Any]) -> NumpyTree:
  """The tree that is written.

  Args:
    params: Of `quantization.quantized`, on the host.
  """
  flat: dict[tuple[str, ...], Any] = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    if not isinstance(leaf, Quantized):
      flat[path] = np.asarray(leaf)
      continue
    codes = np.asarray(leaf.codes)
    flat[*path, _CODES] = _packed(codes) if leaf.bits == 4 else codes
    flat[*path, _SCALES] = np.asarray(leaf.scales)
  return traverse_util.unflatten_dict(flat)


def abstract(config: EmbedderConfig) -> NumpyTree:
  """Uninitialised arrays like those of `stored`.

  Args:
    config: Of a model with formats, and without adapters.
  """
  shapes = embedder.abstract_params(config)
  flat: dict[tuple[str, ...], np.ndarray] = {}
  formats = _formats(config)
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    if path not in formats:
      flat[path] = np.empty(leaf.shape, np.float32)
      continue
    chosen = FORMATS[formats[path]]
    axis = quantization.input_axis(path)
    flat[*path, _CODES] = np.empty(leaf.shape, np.int8)
    if chosen.bits == 4:
      flat[*path, _CODES] = np.empty(-(-math.prod(leaf.shape) // 2), np.uint8)
    scales = list(leaf.shape)
    scales[axis] = 1 if chosen.block is None else scales[axis] // chosen.block
    kind = np.float32 if chosen.block is None else np.float16
    flat[*path, _SCALES] = np.empty(scales, kind)
  return traverse_util.unflatten_dict(flat)


def loaded(tree: Mapping[str, Any], config: EmbedderConfig) -> dict[str, Any]:
  """The parameters, those with a format as `Quantized`.

  Args:
    tree: As of `stored`.
    config: Of the model.
  """
  shapes = traverse_util.flatten_dict(embedder.abstract_params(config))
  flat = traverse_util.flatten_dict(tree)
  formats = _formats(config)
  params: dict[tuple[str, ...], Any] = {}
  for path, leaf in shapes.items():
    if path not in formats:
      params[path] = flat[path]
      continue
    codes = flat[*path, _CODES]
    bits = FORMATS[formats[path]].bits
    if bits == 4:
      codes = _unpacked(codes, leaf.shape)
    axis = quantization.input_axis(path)
    params[path] = Quantized(codes, flat[*path, _SCALES], axis, bits)
  return traverse_util.unflatten_dict(params)


def _formats(config: EmbedderConfig) -> dict[tuple[str, ...], str]:
  if config.quantization is None:
    raise CheckpointError(
      "the checkpoint holds codes, and its model.json no formats; it is damaged"
    )
  return quantization.formats(embedder.abstract_params(config), config.quantization)


def _packed(codes: np.ndarray) -> np.ndarray:
  flat = codes.reshape(-1).view(np.uint8) & 15
  flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
  return flat[::2] | flat[1::2] << 4


def _unpacked(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
  # Two's complement of 4 bits.
  signed = (halves ^ 8).astype(np.int8) - np.int8(8)
  return signed[: math.prod(shape)].reshape(shape)
