import gzip
import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data.decontamination import Decontamination
from embgemma.errors import ConfigError, DataError


def pair(query, positive, title=""):
  return {"query": query, "positive": positive, "title": title, "negatives": []}


def write(path, records):
  lines = "".join(json.dumps(record) + "\n" for record in records)
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".gz":
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text(lines)
  return str(path)


def naive(evaluation, text, n, least):
  """Whether a text is one of the evaluation's, or shares n words in a row with one."""

  def grams(words):
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

  known = [words for words in map(str.split, evaluation) if len(words) >= least]
  return "".join(text.split()) in {"".join(words) for words in known} or any(
    grams(words) & grams(text.split()) for words in known
  )


TEXTS = st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join)


@given(
  st.lists(TEXTS, min_size=1, max_size=5),
  st.lists(TEXTS, min_size=1, max_size=5),
  st.integers(2, 5),
  st.integers(1, 4),
)
def test_overlap_is_that_of_sets(tmp_path_factory, evaluation, texts, n, least):
  folder = tmp_path_factory.mktemp("evaluation")
  path = write(folder / "set.jsonl", [{"text": text} for text in evaluation])
  cleaner = Decontamination({"set": path}, ngram=n, least_words=least)
  for text in texts:
    expected = naive(evaluation, text, n, least)
    assert (cleaner.fault({"text": text}) is not None) == expected
    assert (cleaner.fault(pair(text, "z")) is not None) == expected
    assert (cleaner.fault(pair("z", text)) is not None) == expected


LONG = "the quick brown fox jumps over the lazy dog and then sleeps until noon today"


def test_reasons_name_the_side_and_the_set(tmp_path):
  against = {
    "sts": write(
      tmp_path / "sts.jsonl.gz", [{"sentence1": LONG, "sentence2": "A-b c"}]
    ),
    "qa": write(tmp_path / "qa.jsonl", [{"query": "What is it?", "positive": "label"}]),
  }
  cleaner = Decontamination(against)
  assert cleaner.fault(pair("what IS it", "x")) == "query is a text of qa"
  assert cleaner.fault(pair("x", "ab, C")) == "positive is a text of sts"
  within = f"See: {LONG.upper()}!"
  assert cleaner.fault(pair("x", within)) == "positive has 13 words in a row of sts"
  # Twelve words in a row, short texts inside others, labels and titles stay.
  twelve = " ".join([*LONG.split()[:12], "x", *LONG.split()[4:]])
  for example in (
    pair("x", twelve),
    pair("so what is it?", "x"),
    pair("x", "label"),
    pair("x", "y", title="what is it"),
  ):
    assert cleaner.fault(example) is None
  assert pickle.loads(pickle.dumps(cleaner)) == cleaner


@pytest.fixture
def beir(tmp_path):
  folder = tmp_path / "beir"
  write(
    folder / "queries.jsonl.gz",
    [{"_id": f"q{i}", "text": f"question number {w}"} for i, w in enumerate("abc")],
  )
  write(
    folder / "corpus.jsonl",
    [{"_id": f"d{i}", "text": f"document number {w}"} for i, w in enumerate("abc")],
  )
  header = "query-id\tcorpus-id\tscore\n"
  (folder / "qrels").mkdir()
  (folder / "qrels" / "train.tsv").write_text(f"{header}q0\td0\t1\n")
  (folder / "qrels" / "test.tsv").write_text(f"{header}q1\td0\t0\nq1\td1\t2\n")
  return folder


@pytest.mark.parametrize(
  ("documents", "hit"),
  [("none", ""), ("relevant", "b"), ("all", "abc")],
)
def test_beir_folders_give_their_evaluated_part(beir, documents, hit):
  cleaner = Decontamination({"beir": str(beir)}, documents=documents)
  queries = [w for w in "abc" if cleaner.fault({"text": f"Question number {w}"})]
  assert queries == ["b"]
  found = [w for w in "abc" if cleaner.fault({"text": f"document number {w}"})]
  assert found == list(hit)


def test_fingerprints_follow_the_files(tmp_path):
  path = write(tmp_path / "set.jsonl", [{"text": LONG}])
  before = Decontamination({"set": path}).fingerprint()
  assert Decontamination({"set": path}).fingerprint() == before
  assert Decontamination({"set": path}, ngram=8).fingerprint() != before
  os.utime(path, (1, 1))
  assert Decontamination({"set": path}).fingerprint() != before
  assert json.loads(json.dumps(before)) == before


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"against": {}}, "nothing to compare with"),
    ({"ngram": 1}, "ngram must be >= 2"),
    ({"least_words": 0}, "least_words must be >= 1"),
    ({"documents": "some"}, "documents must be one of"),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    Decontamination(**{"against": {"a": "b"}, **settings})


def test_what_cannot_be_compared_with_is_reported(tmp_path, beir):
  def fault(path):
    return Decontamination({"set": str(path)}).fault({"text": "x"})

  with pytest.raises(DataError, match="no such file or BEIR folder"):
    Decontamination({"set": str(tmp_path / "none.jsonl")}).check()
  with pytest.raises(DataError, match=r"other.jsonl:1: has none of query, positive"):
    fault(write(tmp_path / "other.jsonl", [{"question": "x"}]))
  with pytest.raises(DataError, match=r"empty.jsonl: holds no text"):
    fault(write(tmp_path / "empty.jsonl", []))
  with pytest.raises(DataError, match=r'wrong.jsonl:1: "text" must be a string'):
    fault(write(tmp_path / "wrong.jsonl", [{"text": 3}]))
  (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1 d1 1\n")
  with pytest.raises(DataError, match=r"test.tsv:2: 1 columns"):
    fault(beir)
  (beir / "qrels" / "test.tsv").unlink()
  with pytest.raises(DataError, match=r"no qrels.tsv and no qrels/\*.tsv but train"):
    Decontamination({"set": str(beir)}).check()
  (beir / "corpus.jsonl").unlink()
  with pytest.raises(DataError, match=r"no corpus.jsonl or corpus.jsonl.gz"):
    Decontamination({"set": str(beir)}).check()
