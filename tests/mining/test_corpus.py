"""Collections: what is distinct, what is protected, what is read back."""

import json

import numpy as np
import pytest

from embgemma.data.task_examples import open_tasks
from embgemma.errors import DataError
from embgemma.mining import corpus
from embgemma.mining.corpus import Groups, Passage, build_collection

_RECORDS = [
  {"query": "a dog", "positive": "dogs bark", "title": "Animals"},
  {"query": "a cat", "positive": "cats purr", "negatives": ["old negative"]},
  {"query": "a dog", "positive": "a hound", "label": "pet"},
  {"query": "A DOG?", "positive": "dogs bark", "task": "qa"},
  {"query": "a cat", "positive": "cats purr"},
  {"query": "a bird", "positive": "dogs bark", "title": "Pets", "label": "pet"},
  {"query": "a fish", "positive": "fins", "label": "sea"},
]


@pytest.fixture
def collect(make_config, tmp_path):
  def collect(records, files=()):
    (task,) = open_tasks(make_config(animals=records))
    return build_collection(tmp_path / "collection", task, files)

  return collect


def test_distinct_queries_and_passages_in_order(collect):
  found = collect(_RECORDS)
  assert [found.query(i) for i in range(found.queries)] == [
    ("a dog", None),
    ("a cat", None),
    ("A DOG?", "qa"),
    ("a bird", None),
    ("a fish", None),
  ]
  assert [found.passage(i) for i in range(found.passages)] == [
    Passage("Animals", "dogs bark", None),
    Passage("", "cats purr", None),
    Passage("", "a hound", None),
    Passage("", "dogs bark", "qa"),
    Passage("Pets", "dogs bark", None),
    Passage("", "fins", None),
  ]
  np.testing.assert_array_equal(found.record_query, [0, 1, 0, 2, 1, 3, 4])
  np.testing.assert_array_equal(found.record_passage, [0, 1, 2, 3, 1, 4, 5])
  assert [found.record(i) for i in range(found.records)] == _RECORDS
  assert found.passage(0).whole == "Animals\ndogs bark"


def test_what_protects_a_query(collect):
  """All positives of equal queries, texts like them, and its labels."""
  found = collect(_RECORDS)
  everything = np.arange(found.passages)
  for query in (0, 2):  # "a dog" and "A DOG?"
    np.testing.assert_array_equal(found.positives(query), [0, 2, 3])
    same = found.same_text(query, everything)
    np.testing.assert_array_equal(np.flatnonzero(same), [0, 2, 3, 4])
    label = found.same_label(query, everything)
    np.testing.assert_array_equal(np.flatnonzero(label), [2, 4])
  assert not found.same_label(1, everything).any()
  np.testing.assert_array_equal(np.flatnonzero(found.same_label(4, everything)), [5])


@pytest.mark.parametrize(
  ("one", "other", "same"),
  [
    ("Straße, 5", "strasse 5", True),
    ("ｆｕｌｌ　width", "fullwidth", True),
    ("C++", "C", True),
    ("!!", "??", False),
    ("a b", "a c", False),
    ("कि", "का", False),
  ],
)
def test_texts_that_are_the_same(one, other, same):
  assert (corpus.normal_key(one) == corpus.normal_key(other)) is same


def test_a_query_that_is_a_passage_is_no_negative(collect):
  pairs = [("What now", "later"), ("Later?", "what now!"), ("who", "they")]
  found = collect([{"query": q, "positive": p} for q, p in pairs])
  np.testing.assert_array_equal(found.same_text(0, np.arange(3)), [True, True, False])


def test_pairs_of_a_symmetric_task_hold_in_both_directions(make_config, tmp_path):
  records = [
    {"query": "C", "positive": "a!"},
    {"query": "x", "positive": "c"},
    {"query": "A", "positive": "y"},
    {"query": "u", "positive": "v", "title": "T"},
    {"query": "w", "positive": "u"},
  ]
  # Of each example, among: a!, c, y, v, u.
  expected = [[0, 1, 2], [0, 1], [0, 1, 2], [3, 4], [3, 4]]
  for symmetric, paired in ((False, [[]] * 5), (True, expected)):
    entry = {"records": records, "kind": "similarity", "symmetric": symmetric}
    (task,) = open_tasks(make_config(one=entry))
    found = build_collection(tmp_path / str(symmetric), task, ())
    assert found.symmetric is symmetric
    own = [np.flatnonzero(found.paired(i, i, np.arange(5))).tolist() for i in range(5)]
    assert own == paired


def test_a_corpus_comes_first_and_lacks_no_positive(collect, tmp_path):
  path = tmp_path / "corpus.jsonl"
  lines = [
    {"_id": "1", "title": "Animals", "text": "dogs bark"},
    {"_id": "2", "text": "wolves howl"},
    {"_id": "2", "text": "wolves howl"},
    {"_id": "3", "title": "", "text": " "},
  ]
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  found = collect(_RECORDS[:2], [str(path)])
  assert [found.passage(i).whole for i in range(found.passages)] == [
    "Animals\ndogs bark",
    "wolves howl",
    "cats purr",
  ]
  np.testing.assert_array_equal(found.record_passage, [0, 2])
  assert found.record(1)["negatives"] == ["old negative"]


def test_bad_corpora(collect, tmp_path):
  path = tmp_path / "corpus.jsonl"
  path.write_text('{"text": "fine"}\n{"body": "x"}\n')
  with pytest.raises(DataError, match=r'corpus\.jsonl:2: no "text"'):
    collect(_RECORDS, [str(path)])
  assert not list(tmp_path.glob("*collection*"))  # nothing half made


def test_a_task_without_examples(collect):
  with pytest.raises(DataError, match="'animals' has no examples"):
    collect([])


def test_groups_are_sorted_and_distinct():
  groups = Groups.of(np.array([2, 0, 2, 2, 0]), np.array([5, 9, 3, 5, 1]), 4)
  assert [groups[i].tolist() for i in range(4)] == [[1, 9], [], [3, 5], []]
