"""XOR-Retrieve and XTREME-UP with a model's vectors, at several widths."""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from embgemma.data import prompts
from embgemma.errors import DataError
from embgemma.evaluation import xor_retrieve, xtreme_up
from embgemma.evaluation.exact_search import search
from embgemma.evaluation.retrieval import EncodeFn, encode_checked
from embgemma.evaluation.suite import TaskResults
from embgemma.losses.matryoshka import truncate
from embgemma.typing import Float

BLOCK = 50_000  # passages embedded and searched together


def evaluate_xor_retrieve(
  encode: EncodeFn,
  task_prompts: prompts.TaskPrompts,
  widths: Sequence[int],
  questions: pathlib.Path,
  corpus: pathlib.Path,
  said: Callable[[int], None] = lambda passages: None,
) -> TaskResults:
  """Recalls at 2,000 and 5,000 tokens; the corpus is read and embedded once.

  Args:
    encode: Texts with prompts to unit vectors of full width.
    task_prompts: Of questions and passages.
    widths: Components kept.
    questions: The original file.
    corpus: See `xor_retrieve.read_passages`.
    said: Called with the passages so far after each block.

  Raises:
    DataError: a file is damaged.
    TrainingError: a vector is not finite.
  """
  asked = xor_retrieve.read_questions(questions)
  name = "xor_retrieve"
  texts = [task_prompts.format_query(each.text) for each in asked]
  vectors = encode_checked(encode, texts, name, widths)
  tops = {width: xor_retrieve.TopPassages(_cut(vectors, width)) for width in widths}
  seen = 0
  for block in _blocks(xor_retrieve.read_passages(corpus)):
    texts = [task_prompts.format_document(text, title) for title, text in block]
    embedded = encode_checked(encode, texts, name, widths)
    for width, top in tops.items():
      top.add(_cut(embedded, width), block)
    seen += len(block)
    said(seen)
  if not seen:
    raise DataError(f"{corpus}: holds no passages")
  results: dict[str, float] = {}
  for width, top in tops.items():
    # As the official baselines hand in: texts, without titles.
    ranked = {
      each.name: [text for _, text in found]
      for each, found in zip(asked, top.found(), strict=True)
    }
    results |= _at(width, xor_retrieve.recalls(asked, ranked))
  return {name: results}


def evaluate_xtreme_up(
  encode: EncodeFn,
  task_prompts: prompts.TaskPrompts,
  widths: Sequence[int],
  directory: pathlib.Path,
  split: str,
) -> TaskResults:
  """MRR@10 of each language, and their mean where all of the paper's are there.

  Args:
    encode: As of `evaluate_xor_retrieve`, and so on.
    directory: See `xtreme_up.read`.
    split: Likewise.

  Raises:
    DataError: a file is damaged.
    TrainingError: a vector is not finite.
  """
  data = xtreme_up.read(directory, split)
  name = "xtreme_up"
  documents = [task_prompts.format_document(t, title) for title, t in data.passages]
  passages = encode_checked(encode, documents, name, widths)
  questions = {
    language: encode_checked(
      encode, [task_prompts.format_query(text) for text in texts], name, widths
    )
    for language, texts in data.questions.items()
  }
  results: dict[str, float] = {}
  for width in widths:
    searched = _cut(passages, width)
    ranked = {
      language: search(_cut(vectors, width), searched, xtreme_up.DEPTH)[1].tolist()
      for language, vectors in questions.items()
    }
    results |= _at(width, xtreme_up.scores(ranked, data.gold))
  return {name: results}


def _cut(vectors: Float[np.ndarray, "N E"], width: int) -> Float[np.ndarray, "N W"]:
  return np.asarray(truncate(vectors, width))


def _at(width: int, found: Mapping[str, float]) -> dict[str, float]:
  """Keys as all evaluations have them: "mrr@10/768"."""
  return {f"{key}/{width}": value for key, value in found.items()}


def _blocks(
  passages: Iterator[xor_retrieve.Passage],
) -> Iterator[list[xor_retrieve.Passage]]:
  while block := list(itertools.islice(passages, BLOCK)):
    yield block
