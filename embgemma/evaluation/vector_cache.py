"""Vectors of texts that are asked for again and again."""

import hashlib
import tempfile
from collections.abc import Sequence

import numpy as np

from embgemma.evaluation.retrieval import EncodeFn
from embgemma.typing import Float


class VectorCache:
  """Full-width vectors of the texts seen so far, so that none is embedded twice.

  The widths of a task, the repeats of its probes, and intervals of its score ask for
  the same texts. Vectors lie in a file without a name, which ends with the object.

  Args:
    encode: Texts to vectors of unit norm, float32.

  Attributes:
    texts: Embedded, each once.
  """

  def __init__(self, encode: EncodeFn):
    self._encode = encode
    self._rows: dict[bytes, int] = {}
    self._file = tempfile.TemporaryFile()  # noqa: SIM115 (ends with the object)
    self._width = 0

  @property
  def texts(self) -> int:
    return len(self._rows)

  def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Vectors in the order of the texts."""
    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    new: dict[bytes, str] = {}
    for key, text in zip(keys, texts, strict=True):
      if key not in self._rows:
        new.setdefault(key, text)
    if new:
      vectors = np.ascontiguousarray(self._encode(list(new.values())), "<f4")
      self._width = vectors.shape[1]
      for key in new:
        self._rows[key] = len(self._rows)
      self._file.seek(0, 2)
      self._file.write(vectors.tobytes())
      self._file.flush()
    if not keys:
      return self._encode([])
    kept = np.memmap(self._file, "<f4", mode="r", shape=(len(self._rows), self._width))
    return np.asarray(kept[[self._rows[key] for key in keys]])
