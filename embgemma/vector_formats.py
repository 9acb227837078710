"""Vectors in fewer bytes: what a vector store keeps, and what that is worth.

The formats are those of sentence-transformers (`util.quantization`) and of the stores
that read them: float16; int8 and uint8 by the range of each component over calibration
vectors; binary and ubinary, the signs packed eight to a byte.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from embgemma.errors import ConfigError
from embgemma.models.config import VECTOR_FORMATS
from embgemma.typing import Float

CALIBRATION_VECTORS = 10_000
"""As many of the first vectors give ranges where none are given."""
_BUCKETS = 256
_DTYPES: Mapping[str, str] = {
  "float32": "<f4",
  "float16": "<f2",
  "int8": "|i1",
  "uint8": "|u1",
  "binary": "|i1",
  "ubinary": "|u1",
}


@dataclasses.dataclass(frozen=True)
class VectorFormat:
  """How vectors are kept.

  Attributes:
    name: One of `VECTOR_FORMATS`.
    ranges: [2, E]: least and largest value of each component, of int8 and uint8.

  Raises:
    ConfigError: another name, or int8 and uint8 without ranges.
  """

  name: str
  ranges: Float[np.ndarray, "2 E"] | None = None

  def __post_init__(self) -> None:
    if self.name not in VECTOR_FORMATS:
      raise ConfigError(f"vectors {self.name!r}: there are {', '.join(VECTOR_FORMATS)}")
    if needs_ranges(self.name) and self.ranges is None:
      raise ConfigError(f"vectors {self.name!r} need ranges; see `calibrated`")

  @property
  def dtype(self) -> str:
    """Of codes, as numpy has it."""
    return _DTYPES[self.name]

  def columns(self, width: int) -> int:
    """Codes of a vector."""
    return -(-width // 8) if self.name.endswith("binary") else width

  def bytes(self, width: int) -> int:
    """Of a vector."""
    return self.columns(width) * np.dtype(self.dtype).itemsize

  def codes(self, vectors: Float[np.ndarray, "N E"]) -> np.ndarray:
    """What is kept of vectors: [N, columns] of `dtype`."""
    if self.name.startswith("float"):
      return vectors.astype(self.dtype)
    if self.name.endswith("binary"):
      packed = np.packbits(vectors > 0, axis=-1)
      return (packed - 128).astype(np.int8) if self.name == "binary" else packed
    start, step = self._buckets()
    codes = np.clip(np.floor((vectors - start) / step), 0, _BUCKETS - 1)
    return (codes - 128).astype(np.int8) if self.name == "int8" else codes.astype("u1")

  def values(self, codes: np.ndarray, width: int) -> Float[np.ndarray, "N E"]:
    """What codes stand for, float32: middles of buckets, or signs.

    Args:
      codes: [N, columns].
      width: E.
    """
    if self.name.startswith("float"):
      return codes.astype(np.float32)
    if self.name.endswith("binary"):
      packed = (
        (codes.astype(np.int16) + 128).astype("u1") if codes.dtype == "i1" else codes
      )
      signs = np.unpackbits(packed, axis=-1, count=width)
      return signs.astype(np.float32) * 2 - 1
    start, step = self._buckets()
    numbers = codes.astype(np.float32) + (128 if self.name == "int8" else 0)
    return start + (numbers + 0.5) * step

  def _buckets(self) -> tuple[np.ndarray, np.ndarray]:
    assert self.ranges is not None
    start, end = self.ranges.astype(np.float32)
    step = (end - start) / (_BUCKETS - 1)
    return start, np.where(step == 0, np.float32(1), step)


def needs_ranges(name: str) -> bool:
  """Whether a format is made by ranges of components."""
  return name in ("int8", "uint8")


def calibrated(name: str, vectors: Float[np.ndarray, "N E"]) -> VectorFormat:
  """A format with the ranges of calibration vectors, where it needs any.

  Args:
    name: One of `VECTOR_FORMATS`.
    vectors: A sample of what will be kept.

  Raises:
    ConfigError: another name, or fewer than two vectors for ranges.
  """
  if not needs_ranges(name):
    return VectorFormat(name)
  if len(vectors) < 2:
    raise ConfigError(
      f"vectors {name!r} need two texts at least to find the range of components; "
      f"got {len(vectors)}"
    )
  return VectorFormat(name, np.stack([vectors.min(axis=0), vectors.max(axis=0)]))
