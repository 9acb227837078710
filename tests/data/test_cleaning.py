import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import cleaning
from embgemma.data.cleaners import Filter
from embgemma.data.duplicates import ExactDuplicates, NearDuplicates
from embgemma.data.filters import LengthFilter
from embgemma.errors import DataError


def pair(query, positive, title=""):
  return {
    "query": query,
    "positive": positive,
    "negatives": [],
    "title": title,
    "task": "",
    "label": "",
  }


@dataclasses.dataclass(frozen=True)
class Without(Filter):
  """Drops queries with a word."""

  word: str

  def fault(self, example):
    return f"has {self.word}" if self.word in example["query"].split() else None


def clean(directory, shards, cleaners):
  for number in reversed(range(len(shards))):  # the order of scans is of no account
    cleaning.scan(shards[number], cleaners, directory, number)
  return cleaning.decide(cleaners, directory, len(shards))


def dropped(directory, shards):
  """(shard, index) of what is left out."""
  return [
    (shard, int(index))
    for shard in range(len(shards))
    for index in cleaning.dropped(directory, shard)
  ]


def one_after_another(examples, cleaners):
  """Places that each cleaner drops, by a dict of what was seen."""
  left, drops = list(range(len(examples))), []
  for cleaner in cleaners:
    seen, own = {}, []
    for place in left:
      query, positive = examples[place]["query"], examples[place]["positive"]
      if isinstance(cleaner, ExactDuplicates):
        key = {"pair": (query, positive), "query": query, "positive": positive}
        if seen.setdefault(key[cleaner.on], place) != place:
          own.append(place)
      elif cleaner.fault(examples[place]):
        own.append(place)
    left = [place for place in left if place not in own]
    drops.append(own)
  return drops


TEXTS = st.sampled_from(["a", "b", "a b", "b a", "c", "a c"])
CLEANERS = st.lists(
  st.sampled_from(
    [
      Without("a"),
      Without("c"),
      ExactDuplicates("pair", normalized=False),
      ExactDuplicates("query", normalized=False),
      ExactDuplicates("positive", normalized=False),
    ]
  ),
  max_size=4,
)


@settings(max_examples=60)
@given(
  st.lists(st.tuples(TEXTS, TEXTS), max_size=30),
  CLEANERS,
  st.lists(st.integers(0, 30), max_size=3),
)
def test_cleaners_act_in_order_however_the_examples_lie(
  tmp_path_factory, texts, cleaners, cuts
):
  examples = [pair(*both) for both in texts]
  ends = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
  shards = [examples[a:b] for a, b in itertools.pairwise(ends)]
  directory = tmp_path_factory.mktemp("cleaned")
  report = clean(directory, shards, cleaners)
  expected = one_after_another(examples, cleaners)
  places = [ends[shard] + index for shard, index in dropped(directory, shards)]
  assert places == sorted(itertools.chain(*expected))
  assert [entry["dropped"] for entry in report["cleaners"]] == list(map(len, expected))
  assert report["examples"] == len(examples)
  assert report["kept"] == len(examples) - len(places)
  for cleaner, entry, own in zip(cleaners, report["cleaners"], expected, strict=True):
    if isinstance(cleaner, Without):
      assert entry["reasons"] == ({f"has {cleaner.word}": len(own)} if own else {})
    listed = [ends[row["shard"]] + row["index"] for row in entry["listed"]]
    assert listed == own[: cleaning.MAX_LISTED]
    assert [row["text"] for row in entry["listed"]] == [
      examples[place]["query"] for place in listed
    ]


def test_the_report_says_what_was_dropped_and_why(tmp_path):
  shards = [
    [pair("one\ntwo  " + "x" * 100, "p"), pair("q", "p")],
    [pair("Q!", "P"), pair("ab", "p")],
  ]
  cleaners = [ExactDuplicates("query"), ExactDuplicates("positive"), Without("ab")]
  report = clean(tmp_path, shards, cleaners)
  assert report == cleaning.report(tmp_path)
  assert report["dropped"] == {
    "ExactDuplicates": 1,
    "ExactDuplicates 2": 2,
    "Without": 0,
  }
  assert report["cleaners"][0]["listed"] == [
    {"shard": 1, "index": 0, "text": "Q!", "reason": "repeats example 1 of shard 0"}
  ]
  lines = cleaning.report_lines(report)
  assert lines[0] == "cleaning kept 1 of 4 examples"
  assert "    shard 1, example 1: repeats example 0 of shard 0: ab" in lines


def test_documents_are_cleaned_by_their_text(tmp_path):
  shard = [{"text": text} for text in ("A b.", "a b", "abc", "a")]
  report = clean(tmp_path, [shard], [LengthFilter(min_text=2), ExactDuplicates()])
  assert cleaning.dropped(tmp_path, 0).tolist() == [1, 3]
  assert report["cleaners"][0]["listed"][0]["text"] == "a"


class Killed(BaseException):
  pass


def killed_after(examples, number):
  yield from examples[:number]
  raise Killed


def test_killed_scans_and_decisions_are_made_again(tmp_path, monkeypatch):
  examples = [pair(f"q{i % 7}", f"p{i % 5}") for i in range(60)]
  shards = [examples[:40], examples[40:]]
  cleaners = [Without("q3"), ExactDuplicates(), NearDuplicates()]
  clean(tmp_path / "whole", shards, cleaners)
  directory = tmp_path / "killed"
  with pytest.raises(Killed):
    cleaning.scan(killed_after(shards[0], 13), cleaners, directory, 0)
  assert not list(directory.glob("*"))
  # What a kill without any clean-up leaves: temporary files, and some finished ones.
  (directory / ".scan-00000.codes.abc").write_bytes(b"half")
  (directory / "scan-00000.codes").write_bytes(b"half")
  for number, shard in enumerate(shards):
    cleaning.scan(shard, cleaners, directory, number)
  cleaning.scan(killed_after(shards[1], 0), cleaners, directory, 1)  # is there: unread

  save = np.save
  saved = []

  def dies_on_the_second(file, array):
    if saved:
      raise Killed
    saved.append(array)
    save(file, array)

  monkeypatch.setattr(np, "save", dies_on_the_second)
  with pytest.raises(Killed):
    cleaning.decide(cleaners, directory, 2)
  monkeypatch.undo()
  assert not cleaning.is_decided(directory)
  cleaning.decide(cleaners, directory, 2)
  assert cleaning.is_decided(directory)
  for path in (tmp_path / "whole").iterdir():
    assert (directory / path.name).read_bytes() == path.read_bytes()
  assert {p.name for p in directory.iterdir()} == {
    "drops-00000.npy",
    "drops-00001.npy",
    "report.json",
  }
  # Again: nothing is read.
  cleaning.scan(killed_after(shards[0], 0), cleaners, directory, 0)
  assert cleaning.decide(cleaners, directory, 2) == cleaning.report(directory)


def test_damage_is_reported(tmp_path):
  cleaners = [ExactDuplicates()]
  shards = [[pair("a", "b"), pair("a", "b")], [pair("c", "d")]]
  cleaning.scan(shards[0], cleaners, tmp_path, 0)
  with pytest.raises(DataError, match=r"scan cannot be read .*scan-00001.json"):
    cleaning.decide(cleaners, tmp_path, 2)
  cleaning.scan(shards[1], cleaners, tmp_path, 1)
  keys = tmp_path / "scan-00000.0.keys"
  whole = keys.read_bytes()
  keys.write_bytes(whole[:9])
  with pytest.raises(DataError, match=r"0.keys: 9 bytes where the scan wrote 16; del"):
    cleaning.decide(cleaners, tmp_path, 2)
  keys.write_bytes(whole)
  meta = tmp_path / "scan-00000.json"
  text = meta.read_text()
  meta.write_text(text[:10])
  with pytest.raises(DataError, match="scan cannot be read"):
    cleaning.decide(cleaners, tmp_path, 2)
  meta.write_text(text)
  cleaning.decide(cleaners, tmp_path, 2)
  (tmp_path / "drops-00000.npy").write_bytes(b"")
  with pytest.raises(DataError, match="drops-00000.npy: cannot be read"):
    cleaning.dropped(tmp_path, 0)
  (tmp_path / "report.json").write_text("{")
  with pytest.raises(DataError, match="report.json: cannot be read"):
    cleaning.report(tmp_path)


def test_a_reader_of_scans_that_were_removed_finds_the_report(tmp_path, monkeypatch):
  cleaners = [ExactDuplicates()]
  cleaning.scan([pair("a", "b")], cleaners, tmp_path, 0)
  load = cleaning._load_scans

  def overtaken(directory, num_shards):
    monkeypatch.setattr(cleaning, "_load_scans", load)
    cleaning.decide(cleaners, tmp_path, 1)  # another process
    return load(directory, num_shards)

  monkeypatch.setattr(cleaning, "_load_scans", overtaken)
  assert cleaning.decide(cleaners, tmp_path, 1)["examples"] == 1


def test_cleaners_are_picklable_and_have_fingerprints():
  cleaners = [ExactDuplicates("query"), NearDuplicates(), LengthFilter(min_query=2)]
  assert pickle.loads(pickle.dumps(cleaners)) == cleaners
  keys = [json.dumps(c.fingerprint()) for c in cleaners]
  assert len(set(keys)) == 3
  assert ExactDuplicates("pair").fingerprint() != cleaners[0].fingerprint()


def test_more_shards_than_open_files(tmp_path, monkeypatch):
  monkeypatch.setattr("embgemma.data.cleaners._OPEN_FILES", 2)
  monkeypatch.setattr("embgemma.data.cleaners._BLOCK", 3)
  shards = [[pair(f"q{i % 4}", "p"), pair("r", f"p{i}")] for i in range(6)] + [[]]
  clean(tmp_path, shards, [ExactDuplicates()])
  assert dropped(tmp_path, shards) == [(4, 0), (5, 0)]


def test_a_remote_directory_serves_as_a_local_one(tmp_path, bucket):
  shards = [[pair("a", "b"), pair("a", "b")], [pair("cc", "d"), pair("a", "b")]]
  cleaners = [LengthFilter(max_query=1), ExactDuplicates()]
  remote = "gs://bucket/cleaned"
  assert clean(remote, shards, cleaners) == clean(tmp_path, shards, cleaners)
  assert (
    dropped(remote, shards) == dropped(tmp_path, shards) == [(0, 1), (1, 0), (1, 1)]
  )
  assert sorted(bucket.find("gs://bucket/cleaned")) == [
    f"/bucket/cleaned/{name}"
    for name in ("drops-00000.npy", "drops-00001.npy", "report.json")
  ]
