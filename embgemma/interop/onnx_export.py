"""Embedders as ONNX: token ids and mask in, unit vectors out.

torch's exporter writes what sentence-transformers computes with the exported weights;
onnxruntime quantizes it. Both are of the extra `onnx`.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from embgemma.errors import ConfigError, of_extra
from embgemma.interop import torch_pipeline
from embgemma.interop.model import Model
from embgemma.interop.torch_pipeline import INPUTS, OUTPUT
from embgemma.models.quantization import FORMATS

DTYPES = ("float32", "int8")
_MODEL = pathlib.Path("onnx") / "model.onnx"
_INT8_MODEL = pathlib.Path("onnx") / "model_quantized.onnx"  # as transformers.js has it
_FLOAT = 1  # TensorProto.FLOAT
_TEXTS, _TOKENS = 2, 8  # that the exporter traces with; both vary
_MOST_TEXTS = 4096


def check_exportable(dtype: str) -> None:
  """Refuses what `write` would, before weights are read.

  Raises:
    ConfigError: another dtype, or the extra is not installed.
  """
  if dtype not in DTYPES:
    raise ConfigError(f"--dtype={dtype}: onnx has {' and '.join(DTYPES)}")
  with of_extra("`embgemma export --to=onnx`", "onnx"):
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import sentence_transformers  # noqa: F401


def write(
  model: Model, directory: pathlib.Path, dtype: str, max_length: int, card: str = ""
) -> tuple[str, ...]:
  """Writes onnx/model.onnx (int8: model_quantized.onnx) with tokenizer and settings.

  The graph takes int64 `input_ids` and `attention_mask` [texts, tokens], with BOS, EOS
  and the prompt, and gives float32 `sentence_embedding` [texts, E] of unit norm. int8
  is onnxruntime's dynamic quantization of products, weights by output channel and
  activations as they come, and a token table with a scale for each row.

  Args:
    model: An embedder.
    directory: Exists, and is empty.
    dtype: Of the weights, one of DTYPES.
    max_length: Tokens a text is cut to.
    card: Content of README.md.

  Returns:
    What the user should know about it.

  Raises:
    CheckpointError, ConfigError: see `sentence_transformers_writer.write`.
  """
  path = directory / _MODEL
  path.parent.mkdir()
  with torch_pipeline.loaded(model, max_length, card) as pipeline:
    _export(pipeline.vectors, path, max_length)
    if dtype == "int8":
      _quantize(path, directory / _INT8_MODEL)
      for unquantized in path.parent.glob(f"{path.name}*"):  # and its .data
        unquantized.unlink()
    pipeline.copy_settings(directory)
    return pipeline.notes


def _export(vectors: Any, path: pathlib.Path, max_length: int) -> None:
  import torch

  ids = torch.ones((_TEXTS, min(_TOKENS, max_length)), dtype=torch.int64)
  varying = {
    0: torch.export.Dim("texts", min=1, max=_MOST_TEXTS),
    1: torch.export.Dim("tokens", min=2, max=max_length),
  }
  program = torch.onnx.export(
    vectors,
    (ids, torch.ones_like(ids)),
    dynamo=True,
    dynamic_shapes=(varying, varying),
    input_names=list(INPUTS),
    output_names=[OUTPUT],
    verbose=False,
  )
  assert program is not None
  program.save(str(path))


def _quantize(source: pathlib.Path, path: pathlib.Path) -> None:
  import onnx
  from onnxruntime import quantization

  model = onnx.load(source)
  # The exporter's shapes of what lies between are not onnx's own, which it refuses.
  model.graph.ClearField("value_info")
  _quantize_table(model.graph)
  quantization.quantize_dynamic(
    model,
    path,
    op_types_to_quantize=["MatMul", "Gemm"],
    per_channel=True,
    weight_type=quantization.QuantType.QInt8,
  )


def _quantize_table(graph: Any) -> None:
  """int8 rows with a scale each, in place of the token table.

  onnxruntime's own way has one scale for all rows: the longest row would set it.
  """
  import onnx
  from onnx import TensorProto, helper, numpy_helper

  weights = {each.name: each for each in graph.initializer}
  found = [
    index
    for index, node in enumerate(graph.node)
    if node.op_type == "Gather" and _is_table(weights.get(node.input[0]))
  ]
  (index,) = found
  lookup = graph.node[index]
  table = weights[lookup.input[0]]
  kept = FORMATS["int8_channel"].quantize(jnp.asarray(numpy_helper.to_array(table)), -1)
  graph.initializer.remove(table)
  names = [f"{table.name}.codes", f"{table.name}.scales"]
  for name, values in zip(names, (kept.codes, kept.scales), strict=True):
    graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
  (output,) = lookup.output
  rows = [f"{output}.{part}" for part in ("codes", "numbers", "scales")]
  nodes = [
    helper.make_node("Gather", [names[0], lookup.input[1]], [rows[0]], axis=0),
    helper.make_node("Cast", [rows[0]], [rows[1]], to=TensorProto.FLOAT),
    helper.make_node("Gather", [names[1], lookup.input[1]], [rows[2]], axis=0),
    helper.make_node("Mul", [rows[1], rows[2]], [output]),
  ]
  following: list[onnx.NodeProto] = list(graph.node)
  following[index : index + 1] = nodes
  graph.ClearField("node")
  graph.node.extend(following)


def _is_table(tensor: Any) -> bool:
  return tensor is not None and len(tensor.dims) == 2 and tensor.data_type == _FLOAT
