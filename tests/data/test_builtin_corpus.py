import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import textwrap

import pytest

from embgemma.data import builtin_corpus
from embgemma.data.prompts import TASK_PROMPTS
from embgemma.errors import ConfigError, DataError

_ALL = [
  (task, split) for task in builtin_corpus.TASKS for split in builtin_corpus.SPLITS
]


def _normalised(text):
  return " ".join(text.lower().split())


@pytest.fixture(scope="module")
def corpus():
  return {key: list(builtin_corpus.examples(*key)) for key in _ALL}


def _texts(corpus, split):
  return {
    _normalised(record[side])
    for (_, name), records in corpus.items()
    for record in records
    for side in ("query", "positive")
    if name == split
  }


def test_enough_pairs_in_every_task(corpus):
  sizes = {key: len(records) for key, records in corpus.items()}
  train = sum(size for (_, split), size in sizes.items() if split == "train")
  validation = sum(sizes.values()) - train
  assert train >= 10_000
  assert 0.05 < validation / (train + validation) < 0.15
  assert min(sizes.values()) >= 50


def test_records_have_the_schema_of_user_data(corpus):
  for (task, _), records in corpus.items():
    kind = builtin_corpus.TASKS[task]
    assert kind in TASK_PROMPTS
    for record in records:
      assert set(record) - {"title"} == {
        *("query", "positive", "task", "language", "source")
      }
      assert all(type(value) is str for value in record.values())
      assert (record["task"], record["language"]) == (kind, "en")
      assert 12 <= len(record["query"]) <= 2000
      assert 20 <= len(record["positive"]) <= 2000
      assert record["query"] == record["query"].strip()


def test_no_text_twice_in_a_task(corpus):
  for task in builtin_corpus.TASKS:
    records = corpus[task, "train"] + corpus[task, "validation"]
    for side in ("query", "positive"):
      texts = [_normalised(record[side]) for record in records]
      assert len(set(texts)) == len(texts)


def test_no_positive_spells_out_its_query(corpus):
  for records in corpus.values():
    for record in records:
      assert _normalised(record["query"]) not in _normalised(record["positive"])


def test_validation_shares_no_text_with_train(corpus):
  assert not _texts(corpus, "train") & _texts(corpus, "validation")


def test_a_module_belongs_to_one_split(corpus):
  modules = {"train": set(), "validation": set()}
  for (task, split), records in corpus.items():
    if task != "stdlib_topics":
      files = (record["source"].rpartition(":")[0] for record in records)
      modules[split] |= {file.split("/")[0].removesuffix(".py") for file in files}
  assert len(modules["train"]) > 100
  assert len(modules["validation"]) > 10
  assert not modules["train"] & modules["validation"]


def test_records_are_the_callers_own():
  first = next(builtin_corpus.examples("stdlib_docs", "train"))
  first["query"] = "changed"
  assert next(builtin_corpus.examples("stdlib_docs", "train"))["query"] != "changed"


def test_other_processes_see_the_same_pairs(corpus):
  script = """
    import hashlib, json
    from embgemma.data import builtin_corpus as b
    keys = [(t, s) for t in b.TASKS for s in ("train", "validation")]
    lines = json.dumps([list(b.examples(*key)) for key in keys])
    print(b.fingerprint(), hashlib.sha256(lines.encode()).hexdigest())
  """
  # Another seed than ours orders sets and dictionaries of strings differently.
  result = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    env={**os.environ, "PYTHONHASHSEED": "4242"},
    capture_output=True,
    text=True,
    check=True,
  )
  lines = json.dumps([corpus[key] for key in _ALL]).encode()
  expected = [builtin_corpus.fingerprint(), hashlib.sha256(lines).hexdigest()]
  assert result.stdout.split() == expected


def test_drawn_pairs_are_kept_on_disk(corpus, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(builtin_corpus, "_drawn", lambda: drawn.append(1) or corpus)
  monkeypatch.setenv("EMBGEMMA_CACHE", str(tmp_path / "cache"))
  read = builtin_corpus._corpus.__wrapped__
  assert read() == read() == corpus
  assert len(drawn) == 1
  (kept,) = (tmp_path / "cache" / "builtin").iterdir()
  kept.write_bytes(kept.read_bytes()[:-9])
  assert read() == read() == corpus
  assert len(drawn) == 2, "a damaged file is drawn again"
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("EMBGEMMA_CACHE", str(tmp_path / "file"))
  assert read() == corpus, "a cache that cannot be written to is done without"


def test_fingerprint_changes_with_python_and_with_the_corpus(monkeypatch):
  before = builtin_corpus.fingerprint()
  monkeypatch.setattr(sys, "version", "3.99.0 (other build)")
  other_python = builtin_corpus.fingerprint()
  monkeypatch.setattr(builtin_corpus, "_VERSION", 999)
  assert len({before, other_python, builtin_corpus.fingerprint()}) == 3


@pytest.mark.parametrize(
  ("task", "split", "message"),
  [
    ("stdlib", "train", "there are: stdlib_docs, stdlib_code"),
    ("stdlib_docs", "test", "there are: train, validation"),
  ],
)
def test_unknown_task_or_split(task, split, message):
  with pytest.raises(ConfigError, match=message):
    builtin_corpus.examples(task, split)


_MODULE = '''
# Copyright of somebody, who licensed this file to all of us.
"""Tools for boxes of every size."""

class BigBox:
  """Holds many small things.

  The things stay in the order
  in which they came.
  """

  def add_thing(self, thing, *, twice=False):
    """Put one thing in. Boxes grow when they are full."""
    text = """
    # this is in a string and no comment at all
    and neither is this code.
    """
    # Twice means that a copy goes in
    # as well as the thing.
    if twice:
      self.things.append(thing)

    # self.things.append(not_for_real)
    return text

  def close(self):
    """Close the lid of the box."""
    pass

def one_line(): """Say nothing of any use."""; return 1
'''


@pytest.fixture
def small_library(tmp_path, monkeypatch):
  builtin_corpus._corpus.cache_clear()
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  # Every module counts as training data, so that expectations need no hashes.
  monkeypatch.setattr(builtin_corpus, "_split", lambda group: "train")
  yield tmp_path
  builtin_corpus._corpus.cache_clear()


def _pairs(task):
  records = builtin_corpus.examples(task, "train")
  return [(r["query"], r["positive"], r["source"]) for r in records]


def test_what_is_drawn_from_a_module(small_library):
  (small_library / "boxes").mkdir()
  (small_library / "boxes" / "big.py").write_text(_MODULE)
  assert _pairs("stdlib_docs") == [
    (
      "Holds many small things.",
      "The things stay in the order\nin which they came.",
      "boxes/big.py:5",
    ),
    ("Put one thing in.", "Boxes grow when they are full.", "boxes/big.py:12"),
  ]
  assert next(builtin_corpus.examples("stdlib_docs", "train"))["title"] == (
    "boxes.big.BigBox"
  )
  code = _pairs("stdlib_code")
  assert [(query, source) for query, _, source in code] == [
    ("Holds many small things.", "boxes/big.py:5"),
    ("Put one thing in.", "boxes/big.py:12"),
  ]
  assert code[0][1].startswith("class BigBox:\n\n  def add_thing(")
  assert code[1][1].startswith(
    'def add_thing(self, thing, *, twice=False):\n  text = """\n'
  )
  assert code[1][1].endswith("\n  return text")
  assert _pairs("stdlib_names") == [
    ("boxes big Big Box", "Holds many small things.", "boxes/big.py:5"),
    (
      "boxes big Big Box close (self)",
      "Close the lid of the box.",
      "boxes/big.py:26",
    ),
    ("boxes big one line ()", "Say nothing of any use.", "boxes/big.py:30"),
  ]
  assert _pairs("stdlib_comments") == [
    (
      "Twice means that a copy goes in as well as the thing.",
      "if twice:\n  self.things.append(thing)",
      "boxes/big.py:18",
    )
  ]


@pytest.mark.parametrize(
  "path",
  [
    "site-packages/m.py",
    "dist-packages/m.py",
    "unittest/test/m.py",
    "idlelib/idle_test/m.py",
    "lib2to3/m.py",
    "__phello__.foo.py",
    "config-3.11-x86_64-linux-gnu/m.py",
    "_sysconfigdata__linux_.py",
  ],
)
def test_what_is_no_library_module_is_skipped(small_library, path):
  for name, content in ((path, _MODULE), ("kept.py", '"""Nothing."""')):
    (small_library / name).parent.mkdir(parents=True, exist_ok=True)
    (small_library / name).write_text(content)
  assert not _pairs("stdlib_docs")


def test_broken_files_are_passed_over(small_library):
  (small_library / "a_broken.py").write_text("def f(:\n")
  (small_library / "b_latin.py").write_bytes(b"# \xff\n")
  (small_library / "c_dangling.py").symlink_to("absent.py")
  (small_library / "d_whole.py").write_text(_MODULE)
  assert len(_pairs("stdlib_docs")) == 2


def test_long_texts_are_cut_at_white_space(small_library):
  words = "word " * 600
  source = f'"""Say the same word all the time.\n\n{words}"""\n'
  (small_library / "long.py").write_text(source)
  [(_, positive, _)] = _pairs("stdlib_docs")
  assert positive == ("word " * 400).strip()


def test_documents_are_whole(small_library):
  (small_library / "boxes").mkdir()
  (small_library / "boxes" / "big.py").write_text(_MODULE)
  (small_library / "empty.py").write_text("\n")
  documents = list(builtin_corpus.documents("stdlib_modules", "train"))
  assert documents == [{"text": _MODULE}]
  assert not list(builtin_corpus.documents("stdlib_modules", "validation"))


def test_topics_are_split_as_their_pairs_are(corpus):
  """A held-out topic is in no training text."""
  texts = {
    split: [d["text"] for d in builtin_corpus.documents("stdlib_reference", split)]
    for split in builtin_corpus.SPLITS
  }
  assert len(texts["train"]) > 2 * len(texts["validation"]) > 0
  assert not set(texts["train"]) & set(texts["validation"])
  # The first words of a topic's pairs lie in a text of the same split.
  for split, documents in texts.items():
    joined = " ".join(" ".join(documents).split())
    queries = [
      record["query"]
      for record in corpus["stdlib_topics", split]
      if record["source"].startswith("pydoc_data")
    ]
    assert queries
    assert all(query in joined for query in queries)


def test_unknown_text_task():
  with pytest.raises(ConfigError, match="there are: stdlib_modules, stdlib_reference"):
    builtin_corpus.documents("stdlib_docs", "train")
  with pytest.raises(ConfigError, match="there are: train, validation"):
    builtin_corpus.documents("stdlib_modules", "test")


def test_library_without_source(small_library):
  with pytest.raises(DataError, match=r"has no \.py files"):
    next(builtin_corpus.examples("stdlib_docs", "train"))
