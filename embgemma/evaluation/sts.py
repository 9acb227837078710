"""Sentence pairs: similarity by Spearman, classification by average precision."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from embgemma.data.jsonl import read_jsonl, string_field
from embgemma.data.prompts import TaskPrompts
from embgemma.errors import DataError
from embgemma.evaluation import metrics, retrieval
from embgemma.evaluation.statistics import Sample
from embgemma.evaluation.stored_vectors import kept_values, metric_key


@dataclasses.dataclass
class ScoredPairs:
  """Sentence pairs and their gold scores, on any scale; [N] each."""

  sentences1: list[str]
  sentences2: list[str]
  scores: list[float]


def read_sts(path: str | pathlib.Path) -> ScoredPairs:
  """Returns the pairs of a JSONL file, plain or .gz.

  Records are {"sentence1", "sentence2", "score"}; "label" may stand for "score".

  Raises:
    DataError: a missing or malformed file, a score that is not a finite number, or
      fewer than two distinct scores, which no prediction could be held against.
  """
  pairs = ScoredPairs([], [], [])
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    score = record.get("score", record.get("label"))
    if (
      not isinstance(score, int | float)
      or isinstance(score, bool)
      or not math.isfinite(score)
    ):
      raise DataError(
        f'{where}: "score" (or "label") must be a finite number, got {score!r}'
      )
    pairs.sentences1.append(string_field(record, "sentence1", where))
    pairs.sentences2.append(string_field(record, "sentence2", where))
    pairs.scores.append(float(score))
  if len(set(pairs.scores)) < 2:
    raise DataError(
      f"{path}: {len(pairs.scores)} pairs with {len(set(pairs.scores))} distinct "
      "scores; at least two are needed"
    )
  return pairs


@dataclasses.dataclass(frozen=True)
class StsEvaluator:
  """Spearman's correlation of cosine with the gold scores, at each width.

  Attributes:
    name: The task's name in results.
    path: See `read_sts`; read at the first `check` or `evaluate` and kept.
    prompts: The query prompt goes in front of both sentences.
    widths: Prefixes to cut; texts are embedded once for all of them.
    vectors: Formats in which the vectors are kept (`vector_formats`).
  """

  name: str
  path: str | pathlib.Path
  prompts: TaskPrompts = TaskPrompts("STS", "STS")
  widths: Sequence[int] = retrieval.MATRYOSHKA_WIDTHS
  vectors: Sequence[str] = ("float32",)

  @functools.cached_property
  def pairs(self) -> ScoredPairs:
    """The data, read once."""
    return read_sts(self.path)

  def check(self) -> None:
    """Reads the data, so that a mistake shows before training starts.

    Raises:
      DataError: the data is missing or malformed.
      ConfigError: the widths cannot work.
    """
    retrieval.check_widths(self.name, self.widths)
    _ = self.pairs

  def evaluate(self, encode: retrieval.EncodeFn) -> dict[str, float]:
    """Values by key such as "spearman/768".

    Raises:
      DataError: the data is missing or malformed.
      ConfigError: a width is above the embedding's.
      TrainingError: an embedding is not finite.
    """
    vectors, gold = self._embedded(encode), np.array(self.pairs.scores)
    return {
      metric_key(self.main_metric, name, width): self._value(
        self._cosines(vectors, width, name), gold
      )
      for name in self.vectors
      for width in self.widths
    }

  def sample(self, encode: retrieval.EncodeFn) -> Sample:
    """Ranks of the pairs by cosine, at the widest of the widths.

    Raises:
      DataError, ConfigError, TrainingError: see `evaluate`.
    """
    from scipy import stats

    cosines = self._cosines(self._embedded(encode), max(self.widths), "float32")
    gold = np.array(self.pairs.scores)
    ranks = stats.rankdata(cosines) / len(cosines)
    return Sample(ranks, lambda values, drawn: self._value(values[drawn], gold[drawn]))

  def _embedded(self, encode: retrieval.EncodeFn) -> Float[np.ndarray, "M E"]:
    """Vectors of the distinct sentences: sets such as STS-B repeat them."""
    self.check()
    texts = [self.prompts.format_query(text) for text in self._rows]
    return retrieval.encode_checked(encode, texts, self.name, self.widths)

  @functools.cached_property
  def _rows(self) -> dict[str, int]:
    """Distinct sentences, numbered."""
    sentences = dict.fromkeys([*self.pairs.sentences1, *self.pairs.sentences2])
    return {text: row for row, text in enumerate(sentences)}

  @functools.cached_property
  def _sides(self) -> tuple[list[int], list[int]]:
    """Rows of the first and the second sentences."""
    first, second = self.pairs.sentences1, self.pairs.sentences2
    return [self._rows[text] for text in first], [self._rows[text] for text in second]

  def _cosines(
    self, vectors: Float[np.ndarray, "M E"], width: int, name: str
  ) -> Float[np.ndarray, " N"]:
    """Of the pairs, from vectors kept in a format."""
    first, second = self._sides
    (kept,) = kept_values(name, retrieval.prefix(vectors, width))
    cosine = np.sum(kept[first] * kept[second], axis=1)
    if name != "float32":  # no longer of unit norm; equal products stay equal
      norms = np.linalg.norm(kept, axis=1)
      cosine = cosine / (norms[first] * norms[second])
    return cosine

  @property
  def main_metric(self) -> str:
    """Its name."""
    return "spearman"

  def _value(
    self, cosine: Float[np.ndarray, " N"], gold: Float[np.ndarray, " N"]
  ) -> float:
    return metrics.spearman(cosine, gold)


@dataclasses.dataclass(frozen=True)
class PairClassificationEvaluator(StsEvaluator):
  """Average precision of cosine for pairs labelled 1 (alike) or 0, at each width.

  Keys are such as "average_precision/768". Attributes as of `StsEvaluator`.
  """

  prompts: TaskPrompts = TaskPrompts("PairClassification", "PairClassification")

  @functools.cached_property
  def pairs(self) -> ScoredPairs:
    """The data, read once.

    Raises:
      DataError: see `read_sts`; or a label is neither 0 nor 1.
    """
    pairs = read_sts(self.path)
    if set(pairs.scores) != {0.0, 1.0}:
      raise DataError(
        f"{self.path}: labels are {sorted(set(pairs.scores))[:5]}; pair "
        "classification needs 1 for pairs that are alike and 0 for others"
      )
    return pairs

  @property
  def main_metric(self) -> str:
    """Its name."""
    return "average_precision"

  def _value(
    self, cosine: Float[np.ndarray, " N"], gold: Float[np.ndarray, " N"]
  ) -> float:
    return metrics.average_precision(cosine, gold)
