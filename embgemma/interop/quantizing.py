"""A checkpoint of codes made of one of float32, and what that costs and saves."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from rich.table import Table

from embgemma import checkpoints
from embgemma.interop import codes, conversion
from embgemma.interop.model import Model
from embgemma.models import quantization
from embgemma.models.config import QuantizationConfig
from embgemma.models.quantization import FORMATS, Quantized

REPORT_FILE = "quantization.json"
_WORST = 8  # matrices that are listed one by one


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter, kept.

  Attributes:
    name: Its path; of one of several layers that are kept as one, with its number.
    kept_as: Its format, or float32.
    values: Numbers.
    bytes: Kept, codes packed.
    error: Root mean square of what was changed, over that of the values.
  """

  name: str
  kept_as: str
  values: int
  bytes: int
  error: float


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
  """A model with codes.

  Attributes:
    model: Its `params` are of `quantization.quantized`, on the host.
    rows: Of all parameters.
  """

  model: Model
  rows: tuple[Row, ...]

  @property
  def bytes(self) -> int:
    """Of all parameters."""
    return sum(row.bytes for row in self.rows)


def quantize(model: Model, rules: QuantizationConfig) -> QuantizedModel:
  """The model with the weights that have a format as codes.

  Args:
    model: An embedder with float32 parameters.
    rules: Which have one.

  Raises:
    ConfigError: see `quantization.formats`.
  """
  config = dataclasses.replace(model.description.embedder, quantization=rules)
  found = jax.device_get(quantization.quantized(model.params, rules))
  formats = quantization.formats(model.params, rules)
  rows = []
  for path, leaf in traverse_util.flatten_dict(found).items():
    name = "/".join(path)
    if not isinstance(leaf, Quantized):
      rows.append(Row(name, "float32", leaf.size, leaf.nbytes, 0.0))
      continue
    of: Any = traverse_util.flatten_dict(model.params)[path]
    values, chosen = np.asarray(leaf.values()), formats[path]
    axis = quantization.input_axis(path)
    # Layers of a scan lie on a leading axis; each is a matrix.
    stacked = of.ndim > 2
    for index, matrix in enumerate(of if stacked else [of]):
      of_it = values[index] if stacked else values
      error = np.mean(np.square(of_it - matrix)) / np.mean(np.square(matrix))
      kept = FORMATS[chosen].bytes(matrix.shape, axis)
      own = f"{name}[{index}]" if stacked else name
      rows.append(Row(own, chosen, matrix.size, kept, float(np.sqrt(error))))
  description = dataclasses.replace(model.description, config=config)
  return QuantizedModel(
    dataclasses.replace(model, description=description, params=found), tuple(rows)
  )


def write(quantized: QuantizedModel, directory: pathlib.Path) -> None:
  """Writes a checkpoint directory of codes, with quantization.json.

  Raises:
    OSError: the directory cannot be written.
  """
  model = quantized.model
  with conversion.plain_errors():
    checkpoints.write_description(directory, model.description, model.vocabulary, "")
    checkpoints.write_weights(directory, codes.stored(model.params), codes.ITEM)
  content = [dataclasses.asdict(row) for row in quantized.rows]
  (directory / REPORT_FILE).write_text(json.dumps(content, indent=1) + "\n")


def tables(quantized: QuantizedModel) -> tuple[Table, Table]:
  """Bytes by group of parameters, and the matrices that were changed most."""
  groups: dict[tuple[str, str], list[Row]] = {}
  for row in quantized.rows:
    groups.setdefault((_group(row.name), row.kept_as), []).append(row)
  sizes = Table(title="bytes by group")
  errors = Table(title="changed most")
  for table, heads in (
    (sizes, ("group", "kept as", "values", "MB", "bits a value", "error")),
    (errors, ("matrix", "kept as", "values", "error")),
  ):
    for number, head in enumerate(heads):
      table.add_column(head, justify="left" if number < 2 else "right")
  for (group, kept_as), rows in groups.items():
    values, size = sum(row.values for row in rows), sum(row.bytes for row in rows)
    mean = sum(row.error * row.values for row in rows) / values
    numbers = (f"{size / 1e6:,.1f}", f"{8 * size / values:.2f}", f"{mean:.2%}")
    sizes.add_row(group, kept_as, f"{values:,}", *numbers)
  for row in sorted(quantized.rows, key=lambda row: -row.error)[:_WORST]:
    errors.add_row(row.name, row.kept_as, f"{row.values:,}", f"{row.error:.2%}")
  return sizes, errors


def _group(name: str) -> str:
  for part, group in (
    ("/table", "token table"),
    ("attention/", "attention"),
    ("mlp/", "feed-forward"),
    ("projection_", "heads"),
  ):
    if part in name and not name.endswith("scale"):
      return group
  return "norms and other vectors"
