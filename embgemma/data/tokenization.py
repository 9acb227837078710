"""Texts to tokens: pairs with their prompts, documents in segments."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from embgemma.data import prompts
from embgemma.data.denoisers import LEAST_TOKENS
from embgemma.data.denoising import cut
from embgemma.data.records import Example, content_hash
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError, DataError

_TOKENIZE_BATCH = 2048
_TOKENIZE_CHARACTERS = 1 << 22  # at a time


@dataclasses.dataclass(frozen=True)
class PairTexts:
  """The texts of a pair: query, positive, then negatives.

  Attributes:
    prompted: What is tokenised.
    contents: What they say: without prompts and ids, a title before its passage.
    identities: What makes two of them the same to the loss.
  """

  prompted: list[str]
  contents: list[str]
  identities: list[str]


def passages(example: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Titles ("" where there is none) and texts of the positive and the negatives.

  Args:
    example: As of `record_formats.pair_example`.
  """
  negatives = example.get("negatives", ())
  titles = example.get("negative_titles") or [""] * len(negatives)
  positive = (example.get("title") or "", example["positive"])
  return [positive, *zip(titles, negatives, strict=True)]


def example_prompts(
  example: Mapping[str, Any], kind: str | None, table: Mapping[str, str]
) -> prompts.TaskPrompts:
  """The prompts of an example of pairs.

  Args:
    example: As of `record_formats.pair_example`.
    kind: Of its task; None is the example's own, or "search".
    table: Prompts by name.

  Raises:
    DataError: the example's own kind is unknown.
  """
  try:
    return prompts.task_prompts(kind or example.get("task") or "search", table)
  except ConfigError as error:
    raise DataError(
      f"{error}, in the record whose query begins {example['query'][:60]!r}; or set "
      "the task's kind in gin"
    ) from None


def pair_texts(
  example: Mapping[str, Any],
  kind: str | None,
  table: Mapping[str, str] = prompts.PROMPTS,
  unique_ids: bool = False,
) -> PairTexts:
  """The texts of an example of pairs.

  A title beside negatives that have none becomes the first line of its passage: in the
  prompt it would tell what is sought from what is not.

  Args:
    example: As of `record_formats.pair_example`.
    kind: Of its prompts; None is the example's own.
    table: Prompts by name.
    unique_ids: Whether an id of the example begins each text, where no cut loses it,
      and labels count for nothing; see `tasks.Task`.

  Raises:
    DataError: the example's own kind is unknown.
  """
  templates = example_prompts(example, kind, table)
  query, documents = example["query"], passages(example)
  contents = [query, *("\n".join(filter(None, document)) for document in documents)]
  negatives = documents[1:]
  if negatives and not any(title for title, _ in negatives):
    documents = [("", text) for text in contents[1:]]
  identities = list(contents)
  if unique_ids:
    own = f"{content_hash(query + chr(0) + contents[1]):016x} "[8:]
    query, documents = own + query, [(title, own + text) for title, text in documents]
    identities = [own + text for text in contents]
  elif label := example.get("label"):
    # Examples that share a label are positives of each other: one identity.
    identities[1] = f"label:{label}"
  prompted = [
    templates.format_query(query),
    *(templates.format_document(text, title) for title, text in documents),
  ]
  return PairTexts(prompted, contents, identities)


def _hashes(texts: Iterable[str]) -> np.ndarray:
  return np.array([content_hash(text) for text in texts], np.uint64)


def pairs(
  texts: Iterable[PairTexts],
  vocabulary: SentencePieceVocabulary,
  lengths: Mapping[str, int],
  max_negatives: int,
  num_threads: int = -1,
) -> Iterator[Example]:
  """Pairs in order, tokenised in batches; negatives beyond max_negatives dropped.

  Args:
    texts: Of the pairs.
    vocabulary: That tokenises them.
    lengths: Tokens at which a query, a positive and a negative are cut.
    max_negatives: M.
    num_threads: That tokenise; -1 is one a core.
  """
  texts = iter(texts)
  while batch := list(itertools.islice(texts, _TOKENIZE_BATCH)):
    kept = [own.prompted[2 : 2 + max_negatives] for own in batch]
    queries, positives, flat = (
      vocabulary.encode_batch(own, lengths[role], num_threads)
      for role, own in (
        ("query", [own.prompted[0] for own in batch]),
        ("positive", [own.prompted[1] for own in batch]),
        ("negatives", [text for own in kept for text in own]),
      )
    )
    negatives = iter(flat)
    for own, query, positive, count in zip(
      batch, queries, positives, map(len, kept), strict=True
    ):
      tokens = (query, positive, *itertools.islice(negatives, count))
      contents = _hashes(own.contents[: len(tokens)])
      identities = contents
      if own.identities != own.contents:
        identities = _hashes(own.identities[: len(tokens)])
      yield Example(tokens, identities, contents)


def segments(
  documents: Iterable[str],
  vocabulary: SentencePieceVocabulary,
  longest: int,
  num_threads: int = -1,
) -> Iterator[list[Example]]:
  """Documents in order, each as its segments; none of one too short for any.

  Args:
    documents: Texts.
    vocabulary: That tokenises them, whole.
    longest: Most tokens of a segment.
    num_threads: That tokenise; -1 is one a core.
  """
  for batch in _batched(documents):
    encoded = vocabulary.encode_documents(batch, num_threads)
    for text, tokens in zip(batch, encoded, strict=True):
      parts = cut(tokens, longest) if len(tokens) >= LEAST_TOKENS else []
      hashes = _hashes([text])
      yield [Example((part,), hashes, hashes) for part in parts]


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
