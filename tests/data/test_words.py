import re
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data import words


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_terms_are_runs_of_letters_and_digits(text):
  runs = re.sub("[^a-z0-9]", " ", text.lower()).split()
  assert words.tokenize(text) == runs
  assert words.normalize(text) == "".join(runs)


@given(
  st.lists(st.sampled_from(["東京", "cafe\u0301", "हिन्दी", "3", "x_y"]), max_size=6)
)
def test_characters_beyond_the_plane_change_no_other_terms(parts):
  text = " ".join(parts)
  # The last has a mark and a letter without spaces, for which other patterns serve.
  for other in ("🙂", "𝐀", "\U00020000\U0001e8d0"):
    assert words.tokenize(f"{text} {other}")[: len(words.tokenize(text))] == (
      words.tokenize(text)
    )


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A cat, a DOG!", "acatadog"),
    ("東京 都へ", "東京都へ"),
    ("हिन्दी में", "हिन्दीमें"),
    ("\U00020000 \U00020001", "\U00020000\U00020001"),
    ("snake_case — x²", "snakecasex2"),
    ("…", ""),
  ],
)
def test_normalize(text, expected):
  assert words.normalize(text) == unicodedata.normalize("NFKC", expected)


def test_word_hashes_are_those_of_the_terms():
  hashes = words.word_hashes("One two, ONE")
  assert hashes.tolist() == [zlib.crc32(w) for w in (b"one", b"two", b"one")]


@given(
  st.lists(st.sampled_from("abc"), max_size=12),
  st.lists(st.sampled_from("abc"), max_size=12),
  st.integers(1, 4),
)
def test_ngrams_are_equal_where_their_hashes_are(left, right, n):
  def naive(terms):
    return [tuple(terms[i : i + n]) for i in range(len(terms) - n + 1)]

  hashes = [words.ngram_hashes(" ".join(t), n).tolist() for t in (left, right)]
  by_hash = dict(zip(hashes[0] + hashes[1], naive(left) + naive(right), strict=True))
  assert [by_hash[h] for h in hashes[0]] == naive(left)
  assert len(by_hash) == len(set(naive(left) + naive(right)))


def test_hash_rows_heeds_order_and_width():
  rows = np.array([[1, 2], [2, 1], [0, 0], [0, 1], [1, 0]], np.uint32)
  hashes = set(words.hash_rows(rows).tolist())
  assert len(hashes) == 5
  assert not hashes & set(words.hash_rows(np.zeros((1, 3), np.uint32)).tolist())
