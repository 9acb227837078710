"""Safetensors, read and written one tensor at a time.

The package `safetensors` reads; it can only write tensors that are all in memory, so
that writing is here (format: huggingface.co/docs/safetensors).
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import ml_dtypes
import numpy as np
import safetensors

from embgemma.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {"float32": _DTYPES["F32"], "bfloat16": _DTYPES["BF16"]}
"""Of weights that we write, by name."""


class SafetensorsDirectory:
  """The tensors of a directory: `model.safetensors`, or the shards of an index.

  Raises:
    CheckpointError: there are none (a pickle is never read), a file is truncated, or
      a tensor is neither float32 nor bfloat16.
  """

  def __init__(self, directory: pathlib.Path):
    self.location = str(directory)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._file_of: dict[str, pathlib.Path] = {}
    for path in _files(directory):
      self._add(path)
    wrong = [n for n, dtype in self.dtypes.items() if dtype not in _DTYPES]
    if wrong:
      shown = ", ".join(f"{n} ({self.dtypes[n]})" for n in wrong[:10])
      raise CheckpointError(
        f"{directory}: {len(wrong)} tensors are neither float32 nor bfloat16: {shown}; "
        "Gemma 3 overflows float16, and other types are no weights. Save the model "
        "in float32 or bfloat16."
      )

  @property
  def dtype(self) -> str:
    """What to compute in: bfloat16 where all is, as transformers loads it."""
    return "bfloat16" if set(self.dtypes.values()) == {"BF16"} else "float32"

  def _add(self, path: pathlib.Path) -> None:
    with _opened(path) as file:
      for name in file.keys():  # noqa: SIM118 (no mapping)
        if name in self._file_of:
          raise CheckpointError(
            f"{path}: tensor {name} is also in {self._file_of[name].name}; the shards "
            "do not belong together"
          )
        tensor = file.get_slice(name)
        self.shapes[name] = tuple(tensor.get_shape())
        self.dtypes[name] = tensor.get_dtype()
        self._file_of[name] = path

  def read(self, name: str) -> np.ndarray:
    """The tensor; float32 or bfloat16.

    Raises:
      CheckpointError: it cannot be read.
    """
    path = self._file_of[name]
    # Opened for each: a mapped file counts as memory as long as it is open.
    with _opened(path) as file:
      return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """A safetensors file; what goes wrong with it is a CheckpointError."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      yield file
  except (safetensors.SafetensorError, OSError) as error:
    size = f"{path.stat().st_size:,} bytes" if path.exists() else "missing"
    raise CheckpointError(
      f"{path} ({size}): no complete safetensors file: {error}; it is truncated, "
      "damaged or a Git LFS pointer. Download it again."
    ) from error


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files with the weights: the single one first, as transformers looks."""
  if (directory / SINGLE).exists():
    return [directory / SINGLE]
  index = directory / INDEX
  if index.exists():
    try:
      names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
      raise CheckpointError(
        f"{index}: damaged: {error!r}; download it again"
      ) from error
    outside = [n for n in names if not isinstance(n, str) or os.path.basename(n) != n]
    if outside:
      raise CheckpointError(
        f"{index}: shard {outside[0]!r} is no file name; shards lie beside the index"
      )
    missing = [n for n in names if not (directory / n).exists()]
    if missing:
      raise CheckpointError(
        f"{index}: shards {missing[:10]} are missing; download them, too"
      )
    return [directory / n for n in names]
  pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
  if pickles:
    raise CheckpointError(
      f"{directory}: {pickles[0]} is a pickle, which can run any code when it is read; "
      "embgemma never reads one. Load the model where you trust it and save it with "
      "safe_serialization=True."
    )
  raise CheckpointError(f"{directory}: holds no {SINGLE} and no {INDEX}")


Entry = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""Name, shape, and a function that makes the tensor when its turn comes."""


def write(file: IO[bytes], entries: Iterable[Entry], dtype: str) -> None:
  """Writes a safetensors file.

  Args:
    file: Open for writing.
    entries: Tensors, in the order of the file.
    dtype: Of all of them, "float32" or "bfloat16".
  """
  entries = list(entries)
  kind = DTYPES[dtype]
  code = next(code for code, of in _DTYPES.items() if of == kind)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  position = 0
  for name, shape, _ in entries:
    size = math.prod(shape) * kind.itemsize
    offsets = [position, position + size]
    header[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
    position += size
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)  # tensors are aligned
  file.write(len(encoded).to_bytes(8, "little") + encoded)
  for name, shape, make in entries:
    array = np.ascontiguousarray(make(), kind)
    if array.shape != tuple(shape):
      raise ValueError(f"{name}: {array.shape} is not {shape}")
    file.write(array.reshape(-1).view(np.uint8).data)
