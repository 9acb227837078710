"""XTREME-UP cross-lingual retrieval: MRR@10 of English passages.

Ruder et al., arXiv 2305.11938, as its code (google-research/xtreme-up) reads and scores
the files of `retrieval_cross_lang`: SPLIT/LANGUAGE.jsonl with the questions, whose id
is that of the passage they are about, and index.jsonl with all passages.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.data.jsonl import read_jsonl
from embgemma.errors import DataError

# Those of EmbeddingGemma's Table 9 (arXiv 2509.20354).
LANGUAGES = (
  *("as", "bho", "brx", "gbm", "gom", "gu", "hi", "hne", "kn", "mai"),
  *("ml", "mni", "mr", "mwr", "or", "pa", "ps", "sa", "ta", "ur"),
)
DEPTH = 10
_INDEX = "index.jsonl"


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """The benchmark's questions and passages.

  Attributes:
    ids: Of the passages.
    passages: (title, text) of each.
    questions: By language.
    gold: By language, of each question the index of its passage.
  """

  ids: tuple[str, ...]
  passages: tuple[tuple[str, str], ...]
  questions: Mapping[str, tuple[str, ...]]
  gold: Mapping[str, tuple[int, ...]]


def read(directory: pathlib.Path, split: str = "test") -> Retrieval:
  """The original files, of the languages of LANGUAGES that are there.

  Args:
    directory: Holds index.jsonl and a folder for each split.
    split: "test", "validation" or "train".

  Raises:
    DataError: a file is missing or damaged, or a question's passage is not among them.
  """
  index: dict[str, int] = {}
  passages: list[tuple[str, str]] = []
  for where, record in _records(directory / _INDEX):
    name, title, text = _texts(where, record, "id", "title", "context")
    if index.setdefault(name, len(passages)) == len(passages):
      passages.append((title, text))
  files = {
    language: path
    for language in LANGUAGES
    if (path := directory / split / f"{language}.jsonl").exists()
  }
  if not files:
    raise DataError(
      f"{directory / split}: holds no questions of XTREME-UP's languages, such as "
      f"{LANGUAGES[0]}.jsonl; give the folder retrieval_cross_lang"
    )
  questions, gold = {}, {}
  for language, path in files.items():
    texts, wanted = [], []
    for where, record in _records(path):
      name, text = _texts(where, record, "id", "question")
      if name not in index:
        raise DataError(f"{where}: passage {name!r} is not in {_INDEX}")
      texts.append(text)
      wanted.append(index[name])
    questions[language], gold[language] = tuple(texts), tuple(wanted)
  return Retrieval(tuple(index), tuple(passages), questions, gold)


def _records(path: pathlib.Path) -> Sequence[tuple[str, Mapping[str, Any]]]:
  found = [(f"{path}:{number}", record) for number, record in read_jsonl(path)]
  if not found:
    raise DataError(f"{path}: holds no records")
  return found


def _texts(where: str, record: Mapping[str, Any], *keys: str) -> list[str]:
  """Values as texts: ids may be numbers."""
  values = [record.get(key) for key in keys]
  if None in values:
    missing = [key for key in keys if record.get(key) is None]
    raise DataError(f"{where}: has no {', '.join(missing)}")
  return [str(value) for value in values]


def mrr(ranked: Sequence[Sequence[int]], gold: Sequence[int]) -> float:
  """Mean of 1 / rank of the gold passage among the first ten; 0 where it is not.

  Args:
    ranked: Indices of passages of each question, from the best.
    gold: Of each question.
  """
  scores = []
  for found, wanted in zip(ranked, gold, strict=True):
    first = list(found[:DEPTH])
    scores.append(1 / (first.index(wanted) + 1) if wanted in first else 0.0)
  return float(np.mean(scores))


def scores(
  ranked: Mapping[str, Sequence[Sequence[int]]], gold: Mapping[str, Sequence[int]]
) -> dict[str, float]:
  """MRR@10 in 0..1, of each language and, where all of LANGUAGES are there, their mean.

  Keys are such as "mrr@10" and "mrr@10:hi".
  """
  by_language = {name: mrr(of, gold[name]) for name, of in ranked.items()}
  found = {f"mrr@10:{name}": of for name, of in by_language.items()}
  if set(LANGUAGES) <= by_language.keys():
    found["mrr@10"] = float(np.mean([by_language[name] for name in LANGUAGES]))
  return found
