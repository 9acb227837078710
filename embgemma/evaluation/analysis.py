"""What a space of vectors is like: spread, directions in use, hubs, bias of length."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from embgemma.evaluation.exact_search import search
from embgemma.evaluation.metrics import spearman

_PAIRS = 4_000_000  # of which pairwise numbers are means
_NEIGHBOURS = 10


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Numbers of a set of queries and their documents.

  Attributes:
    alignment: Mean squared distance of a query and its document (Wang and Isola, 2020,
      arXiv 2005.10242, with exponent 2); lower is closer.
    uniformity: Log of the mean of exp(-2 d^2) over pairs of documents (the same);
      lower is more even.
    anisotropy: Mean cosine of pairs of documents; 0 for an even space.
    effective_rank: exp of the entropy of the normalised singular values of the
      documents (Roy and Vetterli, 2007): directions in use, at most the width.
    hubness: Skewness of how often a document is among the ten nearest of the others
      (Radovanovic et al., 2010); some .3 without hubs.
    length_bias: Spearman's correlation of how often a document is among the ten nearest
      of the queries and documents' lengths.
    language_bias: How much larger the share of a query's own language is among its ten
      nearest documents than among all, the relevant one left out; None where no query
      has documents of its language and of others. 0 is blind to language, as retrieval
      across them wants it.
  """

  alignment: float
  uniformity: float
  anisotropy: float
  effective_rank: float
  hubness: float
  length_bias: float
  language_bias: float | None = None


def analyse(
  queries: Float[np.ndarray, "Q E"],
  documents: Float[np.ndarray, "N E"],
  relevant: Int[np.ndarray, " Q"],
  lengths: Sequence[int],
  query_languages: Sequence[str] = (),
  document_languages: Sequence[str] = (),
) -> Geometry:
  """Numbers of a space.

  Args:
    queries: Unit vectors.
    documents: Unit vectors, two at least.
    relevant: Index of a document that belongs to each query.
    lengths: Of the documents, in characters.
    query_languages: Of each query; "" is not known. Empty is of none.
    document_languages: Of each document, likewise.

  Raises:
    ValueError: fewer than two documents.
  """
  if len(documents) < 2:
    raise ValueError("a space needs two documents at least")
  aligned = np.sum((queries - documents[relevant]) ** 2, axis=1)
  cosines = _pair_cosines(documents)
  _, nearest = search(queries, documents, _NEIGHBOURS)
  counts = np.bincount(nearest.ravel(), minlength=len(documents)).astype(float)
  return Geometry(
    alignment=float(aligned.mean()),
    uniformity=float(np.log(np.mean(np.exp(-2 * (2 - 2 * cosines))))),
    anisotropy=float(cosines.mean()),
    effective_rank=effective_rank(documents),
    hubness=skewness(_occurrences(documents)),
    length_bias=spearman(counts, np.asarray(lengths, float)),
    language_bias=_language_bias(
      nearest, relevant, np.array(query_languages), np.array(document_languages)
    ),
  )


def _occurrences(documents: Float[np.ndarray, "N E"]) -> Float[np.ndarray, " N"]:
  """How often each is among the nearest of the others."""
  _, nearest = search(documents, documents, _NEIGHBOURS + 1)
  own = nearest == np.arange(len(documents))[:, None]
  own[~own.any(axis=1), -1] = True  # of more equal ones than neighbours
  return np.bincount(nearest[~own], minlength=len(documents)).astype(float)


def _language_bias(
  nearest: Int[np.ndarray, "Q K"],
  relevant: Int[np.ndarray, " Q"],
  queries: Shaped[np.ndarray, " _"],
  documents: Shaped[np.ndarray, " _"],
) -> float | None:
  apart = []
  for row in np.flatnonzero(queries != "") if len(documents) else ():
    others = np.delete(documents, relevant[row])
    others = others[others != ""]
    near = documents[nearest[row][nearest[row] != relevant[row]]]
    near = near[near != ""]
    share = np.mean(others == queries[row]) if len(others) else 0.0
    if len(near) and 0 < share < 1:
      apart.append(np.mean(near == queries[row]) - share)
  return float(np.mean(apart)) if apart else None


def effective_rank(vectors: Float[np.ndarray, "N E"]) -> float:
  """exp of the entropy of singular values as shares of their sum."""
  values = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
  shares = values[values > 0] / values.sum()
  return float(np.exp(-np.sum(shares * np.log(shares))))


def skewness(values: Float[np.ndarray, " N"]) -> float:
  """Third standardized moment; 0 where all are equal."""
  apart = values - values.mean()
  deviation = float(np.sqrt(np.mean(apart**2)))
  return float(np.mean(apart**3)) / deviation**3 if deviation else 0.0


def _pair_cosines(vectors: Float[np.ndarray, "N E"]) -> Float[np.ndarray, " P"]:
  """Of all pairs of different vectors, or of as many drawn at random."""
  count = len(vectors)
  if count * (count - 1) // 2 <= _PAIRS:
    rows, columns = np.triu_indices(count, 1)
  else:
    generator = np.random.default_rng(0)
    rows = generator.integers(count, size=_PAIRS)
    columns = (rows + generator.integers(1, count, size=_PAIRS)) % count
  parts = [
    np.sum(vectors[rows[i : i + 65_536]] * vectors[columns[i : i + 65_536]], axis=1)
    for i in range(0, len(rows), 65_536)
  ]
  return np.concatenate(parts).astype(np.float64)
