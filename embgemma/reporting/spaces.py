"""A set's queries and documents as vectors, for numbers and for looking at."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.evaluation import analysis
from embgemma.evaluation.exact_search import search
from embgemma.evaluation.retrieval import EncodeFn, RetrievalEvaluator

_QUERIES, _DOCUMENTS = 300, 5_000  # embedded of a set
_SHOWN, _NEIGHBOURS, _LETTERS = 25, 5, 160


@dataclasses.dataclass(frozen=True)
class Space:
  """Queries from all over a set, their documents, and others.

  Attributes:
    queries: Unit vectors [Q, E].
    documents: Unit vectors [N, E]; the relevant ones first.
    query_texts: Of the queries, without prompts.
    document_texts: Of the documents, likewise.
    relevant: int [Q], a document of each query.
    query_languages: Of the queries, "" where it is not known.
    document_languages: Of the documents, likewise.
  """

  queries: np.ndarray
  documents: np.ndarray
  query_texts: Sequence[str]
  document_texts: Sequence[str]
  relevant: np.ndarray
  query_languages: Sequence[str] = ()
  document_languages: Sequence[str] = ()

  @classmethod
  def of(cls, evaluator: RetrievalEvaluator, encode: EncodeFn) -> "Space":
    """Embeds what of a set is looked at.

    Args:
      evaluator: Of the set.
      encode: Texts with prompts to unit vectors.
    """
    data = evaluator.collection
    place = {name: index for index, name in enumerate(data.ids)}
    # Files may be in the order of languages or subjects: from all over them.
    asked = _spread(list(data.queries.items()), _QUERIES)
    best = [
      max(data.qrels[name].items(), key=lambda item: item[1])[0] for name, _ in asked
    ]
    chosen = dict.fromkeys(place[name] for name in best)
    others = [index for index in range(len(data.ids)) if index not in chosen]
    for index in _spread(others, _DOCUMENTS - len(chosen)):
      chosen.setdefault(index)
    rows = {index: row for row, index in enumerate(chosen)}
    passages = evaluator.passages
    prompts = evaluator.prompts
    return cls(
      queries=encode([prompts.format_query(text) for _, text in asked]),
      documents=encode([passages[index] for index in rows]),
      query_texts=[text for _, text in asked],
      document_texts=[
        f"{data.titles[index]}: {data.texts[index]}".removeprefix(": ")
        for index in rows
      ],
      relevant=np.array([rows[place[name]] for name in best]),
      query_languages=[data.languages.get(name, "") for name, _ in asked],
      document_languages=[
        data.document_languages.get(data.ids[index], "") for index in rows
      ],
    )

  def numbers(self) -> analysis.Geometry:
    """What the space is like.

    Raises:
      ValueError: it has fewer than two documents.
    """
    lengths = [len(text) for text in self.document_texts]
    return analysis.analyse(
      self.queries,
      self.documents,
      self.relevant,
      lengths,
      self.query_languages,
      self.document_languages,
    )

  def neighbours(self) -> str:
    """The first queries, each with the documents nearest to it, as text."""
    scores, found = search(self.queries[:_SHOWN], self.documents, _NEIGHBOURS)
    lines = []
    for row, text in enumerate(self.query_texts[:_SHOWN]):
      lines.append(_short(text))
      for score, index in zip(scores[row], found[row], strict=True):
        mark = "*" if index == self.relevant[row] else " "
        lines.append(f"  {score:.3f} {mark} {_short(self.document_texts[index])}")
      lines.append("")
    return "\n".join(lines)


def _spread(values: Sequence[Any], most: int) -> list[Any]:
  """So many of them, in equal steps."""
  if len(values) <= most:
    return list(values)
  return [values[int(i)] for i in np.linspace(0, len(values) - 1, max(0, most))]


def _short(text: str) -> str:
  """One line."""
  text = " ".join(text.split())
  return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def principal_components(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Places in a plane, [N, 2] by set, of vectors [N, E] by set."""
  everything = np.concatenate(list(vectors.values())).astype(np.float64)
  centred = everything - everything.mean(0)
  _, _, directions = np.linalg.svd(centred, full_matrices=False)
  places = centred @ directions[:2].T
  ends = list(itertools.accumulate(len(of) for of in vectors.values()))
  return dict(zip(vectors, np.split(places, ends[:-1]), strict=True))
