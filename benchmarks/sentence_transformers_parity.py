"""Compares sentence-transformers' vectors and token ids of a directory with ours.

    python benchmarks/sentence_transformers_parity.py DIRECTORY --texts=FILE.jsonl \
      [--checkpoint=MODEL_DIR] [--prompts=none,query,document]

FILE has a JSON string a line. Ours come from DIRECTORY itself, or from the checkpoint
that it was exported from. Exits with 1 if token ids differ, or a component of a unit
vector by more than 2e-5 (float32 weights).
"""

import argparse
import json
import pathlib

import numpy as np
from sentence_transformers import SentenceTransformer

from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import conversion

BOUND = 2e-5


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("directory")
  parser.add_argument("--texts", required=True, type=pathlib.Path)
  parser.add_argument("--checkpoint")
  parser.add_argument("--prompts", default="none,query,document")
  options = parser.parse_args()
  texts = [json.loads(line) for line in options.texts.read_text().splitlines()]
  theirs = SentenceTransformer(options.directory, device="cpu", local_files_only=True)
  checkpoint = options.checkpoint or options.directory
  model = conversion.open_embedder(checkpoint)
  ours = CheckpointEmbedder(checkpoint, max_length=theirs.max_seq_length)
  length = theirs.max_seq_length
  expected = theirs.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
  found = [ids.tolist() for ids in model.vocabulary.encode_batch(texts, length)]
  tokens = sorted(map(len, found))
  same = sum(map(list.__eq__, found, expected))
  print(f"{len(texts)} texts of {tokens[0]} to {tokens[-1]} tokens")
  print(f"token ids equal: {same} of {len(texts)}")
  worst = 0.0
  for prompt in options.prompts.split(","):
    name = None if prompt == "none" else prompt
    vectors = theirs.encode(texts, prompt_name=name, batch_size=16)
    mine = ours.encode([ours.prompt(prompt) + text for text in texts])
    difference = float(np.abs(vectors - mine).max())
    worst = max(worst, difference)
    print(f"prompt {prompt}: largest difference {difference:.1e}")
  if same < len(texts) or worst > BOUND:
    raise SystemExit(f"not equal within {BOUND}")


if __name__ == "__main__":
  main()
