"""Compares the vectors and token ids of a GGUF file in llama.cpp with ours.

    pip install llama-cpp-python
    python benchmarks/llama_cpp_parity.py --gguf=FILE --checkpoint=DIR [--texts=FILE]

Ours are computed in float32 from the checkpoint's own weights, so that the difference
is that of the file and of llama.cpp together. It exits with 1 if token ids differ, or
if a cosine is below --min_cosine.

What differs on a CPU: with F32 weights ggml's GELU, which is a table over float16;
with BF16 and Q8_0 the rounding of weights, and of activations to the same type.
--flash_attention casts keys and values to float16.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import llama_cpp
import numpy as np

from embgemma.inference.embedder import TextEncoder
from embgemma.interop import conversion
from embgemma.interop.model import Model

WORDS = "Sliding windows end where a text is longer, and no number gives that away. "
TEXTS = (
  "",
  "a",
  "task: search result | query: what is a sliding window?",
  "  two  spaces,\ta tab\n\n\nand lines; Größe, naïve, 東京, 🦊 12345",
  "<start_of_turn>user <mask> <unused7> [PAD99] <0x0A><eos>",
  WORDS * 8,
  WORDS * 40,
)


def open_file(path: pathlib.Path, context: int, flash: bool) -> llama_cpp.Llama:
  """The file in llama.cpp; texts see all of themselves only in one micro-batch."""
  return llama_cpp.Llama(
    str(path),
    embedding=True,
    n_ctx=context,
    n_batch=context,
    n_ubatch=context,
    flash_attn=flash,
    verbose=False,
  )


def our_vectors(model: Model, texts: Sequence[str], max_length: int) -> np.ndarray:
  """Unit vectors, computed in float32."""
  config = model.description.embedder
  transformer = dataclasses.replace(config.transformer, dtype="float32")
  config = dataclasses.replace(config, transformer=transformer)
  return TextEncoder(config, model.vocabulary, max_length).encode(model.params, texts)


def compare(model: Model, llama: llama_cpp.Llama, texts: Sequence[str]) -> float:
  """Prints a line for each text; the least cosine, or -1 where token ids differ."""
  context = llama.n_ctx()
  ids = [t.tolist() for t in model.vocabulary.encode_batch(texts, context)]
  theirs = [llama.tokenize(t.encode(), add_bos=True, special=False) for t in texts]
  ours = our_vectors(model, texts, context)
  worst = 1.0
  print(f"{'tokens':>7} {'same ids':>8} {'max |difference|':>16} {'1 - cosine':>11}")
  for text, own, other, vector in zip(texts, ids, theirs, ours, strict=True):
    embedded = np.asarray(llama.embed(text, normalize=True))
    cosine = float(np.clip(embedded @ vector.astype(np.float64), -1, 1))
    same = own == other  # not if the text is beyond the context: we cut, keeping EOS
    difference = np.abs(embedded - vector).max()
    print(f"{len(own):7} {same!s:>8} {difference:16.2e} {1 - cosine:11.2e}")
    worst = min(worst, cosine if same else -1.0)
  return worst


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--gguf", type=pathlib.Path, required=True, help="the file")
  parser.add_argument("--checkpoint", required=True, help="what it was exported from")
  parser.add_argument("--texts", type=pathlib.Path, help="one a line, instead of ours")
  parser.add_argument("--min_cosine", type=float, default=0.99)
  parser.add_argument("--flash_attention", action="store_true")
  options = parser.parse_args()
  model = conversion.open_embedder(options.checkpoint)
  texts = options.texts.read_text().splitlines() if options.texts else TEXTS
  context = model.description.embedder.transformer.max_length
  llama = open_file(options.gguf, context, options.flash_attention)
  worst = compare(model, llama, texts)
  if worst < options.min_cosine:
    sys.exit("token ids differ" if worst == -1 else f"a cosine is {worst:.6f}")


if __name__ == "__main__":
  main()
