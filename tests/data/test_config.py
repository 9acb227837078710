"""What a stage trains on: what is refused, and where caches lie."""

import dataclasses
import os
import pathlib

import jaxtyping
import pytest

from embgemma.data.config import DataConfig, TextDataConfig
from embgemma.data.denoisers import Denoiser, Sentinels, causal_lm, prefix_lm, ul2
from embgemma.data.sources import BuiltinSource, JsonlSource, TextFileSource
from embgemma.data.tasks import Task
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
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


def _with_task(config, **options) -> DataConfig:
  return dataclasses.replace(config, tasks=(Task("t", JsonlSource("x"), **options),))


def test_task_kind(config):
  with pytest.raises(ConfigError, match="'t': unknown kind 'poetry'; there are .*'qa'"):
    _with_task(config, kind="poetry")
  with pytest.raises(ConfigError, match="'t': prompt 'poem' does not exist"):
    _with_task(config, kind="poem/document")
  changed = dataclasses.replace(config, prompts={"poem": "task: poem | query: "})
  assert _with_task(changed, kind="poem/document").tasks[0].kind == "poem/document"


def test_symmetric_task(config):
  with pytest.raises(ConfigError, match="'t': give a symmetric task a kind"):
    Task("t", JsonlSource("x"), symmetric=True)
  with pytest.raises(ConfigError, match="'t': kind 'qa' has two prompts, so its sides"):
    _with_task(config, kind="qa", symmetric=True)
  assert _with_task(config, kind="bitext", symmetric=True).tasks[0].symmetric


def test_a_changed_prompt_changes_its_tasks_alone(config):
  tasks = tuple(
    Task(name, config.tasks[0].source, kind)
    for name, kind in (("a", "qa"), ("b", "code"), ("c", None), ("d", "poem/document"))
  )
  poem = {"poem": "task: poem | query: "}
  before = dataclasses.replace(config, tasks=tasks, prompts=poem)
  qa = {"QuestionAnswering": "question: "}
  after = dataclasses.replace(before, prompts={**poem, **qa})
  changed = {
    task.name
    for task in tasks
    if before.task_directory(task.name, "v") != after.task_directory(task.name, "v")
  }
  assert changed == {"a", "c"}  # without a kind, any prompt may be meant
  assert before.manifest_path() != after.manifest_path()


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


def test_rates_are_another_mixture_of_the_same_caches(config):
  mixtures = [
    dataclasses.replace(config, rates=rates)
    for rates in ("explicit", "even", 2.0, {"a": 1.0}, {"a": 1.0, "b": 2.0})
  ]
  assert len({each.manifest_path() for each in mixtures}) == 1
  assert len({each.mixture_key() for each in mixtures}) == len(mixtures)


_TEXT_LENGTHS = {"inputs": 64, "targets": 64}


@pytest.fixture
def text_config(tmp_path) -> TextDataConfig:
  path = tmp_path / "a.txt"
  path.write_text("a document\n")
  vocabulary = tmp_path / "tokenizer.model"
  vocabulary.write_bytes(b"any")
  return TextDataConfig(
    "mixture",
    _TEXT_LENGTHS,
    (Task("a", TextFileSource(str(path))),),
    vocabulary=str(vocabulary),
    cache_dir=str(tmp_path / "cache"),
  )


def test_each_kind_refuses_the_other(config, text_config):
  message = "task 'a' has {} and this stage trains on {}; give {}_TASKS"
  with pytest.raises(ConfigError, match=message.format("text,", "pairs", "JSONL")):
    dataclasses.replace(config, tasks=text_config.tasks)
  with pytest.raises(ConfigError, match=message.format("pairs,", "text", "TEXT")):
    dataclasses.replace(text_config, tasks=config.tasks[:1])
  with pytest.raises(ConfigError, match=r"keys \('query', .* got {'inputs': 64"):
    dataclasses.replace(config, lengths=_TEXT_LENGTHS)
  with pytest.raises(ConfigError, match=r"keys \('inputs', 'targets'\), got {'query'"):
    dataclasses.replace(text_config, lengths=_LENGTHS)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks": ()}, "no tasks: give TEXT_TASKS"),
    ({"denoisers": ()}, "no denoisers: take one of"),
    ({"denoisers": causal_lm()}, r"must have the keys \('targets',\), got {'inputs'"),
    ({"denoisers": (*prefix_lm(), *causal_lm())}, "cannot be mixed with others"),
    ({"lengths": {"targets": 64}}, r"must have the keys \('inputs', 'targets'\)"),
    ({"lengths": {"inputs": 64, "targets": 2}}, r"\['targets'\] must be at least 3"),
    ({"lengths": {"inputs": 4, "targets": 9}}, "no room for a segment of 3 tokens"),
    ({"segment_tokens": 2}, "segments of 2 tokens: .* holds 3 to"),
    ({"segment_tokens": 100}, "segments of 100 tokens: .*; set SEGMENT_TOKENS"),
    ({"on_bad_record": "ignore"}, "on_bad_record must be one of .*, got 'ignore'"),
    ({"vocabulary": None}, "no vocabulary: set VOCABULARY .* or VOCABULARY_SIZE"),
  ],
)
def test_text_config_errors(text_config, changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(text_config, **changes)


def test_text_manifest_follows_what_is_trained_on(text_config, tmp_path):
  def change(**changes):
    return dataclasses.replace(text_config, **changes)

  first = text_config.manifest_path()
  assert change().manifest_path() == first
  seen = {first}
  for changed in (
    change(lengths={"inputs": 64, "targets": 65}),
    change(denoisers=ul2(), segment_tokens=text_config.longest),
    change(segment_tokens=text_config.longest - 1),
    change(sentinels=Sentinels(5000, 99)),
    change(vocabulary=None, vocabulary_size=700),
    change(denoisers=causal_lm(), lengths={"targets": 64}),
    change(tasks=[Task("a", TextFileSource(str(tmp_path / "a.txt"), limit=1))]),
  ):
    path = changed.manifest_path()
    assert path not in seen
    seen.add(path)


def test_segments_are_shared_between_mixtures(text_config):
  """What is cached depends on the segments' length, not on what becomes of them."""
  other = dataclasses.replace(
    text_config, denoisers=causal_lm(), lengths={"targets": 64}, segment_tokens=40
  )
  assert other.longest == 40
  same = dataclasses.replace(text_config, segment_tokens=40)
  assert same.record_key() == other.record_key()
  assert same.reading_key() != other.reading_key()
  assert text_config.record_key() != same.record_key()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SentencePieceVocabulary:
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  text = "letters of a few words, and words of a few letters " * 20
  return train_vocabulary([text], 520, path)


def test_sentinels_of_the_vocabulary(text_config, trained):
  corruption = text_config.corruption(trained, trained.size)
  # The block's first piece is left to images.
  assert corruption.sentinels == Sentinels(520 - 127, 127)
  assert (corruption.bos_id, corruption.eos_id) == (2, 1)
  assert corruption.longest == text_config.longest
  assert corruption.capacity == (64, 64)


def test_sentinels_trained(text_config):
  assert text_config.sentinels_trained == 128
  long = dataclasses.replace(text_config, lengths={"inputs": 8192, "targets": 8192})
  needed = long.sentinels_trained - 1
  assert needed == max(round(round(0.15 * long.longest) / 3), 0)
  pairs = (text_config, long)
  unnamed = [
    dataclasses.replace(config, vocabulary=None, vocabulary_size=700)
    for config in pairs
  ]
  assert len({config.vocabulary_path() for config in unnamed}) == 2


@pytest.mark.parametrize(
  ("changes", "rows", "message"),
  [
    (
      {"sentinels": Sentinels(300, 20)},
      520,
      "sentinel 300: it is a piece .* texts use",
    ),
    ({"sentinels": Sentinels(0, 20)}, 520, "sentinel 0: it is a piece"),
    ({"sentinels": Sentinels(510, 20)}, 520, "sentinel 520: the model's table has 520"),
    ({}, 500, "sentinel 500: the model's table has 500 rows"),
    (
      {"denoisers": (Denoiser("p", "prefix", mode=400),)},
      520,
      "mode token 400: it is a sentinel too",
    ),
    (
      {"denoisers": (Denoiser("p", "prefix", mode=200),)},
      520,
      "mode token 200: it is a piece of the vocabulary",
    ),
    ({"sentinels": Sentinels(510, 2)}, 520, r"up to \d+ spans, .* 2 sentinels"),
  ],
)
def test_control_ids_that_cannot_be(text_config, trained, changes, rows, message):
  config = dataclasses.replace(text_config, **changes)
  with pytest.raises(ConfigError, match=message):
    config.corruption(trained, rows)


def test_sentinels_beyond_the_vocabulary(text_config, trained):
  config = dataclasses.replace(text_config, sentinels=Sentinels(520, 50))
  assert config.corruption(trained, 570).sentinels == Sentinels(520, 50)


def test_prompts_that_records_may_name(config, tmp_path, monkeypatch):
  """Of a task without a kind, and of tasks of modules, any prompt counts."""
  poem = {"poem": "task: poem | query: "}
  other = {"poem": "poem: "}
  before = dataclasses.replace(config, tasks=config.tasks[:1], prompts=poem)
  after = dataclasses.replace(before, prompts=other)
  assert before.tasks[0].kind is None
  name = before.tasks[0].name
  assert before.task_directory(name, "v") != after.task_directory(name, "v")
  (tmp_path / "registers.py").write_text("")
  monkeypatch.syspath_prepend(tmp_path)
  modules = dataclasses.replace(before, tasks=(), modules=("registers",))
  changed = dataclasses.replace(modules, prompts=other)
  assert modules.task_directory("x", "v") != changed.task_directory("x", "v")
  assert modules.manifest_path() != changed.manifest_path()
  # Cleaning sees texts alone.
  assert before.cleaned_directory(name) == after.cleaned_directory(name)
