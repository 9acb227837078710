"""Texts to tokens: pairs with their prompts, documents in segments."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from embgemma.data import prompts
from embgemma.data.denoisers import LEAST_TOKENS
from embgemma.data.denoising import cut
from embgemma.data.records import Example, content_hash
from embgemma.data.tasks import DataConfig
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import DataError

_TOKENIZE_BATCH = 2048
_TOKENIZE_CHARACTERS = 1 << 22  # of documents, at a time


def pair_texts(
  example: dict[str, Any], kind: str | None
) -> tuple[list[str], list[str]]:
  """Texts with prompts, and what identifies each for duplicate detection."""
  name = kind or example.get("task") or "search"
  if name not in prompts.TASK_PROMPTS:
    raise DataError(
      f"unknown task kind {name!r} in the record whose query begins "
      f"{example['query'][:60]!r}; there are {sorted(prompts.TASK_PROMPTS)}, or set "
      "the task's kind in gin"
    )
  templates = prompts.TASK_PROMPTS[name]
  title = example.get("title") or None
  negatives = list(example.get("negatives", ()))
  texts = [
    templates.format_query(example["query"]),
    templates.format_document(example["positive"], title),
    *(templates.format_document(text) for text in negatives),
  ]
  label = example.get("label")
  # Examples that share a label are positives of each other: one identity.
  positive = (
    f"label:{label}" if label else "\n".join(filter(None, (title, example["positive"])))
  )
  return texts, [example["query"], positive, *negatives]


def pairs(
  examples: Iterable[dict[str, Any]],
  kind: str | None,
  vocabulary: SentencePieceVocabulary,
  config: DataConfig,
) -> Iterator[Example]:
  """Examples in order, tokenised in batches; negatives beyond max_negatives dropped."""
  limits = config.lengths
  examples = iter(examples)
  while batch := list(itertools.islice(examples, _TOKENIZE_BATCH)):
    formatted = [pair_texts(example, kind) for example in batch]
    queries = vocabulary.encode_batch([t[0] for t, _ in formatted], limits["query"])
    positives = vocabulary.encode_batch(
      [t[1] for t, _ in formatted], limits["positive"]
    )
    kept = [texts[2 : 2 + config.max_negatives] for texts, _ in formatted]
    flat = iter(
      vocabulary.encode_batch([t for texts in kept for t in texts], limits["negatives"])
    )
    for i, (_, identities) in enumerate(formatted):
      negatives = [next(flat) for _ in kept[i]]
      hashes = [content_hash(text) for text in identities[: 2 + len(negatives)]]
      yield Example((queries[i], positives[i], *negatives), np.array(hashes, np.uint64))


def document_segments(
  documents: Iterable[str], vocabulary: SentencePieceVocabulary, longest: int
) -> Iterator[tuple[str, list[np.ndarray]]]:
  """Documents in order, each with its segments; none of one too short for any.

  Args:
    documents: Texts.
    vocabulary: That tokenises them, whole.
    longest: Most tokens of a segment.
  """
  for batch in _batched(documents):
    for text, tokens in zip(batch, vocabulary.encode_documents(batch), strict=True):
      yield text, cut(tokens, longest) if len(tokens) >= LEAST_TOKENS else []


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
  batch: list[str] = []
  characters = 0
  for text in documents:
    batch.append(text)
    characters += len(text)
    if len(batch) == _TOKENIZE_BATCH or characters >= _TOKENIZE_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def segments(
  examples: Iterable[dict[str, Any]],
  vocabulary: SentencePieceVocabulary,
  longest: int,
  counts: collections.Counter[str],
) -> Iterator[Example]:
  """Segments of all documents in order; counts documents, and those too short."""
  texts = (example["text"] for example in examples)
  for text, own in document_segments(texts, vocabulary, longest):
    counts["documents"] += 1
    counts["short"] += not own
    hashes = np.array([content_hash(text)], np.uint64)
    for segment in own:
      yield Example((segment,), hashes)
