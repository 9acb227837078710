"""Time and peak memory of export and import at full size, on random weights.

    python benchmarks/conversion.py --model=embeddinggemma_300m --directory=SCRATCH

Makes a checkpoint of the model with a vocabulary of its table's size, then runs
`embgemma export --to=hf`, `import --from=hf` and `export --to=gguf`, each in a process
of its own, and compares what comes back bit for bit. Needs about 8 GB of disk and
memory for the 300M model.
"""

import argparse
import itertools
import os
import pathlib
import shutil
import string
import subprocess
import sys
import time

import jax
import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from embgemma import checkpoints, gin_config
from embgemma.data import builtin_corpus, prompts
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.interop import conversion
from embgemma.interop.model import Model
from embgemma.models.embedder import abstract_params


def vocabulary_of_size(size: int, directory: pathlib.Path) -> SentencePieceVocabulary:
  """A vocabulary trained on built-in text, filled up with strings of letters."""
  texts = (r["positive"] for r in builtin_corpus.examples("stdlib_docs", "train"))
  small = train_vocabulary(texts, 4096, directory / "small.model", max_bytes=500_000)
  model = ModelProto.FromString(small.serialized)
  known = {piece.piece for piece in model.pieces}
  lowest = min(piece.score for piece in model.pieces)
  letters = string.ascii_lowercase
  strings = itertools.chain.from_iterable(
    map("".join, itertools.product(letters, repeat=n)) for n in (2, 3, 4)
  )
  new = (s for s in strings if s not in known)
  for rank, piece in enumerate(itertools.islice(new, size - small.size), start=1):
    model.pieces.add(piece=piece, score=lowest - rank, type=1)
  model.trainer_spec.vocab_size = size
  return SentencePieceVocabulary.from_serialized(model.SerializeToString(), "made")


def make_checkpoint(name: str, directory: pathlib.Path) -> None:
  """Random weights at the shapes of gin/models/NAME.gin."""
  gin_config.register()
  gin_config.parse([f"gin/models/{name}.gin"], ["TransformerConfig.dtype=float32"], [])
  config = gin_config.resolve("EmbedderConfig")
  generator = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: generator.standard_normal(leaf.shape, np.float32) * 0.02,
    abstract_params(config),
  )
  length = config.transformer.max_length
  lengths = {"query": length, "positive": length, "negatives": length}
  vocabulary = vocabulary_of_size(config.transformer.vocab_size, directory)
  described = checkpoints.Description(config, lengths, prompts.PROMPTS)
  model = Model(described, vocabulary, params)
  print(f"{name}: {model.size:,} parameters, {model.size * 4 / 1e9:.2f} GB")
  conversion.write_checkpoint(model, directory / "checkpoint")


def measured(*command: str) -> None:
  """Runs a command of embgemma; prints its seconds and its peak resident memory."""
  began = time.monotonic()
  process = subprocess.Popen([sys.executable, "-m", "embgemma", *command])
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.monotonic() - began
  if status:
    raise SystemExit(1)
  peak = usage.ru_maxrss * 1024 / 1e9
  print(f"{' '.join(command[:2])}: {seconds:.1f} s, peak {peak:.2f} GB", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", default="embeddinggemma_300m")
  parser.add_argument("--directory", required=True, type=pathlib.Path)
  options = parser.parse_args()
  root = options.directory
  root.mkdir(parents=True, exist_ok=True)
  # In a process of its own: its memory is not theirs.
  if os.fork() == 0:
    make_checkpoint(options.model, root)
    os._exit(0)
  os.wait()
  first, hf, again = root / "checkpoint", root / "hf", root / "imported"
  measured("export", "--to=hf", f"--checkpoint={first}", f"--output={hf}")
  measured("import", "--from=hf", f"--source={hf}", f"--output={again}")
  for dtype in ("bfloat16", "q8_0"):
    gguf = root / f"{dtype}.gguf"
    measured(
      "export", "--to=gguf", f"--checkpoint={first}", f"--output={gguf}",
      f"--dtype={dtype}",
    )  # fmt: skip
  ours, theirs = (conversion.open_embedder(path) for path in (first, again))
  same = jax.tree.map(np.array_equal, ours.params, theirs.params)
  print(f"bit-identical after export and import: {all(jax.tree.leaves(same))}")
  print(f"tokenizer too: {ours.vocabulary.serialized == theirs.vocabulary.serialized}")
  shutil.rmtree(root)


if __name__ == "__main__":
  main()
