"""XOR-Retrieve on hand-made cases and on files in the original format."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.errors import DataError
from embgemma.evaluation import xor_retrieve
from embgemma.evaluation.xor_retrieve import Question


def question(name, language, *answers):
  return Question(name, language, "?", answers)


def test_recall_is_of_the_first_tokens():
  """A passage of 10 tokens, so that the 200th ends at 2,000 and the 500th at 5,000."""
  filler = "one two three four five six seven eight nine ten"
  passages = {
    "first": ["the answer is here", *[filler] * 600],
    "at 2,000": [*[filler] * 199, "a b c d e f g h i answer"],
    "after 2,000": [*[filler] * 200, "answer"],
    "after 5,000": [*[filler] * 500, "answer"],
    "never": [filler] * 600,
  }
  languages = {
    "first": "ja",
    "at 2,000": "ja",
    "after 2,000": "ja",
    "after 5,000": "ko",
  }
  questions = [
    question(name, languages.get(name, "ko"), "no such", "answer") for name in passages
  ]
  found = xor_retrieve.recalls(questions, passages)
  assert found["recall@2kt:ja"] == pytest.approx(2 / 3)
  assert found["recall@5kt:ja"] == 1
  assert found["recall@2kt:ko"] == found["recall@5kt:ko"] == 0
  assert found["recall@2kt"] == pytest.approx(1 / 3)
  assert found["recall@5kt"] == pytest.approx(1 / 2)


def test_answers_may_go_over_passages_and_tokens():
  passages = ["of New", "York City"]
  assert xor_retrieve.has_answer(passages, ["New York"], (2, 10)) == [False, True]
  assert xor_retrieve.has_answer(["new york"], ["New York"], (10,)) == [False]


def test_tokens_are_words_and_signs():
  text = "It's 1,000 km (or so). Mr. X said: far!"
  found = xor_retrieve.tokens(text)
  assert found[:9] == ["It", "'s", "1,000", "km", "(", "or", "so", ")", "."]
  assert found[-4:] == ["said", ":", "far", "!"]


def test_original_files(tmp_path):
  lines = [
    {"id": 7, "lang": "te", "question": "q7", "answers": ["Paris", "the city"]},
    {"id": 8, "lang": "te", "question": "q8", "answers": ["yes"]},
    {"id": 9, "lang": "ar", "question": "q9", "answers": ["no"]},
    {"id": 10, "lang": "ar", "question": "q10", "answers": ["yes", "Oslo"]},
  ]
  path = tmp_path / "xor_dev.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert xor_retrieve.read_questions(path) == [
    Question("7", "te", "q7", ("Paris", "the city")),
    Question("10", "ar", "q10", ("Oslo",)),
  ]
  path.write_text('{"id": 1, "lang": "te"}\n')
  with pytest.raises(DataError, match=r"xor_dev.jsonl:1: needs id, lang, question"):
    xor_retrieve.read_questions(path)
  path.write_text(json.dumps(lines[1]) + "\n")
  with pytest.raises(DataError, match="holds no question"):
    xor_retrieve.read_questions(path)


def test_corpora(tmp_path):
  rows = ["id\ttext\ttitle", '1\t"He said ""no""."\t"""A"" title"', "2\tplain\tB"]
  expected = [('"A" title', 'He said "no".'), ("B", "plain")]
  tsv = tmp_path / "psgs_w100.tsv.gz"
  tsv.write_bytes(gzip.compress("\n".join(rows).encode()))
  assert list(xor_retrieve.read_passages(tsv)) == expected
  jsonl = tmp_path / "psgs.jsonl"
  jsonl.write_text('{"text": "t", "title": "T"}\n{"text": "u"}\n')
  assert list(xor_retrieve.read_passages(jsonl)) == [("T", "t"), ("", "u")]
  bad = tmp_path / "bad.tsv"
  bad.write_text("1\tonly\n")
  with pytest.raises(DataError, match=r"bad.tsv:1: has 2 fields"):
    list(xor_retrieve.read_passages(bad))
  bad.write_bytes(b"1\t\xff\tT\n")
  with pytest.raises(DataError, match=r"bad.tsv:1"):
    list(xor_retrieve.read_passages(bad))


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 12), st.integers(0, 9))
def test_search_is_that_of_all_at_once(count, block, depth, seed):
  """Of equal scores the earlier passage comes first."""
  generator = np.random.default_rng(seed)
  # Few values: many equal scores.
  documents = generator.integers(-1, 2, (count, 3)).astype(np.float32)
  queries = generator.integers(-1, 2, (4, 3)).astype(np.float32)
  names = [("", str(i)) for i in range(count)]
  top = xor_retrieve.TopPassages(queries, depth)
  for start in range(0, count, block):
    top.add(documents[start : start + block], names[start : start + block])
  for row, query in zip(top.found(), queries, strict=True):
    order = np.argsort(-(documents @ query), kind="stable")[:depth]
    assert [int(text) for _, text in row] == order.tolist()
