import dataclasses
import os
import pathlib

import jaxtyping
import pytest

from embgemma.data import tasks
from embgemma.data.sources import BuiltinSource, JsonlSource
from embgemma.data.tasks import DataConfig, Task
from embgemma.errors import ConfigError, DataError

_LENGTHS = {"query": 16, "positive": 32, "negatives": 32}


@pytest.fixture
def untyped():
  """Without the type checks of tests, as users run it."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def config(tmp_path) -> DataConfig:
  path = tmp_path / "a.jsonl"
  path.write_text('{"query": "q", "positive": "p"}\n')
  vocabulary = tmp_path / "tokenizer.model"
  vocabulary.write_bytes(b"any")
  return DataConfig(
    "mixture",
    _LENGTHS,
    (Task("a", JsonlSource(str(path))), Task("b", BuiltinSource("stdlib_topics"))),
    vocabulary=str(vocabulary),
    cache_dir=str(tmp_path / "cache"),
  )


@pytest.mark.parametrize("name", ["", "my-task", "a/b", "a b", "a:b"])
def test_task_names(name):
  with pytest.raises(ConfigError, match="use letters, digits, '_' and '.' only"):
    Task(name, JsonlSource("x"))


def test_task_kind():
  with pytest.raises(ConfigError, match="'t': unknown kind 'poetry'; there are .*'qa'"):
    Task("t", JsonlSource("x"), "poetry")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), "1"])
def test_task_rate(rate):
  with pytest.raises(ConfigError, match="task 't': rate must be > 0, got"):
    Task("t", JsonlSource("x"), rate=rate)


def test_jsonl_tasks():
  entry = {"path": ["b.jsonl", "c.jsonl"], "kind": "qa", "rate": 2.0, "limit": 5}
  assert tasks.jsonl_tasks({"a": "a.jsonl", "b": entry}) == (
    Task("a", JsonlSource("a.jsonl")),
    Task("b", JsonlSource(("b.jsonl", "c.jsonl"), 5), "qa", 2.0),
  )


@pytest.mark.parametrize("entry", [{"rate": 1.0}, {"path": "a", "weight": 1.0}])
def test_jsonl_tasks_with_other_keys(entry):
  with pytest.raises(ConfigError, match="JSONL task 'a': needs 'path' and takes"):
    tasks.jsonl_tasks({"a": entry})


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks": ()}, "no tasks: give JSONL_TASKS"),
    (
      {"tasks": [Task("a", JsonlSource("x")), Task("a", JsonlSource("y"))]},
      r"tasks named twice: \['a'\]",
    ),
    ({"lengths": {"query": 16}}, "TASK_FEATURE_LENGTHS must have the keys"),
    ({"lengths": {**_LENGTHS, "title": 3}}, "TASK_FEATURE_LENGTHS must have the keys"),
    (
      {"lengths": {**_LENGTHS, "positive": 2}},
      r"TASK_FEATURE_LENGTHS\['positive'\] must be at least 3 .*, got 2",
    ),
    ({"lengths": {**_LENGTHS, "query": 16.0}}, r"\['query'\] .*, got 16.0"),
    ({"on_bad_record": "ignore"}, "on_bad_record must be one of .*, got 'ignore'"),
    ({"max_negatives": -1}, "max_negatives must be >= 0, got -1"),
    ({"vocabulary": None}, "no vocabulary: set VOCABULARY .* or VOCABULARY_SIZE"),
  ],
)
def test_config_errors(config, changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(config, **changes)


def test_missing_vocabulary(config, tmp_path):
  config = dataclasses.replace(config, vocabulary=str(tmp_path / "gone.model"))
  with pytest.raises(DataError, match=r"gone\.model: no such .*; check VOCABULARY"):
    config.vocabulary_path()


def test_selected(config):
  assert [task.name for task in config.selected()] == ["a", "b"]
  alone = dataclasses.replace(config, mixture_or_task_name="b")
  assert [task.name for task in alone.selected()] == ["b"]
  assert config.max_length == 32


def test_cache_directory(config, tmp_path, monkeypatch):
  assert config.cache_root == tmp_path / "cache"
  default = dataclasses.replace(config, cache_dir=None)
  monkeypatch.delenv("EMBGEMMA_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", "/x")
  assert default.cache_root == pathlib.Path("/x/embgemma")
  monkeypatch.setenv("EMBGEMMA_CACHE", "/y")
  assert default.cache_root == pathlib.Path("/y")
  monkeypatch.delenv("EMBGEMMA_CACHE")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert default.cache_root == pathlib.Path.home() / ".cache" / "embgemma"


def test_manifest_follows_what_is_cached(config, tmp_path):
  def other_file():
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    return config

  def other_vocabulary():
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    return config

  def task(**changes):
    first, second = config.tasks
    return change(tasks=(dataclasses.replace(first, **changes), second))

  def change(**changes):
    return dataclasses.replace(config, **changes)

  first = config.manifest_path()
  assert change().manifest_path() == first
  assert first.parent == tmp_path / "cache" / "mixtures"
  seen = {first}
  for changed in (
    lambda: change(lengths={**_LENGTHS, "query": 17}),
    lambda: change(max_negatives=2),
    lambda: change(on_bad_record="skip"),
    lambda: change(mixture_or_task_name="a"),
    lambda: change(mixture_or_task_name="other"),
    lambda: change(vocabulary=None, vocabulary_size=700),
    lambda: change(vocabulary=None, vocabulary_size=800),
    lambda: task(kind="qa"),
    lambda: task(rate=2.0),
    lambda: task(name="c"),
    lambda: task(source=JsonlSource(str(tmp_path / "a.jsonl"), 1)),
    other_file,
    other_vocabulary,
  ):
    path = changed().manifest_path()
    assert path not in seen
    seen.add(path)
