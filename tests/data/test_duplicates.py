import itertools
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import cleaning, duplicates
from embgemma.data.cleaners import Keys
from embgemma.data.duplicates import ExactDuplicates, NearDuplicates
from embgemma.errors import ConfigError

VOCABULARY = [f"w{i}" for i in range(5000)]


def words(rng, count):
  return [rng.choice(VOCABULARY) for _ in range(count)]


def jaccard(left, right, n=5):
  sets = [
    {tuple(text[i : i + n]) for i in range(max(1, len(text) - n + 1))}
    for text in (left, right)
  ]
  return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def drops(directory, examples, cleaner):
  cleaning.scan(examples, [cleaner], directory, 0)
  cleaning.decide([cleaner], directory, 1)
  return cleaning.dropped(directory, 0).tolist()


def on_disk(path, sketches):
  sketches.astype(np.uint32).tofile(path)
  shape = ("uint32", sketches.shape[1])
  return Keys([path], [len(sketches)], shape, np.arange(len(sketches)))


@pytest.mark.parametrize(
  ("on", "expected"), [("pair", [1]), ("query", [1, 2]), ("positive", [1, 3])]
)
def test_exact_duplicates_compare_letters_and_digits(tmp_path, on, expected):
  examples = [
    {"query": "Ｗhat-is it?", "positive": "The rapist.", "title": ""},
    {"query": "whatis IT", "positive": "therapist", "title": ""},
    {"query": "what is-it", "positive": "the rapists", "title": ""},
    {"query": "other", "positive": "the\nrapist", "title": ""},
    # Neither the bounds of sides nor a title are ignored.
    {"query": "whatis itthe", "positive": "rapist", "title": ""},
    {"query": "whatis its", "positive": "rapist", "title": "the x"},
  ]
  assert drops(tmp_path, examples, ExactDuplicates(on)) == expected


def test_exact_duplicates_as_they_are(tmp_path):
  code = [{"text": text} for text in ("a + b", "a - b", "a+b", "a + b", "+", "-", "+")]
  assert drops(tmp_path / "raw", code, ExactDuplicates(normalized=False)) == [3, 6]
  # Texts without letters are compared as they are.
  assert drops(tmp_path / "letters", code, ExactDuplicates()) == [1, 2, 3, 6]


def test_sketches_estimate_jaccard_similarity():
  rng = random.Random(0)
  for replaced in (0, 1, 3, 8, 30):
    left = words(rng, 120)
    right = list(left)
    for place in rng.sample(range(120), replaced):
      right[place] = rng.choice(VOCABULARY)
    a, b = (
      duplicates.sketch(duplicates.shingles(" ".join(text), 5), 1024)
      for text in (left, right)
    )
    true = jaccard(left, right)
    error = np.sqrt(true * (1 - true) / 1024)
    assert abs(np.mean(a == b) - true) <= 4 * error + 1e-9


def linked(sketches, threshold, bands, rows):
  """Firsts of clusters of rows that agree in a band and in enough entries."""
  first = list(range(len(sketches)))
  for i, j in itertools.combinations(range(len(sketches)), 2):
    a, b = sketches[i], sketches[j]
    in_band = any(
      (a[k * rows : (k + 1) * rows] == b[k * rows : (k + 1) * rows]).all()
      for k in range(bands)
    )
    if in_band and np.mean(a == b) >= threshold:
      low, high = sorted((first[i], first[j]))
      first = [low if f == high else f for f in first]
  return first


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.sampled_from([0.5, 0.8]))
def test_clusters_are_those_of_all_pairs(tmp_path_factory, seed, count, threshold):
  rng = np.random.default_rng(seed)
  # Few origins, of which each sketch changes some entries: chains and crowded bands.
  origins = rng.integers(0, 3, (4, 32))
  sketches = origins[rng.integers(0, 4, count)]
  changed = rng.random((count, 32)) < rng.random((count, 1)) * 0.4
  sketches = np.where(changed, rng.integers(0, 3, (count, 32)), sketches)
  cleaner = NearDuplicates("query", threshold=threshold, permutations=32)
  path = tmp_path_factory.mktemp("sketches") / "keys"
  found = cleaner.first(on_disk(path, sketches))
  assert found.tolist() == linked(sketches, threshold, *cleaner.bands())


def test_planted_near_duplicates_are_found_and_others_stay(tmp_path):
  rng = random.Random(1)
  texts, expected = [], []
  for number in range(400):
    text = words(rng, 100)
    texts.append(text)
    if number % 2:
      copy = list(text)
      # In a row: one word touches five runs of 96, ten touch fourteen.
      length = 2 if number % 4 == 1 else 35
      copy[40 : 40 + length] = words(rng, length)
      if length == 2:
        assert 0.87 < jaccard(text, copy) < 0.9
        expected.append(len(texts))
      else:
        assert jaccard(text, copy) < 0.5
      texts.append(copy)
  examples = [{"text": " ".join(text)} for text in texts]
  found = drops(tmp_path, examples, NearDuplicates("positive", threshold=0.8))
  assert set(found) <= set(expected)
  assert len(found) >= 0.95 * len(expected)


def test_a_pair_needs_both_sides(tmp_path):
  rng = random.Random(2)
  passage = words(rng, 200)
  other = passage[:100] + ["changed"] + passage[101:]
  question = words(rng, 8)

  def example(query, positive):
    return {"query": " ".join(query), "positive": " ".join(positive), "title": ""}

  examples = [
    example(question, passage),
    example(words(rng, 8), passage),
    example(question, other),
    example(question, words(rng, 200)),
  ]
  assert drops(tmp_path / "pair", examples, NearDuplicates()) == [2]
  positives = drops(tmp_path / "positive", examples, NearDuplicates("positive"))
  assert positives == [1, 2]
  assert drops(tmp_path / "query", examples, NearDuplicates("query")) == [2, 3]


def test_scripts_without_spaces_and_short_texts(tmp_path):
  rng = random.Random(3)
  text = "".join(rng.choice("日本語漢字東京都市国民生活水") for _ in range(300))
  texts = [
    text,
    text[:150] + "新" + text[151:],
    "a b",
    "A, b!",
    "a c",
    "!!",
    "??",
    "!!",
  ]
  examples = [{"text": text} for text in texts]
  assert drops(tmp_path, examples, NearDuplicates()) == [1, 3, 7]


def test_a_crowded_bucket_of_one_text_is_one_cluster(tmp_path):
  keys = np.zeros((5000, 32), np.uint32)
  keys[::2, -1] = np.arange(2500)
  first = NearDuplicates("query", permutations=32).first(
    on_disk(tmp_path / "keys", keys)
  )
  assert not first.any()


def test_bands_find_nine_of_ten_at_the_threshold():
  for threshold in (0.5, 0.7, 0.8, 0.9):
    bands, rows = NearDuplicates(threshold=threshold).bands()
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands > 0.9


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ExactDuplicates("both"), "ExactDuplicates: on must be one of"),
    (lambda: NearDuplicates("text"), "NearDuplicates: on must be one of"),
    (lambda: NearDuplicates(threshold=1.0), "threshold must be at least 0.1 and below"),
    (lambda: NearDuplicates(shingle=0), "shingle must be >= 1"),
    (lambda: NearDuplicates(permutations=8), "permutations must be between 16"),
  ],
)
def test_wrong_settings_are_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_a_missing_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasketch", None)
  with pytest.raises(ConfigError, match=r"pip install 'embgemma\[clean\]'"):
    NearDuplicates(permutations=97).check()
