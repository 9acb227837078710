"""Plain, compressed, remote and damaged files."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import files
from embgemma.data.bad_records import SkipLog
from embgemma.data.sources import (
  BeirSource,
  JsonlSource,
  ParquetSource,
  TextFileSource,
  TfrecordSource,
)
from embgemma.errors import ConfigError, DataError

_COMPRESS = {
  "": bytes,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstandard.ZstdCompressor().compress,
}


def _read(source, policy="fail", log=None):
  log = SkipLog() if log is None else log
  return [e for shard in source.shards() for e in source.read(shard, policy, log)]


_CONTENT = st.lists(st.binary(max_size=40), max_size=30).map(b"\n".join)


@pytest.mark.parametrize("suffix", _COMPRESS)
@given(parts=st.lists(_CONTENT, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_lines_of_every_compression(tmp_path_factory, suffix, parts):
  """Also of streams end to end, as pigz, pbzip2 and pzstd write them."""
  path = tmp_path_factory.mktemp("lines") / f"a.txt{suffix}"
  path.write_bytes(b"".join(_COMPRESS[suffix](part) for part in parts))
  content = b"".join(parts)
  lines = content.split(b"\n")[: None if content[-1:] not in (b"", b"\n") else -1]
  expected = [(i, line.rstrip(b"\r")) for i, line in enumerate(lines, 1)]
  assert list(files.read_lines(path)) == expected


@pytest.mark.parametrize("suffix", [s for s in _COMPRESS if s])
def test_truncated_stream(tmp_path, suffix):
  content = b"".join(b"%d %s\n" % (i, os.urandom(9).hex().encode()) for i in range(900))
  whole = _COMPRESS[suffix](content)
  for cut in (len(whole) - 1, len(whole) // 2, 9):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.txt\.\w+:\d+: cannot be read: ") as caught:
      list(files.read_lines(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [s for s in _COMPRESS if s])
def test_not_what_the_suffix_says(tmp_path, suffix):
  path = tmp_path / f"a.txt{suffix}"
  path.write_bytes(b"plain text, and enough of it" * 9)
  with pytest.raises(DataError, match=r":1: cannot be read: "):
    list(files.read_lines(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_ten_megabytes(tmp_path, suffix):
  record = {"query": "q", "positive": "ä " * 5_000_000}
  lines = json.dumps(record).encode() + b'\n{"query": "q", "positive": "p"}\n'
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(_COMPRESS[suffix](lines))
  first, second = _read(JsonlSource(str(path)))
  assert first["positive"] == record["positive"]
  assert second["positive"] == "p"


def test_frames_that_need_a_large_window(tmp_path):
  """As `zstd --long=31` writes them."""
  parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=29)
  compressor = zstandard.ZstdCompressor(compression_params=parameters)
  path = tmp_path / "a.txt.zst"
  stream = compressor.compressobj()
  path.write_bytes(stream.compress(b"one\ntwo\n") + stream.flush())
  with pytest.raises(zstandard.ZstdError, match="too much memory"):
    zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
  assert list(files.read_lines(path)) == [(1, b"one"), (2, b"two")]


@pytest.mark.parametrize("suffix", _COMPRESS)
def test_empty_file(tmp_path, suffix):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(_COMPRESS[suffix](b""))
  assert _read(JsonlSource(str(path))) == []


def test_compressed_copies_are_not_read_beside_plain_files(tmp_path):
  for name in ("a.jsonl.zst", "b.jsonl.gz", "c.jsonl.gz"):
    (tmp_path / name).write_bytes(b"")
  pattern = str(tmp_path / "*.jsonl")
  names = [pathlib.Path(path).name for path in files.match_compressed(pattern)]
  assert names == ["b.jsonl.gz", "c.jsonl.gz"]
  (tmp_path / "b.jsonl").write_bytes(b"")
  names = [pathlib.Path(path).name for path in files.match_compressed(pattern)]
  assert names == ["b.jsonl"]
  assert files.match_compressed(str(tmp_path / "*.txt")) == []


_LINE = b'{"query": "%s", "positive": "p"}\n'


def test_remote_files(bucket):
  for name, suffix in (("b", ".gz"), ("a", ""), ("c", ".zst"), ("d", ".bz2")):
    line = _LINE % name.encode()
    bucket.pipe(f"gs://data/x/{name}.jsonl{suffix}", _COMPRESS[suffix](line))
  source = JsonlSource("gs://data/x/*.jsonl*")
  assert source.shards() == tuple(
    (f"gs://data/x/{name}",) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
  ) + (("gs://data/x/d.jsonl.bz2",),)
  assert [example["query"] for example in _read(source)] == list("abcd")
  single = JsonlSource("gs://data/x/b.jsonl.gz")
  assert [example["query"] for example in _read(single)] == ["b"]
  bucket.pipe("gs://data/text.txt", b"one\ntwo\n")
  documents = _read(TextFileSource("gs://data/text.txt"))
  assert documents == [{"text": "one"}, {"text": "two"}]


def test_remote_parquet(bucket):
  rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(300)]
  with bucket.open("gs://data/a.parquet", "wb") as file:
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=70)
  found = _read(ParquetSource("gs://data/*.parquet"))
  assert [(e["query"], e["positive"]) for e in found] == [
    (row["query"], row["positive"]) for row in rows
  ]


def test_remote_beir(bucket):
  for name, text in (
    ("corpus.jsonl", b'{"_id": "d", "title": "T", "text": "t"}\n'),
    ("queries.jsonl", b'{"_id": "q", "text": "query"}\n'),
    ("qrels/train.tsv", b"query-id\tcorpus-id\tscore\nq\td\t1\n"),
  ):
    bucket.pipe(f"gs://data/beir/{name}", text)
  source = BeirSource("gs://data/beir")
  (found,) = _read(source)
  assert (found["query"], found["title"], found["positive"]) == ("query", "T", "t")
  before = source.fingerprint()
  bucket.pipe("gs://data/beir/queries.jsonl", b'{"_id": "q", "text": "other"}\n')
  assert source.fingerprint() != before


def test_remote_fingerprint_follows_the_content(bucket):
  source = JsonlSource("gs://data/a.jsonl")
  bucket.pipe("gs://data/a.jsonl", _LINE % b"a")
  first = source.fingerprint()
  bucket.pipe("gs://data/a.jsonl", _LINE % b"b")  # of the same size
  assert source.fingerprint() != first
  bucket.pipe("gs://data/a.jsonl", _LINE % b"a")
  assert source.fingerprint() == first
  assert TfrecordSource("gs://data/a.*", {"query": "q"}).fingerprint() != first


def test_remote_files_that_are_not_there(bucket):
  bucket.pipe("gs://data/a.jsonl", b"")
  with pytest.raises(DataError, match=r"gs://data/z\*: no such file; check the path"):
    JsonlSource("gs://data/z*").shards()
  with pytest.raises(DataError, match="gs://data/z.jsonl: no such file"):
    list(files.read_lines("gs://data/z.jsonl"))
  with pytest.raises(DataError, match="gs://data/z.jsonl: no such file"):
    files.fingerprint("gs://data/z.jsonl")
  with pytest.raises(DataError, match="nowhere: no such file"):
    files.fingerprint("nowhere")


class _RefusedError(Exception):
  """As the errors of gcsfs: not an OSError."""


def test_remote_errors_are_ours(bucket, monkeypatch):
  def refuse(*arguments, **options):
    raise _RefusedError("Anonymous caller\ndoes not have access")

  bucket.pipe("gs://data/a.jsonl", b"")
  monkeypatch.setattr(type(bucket), "exists", refuse)
  with pytest.raises(DataError, match="a.jsonl: cannot be listed: Anonymous .* access"):
    JsonlSource("gs://data/a.jsonl").files()
  monkeypatch.setattr(type(bucket), "open", refuse)
  with pytest.raises(DataError, match="a.jsonl:1: cannot be read: Anonymous caller do"):
    list(files.read_lines("gs://data/a.jsonl"))


def test_protocols_without_a_package(monkeypatch):
  with pytest.raises(ConfigError, match="no_such://x: .*no_such.* use a local path"):
    files.match("no_such://x")

  def missing(url):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
  with pytest.raises(ConfigError, match=r"needs embgemma\[gcs\]: pip install 'embgem"):
    list(files.read_lines("gs://bucket/x"))
  with pytest.raises(ConfigError, match="s3://x: Please install"):
    files.fingerprint("s3://x")


def test_zst_without_its_package(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "zstandard", None)
  path = tmp_path / "a.txt.zst"
  path.write_bytes(b"")
  with pytest.raises(ConfigError, match=r"needs embgemma\[zstd\]: pip install 'embgem"):
    list(files.read_lines(path))


def test_what_reading_imports():
  """Neither TensorFlow nor, for local files, anything of clouds."""
  program = """
import sys
import embgemma.data.public_sets
heavy = {"tensorflow", "seqio", "fsspec", "gcsfs", "pyarrow"}
print(*heavy & {*sys.modules})
"""
  result = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.split() == []
