"""Building caches: wherever shards are read and however often a build was stopped."""

import collections
import contextlib
import dataclasses
import fcntl
import gzip
import json
import pathlib
import pickle
import subprocess
import sys
import textwrap
import threading
import time

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from embgemma.data import cache, cache_builder, executors, shard_writer, task_index
from embgemma.data.config import DataConfig, TextDataConfig
from embgemma.data.duplicates import ExactDuplicates
from embgemma.data.filters import LengthFilter
from embgemma.data.records import content_hash, decode_records
from embgemma.data.sources import JsonlSource, TextFileSource
from embgemma.data.task_examples import open_tasks
from embgemma.data.tasks import Task
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import ConfigError, DataError

_LENGTHS = {"query": 40, "positive": 40, "negatives": 20}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = [f"query {i} and passage {i * 7}" for i in range(2000)]
  prompts = ["task: search result | query: ", "task: classification | query: "]
  train_vocabulary([*texts, *prompts * 300], 560, path)
  return str(path)


@pytest.fixture
def corpus(tmp_path):
  """Two tasks of three files, one of them empty, one zipped."""
  for task, sizes in (("a", (5, 0, 8)), ("b", (11, 1, 3))):
    for part, size in enumerate(sizes):
      lines = "".join(
        json.dumps(
          {
            "query": f"{task} query {part} {i}",
            "positive": f"passage {i}",
            "negatives": [f"n {j}" for j in range(i % 3)],
          }
        )
        + "\n"
        for i in range(size)
      )
      path = tmp_path / f"{task}-{part}.jsonl.gz"
      path.write_bytes(gzip.compress(lines.encode(), mtime=0))
  return tmp_path


@pytest.fixture
def make(corpus, vocabulary):
  def make(cache_dir: str = "cache", **options) -> DataConfig:
    tasks = tuple(Task(n, JsonlSource(f"{corpus}/{n}-*.jsonl.gz")) for n in ("a", "b"))
    defaults = {
      "mixture_or_task_name": "m",
      "lengths": _LENGTHS,
      "tasks": tasks,
      "vocabulary": vocabulary,
      "cache_dir": str(corpus / cache_dir),
      "max_negatives": 2,
    }
    return DataConfig(**defaults | options)

  return make


def _contents(config) -> dict[str, bytes]:
  root = pathlib.Path(config.cache_root)
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in sorted(root.rglob("*"))
    if path.is_file() and path.name != ".lock"
  }


def _build(config, executor=None) -> list[str]:
  log: list[str] = []
  cache_builder.build(config, log.append, executor)
  return log


def test_statistics(make):
  config = make()
  log = _build(config)
  assert [line.split(",")[0] for line in log] == [
    *("cached a: 13 examples", "cached b: 15 examples")
  ]
  first, second = cache.manifest(config).tasks
  assert len(first.paths) == 2  # what is empty has no file
  assert first.statistics["duplicates"] == 0
  lengths = first.lengths()
  for role, own in zip(
    ("query", "positive", "negatives"),
    (lengths[:, 0], lengths[:, 1], lengths[:, 2:]),
    strict=True,
  ):
    counts = collections.Counter(
      next(i for i, edge in enumerate((8, 16, 32, 64)) if n <= edge)
      for n in own.flat
      if n
    )
    assert first.statistics["lengths"][role][:4] == [counts[i] for i in range(4)]
  texts = [f"b query {p} {i}" for p, n in enumerate((11, 1, 3)) for i in range(n)]
  assert second.hashes()[:, 0].tolist() == [content_hash(text) for text in texts]
  np.testing.assert_array_equal(second.hashes() > 0, second.lengths() > 0)


def test_duplicates(make, corpus, monkeypatch):
  monkeypatch.setattr(task_index, "_DISTINCT_AT_ONCE", 4)  # several passes
  monkeypatch.setattr(task_index, "_BLOCK", 4)
  pairs = [("q", "p"), ("q", "r"), ("p", "q"), ("q", "p"), ("q", "p"), ("x", "y")]
  path = corpus / "twice.jsonl"
  path.write_text(
    "".join(json.dumps({"query": a, "positive": b}) + "\n" for a, b in pairs)
  )
  config = make(tasks=(Task("t", JsonlSource(str(path))),))
  assert _build(config)[0].endswith(", 2 duplicates")


@pytest.mark.parametrize(
  ("executor", "counted"),
  [
    (executors.ProcessPool(2), 28),
    (executors.BeamPipeline(("--runner=DirectRunner", "--direct_num_workers=1")), 0),
  ],
)
@pytest.mark.slow
def test_the_same_bytes_wherever_shards_are_read(make, executor, counted, monkeypatch):
  one, other = make("one"), make("other")
  _build(one)
  counts = [0]
  monkeypatch.setattr(
    cache_builder._Progress, "count", lambda self, examples: counts.append(examples)
  )
  _build(other, executor)
  assert _contents(one) == _contents(other)
  assert counts[-1] == counted


@pytest.mark.slow
@pytest.mark.parametrize(
  "executor", [executors.ProcessPool(2), executors.BeamPipeline()]
)
def test_an_error_on_an_executor_is_that_of_the_record(make, corpus, executor):
  (corpus / "a-1.jsonl.gz").write_bytes(gzip.compress(b'{"query": "q"}\n'))
  with pytest.raises(DataError, match=r'a-1.jsonl.gz:1: no "positive"; a record needs'):
    _build(make(), executor)
  assert cache.manifest(make()) is None


class _StoppedError(Exception):
  pass


@hypothesis.settings(
  max_examples=15,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(stops=st.lists(st.integers(0, 30), max_size=6))
def test_a_build_goes_on_where_it_was_stopped(
  make, monkeypatch, tmp_path_factory, stops
):
  """Stopped before its n-th file becomes what it is called, again and again."""
  name = tmp_path_factory.mktemp("cache").name
  with monkeypatch.context() as patch:
    patch.setattr(shard_writer, "PART_EXAMPLES", 3)
    whole, stopped = make("whole"), make(name)
    _build(whole)
    for stop in stops:
      with patch.context() as inner:
        left = iter(range(stop))
        new_file = shard_writer.new_file

        @contextlib.contextmanager
        def failing(path, new_file=new_file, left=left):
          with new_file(path) as made:
            yield made
            if next(left, None) is None:
              raise _StoppedError

        for module in (shard_writer, task_index):
          inner.setattr(module, "new_file", failing)
        with contextlib.suppress(_StoppedError):
          _build(stopped)
    _build(stopped)
    assert _contents(stopped) == _contents(whole)


def test_finished_parts_are_not_written_again(make, monkeypatch):
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 3)
  config = make()
  written = []
  monkeypatch.setattr(
    task_index, "finish_task", lambda *unused: (_ for _ in ()).throw(_StoppedError)
  )
  with pytest.raises(_StoppedError):
    _build(config)
  monkeypatch.undo()
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 3)
  new_file = shard_writer.new_file
  monkeypatch.setattr(
    shard_writer, "new_file", lambda path: written.append(path) or new_file(path)
  )
  log = _build(config)
  assert [line.partition(":")[0] for line in log] == ["cached a", "cached b"]
  records = [path.parent.name for path in written if path.name.startswith("examples")]
  assert {name.partition("-")[0] for name in records} == {"b"}
  (first, _) = cache.manifest(config).tasks
  assert first.statistics["examples"] == 13


def test_a_cut_part_is_written_again(make, monkeypatch):
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 3)
  whole, config = make("whole"), make()
  _build(whole)
  tasks = open_tasks(config)
  fingerprint = SentencePieceVocabulary(config.vocabulary).fingerprint
  directory = config.cache_root / config.task_directory("a", fingerprint)
  job = shard_writer.ShardJob(config, tasks[0], 2, str(directory), config.vocabulary)
  shard_writer.write_shard(job, _ignore)
  path = pathlib.Path(directory, "examples-00002-00001.array_record")
  path.write_bytes(path.read_bytes()[:-7])
  _build(config)
  assert _contents(config) == _contents(whole)


def test_nothing_is_done_twice(make):
  config = make()
  assert len(_build(config)) == 2
  before = {
    path: path.stat().st_mtime_ns
    for path in pathlib.Path(config.cache_root).rglob("*")
    if path.is_file() and path.parent.name != "mixtures"
  }
  assert _build(config) == []
  for path, written in before.items():
    assert path.name == ".lock" or path.stat().st_mtime_ns == written


def test_two_builds_at_once(make):
  """The second waits for the first, and finds all done."""
  config = make()
  fingerprint = SentencePieceVocabulary(config.vocabulary).fingerprint
  directory = config.cache_root / config.task_directory("a", fingerprint)
  directory.mkdir(parents=True)
  log: list[str] = []
  waiting = threading.Event()

  def note(line: str) -> None:
    log.append(line)
    waiting.set()

  with open(directory / ".lock", "wb") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    build = threading.Thread(target=cache_builder.build, args=(config, note))
    build.start()
    assert waiting.wait(60)
    assert log == [f"waiting for the process that caches {directory.name}"]
    _write_alone(config)
  build.join()
  assert [line.partition(":")[0] for line in log[1:]] == ["cached b"]


def _write_alone(config) -> None:
  """What another process does to the first task while it holds the lock."""
  task = open_tasks(config)[0]
  fingerprint = SentencePieceVocabulary(config.vocabulary).fingerprint
  directory = config.cache_root / config.task_directory("a", fingerprint)
  for shard in range(task.num_shards):
    job = shard_writer.ShardJob(config, task, shard, str(directory), config.vocabulary)
    shard_writer.write_shard(job, _ignore)
  task_index.finish_task(directory, "a", task.num_shards, {}, pairs=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_leaves_no_process_and_goes_on(make, corpus, workers):
  """SIGKILL while shards are written; workers end with their parent."""
  lines = (json.dumps({"query": f"q {i}", "positive": f"p {i}"}) for i in range(4_000))
  for part in range(4):
    (corpus / f"a-{part}.jsonl.gz").write_bytes(
      gzip.compress("\n".join(lines).encode() + b"\n") if not part else b""
    )
  for part in range(1, 4):
    (corpus / f"a-{part}.jsonl.gz").write_bytes((corpus / "a-0.jsonl.gz").read_bytes())
  config, whole = make(), make("whole")
  script = textwrap.dedent(
    f"""
    import pickle, sys
    from embgemma.data import cache_builder, executors
    if __name__ == "__main__":
      config = pickle.load(sys.stdin.buffer)
      cache_builder.build(config, print, executors.ProcessPool({workers}))
    """
  )
  path = corpus / "build.py"
  path.write_text(script)
  process = subprocess.Popen(
    [sys.executable, str(path)], stdin=subprocess.PIPE, start_new_session=True
  )
  process.stdin.write(pickle.dumps(config))
  process.stdin.close()
  root = pathlib.Path(config.cache_root)
  while not list(root.glob("tasks/a-*/part-*.npz")):
    assert process.poll() is None
  process.kill()
  process.wait()
  for _ in range(200):
    if not _processes_of(process.pid):
      break
    threading.Event().wait(0.05)
  assert not _processes_of(process.pid)
  assert cache.manifest(config) is None
  _build(config)
  _build(whole)
  assert _contents(config) == _contents(whole)
  assert not list(root.rglob(".examples*"))


def _processes_of(session: int) -> list[int]:
  """Processes of a session that are no zombies."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[3]) == session and fields[0] != "Z":
        found.append(int(stat.parent.name))
  return found


def test_cleaning(make):
  cleaning = (LengthFilter(min_query=1), ExactDuplicates(on="positive"))
  config = make(cleaning=cleaning)
  log = _build(config)
  assert log[0] == "a: cleaning kept 8 of 13 examples"
  first, second = cache.manifest(config).tasks
  assert first.statistics["examples"] == 8
  assert first.statistics["dropped"]["ExactDuplicates"] == 5
  assert second.statistics["examples"] == 11
  task = open_tasks(config)[0]
  kept = list(cache.kept_examples(config, task))
  hashes = first.hashes()
  assert [content_hash(example["query"]) for example in kept] == hashes[:, 0].tolist()
  for example, row in zip(kept, hashes, strict=True):
    own = [content_hash(text) for text in example["negatives"]]
    assert own == [value for value in row[2:].tolist() if value]
  assert _build(config) == []


def test_unique_ids(make, corpus, vocabulary):
  records = [
    {"query": f"book {i}", "positive": f"flight {i}", "label": "travel"} for i in (1, 2)
  ]
  path = corpus / "intents.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in (*records, records[0])))
  task = Task("t", JsonlSource(str(path)), "classification", unique_ids=True)
  config = make(tasks=(task,))
  _build(config)
  (cached,) = cache.manifest(config).tasks
  source = grain.sources.ArrayRecordDataSource(cached.paths)
  read = decode_records([source[i] for i in range(3)], 2)
  texts = [
    [
      SentencePieceVocabulary(vocabulary).decode(read.words[start : start + length])
      for start, length in zip(starts, lengths, strict=True)
    ]
    for starts, lengths in zip(read.starts, read.lengths, strict=True)
  ]
  prompt = "task: classification | query: "
  for own, record in zip(texts, records, strict=False):
    ids = {text.removeprefix(prompt).partition(" ")[0] for text in own}
    assert len(ids) == 1
    (own_id,) = ids
    assert len(own_id) == 8
    assert own == [f"{prompt}{own_id} {record[k]}" for k in ("query", "positive")]
  assert texts[0] == texts[2] != texts[1]
  assert cached.unique_ids
  # To the loss each example is its own: labels make no positives of each other.
  assert read.hashes[0, 1].tolist() != read.hashes[1, 1].tolist()
  assert cached.hashes()[0].tolist() == [
    content_hash("book 1"),
    content_hash("flight 1"),
  ]


def test_prompts_of_ones_own(make, vocabulary):
  config = make(
    tasks=(
      dataclasses.replace(make().tasks[0], kind="short/document"),
      make().tasks[1],
    ),
    prompts={"short": "q: ", "document": "title: none > "},
  )
  _build(config)
  (first, second) = cache.manifest(config).tasks
  decode = SentencePieceVocabulary(vocabulary).decode
  for task, prompt in ((first, "q: "), (second, "task: search result | query: ")):
    source = grain.sources.ArrayRecordDataSource(task.paths)
    read = decode_records([source[0]], 4)
    start, length = read.starts[0, :2], read.lengths[0, :2]
    query, positive = (
      decode(read.words[a : a + n]) for a, n in zip(start, length, strict=True)
    )
    assert query.startswith(prompt)
    assert positive.startswith("title: none > ")


def test_a_record_of_ten_megabytes(make, corpus):
  long = {"query": "word " * 2_000_000, "positive": "p"}
  path = corpus / "long.jsonl"
  path.write_text(f"{json.dumps(long)}\n" * 2)
  config = make(tasks=(Task("t", JsonlSource(str(path))),))
  _build(config)
  (task,) = cache.manifest(config).tasks
  assert task.lengths()[:, 0].tolist() == [40, 40]


def test_documents_in_parts(corpus, vocabulary, monkeypatch):
  """A part ends with a document: segments of one are never split over two builds."""
  monkeypatch.setattr(shard_writer, "PART_EXAMPLES", 4)
  path = corpus / "documents.txt"
  path.write_text("".join(f"{'passage ' * 3 * n} {n}\n" for n in range(1, 30)))

  def config(name: str) -> TextDataConfig:
    from embgemma.data.denoisers import causal_lm

    return TextDataConfig(
      "m",
      {"targets": 16},
      (Task("t", TextFileSource(str(path))),),
      vocabulary=vocabulary,
      cache_dir=str(corpus / name),
      denoisers=causal_lm(),
    )

  whole, parts = config("whole"), config("parts")
  with monkeypatch.context() as patch:
    patch.setattr(shard_writer, "PART_EXAMPLES", 1 << 18)
    _build(whole)
  _build(parts)
  (one,), (several,) = (cache.manifest(c).tasks for c in (whole, parts))
  assert len(one.paths) == 1 < len(several.paths)
  assert one.statistics == several.statistics
  np.testing.assert_array_equal(one.lengths(), several.lengths())
  records = [
    [r for path in task.paths for r in ArrayRecordReader(path).read_all()]
    for task in (one, several)
  ]
  assert records[0] == records[1]


@pytest.mark.parametrize("cleaning", [(), (LengthFilter(min_query=1),)])
def test_progress_within_a_shard(make, corpus, monkeypatch, cleaning):
  monkeypatch.setattr(cache_builder, "_REPORT_SECONDS", -1.0)
  task = Task("t", JsonlSource(str(corpus / "b-0.jsonl.gz")))
  log = _build(make(tasks=(task,), cleaning=cleaning))
  for what in ("scanned", "cached")[0 if cleaning else 1 :]:
    lines = [line for line in log if line.startswith(f"{what} 0")]
    assert lines == [
      f"{what} 0 of 1 shards, {examples} examples so far" for examples in range(1, 12)
    ]


def test_examples_of_all_jobs_are_counted():
  def count_to(total: int, count: executors.Count) -> None:
    for number in range(1, total + 1):
      count(number)

  counted: list[int] = []
  assert [*executors.InProcess().run(count_to, [2, 0, 3], counted.append)] == [0, 1, 2]
  assert counted == [1, 2, 3, 4, 5]


def test_workers():
  with pytest.raises(ConfigError, match="--workers=0: give 1 or more"):
    executors.ProcessPool(0)


def test_a_cache_on_gs(make, bucket, monkeypatch, tmp_path):
  """Written object by object; tables are copied here to be memory-mapped."""
  monkeypatch.setenv("EMBGEMMA_CACHE", str(tmp_path / "own"))
  cleaning = (ExactDuplicates(on="positive"),)
  local = make("local", cleaning=cleaning)
  remote = dataclasses.replace(local, cache_dir="gs://data/cache")
  assert _build(remote) == _build(local)
  prefix = "/data/cache/"
  objects = {
    path.removeprefix(prefix): bucket.cat_file(path) for path in bucket.find(prefix)
  }
  assert objects == _contents(local)
  assert _build(remote) == []
  for one, other in zip(
    cache.manifest(local).tasks, cache.manifest(remote).tasks, strict=True
  ):
    assert all(path.startswith("gs://data/cache/tasks/") for path in other.paths)
    assert one.statistics == other.statistics
    np.testing.assert_array_equal(one.lengths(), other.lengths())
    assert isinstance(other.hashes(), np.memmap)
    np.testing.assert_array_equal(one.hashes(), other.hashes())


def test_a_source_that_changes_while_it_is_read(make, corpus, monkeypatch):
  config = make()
  write_shard = shard_writer.write_shard

  def changing(job, count):
    write_shard(job, count)
    path = corpus / "b-0.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"query": "q", "positive": "p"}\n'))

  with monkeypatch.context() as patch:
    patch.setattr(shard_writer, "write_shard", changing)
    with pytest.raises(DataError, match="'b': a file of its source changed while it"):
      _build(config)
  assert cache.manifest(config) is None
  _build(config)
  assert cache.manifest(config).tasks[1].statistics["examples"] == 5


def test_a_kind_that_a_record_alone_names(make, corpus):
  records = [{"query": f"q{i}", "positive": "p", "task": "qa"} for i in range(3)]
  records[1]["task"] = "poem"
  path = corpus / "kinds.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  config = make(tasks=(Task("t", JsonlSource(str(path))),))
  with pytest.raises(DataError, match="unknown kind 'poem'; .* query begins 'q1'"):
    _build(config)
  config = dataclasses.replace(config, on_bad_record="skip")
  log = _build(config)
  assert log[1] == "skipped 1 bad records of t:"
  (cached,) = cache.manifest(config).tasks
  queries = [content_hash(query) for query in ("q0", "q2")]
  assert cached.hashes()[:, 0].tolist() == queries
  task = open_tasks(config)[0]
  assert [e["query"] for e in cache.kept_examples(config, task)] == ["q0", "q2"]


def test_ids_survive_the_cut(make, corpus, vocabulary):
  long = "word " * 300
  records = [{"query": f"{long}{i}", "positive": f"{long}{i}"} for i in range(2)]
  path = corpus / "long.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  task = Task("t", JsonlSource(str(path)), "classification", unique_ids=True)
  config = make(tasks=(task,))
  _build(config)
  (cached,) = cache.manifest(config).tasks
  source = grain.sources.ArrayRecordDataSource(cached.paths)
  read = decode_records([source[i] for i in range(2)], 2)
  spans = (read.starts[:, 0], read.lengths[:, 0])
  queries = [read.words[s : s + n] for s, n in zip(*spans, strict=True)]
  assert len(queries[0]) == len(queries[1]) == 40
  assert queries[0].tolist() != queries[1].tolist()


def test_a_file_named_twice(make, corpus):
  both = (str(corpus / "a-*.jsonl.gz"), str(corpus / "a-0.jsonl.gz"))
  config = make(tasks=(Task("t", JsonlSource(both)),))
  with pytest.raises(DataError, match=r"a-0.jsonl.gz: named twice by the paths"):
    _build(config)


def test_a_failed_job_ends_the_others(make):
  """Nobody waits for what is written again anyway."""
  began = time.monotonic()
  with pytest.raises(DataError, match="no"):
    list(executors.ProcessPool(2).run(_wait_or_fail, [0, 60, 60, 60], _ignore))
  assert time.monotonic() - began < 30


def _ignore(examples: int) -> None:
  del examples


def _wait_or_fail(seconds: float, count: executors.Count) -> None:
  del count
  if not seconds:
    raise DataError("no")
  time.sleep(seconds)
