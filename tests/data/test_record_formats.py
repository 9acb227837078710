"""A few records of each public layout, made here; none was downloaded."""

import collections
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import record_formats
from embgemma.data.bad_records import SkipLog
from embgemma.data.record_formats import FORMATS
from embgemma.data.sources import JsonlSource
from embgemma.data.tokenization import pair_texts
from embgemma.errors import ConfigError, DataError


def _examples(name, *records, log=None):
  reader = FORMATS[name](SkipLog() if log is None else log)
  found = []
  for number, record in enumerate(records, 1):
    found += reader.add(record, f"f:{number}")
  return found + reader.finish()


def _brief(examples):
  return [(e["query"], e["title"], e["positive"], e["negatives"]) for e in examples]


def _nli(premise, hypothesis, label):
  # The keys that SNLI's and MultiNLI's files have beside.
  return {
    "annotator_labels": [label],
    "captionID": "1.jpg#4",
    "gold_label": label,
    "pairID": "1.jpg#4r1n",
    "sentence1": premise,
    "sentence1_parse": "(ROOT …)",
    "sentence2": hypothesis,
  }


def test_nli():
  log = SkipLog()
  found = _examples(
    "nli",
    _nli("a", "a-neutral", "neutral"),
    _nli("a", "a-entailed", "entailment"),
    _nli("a", "a-contradicted", "contradiction"),
    _nli("b", "b-neutral", "neutral"),
    _nli("b", "undecided", "-"),
    _nli("c", "c-neutral", "neutral"),
    _nli("c", "c-entailed", "entailment"),
    _nli("c", "c-too", "entailment"),
    _nli("c", "c-too", "neutral"),
    log=log,
  )
  assert _brief(found) == [
    ("a", "", "a-entailed", ["a-contradicted"]),
    ("c", "", "c-entailed", ["c-neutral"]),
    ("c", "", "c-too", ["c-neutral"]),
  ]
  assert log.unused == {
    "sentence pairs without a gold label": 1,
    "premises without an entailed sentence": 1,
  }
  assert log.count == 0


def test_nli_labels_as_numbers():
  """As TFDS and the Hub's Parquet files have them."""
  rows = [_nli("a", f"{label}", label) for label in (2, 0, 1, -1)]
  assert _brief(_examples("nli", *rows)) == [("a", "", "0", ["2"])]


_PAIRS = st.lists(
  st.tuples(
    st.sampled_from("abc"),
    st.sampled_from("uvwxyz"),
    st.sampled_from(["entailment", "neutral", "contradiction", "-"]),
  )
)


@given(pairs=_PAIRS, order=st.randoms())
@settings(deadline=None)
def test_nli_groups_lines_wherever_they_are(pairs, order):
  found = {
    (e["query"], e["positive"], *sorted(e["negatives"]))
    for e in _examples("nli", *(_nli(*pair) for pair in pairs))
  }
  order.shuffle(pairs)
  shuffled = {
    (e["query"], e["positive"], *sorted(e["negatives"]))
    for e in _examples("nli", *(_nli(*pair) for pair in pairs))
  }
  said = collections.defaultdict(set)
  for premise, hypothesis, label in pairs:
    said[premise, label].add(hypothesis)
  expected = {
    (premise, positive, *sorted(others - said[premise, "entailment"]))
    for premise in "abc"
    for positive in said[premise, "entailment"]
    for others in [said[premise, "contradiction"] or said[premise, "neutral"]]
  }
  assert found == shuffled == expected


def test_nli_holds_a_bounded_number_of_characters(monkeypatch):
  monkeypatch.setattr(record_formats, "_NLI_CHARACTERS", 1000)
  reader = FORMATS["nli"](SkipLog())
  found, most = [], 0
  for i in range(100):
    found += reader.add(_nli(f"premise {i}", "x" * 50, "entailment"), "f:1")
    most = max(most, len(reader._premises))
  assert most < 10
  assert len(found + reader.finish()) == 100


def _passage(number, title="", text=None):
  return {"docid": f"1#{number}", "title": title, "text": text or f"text {number}"}


def test_tevatron():
  log = SkipLog()
  found = _examples(
    "tevatron",
    {
      "query_id": "1",
      "query": "q",
      "positive_passages": [_passage(1, "T"), _passage(2)],
      "negative_passages": [_passage(3, "N"), _passage(4)],
    },
    {"query": "r", "positive_passages": [_passage(5, "T")], "negative_passages": []},
    {"query": "s", "positive_passages": [{"text": "no title"}]},
    {"query": "t", "positive_passages": []},
    log=log,
  )
  negatives = ["text 3", "text 4"]
  assert _brief(found) == [
    ("q", "T", "text 1", negatives),
    ("q", "", "text 2", negatives),
    ("r", "T", "text 5", []),
    ("s", "", "no title", []),
  ]
  assert [e.get("negative_titles") for e in found] == [["N", ""], ["N", ""], None, None]
  assert log.unused == {"queries without a positive passage": 1}


def test_negatives_with_titles():
  record = {"query": "q", "positive": "p", "title": "T"}
  objects = [{"text": "n", "title": "N"}, "m", {"text": "o"}]
  (found,) = _examples("pairs", record | {"negatives": objects})
  assert found["negatives"] == ["n", "m", "o"]
  assert found["negative_titles"] == ["N", "", ""]
  listed = {"negatives": ["n", "m", "o"], "negative_titles": ["N", "", ""]}
  assert _examples("pairs", record | listed) == [found]
  assert pair_texts(found, "search").prompted[1:] == [
    "title: T | text: p",
    "title: N | text: n",
    "title: none | text: m",
    "title: none | text: o",
  ]
  assert pair_texts(found, "search").contents[1:] == ["T\np", "N\nn", "m", "o"]
  for negatives, message in (
    ([{"title": "N"}], r'negatives\[0\]: no "text"'),
    ([{"text": "n", "title": 3}], r'negatives\[0\]: "title" must be a string'),
  ):
    with pytest.raises(DataError, match=message):
      _examples("pairs", record | {"negatives": negatives})
  with pytest.raises(DataError, match='"negative_titles" must be as many'):
    _examples("pairs", record | listed | {"negative_titles": ["N"]})


_PYTHON = '''def add(a, b):
  """Add two numbers.

  Both may be floats.
  """
  return a + b'''


def test_code_search_net():
  common = {
    "repo": "o/r",
    "path": "a.py",
    "func_name": "add",
    "code_tokens": ["def"],
    "partition": "train",
    "sha": "0",
    "url": "u",
  }
  docstring = "Add two numbers.\n\n  Both may be floats."
  found = _examples(
    "code_search_net",
    common | {"original_string": "x", "code": _PYTHON, "docstring": docstring},
    common | {"code": "func F() {}", "docstring": "", "docstring_tokens": ["F", "is"]},
    {"func_code_string": "f()", "func_documentation_string": "Does\n  f."},
    {"function": "g()  # Does g.", "docstring": "Does g."},
  )
  assert _brief(found) == [
    ("Add two numbers.", "", "def add(a, b):\n  return a + b", []),
    ("F is", "", "func F() {}", []),
    ("Does f.", "", "f()", []),
    ("Does g.", "", "g()  # Does g.", []),
  ]


@pytest.mark.parametrize("quote", ['"', "'", '"""', "'''"])
@pytest.mark.parametrize("prefix", ["", "r"])
def test_code_without_its_docstring(quote, prefix):
  code = f"def f():\n  {prefix}{quote}Doc.{quote}\n  return ''"
  (found,) = _examples("code_search_net", {"docstring": "Doc.", "code": code})
  assert found["positive"] == "def f():\n  return ''"


def test_embedding_training_data():
  found = _examples(
    "embedding_training_data",
    ["a", "b"],
    ["a", "b", "n", "m"],
    {"texts": ["title", "body"], "tags": ["x"], "meta": {}},
    {"set": ["a", "b", "c"]},
    {"query": "q", "pos": ["a", "b"], "neg": ["n"]},
    {"query": "q", "pos": ["a"]},
  )
  assert _brief(found) == [
    ("a", "", "b", []),
    ("a", "", "b", ["n", "m"]),
    ("title", "", "body", []),
    ("a", "", "b", []),
    ("b", "", "c", []),
    ("q", "", "a", ["n"]),
    ("q", "", "b", ["n"]),
    ("q", "", "a", []),
  ]


def test_title_body():
  found = _examples(
    "title_body",
    {"title": "t", "text": "x", "url": "u"},
    {"title": "t", "body": "y", "subreddit": "s"},
    {"title": "t", "text": "", "body": "z"},
  )
  assert _brief(found) == [("t", "", text, []) for text in "xyz"]


@pytest.mark.parametrize(
  ("name", "record", "message"),
  [
    ("nli", ["a", "b"], "expected a JSON object, got list; one object like .*gold_la"),
    ("nli", _nli("a", "b", "maybe"), "\"gold_label\" is 'maybe'; it must be entail"),
    ("nli", _nli("a", "b", ["-"]), r"\"gold_label\" is \['-'\]"),
    ("nli", _nli("a", "b", 3), '"gold_label" is 3'),
    ("nli", {"gold_label": "neutral", "sentence1": "a"}, 'no "sentence2"; .* needs'),
    ("nli", _nli("a", " ", "neutral"), '"sentence2" is empty'),
    ("tevatron", {"query": "q"}, '"positive_passages" must be a list of .*NoneType'),
    ("tevatron", {"positive_passages": []}, 'no "query"; a record needs'),
    (
      "tevatron",
      {"query": "q", "positive_passages": ["p"]},
      r"positive_passages\[0\]: expected a JSON object, got str",
    ),
    (
      "tevatron",
      {"query": "q", "positive_passages": [{"docid": "1", "title": "", "text": ""}]},
      r'positive_passages\[0\]: "text" is empty',
    ),
    (
      "tevatron",
      {"query": "q", "positive_passages": [{"title": 3, "text": "t"}]},
      r'positive_passages\[0\]: "title" must be a string, got int',
    ),
    ("code_search_net", {"code": "f()"}, '"docstring" is empty|no "docstring"'),
    ("code_search_net", {"docstring": "Doc."}, 'no "code"; a record needs'),
    ("code_search_net", {"docstring": "D", "code": '"D"'}, "nothing but documentation"),
    (
      "code_search_net",
      {"docstring_tokens": "Doc", "code": "f()"},
      '"docstring_tokens" must be a list of strings, got str',
    ),
    ("embedding_training_data", ["a"], "1 texts; a pair has two"),
    ("embedding_training_data", ["a", 3], r'"texts\[1\]" must be a string, got int'),
    ("embedding_training_data", {"texts": "ab"}, "expected a JSON object|must be a"),
    ("embedding_training_data", {"set": ["a"]}, '"set" has 1 texts; it needs two'),
    ("embedding_training_data", {"query": "q"}, '"pos" must be a list .* NoneType'),
    ("embedding_training_data", {"query": "q", "pos": []}, '"pos" is empty'),
    ("embedding_training_data", {"pos": ["p"]}, 'no "query"; a record needs a list'),
    (
      "embedding_training_data",
      {"query": "q", "pos": ["p"], "neg": {"bm25": ["n"]}},
      '"neg" must be a list of strings, got dict',
    ),
    ("embedding_training_data", "ab", r'got str; one object like \["…", "…"\], {"set"'),
    ("title_body", {"title": "t"}, 'no "text"; a record needs "title" and "text" or'),
    ("title_body", {"text": "t"}, 'no "title"'),
    ("title_body", {"title": "t", "body": ["b"]}, '"body" must be a string, got list'),
  ],
)
def test_bad_records(tmp_path, name, record, message):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps(record) + "\n")
  with pytest.raises(DataError, match=message) as caught:
    list(JsonlSource(str(path), format=name).read((str(path),), "fail", SkipLog()))
  assert str(caught.value).startswith(f"{path}:1: ")
  assert "--on_bad_record=skip" in str(caught.value)


def test_a_bad_line_amid_a_group_leaves_the_group_whole(tmp_path):
  path = tmp_path / "a.jsonl"
  lines = [
    json.dumps(_nli("a", "no", "contradiction")),
    '{"gold_label": "entail',
    json.dumps(_nli("a", "yes", "entailment")),
  ]
  path.write_text("\n".join(lines))
  log = SkipLog()
  found = JsonlSource(str(path), format="nli").read((str(path),), "skip", log)
  assert _brief(found) == [("a", "", "yes", ["no"])]
  assert log.count == 1


def test_groups_end_with_their_file(tmp_path):
  """Whether files are read together or apart, examples are the same."""
  for name, label in (("a", "entailment"), ("b", "contradiction"), ("c", "entailment")):
    line = json.dumps(_nli("premise", name, label))
    (tmp_path / f"{name}.jsonl").write_text(line)
  pattern = str(tmp_path / "*.jsonl")
  apart, together = (
    JsonlSource(pattern, limit=limit, format="nli") for limit in (None, 9)
  )
  assert [len(source.shards()) for source in (apart, together)] == [3, 1]
  found = [
    [e for shard in source.shards() for e in source.read(shard, "fail", SkipLog())]
    for source in (apart, together)
  ]
  assert found[0] == found[1]
  assert _brief(found[0]) == [("premise", "", name, []) for name in "ac"]


def test_unknown_format():
  with pytest.raises(ConfigError, match=r"unknown format 'csv' of records; there are"):
    JsonlSource("a.jsonl", format="csv")


_SOUND = {
  "pairs": {"query": "q", "positive": "p", "negatives": ["n"], "title": "t"},
  "nli": _nli("a", "b", "entailment"),
  "tevatron": {
    "query": "q",
    "positive_passages": [_passage(1, "T")],
    "negative_passages": [_passage(2)],
  },
  "code_search_net": {"docstring": "D", "docstring_tokens": ["D"], "code": "f()"},
  "embedding_training_data": {"query": "q", "pos": ["p", "r"], "neg": ["n"]},
  "title_body": {"title": "t", "text": "x", "body": "y"},
}
_VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-2, 3)
  | st.text(max_size=2)
  | st.sampled_from(["entailment", "-", "a text", "\ud800", "\n"]),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["title", "text"]), inner, max_size=2)
  ),
  max_leaves=4,
)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_record_gives_sound_examples_or_a_data_error(name, data):
  """Sound records with one field changed to anything, and anything at all."""
  keys = st.sampled_from(sorted({*_SOUND[name], "texts", "set", "label"}))
  changed = st.dictionaries(keys, _VALUES, min_size=1, max_size=1).map(
    lambda change: _SOUND[name] | change
  )
  records = data.draw(st.lists(changed | _VALUES, max_size=4))
  reader = FORMATS[name](SkipLog())
  found = []
  for record in records:
    try:
      found += reader.add(record, "f:1")
    except DataError as error:
      assert str(error).startswith("f:1: ")  # noqa: PT017
  for example in found + reader.finish():
    assert set(example) == {
      *("query", "positive", "negatives", "title", "task", "label")
    }
    for text in (example["query"], example["positive"], *example["negatives"]):
      assert text.strip()
      text.encode("utf-8")
    assert all(isinstance(example[key], str) for key in ("title", "task", "label"))
