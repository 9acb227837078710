"""A checkpoint as ONNX in float32 and int8: vectors against ours, and texts a second.

    python benchmarks/quantization/onnx_runtime.py --checkpoint=DIR --texts=FILE

Texts, one a line, in batches of like lengths; the two graphs embed them in turn, in one
process with one thread a core. Our own embedder beside them: packed rows, compiled.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import onnxruntime

from embgemma.inference.embedder import TextEncoder
from embgemma.interop import conversion, onnx_export
from embgemma.interop.model import Model

MODELS = {"float32": "model.onnx", "int8": "model_quantized.onnx"}


def runner(
  model: Model, path: Path, length: int, batch: int
) -> Callable[[Sequence[str]], np.ndarray]:
  """What embeds texts with a graph."""
  session = onnxruntime.InferenceSession(path)

  def embed(texts: Sequence[str]) -> np.ndarray:
    tokens = model.vocabulary.encode_batch(texts, length)
    order = np.argsort([len(own) for own in tokens], kind="stable")
    found = [np.zeros(0)] * len(texts)
    for start in range(0, len(order), batch):
      rows = order[start : start + batch]
      ids = np.zeros((len(rows), max(len(tokens[i]) for i in rows)), np.int64)
      mask = np.zeros_like(ids)
      for row, i in enumerate(rows):
        ids[row, : len(tokens[i])] = tokens[i]
        mask[row, : len(tokens[i])] = 1
      (vectors,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
      for i, vector in zip(rows, vectors, strict=True):
        found[i] = vector
    return np.stack(found)

  return embed


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--texts", type=Path, required=True)
  parser.add_argument("--count", type=int, default=200)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--rounds", type=int, default=7)
  options = parser.parse_args()
  model = conversion.open_embedder(options.checkpoint)
  length = model.description.max_length
  texts = options.texts.read_text(encoding="utf-8").splitlines()[: options.count]
  config = model.description.embedder
  if config.quantization is not None:
    parser.error("of a checkpoint trained with formats ONNX has the unrounded weights")
  encoder = TextEncoder(config, model.vocabulary, length)
  params = jax.device_put(model.params)
  sides = {"embgemma": lambda texts: encoder.encode(params, texts)}
  sizes = {}
  with tempfile.TemporaryDirectory() as made:
    for dtype, file in MODELS.items():
      directory = Path(made) / dtype
      directory.mkdir()
      onnx_export.write(model, directory, dtype, length)
      path = directory / "onnx" / file
      sizes[dtype] = sum(p.stat().st_size for p in path.parent.iterdir()) / 1e6
      sides[dtype] = runner(model, path, length, options.batch)
    vectors = {name: embed(texts) for name, embed in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
      for name, embed in sides.items():
        start = time.perf_counter()
        embed(texts)
        seconds[name].append(time.perf_counter() - start)
  print(f"{len(texts)} texts")
  print("| | MB | largest difference | smallest cosine | mean | texts/s | of float32 |")
  print("|---|---:|---:|---:|---:|---:|---:|")
  for name, found in vectors.items():
    cosines = np.sum(found * vectors["embgemma"], axis=1)
    apart = np.abs(found - vectors["embgemma"]).max()
    rate = len(texts) / np.median(seconds[name])
    ratio = np.median(np.divide(seconds["float32"], seconds[name]))
    size = f"{sizes[name]:.1f}" if name in sizes else ""
    print(
      f"| {name} | {size} | {apart:.1e} | {cosines.min():.5f} | {cosines.mean():.5f} "
      f"| {rate:.0f} | {ratio:.2f} |"
    )


if __name__ == "__main__":
  main()
