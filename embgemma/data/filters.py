"""Filters by length and by language."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from embgemma.data.cleaners import Example, Filter, check_side, sides
from embgemma.data.words import tokenize
from embgemma.errors import ConfigError

_UNITS = ("characters", "words")
_JUDGED_CHARACTERS = 4096  # of a text, from its start: more tells no more


@dataclasses.dataclass(frozen=True)
class LengthFilter(Filter):
  """Drops examples with texts that are too short, too long or too unlike in length.

  Attributes:
    unit: "characters" or "words", as `words.tokenize` has them.
    min_query, max_query: Bounds of queries, inclusive; None is no bound.
    min_positive, max_positive: Bounds of positives, without titles.
    min_text, max_text: Bounds of documents.
    max_ratio: Most that the longer of query and positive has of the shorter, as is
      usual for translations; None is no bound.
  """

  unit: str = "characters"
  min_query: int | None = None
  max_query: int | None = None
  min_positive: int | None = None
  max_positive: int | None = None
  min_text: int | None = None
  max_text: int | None = None
  max_ratio: float | None = None

  def __post_init__(self):
    if self.unit not in _UNITS:
      raise ConfigError(
        f"LengthFilter: unit must be one of {_UNITS}, got {self.unit!r}"
      )
    for side in ("query", "positive", "text"):
      low, high = self._bounds(side)
      if low is not None and high is not None and low > high:
        raise ConfigError(
          f"LengthFilter: min_{side} {low} is above max_{side} {high}; nothing is left"
        )
    if self.max_ratio is not None and self.max_ratio < 1:
      raise ConfigError(f"LengthFilter: max_ratio must be >= 1, got {self.max_ratio}")
    if all(value is None for name, value in vars(self).items() if name != "unit"):
      raise ConfigError("LengthFilter: no bound is set; set one, such as min_query")

  def _bounds(self, side: str) -> tuple[int | None, int | None]:
    return getattr(self, f"min_{side}"), getattr(self, f"max_{side}")

  def fault(self, example: Example) -> str | None:
    lengths = {}
    for side in ("query", "positive", "text"):
      if side not in example:
        continue
      text = example[side]
      lengths[side] = len(text if self.unit == "characters" else tokenize(text))
      low, high = self._bounds(side)
      if low is not None and lengths[side] < low:
        return f"{side} has fewer than {low} {self.unit}"
      if high is not None and lengths[side] > high:
        return f"{side} has more than {high} {self.unit}"
    if self.max_ratio is not None and "query" in lengths:
      shorter, longer = sorted((lengths["query"], lengths["positive"]))
      if longer > self.max_ratio * shorter:
        return f"one side has more than {self.max_ratio:g} times the other's length"
    return None


@dataclasses.dataclass(frozen=True)
class LanguageFilter(Filter):
  """Keeps texts in given languages, identified by py3langid (extra `clean`).

  py3langid is Lui and Baldwin's langid.py (2012) with a newer model of 140 languages.

  Attributes:
    keep: Languages' ISO 639 codes, such as ("en", "de").
    on: "query", "positive" (with its title) or "pair": both must be in them. Documents
      are judged by their text.
    least_probability: That a text is in one of them: the sum of theirs. Technical
      text is often uncertain: of English documentation 1.5 % is below 0.1, 8 % below
      0.5, of Python 3 % and 28 %.
    least_characters: Shorter texts are not judged, and stay.
  """

  keep: Sequence[str]
  on: str = "pair"
  least_probability: float = 0.1
  least_characters: int = 20

  def __post_init__(self):
    object.__setattr__(self, "keep", tuple(self.keep))
    check_side("LanguageFilter", self.on)
    if not self.keep or not all(isinstance(code, str) for code in self.keep):
      raise ConfigError(
        f"LanguageFilter: keep names languages, such as ('en', 'de'); got {self.keep!r}"
      )
    if not 0 < self.least_probability < 1:
      raise ConfigError(
        "LanguageFilter: least_probability must be between 0 and 1, got "
        f"{self.least_probability!r}"
      )

  def check(self) -> None:
    known = _identifier().labels
    unknown = sorted(set(self.keep) - set(known))
    if unknown:
      raise ConfigError(
        f"LanguageFilter: py3langid does not know {unknown}; it knows {sorted(known)}"
      )

  def fault(self, example: Example) -> str | None:
    for side, text in sides(example, self.on).items():
      if len(text) < self.least_characters:
        continue
      ranked = _identifier().rank(text[:_JUDGED_CHARACTERS])
      probability = sum(p for language, p in ranked if language in self.keep)
      if probability < self.least_probability:
        best = ranked[0][0]
        return f"{side} {'is unclear' if best in self.keep else f'seems to be {best}'}"
    return None


@functools.cache
def _identifier() -> Any:
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as error:
    raise ConfigError(
      "LanguageFilter needs embgemma[clean]: pip install 'embgemma[clean]'"
    ) from error
  return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
