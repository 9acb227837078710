"""Words of texts in any language, and hashes of their runs."""

import functools
import itertools
import re
import sys
import unicodedata
import zlib

import numpy as np

from embgemma.typing import UInt32, UInt64

# Scripts written without spaces between words, and Hangul, whose words carry
# particles: Thai, Lao, Myanmar, Hangul, Khmer, kana, Han. Lucene's CJKAnalyzer makes
# bigrams of Han, kana and Hangul; for the others it needs dictionaries.
_UNSPACED = (
  "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005\u3007"
  "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff"
  "\uf900-\ufaff"
)
_UNSPACED_ASTRAL = "\U00020000-\U0003ffff"
# Soft hyphen and zero-width (non-)joiner stand inside words.
_INVISIBLE = dict.fromkeys((0x00AD, 0x200C, 0x200D))
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_ASCII_WORD = re.compile("[a-z0-9]+")

# SplitMix64's multipliers (Steele et al. 2014).
_STEP = np.uint64(0xBF58476D1CE4E5B9)
_LAST = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


@functools.cache
def _patterns(astral: bool) -> tuple[re.Pattern, re.Pattern]:
  """A run of characters of a term or of several, and a character of the latter.

  A set with characters beyond U+FFFF is searched one by one, thirty times as slowly,
  so they are left out where a text has none of them.
  """
  end = sys.maxunicode if astral else 0xFFFF
  unspaced = _UNSPACED + (_UNSPACED_ASTRAL if astral else "")
  # `\w` lacks combining marks, so it would cut Hindi or Tamil words at each vowel.
  marks = "".join(
    char
    for char in map(chr, range(end + 1))
    if unicodedata.category(char).startswith("M")
  )
  unit = f"[{unspaced}][{marks}]*"
  word = f"(?:[^\\W_{unspaced}]+[{marks}]*)+"
  return re.compile(f"((?:{unit})+)|{word}"), re.compile(unit)


def _needs_astral(text: str) -> bool:
  """Whether marks or letters without spaces beyond U+FFFF are in a text."""
  return any(
    char >= _UNSPACED_ASTRAL[0] or unicodedata.category(char).startswith("M")
    for char in _ASTRAL.findall(text)
  )


def _fold(text: str) -> str:
  return unicodedata.normalize("NFKC", text).casefold().translate(_INVISIBLE)


def tokenize(text: str) -> list[str]:
  """Returns the terms of a text in any language, in order, with repeats.

  After NFKC and case folding a term is a run of letters, marks and digits; an
  underscore separates. Text of scripts without spaces becomes overlapping pairs of
  characters (each with its marks), as Lucene's CJKBigramFilter has it, and a lone
  character stays. No stemming, no stop words: what they gain depends on the language.
  """
  if text.isascii():  # the same, five times as fast
    return _ASCII_WORD.findall(text.lower())
  text = _fold(text)
  either, unit = _patterns(_needs_astral(text))
  terms = []
  for match in either.finditer(text):
    if match[1] is None:
      terms.append(match[0])
      continue
    units = unit.findall(match[1])
    pairs = [a + b for a, b in itertools.pairwise(units)]
    terms.extend(pairs or units)
  return terms


def normalize(text: str) -> str:
  """Returns the letters, marks and digits of a text after NFKC and case folding."""
  if text.isascii():
    return "".join(_ASCII_WORD.findall(text.lower()))
  text = _fold(text)
  either, _ = _patterns(_needs_astral(text))
  return "".join(match[0] for match in either.finditer(text))


@functools.lru_cache(maxsize=8)  # several cleaners in turn look at one example
def word_hashes(text: str) -> UInt32[np.ndarray, " N"]:
  """Returns the CRC-32 of each of `tokenize`'s terms, read-only uint32 [N]."""
  terms = tokenize(text)
  hashes = np.fromiter(
    (zlib.crc32(term.encode()) for term in terms), np.uint32, len(terms)
  )
  hashes.setflags(write=False)
  return hashes


def hash_rows(rows: UInt32[np.ndarray, "N K"]) -> UInt64[np.ndarray, " N"]:
  """Returns one uint64 of each row of uint32, in which order counts."""
  hashes = np.full(len(rows), rows.shape[1], np.uint64)
  for column in rows.T:
    hashes = (hashes ^ column) * _STEP
    hashes ^= hashes >> _HALF
  hashes *= _LAST
  return hashes ^ (hashes >> _HALF)


def ngram_hashes(text: str, n: int) -> UInt64[np.ndarray, " N"]:
  """Returns the uint64 hash of each run of n terms of a text; none of a shorter one."""
  hashes = word_hashes(text)
  if len(hashes) < n:
    return np.zeros(0, np.uint64)
  return hash_rows(np.lib.stride_tricks.sliding_window_view(hashes, n))
