"""Every way in which a user's file can be wrong, and what is said about it."""

import gzip
import json
import os
import pathlib
import pickle

import pytest

from embgemma.data import sources
from embgemma.data.bad_records import MAX_LISTED_SKIPS, SkipLog
from embgemma.data.files import read_lines
from embgemma.data.fingerprints import module_fingerprint
from embgemma.data.record_formats import FORMATS
from embgemma.data.sources import JsonlSource, TextFileSource
from embgemma.errors import ConfigError, DataError

_GOOD = b'{"query": "q", "positive": "p"}'


def _examples(source, policy="fail", skipped=None):
  log = SkipLog() if skipped is None else skipped
  return [e for shard in source.shards() for e in source.read(shard, policy, log)]


@pytest.fixture
def write(tmp_path):
  def write(*lines: bytes, name="pairs.jsonl", end=b"\n") -> str:
    path = tmp_path / name
    content = b"".join(line + end for line in lines)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)

  return write


def _line(**record) -> bytes:
  return json.dumps({"query": "q", "positive": "p"} | record).encode()


def test_every_field(write):
  full = {
    "query": " a query ",
    "positive": "p\u2028\n",
    "negatives": ["x", "é😀"],
    "title": "t",
    "task": "qa",
    "label": "l",
    "language": "ignored",
  }
  path = write(_line(**full), _GOOD)
  assert _examples(JsonlSource(path)) == [
    {key: value for key, value in full.items() if key != "language"},
    {
      "query": "q",
      "positive": "p",
      "negatives": [],
      "title": "",
      "task": "",
      "label": "",
    },
  ]


@pytest.mark.parametrize(
  ("record", "negatives"),
  [
    ({"negative": "one"}, ["one"]),
    ({"negative": None}, []),
    ({"negatives": None, "negative": "one"}, ["one"]),
    ({"negatives": ["a", "b"], "negative": "one"}, ["a", "b"]),
    ({"negatives": []}, []),
  ],
)
def test_negatives(write, record, negatives):
  (example,) = _examples(JsonlSource(write(_line(**record))))
  assert example["negatives"] == negatives


def test_absent_is_empty(write):
  (example,) = _examples(JsonlSource(write(_line(title=None, task="", label=None))))
  assert (example["title"], example["task"], example["label"]) == ("", "", "")


_BAD = {
  "empty line": (b"", "empty line; each line must hold one JSON object"),
  "blank line": (b"  \t", "empty line"),
  "malformed": (b'{"query": "q",', "malformed JSON"),
  "deep": (b"[" * 200_000, "malformed JSON"),
  "huge number": (b'{"query": ' + b"1" * 5000 + b"}", "malformed JSON"),
  "list": (b'["q", "p"]', "expected a JSON object, got list"),
  "number": (b"3", "expected a JSON object, got int"),
  "invalid UTF-8": (b'{"query": "\xff"}', "invalid UTF-8 at byte 11"),
  "no query": (b'{"positive": "p"}', r"""no "query"; .* has \['positive'\]"""),
  "no positive": (b'{"query": "q"}', 'no "positive"'),
  "query no string": (_line(query=3), '"query" must be a string, got int'),
  "positive null": (_line(positive=None), 'no "positive"; a record needs'),
  "title no string": (_line(title=["t"]), '"title" must be a string, got list'),
  "label no string": (_line(label=3), '"label" must be a string, got int'),
  "query empty": (_line(query=""), '"query" is empty'),
  "positive blank": (_line(positive=" \n"), '"positive" is empty'),
  "negatives a string": (
    _line(negatives="n"),
    '"negatives" must be a list of strings, got str',
  ),
  "a negative no string": (
    _line(negatives=["n", 3]),
    r'"negatives\[1\]" must be a string, got int',
  ),
  "a negative empty": (_line(negatives=["", "n"]), r'"negatives\[0\]" is empty'),
  "negative a list": (_line(negative=["n"]), "must be a string, got list"),
  "lone surrogate": (
    rb'{"query": "ab\ud800", "positive": "p"}',
    '"query" holds a lone surrogate at character 2',
  ),
  "lone surrogate in a negative": (
    rb'{"query": "q", "positive": "p", "negatives": ["\udfff"]}',
    r'"negatives\[0\]" holds a lone surrogate at character 0',
  ),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_record_fails_with_its_line(write, name):
  line, message = _BAD[name]
  path = write(_GOOD, line, _GOOD)
  with pytest.raises(DataError, match=message) as caught:
    _examples(JsonlSource(path))
  assert str(caught.value).startswith(f"{path}:2: ")
  assert "--on_bad_record=skip" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_bad_records_are_skipped_and_listed(write):
  path = write(_GOOD, *(line for line, _ in _BAD.values()), _line(query="last"))
  skipped = SkipLog()
  examples = _examples(JsonlSource(path), "skip", skipped)
  assert [example["query"] for example in examples] == ["q", "last"]
  assert skipped.count == len(_BAD)
  shown = min(len(_BAD), MAX_LISTED_SKIPS)
  prefixes = [line[: len(f"{path}:{n}: ")] for n, line in enumerate(skipped.listed, 2)]
  assert prefixes == [f"{path}:{n}: " for n in range(2, 2 + shown)]


def test_many_skips_are_counted_not_listed(write):
  skipped = SkipLog()
  _examples(JsonlSource(write(*[b"x"] * 50, _GOOD)), "skip", skipped)
  assert skipped.count == 50
  assert len(skipped.listed) == MAX_LISTED_SKIPS


def test_line_ends(write):
  assert len(_examples(JsonlSource(write(_GOOD, _GOOD, end=b"\r\n")))) == 2
  path = write(_GOOD, name="open_end.jsonl", end=b"")
  assert len(_examples(JsonlSource(path))) == 1


def test_gzip(write):
  path = write(_GOOD, _line(query="second"), name="pairs.jsonl.gz")
  assert [e["query"] for e in _examples(JsonlSource(path))] == ["q", "second"]


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip"])
def test_damaged_gzip(write, policy, damage):
  """Never skipped: nobody knows how many records are lost."""
  lines = [_line(query=f"{i} {os.urandom(8).hex()}") for i in range(2000)]
  path = write(*lines, name="pairs.jsonl.gz")
  content = bytearray(pathlib.Path(path).read_bytes())
  if damage == "truncated":
    content = content[: len(content) // 2]
  elif damage == "flipped":
    content[10] = 0xFF  # the type of the first block
  else:
    content = b"\n".join(lines)
  pathlib.Path(path).write_bytes(content)
  with pytest.raises(DataError, match=r"pairs\.jsonl\.gz:\d+: cannot be read"):
    _examples(JsonlSource(path), policy)


def test_missing_file(tmp_path):
  with pytest.raises(DataError, match=r"gone\.jsonl: no such file; check the path"):
    _examples(JsonlSource(str(tmp_path / "gone.jsonl")))
  with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
    list(read_lines(tmp_path / "gone.jsonl"))


def test_directory_instead_of_a_file(tmp_path):
  with pytest.raises(DataError, match=":1: cannot be read: .*directory"):
    _examples(JsonlSource(str(tmp_path)))


def test_globs_in_order(write, tmp_path):
  for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
    write(_line(query=name), name=name)
  assert [e["query"] for e in _examples(JsonlSource(str(tmp_path / "[ab].jsonl")))] == [
    *("a.jsonl", "b.jsonl")
  ]
  # A name that is there is a name, whatever it means as a pattern.
  paths = (str(tmp_path / "c[1].jsonl"), str(tmp_path / "a.*"))
  assert [e["query"] for e in _examples(JsonlSource(paths))] == [
    *("c[1].jsonl", "a.jsonl")
  ]
  with pytest.raises(DataError, match=r"z\*: no such file"):
    JsonlSource((str(tmp_path / "a*"), str(tmp_path / "z*"))).files()


def test_limit_counts_good_records(write):
  path = write(_GOOD, b"bad", _line(query="second"), b"never read")
  source = JsonlSource(path, limit=2)
  skipped = SkipLog()
  assert [e["query"] for e in _examples(source, "skip", skipped)] == ["q", "second"]
  assert skipped.count == 1


def test_fingerprint_follows_the_files(write, tmp_path):
  path = write(_GOOD)
  first = JsonlSource(path).fingerprint()
  assert JsonlSource(path).fingerprint() == first
  assert JsonlSource(path, limit=1).fingerprint() != first
  os.utime(path, ns=(0, 0))
  touched = JsonlSource(path).fingerprint()
  assert touched != first
  write(_GOOD, _GOOD)
  os.utime(path, ns=(0, 0))
  assert JsonlSource(path).fingerprint() != touched
  pattern = JsonlSource(str(tmp_path / "*.jsonl"))
  one_file = pattern.fingerprint()
  write(_GOOD, name="more.jsonl")
  assert pattern.fingerprint() != one_file


def test_builtin_source(monkeypatch):
  def records(task, split):
    return [{"query": task, "positive": split, "language": "en"}]

  monkeypatch.setattr(sources.builtin_corpus, "examples", records)
  source = sources.BuiltinSource("stdlib_topics")
  assert source.shards() == (("train",),)
  (example,) = source.read(("validation",), "fail", SkipLog())
  assert (example["query"], example["positive"]) == ("stdlib_topics", "validation")
  with pytest.raises(ConfigError, match="unknown built-in task 'other'; there are"):
    sources.BuiltinSource("other")


def test_builtin_documents(monkeypatch):
  def documents(task, split):
    return iter([{"text": f"{task} {split}"}])

  monkeypatch.setattr(sources.builtin_corpus, "documents", documents)
  source = sources.BuiltinSource("stdlib_modules")
  assert source.content == "text"
  (example,) = source.read(("validation",), "fail", SkipLog())
  assert example == {"text": "stdlib_modules validation"}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_documents(write, suffix, end):
  texts = ["one", " two\u2028\n ", "three"]
  lines = [json.dumps({"text": text, "title": "ignored"}).encode() for text in texts]
  path = write(*lines, name=f"a.jsonl{suffix}", end=end)
  assert _examples(TextFileSource(path)) == [{"text": text} for text in texts]
  path = write(b"one", b"", b" \t", " zwei é".encode(), name=f"a.txt{suffix}", end=end)
  skipped = SkipLog()
  found = _examples(TextFileSource(path), "skip", skipped)
  assert found == [{"text": "one"}, {"text": " zwei é"}]
  assert skipped.count == 0
  assert _examples(TextFileSource(path, limit=1)) == [{"text": "one"}]


@pytest.mark.parametrize(
  ("name", "line", "message"),
  [
    ("a.jsonl", b"", "empty line; each line must hold one JSON object"),
    ("a.jsonl", b"[1]", r'one object like {"text": "…"} a line'),
    (
      "a.jsonl",
      _GOOD,
      r"""no "text"; a record needs "text", has \['positive', 'query'""",
    ),
    ("a.jsonl", b'{"text": 3}', '"text" must be a string, got int'),
    ("a.jsonl", b'{"text": " "}', '"text" is empty'),
    ("a.jsonl", rb'{"text": "\ud800"}', '"text" holds a lone surrogate'),
    ("a.txt", b"\xff", "invalid UTF-8 at byte 0"),
  ],
)
def test_bad_document(write, name, line, message):
  good = b'{"text": "good"}'
  path = write(good, line, good, name=name)
  with pytest.raises(DataError, match=message) as caught:
    _examples(TextFileSource(path))
  assert str(caught.value).startswith(f"{path}:2: ")
  assert "--on_bad_record=skip" in str(caught.value)
  skipped = SkipLog()
  assert len(_examples(TextFileSource(path), "skip", skipped)) == 2
  assert skipped.count == 1


def test_documents_in_a_file_of_another_kind(write):
  path = write(b"one", name="a.md")
  with pytest.raises(DataError, match=r"a\.md: neither \.jsonl .* nor \.txt"):
    TextFileSource(path).files()
  with pytest.raises(DataError, match="no such file; check the path of the text task"):
    TextFileSource(path + "x").files()


def test_pairs_and_documents_of_one_file_are_cached_apart(write):
  path = write(_GOOD)
  assert TextFileSource(path).fingerprint() != JsonlSource(path).fingerprint()


def test_tfrecord_without_files(tmp_path):
  source = sources.TfrecordSource(str(tmp_path / "*.tfrecord"), {"query": "q"})
  with pytest.raises(DataError, match=r"\*\.tfrecord: no such TFRecord file"):
    source.fingerprint()


def test_module_fingerprint(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "some_tasks.py").write_text("raise AssertionError('imported')")
  first = module_fingerprint("some_tasks")
  (tmp_path / "some_tasks.py").write_text("x = 1")
  assert module_fingerprint("some_tasks") != first
  for name in ("no_such_module", "no_such.module"):
    with pytest.raises(ConfigError, match=f"'{name}'.* cannot be found.*PYTHONPATH"):
      module_fingerprint(name)


def test_shards_are_files_and_one_with_a_limit(write, tmp_path):
  for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
    write(_line(query=name), _line(query=f"{name} 2"), name=name)
  pattern = str(tmp_path / "*.jsonl*")
  source = JsonlSource(pattern)
  shards = source.shards()
  assert [len(shard) for shard in shards] == [1, 1, 1]
  assert pickle.loads(pickle.dumps((source, shards))) == (source, shards)
  each = [[e["query"] for e in source.read(s, "fail", SkipLog())] for s in shards]
  assert each == [[n, f"{n} 2"] for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl")]
  assert JsonlSource(pattern, limit=3).shards() == (sum(shards, ()),)
  for limit in (0, 1, 2, 3, 5, 6, 7):
    found = _examples(JsonlSource(pattern, limit=limit))
    assert [e["query"] for e in found] == [q for own in each for q in own][:limit]


def test_reading_ends_at_the_limit(write):
  path = write(_GOOD, _GOOD, b"bad")
  assert len(_examples(JsonlSource(path, limit=2))) == 2
  with pytest.raises(DataError, match=":3: malformed"):
    _examples(JsonlSource(path, limit=3))


def test_limit_counts_examples_of_a_record(write):
  path = write(b'{"set": ["a", "b", "c", "d"]}', b"never read")
  source = JsonlSource(path, limit=2, format="embedding_training_data")
  assert [e["query"] for e in _examples(source)] == ["a", "b"]


def test_fingerprint_follows_the_format(write):
  path = write(_GOOD)
  prints = {JsonlSource(path, format=name).fingerprint() for name in FORMATS}
  assert len(prints) == len(FORMATS)
