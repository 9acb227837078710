"""XTREME-UP on hand-made cases and on files in the original format."""

import json

import pytest

from embgemma.errors import DataError
from embgemma.evaluation import xtreme_up


def test_reciprocal_ranks():
  ranked = [[4, 2, 9], [1], list(range(20)), list(range(20))]
  assert xtreme_up.mrr(ranked, [2, 1, 9, 10]) == pytest.approx((1 / 2 + 1 + 1 / 10) / 4)
  found = xtreme_up.scores(
    {"hi": ranked, "ta": [[0]]}, {"hi": [2, 1, 9, 10], "ta": [0]}
  )
  assert found["mrr@10:ta"] == 1
  assert "mrr@10" not in found, "a mean of two languages is another number"
  every = xtreme_up.scores(
    dict.fromkeys(xtreme_up.LANGUAGES, ranked) | {"ta": [[0]]},
    {name: [2, 1, 9, 10] for name in xtreme_up.LANGUAGES} | {"ta": [0]},
  )
  assert every["mrr@10"] == pytest.approx((19 * every["mrr@10:hi"] + 1) / 20)


@pytest.fixture
def directory(tmp_path):
  def write(name, *records):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

  write(
    "index.jsonl",
    {"id": "p1", "title": "T", "context": "one"},
    {"id": 2, "title": "T", "context": "two"},
    {"id": "p3", "title": "", "context": "three"},
  )
  write(
    "test/hi.jsonl",
    {"id": "p3", "title": "", "context": "three", "question": "q1"},
    {"id": "p1", "title": "T", "context": "one", "question": "q2"},
  )
  write("test/ta.jsonl", {"id": 2, "title": "T", "context": "two", "question": "q3"})
  write("test/fi.jsonl", {"id": 2, "question": "of XOR-TyDi: not among the twenty"})
  return tmp_path


def test_original_files(directory):
  found = xtreme_up.read(directory)
  assert found.ids == ("p1", "2", "p3")
  assert found.passages == (("T", "one"), ("T", "two"), ("", "three"))
  assert found.questions == {"hi": ("q1", "q2"), "ta": ("q3",)}
  assert found.gold == {"hi": (2, 0), "ta": (1,)}


def test_damaged_files(directory):
  with pytest.raises(DataError, match="give the folder retrieval_cross_lang"):
    xtreme_up.read(directory, "validation")
  (directory / "test" / "ta.jsonl").write_text('{"id": "none", "question": "q"}\n')
  with pytest.raises(DataError, match=r"ta.jsonl:1: passage 'none' is not in index"):
    xtreme_up.read(directory)
  (directory / "test" / "ta.jsonl").write_text('{"id": "p1"}\n')
  with pytest.raises(DataError, match=r"ta.jsonl:1: has no question"):
    xtreme_up.read(directory)
  (directory / "index.jsonl").unlink()
  with pytest.raises(DataError, match=r"index.jsonl"):
    xtreme_up.read(directory)


def test_the_papers_languages():
  assert len(xtreme_up.LANGUAGES) == len(set(xtreme_up.LANGUAGES)) == 20
