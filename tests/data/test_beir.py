"""Training pairs from collections in the layout of BEIR, made here."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data.bad_records import SkipLog
from embgemma.data.record_formats import example
from embgemma.data.sources import BeirSource
from embgemma.errors import DataError

_CORPUS = [
  {"_id": "d0", "title": "Rivers", "text": "The Danube.", "metadata": {}},
  {"_id": "d1", "title": "", "text": "The Alps."},
  {"_id": "d2", "text": "The Rhine."},
  {"_id": "d3", "title": "Empty", "text": ""},
]
_QUERIES = [
  {"_id": "q1", "text": "which mountain"},
  {"_id": "q0", "text": "which river", "metadata": {}},
  {"_id": "q2", "text": "not judged"},
]
_HEADER = "query-id\tcorpus-id\tscore\n"


def _write(folder, corpus=_CORPUS, queries=_QUERIES, qrels="", split="train"):
  for name, records in (("corpus.jsonl", corpus), ("queries.jsonl", queries)):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / name).write_text("".join(line + "\n" for line in lines))
  (folder / "qrels").mkdir(exist_ok=True)
  (folder / "qrels" / f"{split}.tsv").write_text(_HEADER + qrels)
  return str(folder)


def _read(source, policy="fail", log=None):
  (shard,) = source.shards()
  return list(source.read(shard, policy, SkipLog() if log is None else log))


def test_pairs_in_the_order_of_the_judgements(tmp_path):
  qrels = "q1\td1\t1\nq0\td2\t1\nq0\td1\t0\nq0\td0\t2\nq2\td0\t0\nq1\td0\t1\n"
  source = BeirSource(_write(tmp_path, qrels=qrels))
  assert source.content == "pairs"
  assert _read(source) == [
    example("which mountain", "The Alps."),
    example("which river", "The Rhine.", ["The Alps."]),
    example("which river", "The Danube.", ["The Alps."], title="Rivers"),
    example("which mountain", "The Danube.", title="Rivers"),
  ]
  assert _read(BeirSource(str(tmp_path), limit=2)) == _read(source)[:2]


def test_files_and_splits(tmp_path):
  folder = _write(tmp_path, qrels="q1\td1\t1\n")
  _write(tmp_path, qrels="q0\td2\t1\n", split="dev")
  source = BeirSource(folder)
  first = source.fingerprint()
  assert first != BeirSource(folder, "dev").fingerprint()
  assert first != BeirSource(folder, limit=1).fingerprint()
  assert [e["query"] for e in _read(BeirSource(folder, "dev"))] == ["which river"]
  plain = tmp_path / "corpus.jsonl"
  (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
  plain.unlink()
  assert source.shards() == (
    tuple(
      str(tmp_path / name)
      for name in ("corpus.jsonl.gz", "queries.jsonl", "qrels/train.tsv")
    ),
  )
  assert [e["positive"] for e in _read(source)] == ["The Alps."]
  assert source.fingerprint() != first
  with pytest.raises(DataError, match=r"no qrels/test\.tsv; the judgements are needed"):
    BeirSource(folder, "test").shards()
  (tmp_path / "queries.jsonl").unlink()
  with pytest.raises(DataError, match=r"no queries.jsonl or queries.jsonl.gz; a BEIR"):
    source.shards()


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"qrels": "q9\td1\t1\n"}, r"train.tsv:2: query 'q9' is not in .*queries.jsonl"),
    ({"qrels": "q0\td9\t1\n"}, r"train.tsv:2: document 'd9' is not in .*corpus.jsonl"),
    ({"qrels": "q0\td1\t1\nq0\td9\t0\n"}, r"train.tsv:3: document 'd9' is not in"),
    ({"qrels": "q0\td1\t1\nq0\td1\t0\n"}, r"train.tsv:3: .* has two scores; keep one"),
    ({"qrels": "q0 d1 1\n"}, r"train.tsv:2: 1 columns; a row is query-id"),
    ({"qrels": "q0\td1\tmuch\n"}, r"train.tsv:2: score 'much'; a row is query-id"),
    (
      {"corpus": [*_CORPUS, '{"_id": "d'], "qrels": "q0\td1\t1\n"},
      ":5: malformed JSON",
    ),
    ({"corpus": [*_CORPUS, {"text": "x"}], "qrels": "q0\td1\t1\n"}, ':5: no "_id"'),
    (
      {"corpus": [{"_id": "d1"}, _CORPUS[2]], "qrels": "q0\td1\t1\n"},
      'corpus.jsonl:1: no "text"',
    ),
    ({"corpus": _CORPUS * 2, "qrels": "q0\td1\t1\n"}, ":6: _id 'd1' is there twice"),
    ({"queries": _QUERIES * 2, "qrels": "q0\td1\t1\n"}, ":4: _id 'q1' is there twice"),
  ],
)
def test_bad_records_say_where_and_can_be_skipped(tmp_path, changed, message):
  _write(tmp_path, **changed | {"qrels": changed["qrels"] + "q1\td2\t1\n"})
  with pytest.raises(DataError, match=message) as caught:
    _read(BeirSource(str(tmp_path)))
  assert "--on_bad_record=skip" in str(caught.value)
  log = SkipLog()
  found = _read(BeirSource(str(tmp_path)), "skip", log)
  assert ("which mountain", "The Rhine.") in [
    (e["query"], e["positive"]) for e in found
  ]
  assert log.count > 0


def test_judgements_without_a_header_lose_none(tmp_path):
  _write(tmp_path)
  (tmp_path / "qrels" / "train.tsv").write_text("q0\td1\t1\n")
  with pytest.raises(
    DataError, match=r"train.tsv:1: no header; add one: query-id<TAB>"
  ):
    _read(BeirSource(str(tmp_path)))


def test_documents_without_text_answer_nothing(tmp_path):
  qrels = "q0\td3\t1\nq0\td1\t1\nq1\td1\t1\nq1\td3\t0\n"
  log = SkipLog()
  found = _read(BeirSource(_write(tmp_path, qrels=qrels)), log=log)
  assert found == [
    example("which river", "The Alps."),
    example("which mountain", "The Alps."),
  ]
  assert log.unused == {"judgements of a query or document without text": 1}
  assert log.count == 0


_IDS = st.integers(0, 5)


@given(rows=st.dictionaries(st.tuples(_IDS, _IDS), st.integers(-1, 2), max_size=25))
@settings(deadline=None, max_examples=40)
def test_all_judgements_are_used(tmp_path_factory, rows):
  folder = tmp_path_factory.mktemp("beir")
  qrels = "".join(f"q{q}\td{d}\t{grade}\n" for (q, d), grade in rows.items())
  corpus = [{"_id": f"d{i}", "text": f"text {i}"} for i in range(6)]
  queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(6)]
  found = _read(BeirSource(_write(folder, corpus, queries, qrels)))
  assert found == [
    example(
      f"query {q}",
      f"text {d}",
      [f"text {e}" for (p, e), other in rows.items() if p == q and other <= 0],
    )
    for (q, d), grade in rows.items()
    if grade > 0
  ]


def test_memory_does_not_hold_the_corpus(tmp_path):
  corpus = [{"_id": f"d{i}", "text": f"{i:09d}" * 12_000} for i in range(200)]
  qrels = "".join(f"q0\td{i}\t1\n" for i in range(0, 200, 2))
  source = BeirSource(_write(tmp_path, corpus, qrels=qrels))
  del corpus
  (shard,) = source.shards()
  tracemalloc.start()
  count = sum(1 for _ in source.read(shard, "fail", SkipLog()))
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert count == 100
  assert most < 4 << 20  # of 22 MB, of which half is judged
