"""Caches end to end: sources through seqio to records, and back.

One file, so that TensorFlow is imported by one test process only.
"""

import dataclasses
import gc
import json
import pathlib
import random

import grain
import numpy as np
import pytest

from embgemma.data import cache, cache_builder, shard_writer, tokenization
from embgemma.data.config import DataConfig, TextDataConfig
from embgemma.data.denoisers import causal_lm
from embgemma.data.records import Example, content_hash, decode_records
from embgemma.data.sources import (
  BuiltinSource,
  JsonlSource,
  TextFileSource,
  TfdsSource,
  TfrecordSource,
)
from embgemma.data.tasks import Task
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import ConfigError, DataError

pytestmark = pytest.mark.slow

_LENGTHS = {"query": 24, "positive": 32, "negatives": 20}


@pytest.fixture(scope="module")
def tf():
  """TensorFlow, and all that comes with it."""
  from embgemma.data import seqio_registry

  return seqio_registry.tf


@pytest.fixture(scope="module")
def words():
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
  return [" ".join(rng.choices(words, k=6)) for _ in range(400)]


@pytest.fixture(scope="module")
def vocabulary(words, tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  # Prompts become a few pieces, not one for every letter.
  prompts = ["task: search result | query: ", "title: none | text: "]
  train_vocabulary([*words, *prompts * 50], 640, path)
  return path


@pytest.fixture
def make(tf, tmp_path, vocabulary):
  """Configurations whose caches lie in a directory of their own."""
  del tf

  def make(*tasks: Task, **options) -> DataConfig:
    defaults = {
      "mixture_or_task_name": "everything",
      "lengths": _LENGTHS,
      "vocabulary": str(vocabulary),
      "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(tasks=tasks, **defaults | options)

  return make


@pytest.fixture
def write(tmp_path):
  def write(name: str, records) -> str:
    path = tmp_path / name
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)

  return write


def _build(config):
  log: list[str] = []
  return cache_builder.build(config, log.append), log


def _read(task: cache.CachedTask) -> list[Example]:
  source = grain.sources.ArrayRecordDataSource(task.paths)
  records = [source[i] for i in range(len(source))]
  read = decode_records(records, 2 + task.statistics["max_negatives"])
  np.testing.assert_array_equal(task.lengths(), read.lengths)
  examples = []
  for record, starts, lengths in zip(records, read.starts, read.lengths, strict=True):
    spans = zip(starts, lengths, strict=True)
    tokens = tuple(read.words[a : a + n] for a, n in spans if n)
    examples.append(Example(tokens, np.frombuffer(record, "<u8", len(tokens), 4)))
  return examples


def _queries(task, vocabulary) -> list[str]:
  vocabulary = SentencePieceVocabulary(vocabulary)
  prompt = "task: search result | query: "
  texts = [vocabulary.decode(example.tokens[0]) for example in _read(task)]
  assert all(text.startswith(prompt) for text in texts)
  return [text.removeprefix(prompt) for text in texts]


def _pairs(count, start=0):
  return [{"query": f"q{i}", "positive": f"p{i}"} for i in range(start, start + count)]


def _files(config) -> list[str]:
  root = pathlib.Path(config.cache_root)
  files = (p for p in root.rglob("*") if p.is_file() and p.name != ".lock")
  return sorted(str(p.relative_to(root)) for p in files)


def test_jsonl_to_records(make, write, vocabulary):
  records = [
    {"query": "a", "positive": "bad cab"},
    {"query": "b", "positive": "cafe", "title": "deaf", "task": "qa"},
    {"query": "c", "positive": "face", "negatives": ["x", "y", "z"], "label": "l"},
    {"query": "c", "positive": "fade", "negative": "x", "label": "l"},
    {"query": "d", "positive": "dad", "title": "t", "task": "similarity"},
    {"query": "e " * 40, "positive": "f " * 40, "negatives": ["g " * 40]},
  ]
  path = write("pairs.jsonl", records)
  config = make(Task("pairs", JsonlSource(path), rate=3.0), max_negatives=2)
  manifest, log = _build(config)
  assert manifest == cache.manifest(config)
  assert manifest.vocabulary == vocabulary
  (task,) = manifest.tasks
  assert (task.name, task.rate) == ("pairs", 3.0)
  assert any("cached pairs: 6 examples" in line for line in log)

  search, passage = "task: search result | query: ", "title: none | text: "
  similarity = "task: sentence similarity | query: "
  expected = [
    [search + "a", passage + "bad cab"],
    ["task: question answering | query: b", "title: deaf | text: cafe"],
    [search + "c", passage + "face", passage + "x", passage + "y"],
    [search + "c", passage + "fade", passage + "x"],
    [similarity + "d", similarity + "t dad"],
    [search + "e " * 40, passage + "f " * 40, passage + "g " * 40],
  ]
  examples = _read(task)
  encoder = SentencePieceVocabulary(vocabulary)
  limits = [24, 32, 20, 20]
  for example, texts in zip(examples, expected, strict=True):
    ids = [encoder.encode(*pair) for pair in zip(texts, limits, strict=False)]
    assert [tokens.tolist() for tokens in example.tokens] == ids
  lengths = [[len(tokens) for tokens in example.tokens] for example in examples]
  assert lengths[-1] == [24, 32, 20]

  query, positive, *_ = zip(*(example.hashes[:2] for example in examples), strict=True)
  assert query[0] == content_hash("a")  # without its prompt
  assert positive[0] == content_hash("bad cab")
  assert query[2] == query[3]
  assert positive[2] == positive[3]  # one label
  assert len(set(positive)) == 5
  assert examples[2].hashes[2] == examples[3].hashes[2] == content_hash("x")
  assert task.statistics == {
    "examples": 6,
    "tokens": sum(map(sum, lengths)),
    "max_text_tokens": 32,
    "max_token_id": max(int(t.max()) for e in examples for t in e.tokens),
    "max_negatives": 2,
    "truncated": sum(
      length == limit
      for row in lengths
      for length, limit in zip(row, limits, strict=False)
    ),
    "skipped": 0,
    "empty": 0,
    "unused": {},
    "dropped": {},
    "duplicates": 0,
    "lengths": {
      role: np.histogram(
        [size for row in lengths for size in row[part]],
        [1, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 2**32],
      )[0].tolist()
      for role, part in (
        ("query", slice(0, 1)),
        ("positive", slice(1, 2)),
        ("negatives", slice(2, None)),
      )
    },
  }
  assert task.statistics["truncated"] >= 3
  contents = [content_hash(text) for text in ("b", "deaf\ncafe")]
  np.testing.assert_array_equal(task.hashes()[1], [*contents, 0, 0])
  assert task.hashes()[2][1] == content_hash("face")  # not its label


def test_kind_in_gin_beats_the_records(make, write, vocabulary):
  path = write("pairs.jsonl", [{"query": "a", "positive": "b", "task": "unknown"}])
  manifest, _ = _build(make(Task("pairs", JsonlSource(path), "bitext")))
  (example,) = _read(manifest.tasks[0])
  text = SentencePieceVocabulary(vocabulary).decode(example.tokens[1])
  assert text == "task: search result | query: b"


def test_unknown_kind_in_a_record(make, write):
  path = write("p.jsonl", [*_pairs(3), {"query": "here", "positive": "b", "task": "x"}])
  with pytest.raises(DataError, match="unknown kind 'x'; there are .*'here'"):
    _build(make(Task("p", JsonlSource(path))))


def _iterators() -> list:
  """TensorFlow's iterators that are alive."""
  return [item for item in gc.get_objects() if type(item).__name__ == "OwnedIterator"]


@pytest.mark.parametrize(
  "record", ["{}", '{"query": "q", "positive": "p", "task": "x"}']
)
@pytest.mark.parametrize("vocabulary", [None, "given"])
def test_a_failure_leaves_no_iterator(make, write, record, vocabulary):
  """One alive when Python ends can keep the process from ending."""
  path = write("p.jsonl", [*_pairs(2), record, *_pairs(500)])
  options = {} if vocabulary else {"vocabulary": None, "vocabulary_size": 700}
  gc.collect()
  with pytest.raises(DataError) as caught:
    _build(make(Task("p", JsonlSource(path)), **options))
  assert caught.value.__traceback__ is not None
  assert not _iterators()


def test_vocabulary_of_the_mixture(make, write, words):
  pairs = zip(words[:200], words[200:], strict=True)
  path = write("p.jsonl", ({"query": q, "positive": p} for q, p in pairs))
  options = {"vocabulary": None, "vocabulary_size": 700}
  config = make(Task("p", JsonlSource(path)), **options)
  assert cache.manifest(config) is None
  manifest, log = _build(config)
  assert log[0] == "training a vocabulary of 700 pieces"
  assert SentencePieceVocabulary(manifest.vocabulary).size == 700
  # Prompts are in its text: pieces of them are longer than letters.
  assert len(_read(manifest.tasks[0])[0].tokens[0]) < 30
  again, log = _build(config)
  assert again == manifest
  assert log == []


def test_second_build_reuses_what_is_there(make, write):
  first = Task("first", JsonlSource(write("a.jsonl", _pairs(5))))
  second = Task("second", JsonlSource(write("b.jsonl", _pairs(7))), rate=2.0)
  manifest, _ = _build(make(first))
  index = pathlib.Path(manifest.tasks[0].directory, "index.json")
  written = index.stat().st_mtime_ns
  both, log = _build(make(first, second))
  assert [(task.name, task.rate) for task in both.tasks] == [
    *(("first", 1.0), ("second", 2.0))
  ]
  assert both.tasks[0].directory == manifest.tasks[0].directory
  assert index.stat().st_mtime_ns == written
  assert [line.partition(":")[0] for line in log] == ["cached second"]


def test_changed_file_is_another_cache(make, write, vocabulary):
  config = make(Task("p", JsonlSource(write("p.jsonl", _pairs(5)))))
  before, _ = _build(config)
  write("p.jsonl", _pairs(6, start=10))
  assert cache.manifest(config) is None
  after, _ = _build(config)
  assert after.tasks[0].directory != before.tasks[0].directory
  assert _queries(after.tasks[0], vocabulary) == [f"q{i}" for i in range(10, 16)]
  assert _queries(before.tasks[0], vocabulary) == [f"q{i}" for i in range(5)]


def test_one_task_of_several(make, write):
  tasks = [
    Task(name, JsonlSource(write(f"{name}.jsonl", _pairs(3))), rate=5.0)
    for name in ("a", "b")
  ]
  manifest, _ = _build(make(*tasks, mixture_or_task_name="b"))
  assert [(task.name, task.rate) for task in manifest.tasks] == [("b", 1.0)]


def test_many_shards_keep_the_order(make, write, vocabulary, monkeypatch):
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 4)
  monkeypatch.setattr(tokenization, "_TOKENIZE_BATCH", 3)
  path = write("p.jsonl", _pairs(13))
  manifest, _ = _build(make(Task("p", JsonlSource(path))))
  (task,) = manifest.tasks
  assert len(task.paths) == 4
  assert task.statistics["examples"] == 13
  assert _queries(task, vocabulary) == [f"q{i}" for i in range(13)]


def test_bad_record_leaves_nothing_unfinished(make, write):
  # Tasks of a mixture are cached in the order of their names.
  also = Task("also", JsonlSource(write("also.jsonl", _pairs(4))))
  path = write("bad.jsonl", [*_pairs(4), '{"query": 3}', *_pairs(4)])
  config = make(Task("bad", JsonlSource(path)), also)
  with pytest.raises(DataError) as caught:
    _build(config)
  assert str(caught.value).startswith(f'{path}:5: "query" must be a string, got int')
  complete = [path for path in _files(config) if path.endswith("index.json")]
  names = [pathlib.Path(path).parts[1].partition("-")[0] for path in complete]
  assert names == ["also"]
  assert not [path for path in _files(config) if "bad" in path]
  assert cache.manifest(config) is None
  write("bad.jsonl", _pairs(4))
  manifest, log = _build(config)
  assert [line.partition(":")[0] for line in log] == ["cached bad"]
  assert [task.name for task in manifest.tasks] == ["also", "bad"]


@pytest.mark.parametrize("trained", [False, True])
def test_skipped_records_are_counted_once(make, write, words, trained):
  """A trained vocabulary reads every source one more time."""
  pairs = [
    {"query": a, "positive": b} for a, b in zip(words[:200], words[200:], strict=True)
  ]
  path = write("p.jsonl", [*pairs, "no JSON", {"query": ""}, *_pairs(1)])
  options = {"vocabulary": None, "vocabulary_size": 700} if trained else {}
  config = make(Task("p", JsonlSource(path)), on_bad_record="skip", **options)
  manifest, log = _build(config)
  (task,) = manifest.tasks
  assert task.statistics["examples"] == 201
  assert task.statistics["skipped"] == 2
  assert log[-3] == "skipped 2 bad records of p:"
  assert log[-2].startswith(f"  {path}:201: malformed JSON")
  assert log[-1].startswith(f'  {path}:202: "query" is empty')
  index = json.loads((task.directory / "index.json").read_text())
  assert len(index["skipped"]) == 2


def test_task_without_examples(make, write):
  config = make(Task("p", JsonlSource(write("p.jsonl", []))))
  with pytest.raises(DataError, match="task 'p' has no examples"):
    _build(config)
  assert cache.manifest(config) is None


@pytest.fixture
def built(make, write):
  config = make(Task("p", JsonlSource(write("p.jsonl", _pairs(20)))))
  manifest, _ = _build(config)
  return config, manifest.tasks[0]


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    ("index no JSON", "damaged cache .*; delete the directory to rebuild it"),
    ("index a list", "damaged cache .*; delete the directory to rebuild it"),
    ("index without shards", "damaged cache .*; delete the directory to rebuild it"),
    ("shard gone", "missing, or not of the .* bytes"),
    ("shard cut", "missing, or not of the .* bytes"),
    ("hashes gone", "missing, or not of the .* bytes"),
  ],
)
def test_damaged_cache_is_written_again(built, damage, message):
  config, task = built
  index, (records,) = task.directory / "index.json", map(pathlib.Path, task.paths)
  before = {path.name: path.read_bytes() for path in task.directory.iterdir()}
  if damage == "index no JSON":
    index.write_text(index.read_text()[:-20])
  elif damage == "index a list":
    index.write_text("[]")
  elif damage == "index without shards":
    index.write_text('{"statistics": {}}')
  elif damage == "shard gone":
    records.unlink()
  elif damage == "shard cut":
    records.write_bytes(records.read_bytes()[:-1])
  else:
    (task.directory / "hashes.npy").unlink()
  with pytest.raises(DataError, match=message):
    cache.manifest(config)
  rebuilt, log = _build(config)
  assert rebuilt.tasks == (task,)
  assert "is damaged: writing the task again" in log[0]
  assert {path.name: path.read_bytes() for path in task.directory.iterdir()} == before


def test_a_task_without_its_marker_is_not_complete(built):
  config, task = built
  (task.directory / "index.json").unlink()
  assert cache.manifest(config) is None
  rebuilt, _ = _build(config)
  assert rebuilt.tasks == (task,)


@pytest.mark.parametrize("content", ["", "{}", '{"tasks": [{"name": "p"}]}', "[1]"])
def test_damaged_manifest(built, content):
  config, task = built
  path = config.manifest_path()
  path.write_text(content)
  with pytest.raises(DataError, match=rf"^{path}: damaged .*; delete it to rebuild"):
    cache.manifest(config)
  path.unlink()
  rebuilt, log = _build(config)
  assert rebuilt.tasks == (task,)
  assert log == []


def test_deleted_task_is_built_again(built):
  config, task = built
  for file in task.directory.iterdir():
    file.unlink()
  task.directory.rmdir()
  assert cache.manifest(config) is None
  rebuilt, log = _build(config)
  assert rebuilt.tasks == (task,)
  assert len(log) == 1


@pytest.fixture
def tfds_dir(tf, tmp_path):
  """A dataset on disk alone: no builder class, no download."""
  del tf
  import tensorflow_datasets as tfds

  directory = tmp_path / "tfds" / "tiny" / "1.0.0"
  directory.mkdir(parents=True)
  text = tfds.features.Text()
  features = {"question": text, "answers": tfds.features.Sequence(text), "best": text}
  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name="tiny",
      version=tfds.core.Version("1.0.0"),
      data_dir=str(directory),
      module_name="",
    ),
    features=tfds.features.FeaturesDict(features),
  )
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=3)
  writer.initialize_splits(["train", "test"])
  for split, count in (("train", 5), ("test", 2)):
    for i in range(count):
      record = {"question": f"{split} {i}", "best": "é", "answers": ["x"] * i}
      writer.add_examples({split: [record]})
  writer.close_all()
  return str(tmp_path / "tfds")


_TFDS_FIELDS = {"query": "question", "positive": "best", "negatives": "answers"}


def test_tfds(make, tfds_dir, vocabulary):
  train = TfdsSource("tiny:1.0.0", _TFDS_FIELDS, tfds_dir)
  test = TfdsSource("tiny:1.0.0", _TFDS_FIELDS, tfds_dir, split="test")
  manifest, _ = _build(make(Task("a", train), Task("b", test), max_negatives=3))
  first, second = manifest.tasks
  assert sorted(_queries(first, vocabulary)) == [f"train {i}" for i in range(5)]
  assert sorted(_queries(second, vocabulary)) == ["test 0", "test 1"]
  counts = sorted(len(example.tokens) for example in _read(first))
  assert counts == [2, 3, 4, 5, 5]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "tinier:1.0.0"}, "task 't': Dataset tinier not found"),
    ({"split": "dev"}, "task 't': Unknown split 'dev'"),
    (
      {"fields": {"query": "question", "positive": "answer"}},
      r"task 't': the records have no \['answer'\], they have \['answers', 'best', ",
    ),
    ({"fields": {"query": "question"}}, "missing expected output feature.*positive"),
    (
      {"fields": {"query": "question", "positive": "answers"}},
      "incorrect rank for feature 'positive'",
    ),
  ],
)
def test_tfds_errors(make, tfds_dir, changes, message):
  source = TfdsSource("tiny:1.0.0", _TFDS_FIELDS, tfds_dir)
  config = make(Task("t", dataclasses.replace(source, **changes)))
  with pytest.raises(DataError, match=message) as caught:
    _build(config)
  assert "\n" not in str(caught.value)
  assert _files(config) == []


@pytest.fixture
def tfrecord(tf, tmp_path):
  def feature(*values: bytes):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

  def write(name: str, queries, negatives=2):
    with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
      for query in queries:
        features = {
          "q": feature(query),
          "p": feature("é".encode()),
          "n": feature(*[b"x"] * negatives),
        }
        features = tf.train.Features(feature=features)
        example = tf.train.Example(features=features)
        writer.write(example.SerializeToString())
    return str(tmp_path / name)

  return write


_TFRECORD_FIELDS = {"query": "q", "positive": "p", "negatives": "n"}


def test_tfrecord(make, tfrecord, tmp_path, vocabulary):
  tfrecord("a.tfrecord", [b"one", b"two"])
  tfrecord("b.tfrecord", [b"three"], negatives=0)
  source = TfrecordSource(str(tmp_path / "*.tfrecord"), _TFRECORD_FIELDS)
  manifest, _ = _build(make(Task("t", source)))
  (task,) = manifest.tasks
  assert sorted(_queries(task, vocabulary)) == ["one", "three", "two"]
  assert sorted(len(example.tokens) for example in _read(task)) == [2, 3, 3]


def test_tfrecord_errors(make, tfrecord, tmp_path):
  path = tfrecord("a.tfrecord", [b"\xff"])
  task = Task("t", TfrecordSource(path, _TFRECORD_FIELDS))
  with pytest.raises(DataError, match="task 't'.*can't decode byte 0xff"):
    _build(make(task))
  path = tfrecord("a.tfrecord", [b"one"] * 9)
  with pytest.raises(DataError, match="task 't'.*Feature: nope .*could not be found"):
    _build(make(Task("t", TfrecordSource(path, {"query": "q", "positive": "nope"}))))
  pathlib.Path(path).write_bytes(pathlib.Path(path).read_bytes()[:-5])
  with pytest.raises(DataError, match="task 't'.*truncated record"):
    _build(make(task))


_MODULE = """
import seqio
import tensorflow as tf

from embgemma.data.seqio_registry import OUTPUT_FEATURES


def register(name, count, features=OUTPUT_FEATURES):
  def dataset(split, shuffle_files, seed=None):
    texts = [f"{name} {i}" for i in range(count)]
    return tf.data.Dataset.from_tensor_slices({"query": texts, "positive": texts})

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=("train",)),
    preprocessors=[],
    output_features=features,
  )


register("mine_faq", 4)
register("mine_web", 6)
register("mine_odd", 6, {"query": OUTPUT_FEATURES["query"]})
seqio.MixtureRegistry.add("mine", [("mine_faq", 1), ("mine_web", 2.5)])
"""


def test_registered_by_the_users_module(make, tmp_path, monkeypatch, vocabulary):
  (tmp_path / "my_embedding_tasks.py").write_text(_MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  options = {"modules": ["my_embedding_tasks"], "mixture_or_task_name": "mine"}
  manifest, _ = _build(make(**options))
  faq, web = manifest.tasks
  assert (faq.name, faq.rate) == ("mine_faq", 1.0)
  assert (web.name, web.rate) == ("mine_web", 2.5)
  assert _queries(faq, vocabulary) == [f"mine_faq {i}" for i in range(4)]
  alone, _ = _build(make(**options | {"mixture_or_task_name": "mine_web"}))
  assert [(task.name, task.rate) for task in alone.tasks] == [("mine_web", 1.0)]
  with pytest.raises(ConfigError, match="'theirs' is not registered by .*my_embedding"):
    _build(make(**options | {"mixture_or_task_name": "theirs"}))
  with pytest.raises(ConfigError, match=r"'mine_odd' has no feature \['positive'\]"):
    _build(make(**options | {"mixture_or_task_name": "mine_odd"}))


def test_module_that_is_not_there(make):
  with pytest.raises(ConfigError, match="module 'no_such_tasks'.*PYTHONPATH"):
    _build(make(modules=["no_such_tasks"]))


@pytest.fixture
def make_text(tf, tmp_path, vocabulary):
  """Configurations of documents, cut into segments of up to 12 tokens."""
  del tf

  def make_text(*tasks: Task, **options) -> TextDataConfig:
    defaults = {
      "mixture_or_task_name": "everything",
      "lengths": {"inputs": 32, "targets": 32},
      "segment_tokens": 12,
      "vocabulary": str(vocabulary),
      "cache_dir": str(tmp_path / "cache"),
    }
    return TextDataConfig(tasks=tasks, **defaults | options)

  return make_text


def _segments(task) -> list[tuple[int, np.ndarray]]:
  """Content hash and token ids of each segment."""
  source = grain.sources.ArrayRecordDataSource(task.paths)
  read = decode_records([source[i] for i in range(len(source))], 1)
  np.testing.assert_array_equal(task.lengths(), read.lengths)
  words = read.hashes[:, 0].astype(np.uint64)
  hashes = (words[:, 0] | words[:, 1] << np.uint64(32)).tolist()
  spans = zip(read.starts[:, 0], read.lengths[:, 0], strict=True)
  return [
    (hashed, read.words[start : start + length])
    for hashed, (start, length) in zip(hashes, spans, strict=True)
  ]


def _documents(task, vocabulary) -> list[str]:
  """Documents in order, their segments joined."""
  found: dict[int, list[int]] = {}
  for hashed, tokens in _segments(task):
    found.setdefault(hashed, []).extend(tokens.tolist())
  vocabulary = SentencePieceVocabulary(vocabulary)
  texts = [vocabulary.decode(tokens) for tokens in found.values()]
  assert [content_hash(text) for text in texts] == list(found)
  return texts


def test_documents_to_segments(make_text, write, words, vocabulary, monkeypatch):
  monkeypatch.setattr(tokenization, "_TOKENIZE_BATCH", 3)
  monkeypatch.setattr(tokenization, "_TOKENIZE_CHARACTERS", 90)
  texts = [*words[:20], " ".join(words[20:60]), "a", "\n two\n\nlines ", "cab <eos>"]
  lines = write("a.jsonl", ({"text": text, "title": "t"} for text in texts))
  plain = write("b.txt", [*words[60:70], "", *words[70:80]])
  config = make_text(
    Task("objects", TextFileSource(lines), rate=3.0),
    Task("lines", TextFileSource(plain)),
  )
  manifest, log = _build(config)
  assert manifest == cache.manifest(config)
  second, first = manifest.tasks
  assert (first.name, first.rate) == ("objects", 3.0)
  assert _documents(first, vocabulary) == [text for text in texts if text != "a"]
  assert _documents(second, vocabulary) == words[60:80]
  segments = [tokens for _, tokens in _segments(first)]
  lengths = [len(tokens) for tokens in segments]
  assert max(lengths) <= 12
  assert min(lengths) >= 2
  assert min(map(int, np.concatenate(segments))) > 4  # no BOS, EOS or padding
  expected = {
    "examples": len(segments),
    "tokens": sum(lengths),
    "max_text_tokens": max(lengths),
    "max_token_id": int(np.concatenate(segments).max()),
    "documents": 24,
    "short": 1,
    "skipped": 0,
  }
  assert expected.items() <= first.statistics.items()
  assert any(f"cached objects: {len(segments)} exam" in line for line in log)
  assert any(line.endswith("tokens, of 24 documents") for line in log)


def test_mixtures_share_segments(make_text, write, words):
  task = Task("t", TextFileSource(write("a.txt", words)))
  first, _ = _build(make_text(task))
  config = make_text(task, denoisers=causal_lm(), lengths={"targets": 40})
  assert cache.manifest(config) is None  # its own, so that no run resumes another's
  second, log = _build(config)
  assert second.tasks == first.tasks
  assert log == []
  other, _ = _build(make_text(task, segment_tokens=11))
  assert other.tasks[0].directory != first.tasks[0].directory


def test_vocabulary_of_documents(make_text, write, words):
  """With as many sentinels as segments need, beyond those of pairs."""
  task = Task("t", TextFileSource(write("a.txt", words)))
  lengths = {"inputs": 4096, "targets": 4096}
  options = {"vocabulary": None, "vocabulary_size": 800, "segment_tokens": None}
  config = make_text(task, lengths=lengths, **options)
  manifest, _ = _build(config)
  trained = SentencePieceVocabulary(manifest.vocabulary)
  assert len(trained.sentinel_ids()) == config.sentinels_trained - 1 > 127
  config.corruption(trained, trained.size)
  few, _ = _build(make_text(task, **options))
  assert len(SentencePieceVocabulary(few.vocabulary).sentinel_ids()) == 127


def test_bad_documents(make_text, write):
  path = write("a.jsonl", [{"text": "good cab"}, {"query": "q"}, {"text": "bad cab"}])
  task = Task("t", TextFileSource(path))
  with pytest.raises(DataError, match=f'{path}:2: no "text"'):
    _build(make_text(task))
  manifest, log = _build(make_text(task, on_bad_record="skip"))
  assert manifest.tasks[0].statistics["documents"] == 2
  assert log[-2] == "skipped 1 bad records of t:"
  path = write("b.txt", ["a"])
  with pytest.raises(DataError, match="task 't' has no examples"):
    _build(make_text(Task("t", TextFileSource(path))))


def test_builtin_documents(make_text, monkeypatch, vocabulary):
  def documents(task, split):
    return iter([{"text": f"{task} {split}"}])

  monkeypatch.setattr("embgemma.data.sources.builtin_corpus.documents", documents)
  source = BuiltinSource("stdlib_reference")
  manifest, _ = _build(make_text(Task("reference", source)))
  assert _documents(manifest.tasks[0], vocabulary) == ["stdlib_reference train"]


def test_tfds_documents(make_text, tfds_dir, vocabulary):
  source = TfdsSource("tiny:1.0.0", {"text": "question"}, tfds_dir)
  manifest, _ = _build(make_text(Task("t", source)))
  expected = [f"train {i}" for i in range(5)]
  assert sorted(_documents(manifest.tasks[0], vocabulary)) == expected


def test_tfrecord_documents(make_text, tfrecord, vocabulary):
  path = tfrecord("a.tfrecord", [b"one cab", b"two cabs"])
  manifest, _ = _build(make_text(Task("t", TfrecordSource(path, {"text": "q"}))))
  assert _documents(manifest.tasks[0], vocabulary) == ["one cab", "two cabs"]
  path = tfrecord("b.tfrecord", [b"one cab", b" "])
  message = "task 't', shard 0, example 1: \"text\" is empty"
  with pytest.raises(DataError, match=message):
    _build(make_text(Task("t", TfrecordSource(path, {"text": "q"}))))


_TEXT_MODULE = """
import seqio
import tensorflow as tf

from embgemma.data.seqio_registry import OUTPUT_FEATURES, TEXT_FEATURES


def dataset(split, shuffle_files, seed=None):
  texts = [f"text {i}" for i in range(4)]
  return tf.data.Dataset.from_tensor_slices({"text": texts, "query": texts})


for name, features in (
  ("my_text", TEXT_FEATURES),
  ("my_half", {"query": OUTPUT_FEATURES["query"]}),
):
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=("train",)),
    preprocessors=[],
    output_features=features,
  )
"""


def test_documents_registered_by_the_users_module(
  make_text, tmp_path, monkeypatch, vocabulary
):
  (tmp_path / "my_text_tasks.py").write_text(_TEXT_MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  options = {"modules": ["my_text_tasks"], "mixture_or_task_name": "my_text"}
  manifest, _ = _build(make_text(**options))
  expected = [f"text {i}" for i in range(4)]
  assert _documents(manifest.tasks[0], vocabulary) == expected
  with pytest.raises(ConfigError, match=r"'my_half' has no feature \['text'\]"):
    _build(make_text(**options | {"mixture_or_task_name": "my_half"}))
