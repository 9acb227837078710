"""Pairs and documents in Parquet files, and what can be wrong with them."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import parquet
from embgemma.data.bad_records import SkipLog
from embgemma.data.record_formats import example
from embgemma.data.sources import JsonlSource, ParquetSource
from embgemma.errors import ConfigError, DataError


def _read(source, policy="fail", log=None):
  log = SkipLog() if log is None else log
  return [e for shard in source.shards() for e in source.read(shard, policy, log)]


@pytest.fixture
def write(tmp_path):
  def write(rows, name="a.parquet", **options) -> str:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / name, **options)
    return str(tmp_path / name)

  return write


_TEXT = st.text(min_size=1).filter(str.strip)
_RECORDS = st.fixed_dictionaries(
  {"query": _TEXT, "positive": _TEXT},
  optional={
    "negatives": st.none() | st.lists(_TEXT, max_size=3),
    "title": st.none() | _TEXT,
    "other": st.integers(-9, 9),
  },
)


@given(records=st.lists(_RECORDS, min_size=1, max_size=20), group=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_rows_are_read_as_lines_are(tmp_path_factory, records, group):
  folder = tmp_path_factory.mktemp("both")
  keys = dict.fromkeys(key for record in records for key in record)
  table = pa.Table.from_pylist([{key: r.get(key) for key in keys} for r in records])
  pq.write_table(table, folder / "a.parquet", row_group_size=group)
  lines = [json.dumps(record) for record in records]
  (folder / "a.jsonl").write_text("\n".join(lines))
  rows = _read(ParquetSource(str(folder / "a.parquet")))
  assert rows == _read(JsonlSource(str(folder / "a.jsonl")))


def test_many_row_groups_and_shards(write, tmp_path):
  rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(1000)]
  write(rows[:700], "a.parquet", row_group_size=90, compression="zstd")
  write(rows[700:], "b.parquet", compression="gzip")
  pattern = str(tmp_path / "*.parquet")
  source = ParquetSource(pattern)
  assert [len(shard) for shard in source.shards()] == [1, 1]
  assert pickle.loads(pickle.dumps(source)) == source
  assert [e["query"] for e in _read(source)] == [row["query"] for row in rows]
  limited = ParquetSource(pattern, limit=750)
  assert [len(shard) for shard in limited.shards()] == [2]
  assert len(_read(limited)) == 750


def test_fields(write):
  rows = [
    {
      "data": {"question": f"q{i}", "answer": {"text": f"a{i}", "start": i}},
      "page.title": f"t{i}",
      "wrong": ["n1", "n2"],
      "query": 3,
    }
    for i in range(3)
  ]
  rows.append({"data": None, "page.title": None, "wrong": None, "query": 3})
  fields = {
    "query": "data.question",
    "positive": "data.answer.text",
    "title": "page.title",
    "negatives": "wrong",
  }
  path, log = write(rows), SkipLog()
  source = ParquetSource(path, fields=fields)
  assert source.content == "pairs"
  assert _read(source, "skip", log) == [
    example(f"q{i}", f"a{i}", ["n1", "n2"], f"t{i}") for i in range(3)
  ]
  assert log.count == 1
  assert f'{path}:4: no "query"; a record needs' in log.listed[0]
  other = ParquetSource(path, fields=fields | {"title": "data.question"})
  assert other.fingerprint() != source.fingerprint()


def test_documents(write):
  path = write([{"article": f"d{i}", "id": i} for i in range(300)])
  source = ParquetSource(path, fields={"text": "article"})
  assert source.content == "text"
  assert _read(source) == [{"text": f"d{i}"} for i in range(300)]


def test_rows_of_a_format(write):
  """Structures nest in Parquet as they do in JSON."""
  row = {
    "query": "q",
    "positive_passages": [{"docid": "1", "title": "T", "text": "p"}],
    "negative_passages": [{"docid": "2", "title": "", "text": "n"}],
  }
  found = _read(ParquetSource(write([row]), format="tevatron"))
  assert found == [example("q", "p", ["n"], title="T")]
  rows = [
    {"premise": "a", "hypothesis": str(label), "label": label} for label in (0, 1, 2)
  ]
  fields = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}
  found = _read(ParquetSource(write(rows), fields=fields, format="nli"))
  assert found == [example("a", "0", ["2"])]
  with pytest.raises(ConfigError, match="unknown format 'x' of records"):
    ParquetSource("a.parquet", format="x")


def test_types_of_text(write):
  """Dictionaries and large strings are text; bytes and numbers are not."""
  texts = ["x", "y", "x"]
  for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
    table = pa.table({"query": pa.array(texts).cast(kind), "positive": texts})
    assert [e["query"] for e in _read(ParquetSource(write(table)))] == texts
  for values, name in ((b"x", "bytes"), (3, "int")):
    path = write(pa.table({"query": [values], "positive": ["p"]}))
    with pytest.raises(DataError, match=f':1: "query" must be a string, got {name}'):
      _read(ParquetSource(path))


def test_bad_rows_are_named_and_skipped(write):
  rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(300)]
  rows[200]["positive"], rows[299]["query"] = " ", None
  path, log = write(rows), SkipLog()
  with pytest.raises(DataError, match=r':201: "positive" is empty') as caught:
    _read(ParquetSource(path))
  assert str(caught.value).startswith(f"{path}:201: ")
  assert "--on_bad_record=skip" in str(caught.value)
  assert len(_read(ParquetSource(path), "skip", log)) == 298
  assert [line[: len(path) + 5] for line in log.listed] == [
    f"{path}:201:",
    f"{path}:300:",
  ]


def test_text_that_is_no_utf8(write):
  """Parquet does not check strings when they are written."""
  offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
  broken = pa.Array.from_buffers(
    pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")]
  )
  path = write(pa.table({"query": broken, "positive": ["p", "q", "r"]}))
  with pytest.raises(DataError, match=r"a\.parquet:2: a text is invalid UTF-8"):
    _read(ParquetSource(path))
  log = SkipLog()
  assert [e["query"] for e in _read(ParquetSource(path), "skip", log)] == ["a", "c"]
  assert log.count == 1


def test_missing_columns(write):
  path = write([{"a": {"b": "x"}, "positive": "p"}])
  with pytest.raises(DataError, match=r"no \"query\"; a record needs .*'positive'"):
    _read(ParquetSource(path))
  for column, message in (
    ("z", r"no column 'z'; there are \['a', 'positive'\]; check the task's fields"),
    ("a.c", r"no column 'c' in 'a'; there are \['b'\]"),
    ("a.b.c", r"no column 'c' in 'a.b'; there are \[\]"),
  ):
    source = ParquetSource(path, fields={"query": column, "positive": "positive"})
    with pytest.raises(DataError, match=message):
      _read(source, "skip")


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_damaged_files(write, tmp_path, policy):
  rows = [{"query": f"q{i}", "positive": f"p{i}" * 50} for i in range(2000)]
  path = write(rows, compression="snappy")
  content = (tmp_path / "a.parquet").read_bytes()
  for damaged in (content[:-100], content[:2000], b"", b"no Parquet at all"):
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match="a.parquet: cannot be read as Parquet: "):
      _read(ParquetSource(path), policy)
  half = bytearray(content)
  half[4000:9000] = bytes(5000)
  (tmp_path / "a.parquet").write_bytes(half)
  with pytest.raises(DataError, match=r"a\.parquet(:\d+)?: cannot be read") as caught:
    _read(ParquetSource(path), policy)
  assert "\n" not in str(caught.value)
  with pytest.raises(DataError, match="no such file; check the path of the Parquet"):
    ParquetSource(path + "x").shards()


def test_an_empty_table_and_a_row_of_ten_megabytes(write):
  schema = pa.schema([("query", pa.string()), ("positive", pa.string())])
  assert _read(ParquetSource(write(schema.empty_table()))) == []
  rows = [{"query": "q", "positive": "ä" * size} for size in (1, 5_000_000, 1)]
  found = _read(ParquetSource(write(rows)))
  assert [len(e["positive"]) for e in found] == [1, 5_000_000, 1]


def test_memory_holds_a_few_rows(write, monkeypatch):
  """Not row groups: those of others' files hold gigabytes."""
  rows = [{"query": "q", "positive": f"{i:07d}" * 1000} for i in range(4000)]
  path = write(rows, compression="none", use_dictionary=False, data_page_size=1 << 16)
  del rows
  # One row at a time, so that only what the reader itself holds counts.
  most, before = 0, pa.total_allocated_bytes()
  for _ in parquet.read_rows(path, None):
    most = max(most, pa.total_allocated_bytes() - before)
  assert most < 6 << 20  # of 28 MB
