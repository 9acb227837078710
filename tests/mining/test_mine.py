"""Mining from files to files: order, protection, resuming, and what is refused."""

import dataclasses
import gzip
import json
import random
import shutil

import gin
import numpy as np
import pytest

from embgemma import gin_config
from embgemma.data.tasks import jsonl_tasks
from embgemma.errors import ConfigError, DataError
from embgemma.mining import mine as mine_module
from embgemma.mining import pieces, workspace
from embgemma.mining.ann import AnnOptions
from embgemma.mining.bm25 import Bm25Searcher
from embgemma.mining.filters import RULES, MiningOptions
from embgemma.mining.mine import mine
from embgemma.mining.vectors import EmbeddedTexts, VectorSearcher

_WORDS = "river stone cloud engine table music garden window paper silver"
_STEMS = _WORDS.split()


def _pairs(count, seed, **more):
  generator = random.Random(seed)
  records = []
  for number in range(count):
    words = generator.sample(_STEMS, 3)
    positive = " ".join([*words, *generator.sample(_STEMS, 3), f"n{number % 30}"])
    records.append({"query": " ".join(words), "positive": positive, **more})
  return records


def _read(path):
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def _searcher(name, teacher):
  if name == "bm25":
    return Bm25Searcher(segment=13)
  ann_above = 0 if name == "ann" else 1000
  options = AnnOptions(lists=2, nprobe=2, part=20)
  return VectorSearcher(EmbeddedTexts(teacher), 16, ann_above, options)


_OPTIONS = MiningOptions(depth=8, negatives=2, query_block=16)


@pytest.mark.parametrize("name", ["bm25", "exact", "ann"])
def test_files_hold_the_examples_in_their_order(name, make_config, teacher, tmp_path):
  one = _pairs(40, 1, title="T", task="qa")
  one[3]["negatives"] = ["an old one"]
  other = _pairs(35, 2, label="x")
  config = make_config(one={"records": one, "kind": "code", "rate": 2.5}, other=other)
  lines = []
  found = mine(
    config, _searcher(name, teacher), None, _OPTIONS, tmp_path / "out", lines.append
  )
  for task, records in (("one", one), ("other", other)):
    written = _read(tmp_path / "out" / f"{task}.jsonl.gz")
    assert [
      {k: v for k, v in record.items() if k != "negatives"} for record in written
    ] == [{k: v for k, v in record.items() if k != "negatives"} for record in records]
    mined = sum(len(record["negatives"]) for record in written)
    mined -= sum(len(record.get("negatives", [])) for record in records)
    assert mined == found.tasks[task]["mined"]
    by_mined = found.tasks[task]["examples_by_mined"]
    assert sum(by_mined) == len(records)
  assert found.tasks["one"]["mined"] > 40
  assert found.tasks["other"]["mined"] == 0  # one label: all are positives
  old = _read(tmp_path / "out" / "one.jsonl.gz")[3]["negatives"]
  assert old[0] == "an old one"
  assert old[1]["title"] == "T"
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "one.jsonl.gz",
    "other.jsonl.gz",
    "report.json",
    "tasks.gin",
  ]


def test_the_macro_is_one_that_tasks_are_made_of(make_config, teacher, tmp_path):
  one = {"records": _pairs(20, 1), "kind": "similarity", "rate": 2.5, "symmetric": True}
  config = make_config(one=one, other=_pairs(20, 2))
  mine(config, _searcher("exact", teacher), None, _OPTIONS, tmp_path / "o", [].append)
  gin_config.register()
  try:
    # Of a mixture, which made the tasks in another way.
    gin.parse_config("TASKS = @builtin_tasks()\nMODULES = ('their_seqio_tasks',)")
    gin.parse_config((tmp_path / "o" / "tasks.gin").read_text())
    assert str(gin.query_parameter("%TASKS")) == "@jsonl_tasks()"
    assert gin.query_parameter("%MODULES") == ()
    tasks = jsonl_tasks(gin.query_parameter("%JSONL_TASKS"))
  finally:
    gin.clear_config()
  assert [(t.name, t.kind, t.rate, t.symmetric) for t in tasks] == [
    ("one", "similarity", 2.5, True),
    ("other", None, 1.0, False),
  ]
  assert tasks[0].source.files() == [str(tmp_path / "o" / "one.jsonl.gz")]


@pytest.mark.parametrize("judged", [False, True])
def test_negatives_are_those_of_all_similarities(
  judged, make_config, make_teacher, tmp_path
):
  """Of the whole corpus; the judge's vectors are kept as float16."""
  records = _pairs(50, 3)
  config = make_config(one=records)
  searcher, judge = make_teacher("searcher"), make_teacher("judge")
  options = MiningOptions(depth=50, negatives=50, query_block=16)
  mine(
    config,
    VectorSearcher(EmbeddedTexts(searcher, "float32"), 16),
    judge if judged else None,
    options,
    tmp_path / "o",
    [].append,
  )
  texts = list(dict.fromkeys(record["positive"] for record in records))

  def similarities(teacher, query):
    documents = [teacher.document(text, None, None) for text in texts]
    return teacher.encode(documents) @ teacher.encode([teacher.query(query, None)])[0]

  for record in _read(tmp_path / "o" / "one.jsonl.gz"):
    query, positive = record["query"], texts.index(record["positive"])
    known = {r["positive"] for r in records if r["query"] == query}
    order = np.argsort(-similarities(searcher, query), kind="stable")
    decisive = similarities(judge if judged else searcher, query)
    bound = decisive[positive] - 0.05 * abs(decisive[positive])
    close = {texts[i] for i in np.flatnonzero(abs(decisive - bound) < 1e-3)}
    expected = [
      texts[i] for i in order if texts[i] not in known and decisive[i] < bound
    ]
    found = [text for text in record["negatives"] if text not in close]
    assert found == [text for text in expected if text not in close]


def test_false_negatives_are_not_mined(make_config, teacher, tmp_path):
  """Positives of equal queries, copies of positives, and the query itself."""
  records = [
    {"query": "red river", "positive": "the red river runs"},
    {"query": "Red River!", "positive": "a river that is red"},
    {"query": "blue", "positive": "THE RED RIVER, RUNS"},
    {"query": "who", "positive": "red-river"},
    {"query": "else", "positive": "red stone"},
  ]
  options = MiningOptions(depth=5, negatives=5, max_share=None)
  config = make_config(one=records)
  for number, searcher in enumerate(["bm25", "exact"]):
    output = tmp_path / str(number)
    mine(config, _searcher(searcher, teacher), None, options, output, [].append)
    written = _read(output / "one.jsonl.gz")
    assert written[0]["negatives"] == ["red stone"]
    assert written[1]["negatives"] == ["red stone"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["bm25", "exact"])
def test_swapped_sides_have_no_false_negatives(
  name, symmetric, make_config, teacher, tmp_path
):
  """Of ("a river", "its end"): "c river" is known, "z river" is of its positive."""
  pairs = [
    ("c river", "a river"),
    ("x river", "c river"),
    ("a river", "its river end"),
    ("its river end", "z river"),
    ("other", "river of others"),
  ]
  records = [{"query": query, "positive": positive} for query, positive in pairs]
  one = {"records": records, "kind": "similarity", "symmetric": symmetric}
  options = MiningOptions(depth=5, negatives=5, max_share=None)
  config, output = make_config(one=one), tmp_path / "o"
  mine(config, _searcher(name, teacher), None, options, output, [].append)
  negatives = set(_read(output / "one.jsonl.gz")[2]["negatives"])
  expected = {"river of others"}
  assert negatives == expected if symmetric else {*expected, "c river", "z river"}


def test_names_that_make_one_file(make_config, teacher, tmp_path, monkeypatch):
  """Names of seqio may have what names in JSONL_TASKS may not."""
  opened = mine_module.open_tasks(make_config(one=_pairs(5, 1), other=_pairs(5, 2)))
  renamed = [
    dataclasses.replace(task, name=name)
    for task, name in zip(opened, ("a:b", "a_b"), strict=True)
  ]
  monkeypatch.setattr(mine_module, "open_tasks", lambda config: renamed)
  with pytest.raises(ConfigError, match="'a:b' and 'a_b' would both be written as"):
    mine(
      make_config(one=_pairs(5, 1)),
      _searcher("exact", teacher),
      None,
      _OPTIONS,
      tmp_path / "o",
      [].append,
    )


def test_a_full_disk_is_no_fault(make_config, teacher, tmp_path, monkeypatch):
  """Nothing is written into a sparse mapped file, which would kill the process."""
  mapped = np.lib.format.open_memmap

  def read_only(path, mode, *args, **kwargs):
    assert mode == "r"
    return mapped(path, mode, *args, **kwargs)

  monkeypatch.setattr(np.lib.format, "open_memmap", read_only)
  config = make_config(one=_pairs(20, 1))
  mine(config, _searcher("exact", teacher), None, _OPTIONS, tmp_path / "o", [].append)
  assert _files(tmp_path / "o")


def test_existing_negatives(make_config, teacher, tmp_path):
  records = _pairs(20, 1)
  for record in records:
    record["negatives"] = [records[0]["positive"].upper(), "old"]
  config = make_config(one=records)
  common = {"depth": 20, "negatives": 3, "max_share": None}
  for existing in ("keep", "replace"):
    options = MiningOptions(existing=existing, **common)
    searcher = _searcher("exact", teacher)
    mine(config, searcher, None, options, tmp_path / existing, [].append)
  for record in _read(tmp_path / "keep" / "one.jsonl.gz"):
    assert record["negatives"][:2] == [records[0]["positive"].upper(), "old"]
    assert len(record["negatives"]) == 5
    assert records[0]["positive"] not in record["negatives"]
  replaced = _read(tmp_path / "replace" / "one.jsonl.gz")
  assert all("old" not in record["negatives"] for record in replaced)
  assert any(records[0]["positive"] in record["negatives"] for record in replaced)


def test_a_corpus_of_its_own(make_config, teacher, tmp_path):
  records = _pairs(10, 1)
  path = tmp_path / "corpus.jsonl"
  path.write_text(
    "".join(f'{{"_id": "{i}", "text": "river stone m{i}"}}\n' for i in range(30))
  )
  options = MiningOptions(
    depth=40, negatives=40, max_share=None, corpus={"one": str(path)}
  )
  config = make_config(one=records, other=_pairs(10, 2))
  found = mine(
    config, _searcher("exact", teacher), None, options, tmp_path / "o", [].append
  )
  distinct = len({record["positive"] for record in records})
  assert found.tasks["one"]["passages"] == 30 + distinct
  assert found.tasks["other"]["passages"] <= 10
  for record in _read(tmp_path / "o" / "one.jsonl.gz"):
    assert {f"river stone m{i}" for i in range(30)} <= set(record["negatives"])


def test_counts_of_the_report(make_config, teacher, tmp_path):
  records = _pairs(40, 5)
  options = MiningOptions(
    depth=12, negatives=2, first_rank=2, last_rank=9, min_similarity=0.3, margin=0.05
  )
  config = make_config(one=records)
  output = tmp_path / "o"
  found = mine(config, _searcher("exact", teacher), None, options, output, [].append)
  task = found.tasks["one"]
  assert set(task["dropped"]) == set(RULES)
  assert task["dropped"]["rank"] == 40 * 4
  histograms = task["histograms"]
  assert sum(histograms["positive"]["counts"]) == 40
  assert sum(histograms["negative"]["counts"]) == task["mined"]
  assert sum(n * c for n, c in enumerate(task["examples_by_mined"])) == task["mined"]
  share = histograms["share"]
  below = [c for c, edge in zip(share["counts"], share["edges"], strict=False)]
  assert sum(below) == task["mined"]
  assert not any(c for c, e in zip(below, share["edges"], strict=False) if e >= 0.95)
  recall = [task["recall"][key] for key in ("1", "10", "12")]
  assert recall == sorted(recall)
  assert recall[0] > 0
  assert recall[2] <= 1
  stored = json.loads((output / "report.json").read_text())
  assert stored["tasks"]["one"] == task
  (table,) = found.tables()
  assert [str(column.header) for column in table.columns] == ["task", "one"]
  assert "min_similarity" in list(table.columns[0].cells)


def _files(output):
  names = [p.name for p in output.iterdir() if p.suffix == ".gz"]
  return {name: (output / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["bm25", "exact", "ann"])
def test_a_killed_run_goes_on(name, make_config, make_teacher, tmp_path, monkeypatch):
  """Ends at every piece in turn, before it is there: the same bytes in the end."""
  config = make_config(one=_pairs(40, 1), other=_pairs(25, 2))
  options = MiningOptions(depth=8, negatives=2, query_block=16, pick="random")
  judge = make_teacher("judge") if name == "bm25" else None
  whole = tmp_path / "whole"
  mine(config, _searcher(name, make_teacher()), judge, options, whole, [].append)

  class Killed(BaseException):
    pass

  made, allowed = [], 1

  def limited(real):
    def replacement(*args, **kwargs):
      if len(made) >= allowed:
        raise Killed
      made.append(real)
      return real(*args, **kwargs)

    return replacement

  for module, function in (
    (pieces, "new_path"),
    (pieces.os, "rename"),
    (workspace.os, "replace"),
    (workspace, "write_json"),
    (mine_module, "write_json"),
    (mine_module, "new_path"),
    (mine_module.shutil, "rmtree"),
  ):
    monkeypatch.setattr(module, function, limited(getattr(module, function)))
  output, runs, states = tmp_path / "killed", 0, {()}
  while runs < 300:
    made.clear()
    runs += 1
    try:
      mine(config, _searcher(name, make_teacher()), judge, options, output, [].append)
      break
    except Killed:
      found = (str(p.relative_to(output)) for p in output.rglob("*"))
      # What has no name yet does not count.
      state = tuple(sorted(p for p in found if "/." not in p))
      # Some steps are done again with the one after them.
      allowed = allowed + 1 if state in states else 1
      states.add(state)
      assert allowed < 10
  assert runs > 25
  assert _files(output) == _files(whole)


def test_texts_of_all_tasks_are_embedded_once(make_config, teacher, tmp_path):
  one, other = _pairs(30, 1), _pairs(30, 2)
  config = make_config(one=one, other=other + one)
  mine(config, _searcher("exact", teacher), None, _OPTIONS, tmp_path / "o", [].append)
  sides = {(side, r[side]) for r in one + other for side in ("query", "positive")}
  assert sum(teacher.calls) == len(sides)


def test_pieces_of_other_options_are_left_alone(make_config, teacher, tmp_path):
  """Vectors stay, choices are made anew; and the other way round."""
  config = make_config(one=_pairs(40, 1))
  searcher = _searcher("exact", teacher)
  deep = MiningOptions(depth=20, negatives=3, query_block=16)
  outputs = {}
  for name, options in (("a", _OPTIONS), ("b", deep)):
    mine(config, searcher, None, options, tmp_path / name, [].append)
    outputs[name] = _files(tmp_path / name)
  assert outputs["a"] != outputs["b"]
  shared, before = tmp_path / "shared", len(teacher.calls)
  embedded = []
  for name, options in (("a", _OPTIONS), ("b", deep), ("a", _OPTIONS)):
    mine(
      config, searcher, None, options, shared, [].append, overwrite=True, keep_work=True
    )
    assert _files(shared) == outputs[name]
    embedded.append(len(teacher.calls) - before)
  assert embedded[0] == embedded[1] == embedded[2] > 0


def test_outputs_that_are_refused(make_config, teacher, tmp_path):
  config = make_config(one=_pairs(20, 1), other=_pairs(20, 2))
  searcher, output = _searcher("exact", teacher), tmp_path / "o"
  run = lambda c, o, **more: mine(c, searcher, None, _OPTIONS, o, [].append, **more)  # noqa: E731
  run(config, output)
  first = _files(output)
  run(config, output)  # done already
  changed = make_config(one=_pairs(20, 3))
  with pytest.raises(DataError, match="results of other settings or inputs"):
    run(changed, output)
  assert _files(output) == first
  run(changed, output, overwrite=True)
  assert set(_files(output)) == {"one.jsonl.gz"}  # nothing stays of the first
  (tmp_path / "mine.txt").write_text("x")
  with pytest.raises(DataError, match="holds something else than mined files"):
    run(changed, tmp_path, overwrite=True)
  with pytest.raises(DataError, match="is a file"):
    run(changed, tmp_path / "mine.txt", overwrite=True)


def test_an_unfinished_run_of_others_is_refused(make_config, teacher, tmp_path):
  output = tmp_path / "o"
  (output / ".work").mkdir(parents=True)
  (output / ".work" / "run.json").write_text('{"fingerprint": "another"}')
  config = make_config(one=_pairs(20, 1))
  with pytest.raises(DataError, match="holds an unfinished run of other settings"):
    mine(config, _searcher("exact", teacher), None, _OPTIONS, output, [].append)


def test_two_processes_at_once(make_config, teacher, tmp_path):
  config = make_config(one=_pairs(20, 1))

  def again(line):
    del line
    mine(config, _searcher("exact", teacher), None, _OPTIONS, tmp_path / "o", [].append)

  with pytest.raises(DataError, match="another process is mining"):
    mine(config, _searcher("exact", teacher), None, _OPTIONS, tmp_path / "o", again)


def test_damaged_pieces_are_named(make_config, teacher, tmp_path):
  config, output = make_config(one=_pairs(20, 1)), tmp_path / "o"
  searcher = _searcher("exact", teacher)
  deep = MiningOptions(depth=8, negatives=1, query_block=16)
  mine(config, searcher, None, deep, output, [].append, keep_work=True)
  (piece,) = output.glob(".work/tasks/one-*/search-*/hits-*/000000000000.npz")
  piece.write_bytes(piece.read_bytes()[:100])
  with pytest.raises(DataError, match=r"000000000000\.npz: damaged .* delete it"):
    mine(config, searcher, None, _OPTIONS, output, [].append, overwrite=True)


def test_a_segment_that_was_deleted_is_made_again(make_config, teacher, tmp_path):
  """As the message of a damaged one says."""
  config, output = make_config(one=_pairs(40, 1)), tmp_path / "o"
  searcher = _searcher("exact", teacher)
  mine(config, searcher, None, _OPTIONS, output, [].append, keep_work=True)
  first = _files(output)
  segments = sorted(output.glob(".work/vectors-*/segment-*"))
  shutil.rmtree(segments[1])
  calls = len(teacher.calls)
  deep = dataclasses.replace(_OPTIONS, depth=9)
  mine(config, searcher, None, deep, output, [].append, overwrite=True, keep_work=True)
  assert sum(teacher.calls[calls:]) == 16
  assert first.keys() == _files(output).keys()


def test_missing_corpus_and_documents(make_config, teacher, tmp_path):
  config = make_config(one=_pairs(5, 1))
  options = MiningOptions(corpus=str(tmp_path / "none.jsonl"))
  with pytest.raises(DataError, match=r"none\.jsonl: no such corpus file"):
    mine(config, _searcher("exact", teacher), None, options, tmp_path / "o", [].append)
  assert not (tmp_path / "o").exists()
  with pytest.raises(ConfigError, match="mining: depth"):
    MiningOptions(depth=-1)
