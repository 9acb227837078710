"""XOR-Retrieve over a large made-up corpus: time and memory of reading and searching.

    python benchmarks/mteb/xor_scale.py [--passages=1000000] [--questions=2000]

Passages of 100 words stream from a gzipped TSV in the original format; vectors are
random unit ones in place of a model's, of two widths. What a model adds is the time of
embedding; see docs/performance.md for its rate.
"""

import argparse
import gzip
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from embgemma.data.prompts import TaskPrompts
from embgemma.evaluation import crosslingual

WIDTH = 768
LANGUAGES = ("ar", "bn", "fi", "ja", "ko", "ru", "te")  # of XOR-Retrieve


def write(folder: Path, passages: int, questions: int) -> tuple[Path, Path]:
  """The two files."""
  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(20_000)]
  corpus = folder / "psgs_w100.tsv.gz"
  with gzip.open(corpus, "wt", compresslevel=1) as file:
    file.write("id\ttext\ttitle\n")
    for i in range(passages):
      text = " ".join(draw.choices(words, k=100))
      file.write(f'{i}\t"{text}"\t{words[i % len(words)]}\n')
  asked = folder / "questions.jsonl"
  with asked.open("w") as file:
    for i in range(questions):
      language = LANGUAGES[i % len(LANGUAGES)]
      answers = [" ".join(draw.choices(words, k=1))]
      record = {"id": i, "lang": language, "question": f"q{i}", "answers": answers}
      file.write(json.dumps(record) + "\n")
  return asked, corpus


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--passages", type=int, default=1_000_000)
  parser.add_argument("--questions", type=int, default=2_000)
  options = parser.parse_args()
  generator = np.random.default_rng(0)
  embedding = 0.0

  def encode(texts: list[str]) -> np.ndarray:
    nonlocal embedding
    began = time.monotonic()
    vectors = generator.standard_normal((len(texts), WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    embedding += time.monotonic() - began
    return vectors

  with tempfile.TemporaryDirectory() as made:
    questions, corpus = write(Path(made), options.passages, options.questions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    found = crosslingual.evaluate_xor_retrieve(
      encode, TaskPrompts(), (WIDTH, 128), questions, corpus
    )
    seconds = time.monotonic() - began - embedding
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  scores = found["xor_retrieve"]
  print(f"{options.passages:,} passages, {options.questions:,} questions, two widths")
  print(f"{seconds:.0f} s without the vectors' own {embedding:.0f} s")
  print(
    f"at most resident before {before / 1024:.0f} MiB, in all {peak / 1024:.0f} MiB"
  )
  print(
    {key: round(scores[key], 3) for key in (f"recall@2kt/{WIDTH}", "recall@5kt/128")}
  )


if __name__ == "__main__":
  main()
