"""The four cosines on EmbeddingGemma's model card, from the released weights.

    python benchmarks/golden_cosines.py DIRECTORY

DIRECTORY is a download of google/embeddinggemma-300m, or what `embgemma import` or
`embgemma export` made of it. Exits with 1 if a cosine is off by more than 0.001.
"""

import argparse

import numpy as np

from embgemma.inference.embedder import CheckpointEmbedder

QUERY = "Which planet is known as the Red Planet?"
DOCUMENTS = (
  "Venus is often called Earth's twin because of its similar size and proximity.",
  "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
  "Jupiter, the largest planet in our solar system, has a prominent red spot.",
  "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
)
COSINES = np.array([0.3011, 0.6359, 0.4930, 0.4889])
TOLERANCE = 1e-3  # the card has four digits, of computation in torch


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("directory")
  embedder = CheckpointEmbedder(parser.parse_args().directory)
  query = embedder.encode([embedder.prompt("query") + QUERY])[0]
  documents = [embedder.prompt("document") + text for text in DOCUMENTS]
  cosines = embedder.encode(documents) @ query
  for cosine, golden, text in zip(cosines, COSINES, DOCUMENTS, strict=True):
    print(f"{cosine:.4f}  model card {golden:.4f}  {text}")
  if np.abs(cosines - COSINES).max() > TOLERANCE:
    raise SystemExit("not the model card's: other weights, prompts or precision")


if __name__ == "__main__":
  main()
