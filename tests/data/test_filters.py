import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data import filters
from embgemma.data.filters import LanguageFilter, LengthFilter
from embgemma.errors import ConfigError


def pair(query, positive):
  return {"query": query, "positive": positive, "title": "", "negatives": []}


@pytest.mark.parametrize(
  ("settings", "example", "fault"),
  [
    ({"min_query": 3}, pair("abc", "d"), None),
    ({"min_query": 4}, pair("abc", "d"), "query has fewer than 4 characters"),
    ({"max_query": 2}, pair("abc", "d"), "query has more than 2 characters"),
    ({"max_positive": 1}, pair("abc", "d"), None),
    (
      {"unit": "words", "min_positive": 3},
      pair("a b c", "d, e."),
      "positive has fewer than 3 words",
    ),
    ({"unit": "words", "max_text": 2}, {"text": "a 東京都"}, "text has more than 2 wo"),
    ({"min_text": 2}, pair("a", "b"), None),
    ({"min_query": 2}, {"text": "a"}, None),
    ({"max_ratio": 2.0}, pair("ab", "abcd"), None),
    ({"max_ratio": 2.0}, pair("abcde", "ab"), "one side has more than 2 times the o"),
    ({"unit": "words", "max_ratio": 2.0}, pair("a b", "!"), "one side has more than 2"),
    ({"unit": "words", "max_ratio": 2.0}, pair("?", "!"), None),
  ],
)
def test_length_filter(settings, example, fault):
  found = LengthFilter(**settings).fault(example)
  assert found is None if fault is None else found.startswith(fault)


@given(st.text(), st.text(), st.integers(0, 9), st.integers(0, 9))
def test_length_bounds_are_inclusive(query, positive, low, high):
  low, high = sorted((low, high))
  kept = LengthFilter(min_query=low, max_positive=high).fault(pair(query, positive))
  assert (kept is None) == (len(query) >= low and len(positive) <= high)


ENGLISH = "The committee will publish its report about the harbour next week."
GERMAN = "Der Ausschuss wird seinen Bericht über den Hafen nächste Woche vorlegen."
JAPANESE = "委員会は来週、港についての報告書を公表する予定であると述べています。"


@pytest.mark.parametrize(
  ("keep", "on", "example", "fault"),
  [
    (["en"], "pair", pair(ENGLISH, ENGLISH), None),
    (["en"], "pair", pair(ENGLISH, GERMAN), "positive seems to be de"),
    (["en"], "pair", pair(GERMAN, ENGLISH), "query seems to be de"),
    (["en"], "query", pair(ENGLISH, GERMAN), None),
    (["en"], "positive", pair(GERMAN, ENGLISH), None),
    (["en", "de"], "pair", pair(GERMAN, ENGLISH), None),
    (["ja"], "pair", {"text": JAPANESE}, None),
    (["de"], "pair", {"text": JAPANESE}, "text seems to be ja"),
    (["de"], "pair", pair("too short", GERMAN), None),
  ],
)
def test_language_filter(keep, on, example, fault):
  assert LanguageFilter(keep, on).fault(example) == fault


def test_least_probability_is_of_the_kept_languages_together():
  text = "Jeg har en hund, og den heter Ola."  # Norwegian, or Danish
  ranked = dict(filters._identifier().rank(text))
  alone, both = ranked["no"], ranked["no"] + ranked["da"]
  assert alone + 0.05 < both
  between = (alone + both) / 2
  example = {"text": text}
  assert LanguageFilter(["no"], least_probability=between).fault(example) == (
    "text is unclear"
  )
  assert LanguageFilter(["no", "da"], least_probability=between).fault(example) is None


def test_language_of_a_long_text_is_judged_by_its_beginning():
  text = ENGLISH * 100 + GERMAN * 100_000
  assert LanguageFilter(["en"]).fault({"text": text}) is None


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: LengthFilter(), "no bound is set"),
    (lambda: LengthFilter(unit="tokens", min_query=1), "unit must be one of"),
    (
      lambda: LengthFilter(min_query=3, max_query=2),
      "min_query 3 is above max_query 2",
    ),
    (lambda: LengthFilter(max_ratio=0.5), "max_ratio must be >= 1"),
    (lambda: LanguageFilter(["en"], "both"), "on must be one of"),
    (lambda: LanguageFilter([]), "keep names languages"),
    (lambda: LanguageFilter(["en"], least_probability=0.0), "between 0 and 1"),
    (lambda: LanguageFilter(["english"]).check(), r"does not know \['english'\]"),
  ],
)
def test_wrong_settings_are_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_a_missing_extra_is_named(monkeypatch):
  filters._identifier.cache_clear()
  monkeypatch.setitem(sys.modules, "py3langid.langid", None)
  with pytest.raises(ConfigError, match=r"pip install 'embgemma\[clean\]'"):
    LanguageFilter(["en"]).check()
