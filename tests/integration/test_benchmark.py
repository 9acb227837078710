"""`embgemma eval` through mteb: tasks of several types, widths, failures, resume."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest

from embgemma import cli
from embgemma.data import prompts
from embgemma.errors import ConfigError
from embgemma.evaluation import mteb_runner, suite
from embgemma.evaluation.mteb_encoder import MtebEncoder
from embgemma.evaluation.mteb_runner import BenchmarkModel
from embgemma.evaluation.vector_cache import VectorCache

pytest.importorskip("mteb", reason="of the extra eval")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # mteb's and its libraries'
]
PROMPTS = {"query": "q: ", "document": "title: none | text: ", "STS": "same: "}


class Words:
  """Vectors of the letters of a text: deterministic, and quick."""

  def __init__(self):
    self.calls = []

  def __call__(self, texts):
    self.calls.append(list(texts))
    counts = np.array(
      [np.bincount([ord(c) % 16 for c in t], minlength=16) for t in texts], np.float32
    ).reshape(-1, 16)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def model(encode, **changes):
  return BenchmarkModel(
    name="me/letters",
    revision="1",
    full_width=16,
    max_length=64,
    prompts=PROMPTS,
    encoder=lambda length: encode,
    **changes,
  )


def test_texts_are_embedded_once():
  encode = Words()
  stored = VectorCache(encode)
  first = stored(["a", "b", "a"])
  np.testing.assert_array_equal(first, Words()(["a", "b", "a"]))
  np.testing.assert_array_equal(stored(["c", "b"]), Words()(["c", "b"]))
  assert encode.calls == [["a", "b"], ["c"]]
  assert stored.texts == 3
  assert stored([]).shape == (0, 16)


@pytest.mark.parametrize("titles", [True, False])
def test_prompts_and_titles(titles):
  from mteb.types import PromptType

  encode = Words()
  encoder = MtebEncoder(None, encode, 16, PROMPTS, titles)
  (task,) = mteb_runner.tasks(None, ["StdlibRetrieval"], ["stdlib_tasks"])
  batch = {
    "text": ["A title a body", "only a body"],
    "title": ["A title", ""],
    "body": ["a body", "only a body"],
  }
  options = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
  encoder.encode([batch], prompt_type=PromptType.document, **options)
  first = "title: A title | text: a body" if titles else None
  assert encode.calls[-1] == [
    first or "title: none | text: A title a body",
    "title: none | text: only a body",
  ]
  encoder.encode([{"text": ["x"]}], prompt_type=PromptType.query, **options)
  assert encode.calls[-1] == ["q: x"]
  (sts,) = mteb_runner.tasks(None, ["StdlibSTS"], ["stdlib_tasks"])
  options["task_metadata"] = sts.metadata
  encoder.encode([{"text": ["x"]}], prompt_type=None, **options)
  assert encode.calls[-1] == ["same: x"]


def test_every_type_at_two_widths(tmp_path):
  """A text is embedded once a task; results are mteb's, and are not made again."""
  import mteb

  chosen = mteb_runner.tasks(None, (), ["stdlib_tasks"])
  kinds = {task.metadata.type for task in chosen}
  assert len(kinds) == len(chosen) == 10
  encode = Words()
  outcomes = mteb_runner.run(model(encode), chosen, (16, 8), tmp_path, length=64)
  assert [each.error for each in outcomes] == [""] * 20
  assert all(each.texts == 0 for each in outcomes if each.width == 8)
  texts = [text for call in encode.calls for text in call]
  assert sum(each.texts for each in outcomes) == len(texts)
  found = mteb.ResultCache(tmp_path).load_results(
    validate_and_filter=False, load_experiments="match_name"
  )
  read = {(len(of.task_results), of.model_name) for of in found.model_results}
  assert sum(count for count, _ in read) in (10, 20)
  encode.calls.clear()
  again = mteb_runner.run(model(encode), chosen, (16, 8), tmp_path, length=64)
  kept = [each.score for each in outcomes]  # of which six digits
  assert [each.score for each in again] == pytest.approx(kept, abs=1e-6)
  assert not encode.calls
  # Other settings are other results.
  joined = mteb_runner.run(
    model(encode, titles=False), chosen[:1], (16,), tmp_path, length=64
  )
  assert encode.calls
  assert not joined[0].error


def test_a_task_that_fails_keeps_no_other_back(tmp_path):
  chosen = mteb_runner.tasks(
    None, ["StdlibSTS", "StdlibBitextMining"], ["stdlib_tasks"]
  )

  def broken(*args, **kwargs):
    raise RuntimeError("no such data\nmore")

  chosen[0].load_data = broken
  outcomes = mteb_runner.run(model(Words()), chosen, (16,), tmp_path, length=64)
  assert [(each.task, each.error) for each in outcomes] == [
    ("StdlibSTS", "RuntimeError: no such data"),
    ("StdlibBitextMining", ""),
  ]
  assert outcomes[0].score is None
  assert outcomes[1].score is not None


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("MTEB(no such)", (), ()), "--benchmark: "),
    ((None, ["NoSuchTask"], ()), "--tasks: 'NoSuchTask' not found"),
    ((None, (), ["no_such_module"]), "--task_modules=no_such_module: cannot be"),
    ((None, (), ["json"]), "json: defines no task"),
  ],
)
def test_names_that_are_none(arguments, message):
  with pytest.raises(ConfigError, match=message):
    mteb_runner.tasks(*arguments)


def test_lengths_and_widths_beyond_the_model(tmp_path):
  chosen = mteb_runner.tasks(None, ["StdlibSTS"], ["stdlib_tasks"])
  with pytest.raises(ConfigError, match="65 tokens of a text"):
    mteb_runner.run(model(Words()), chosen, (16,), tmp_path, length=65)
  with pytest.raises(ConfigError, match=r"width 17 is not in 1\.\.16"):
    mteb_runner.run(model(Words()), chosen, (17,), tmp_path, length=64)


def test_data_on_the_disk_in_place_of_the_hub(tmp_path):
  import mteb
  from datasets import Dataset

  data = {"sentence1": ["a b", "c"], "sentence2": ["a b", "d"], "score": [5.0, 1.0]}
  (tmp_path / "STS12").mkdir()
  Dataset.from_dict(data).to_parquet(tmp_path / "STS12" / "test.parquet")
  chosen = [mteb.get_task("STS12"), mteb.get_task("STS13")]
  assert mteb_runner.use_local_data(chosen, tmp_path) == ["STS13"]
  (outcome,) = mteb_runner.run(
    model(Words()), chosen[:1], (16,), tmp_path / "results", length=64
  )
  assert not outcome.error
  assert outcome.score == pytest.approx(1), "the pair of one text twice is first"
  with pytest.raises(ConfigError, match="no such directory"):
    mteb_runner.use_local_data(chosen, tmp_path / "none")


def test_an_aggregate_is_of_its_tasks(tmp_path):
  """Loaded and evaluated one by one, from the disk, too."""
  import mteb
  from mteb.abstasks.aggregated_task import AbsTaskAggregate

  parts = mteb_runner.tasks(
    None, ["StdlibSTS", "StdlibSummarization"], ["stdlib_tasks"]
  )
  known = mteb.get_task("CQADupstackRetrieval").metadata
  metadata = known.model_copy(update={"name": "StdlibBoth", "tasks": parts})

  class Both(AbsTaskAggregate):
    pass

  Both.metadata = metadata
  outcomes = mteb_runner.run(
    model(Words()), [Both(), *parts], (16,), tmp_path, length=64
  )
  assert [each.error for each in outcomes] == [""] * 3
  both, *own = (each.score for each in outcomes)
  assert both == pytest.approx(np.mean(own), abs=1e-6)
  (tmp_path / "data").mkdir()
  assert len(mteb_runner.use_local_data([Both()], tmp_path / "data")) == 2


def test_a_result_that_was_cut_off_is_done_again(tmp_path):
  chosen = mteb_runner.tasks(None, ["StdlibSTS"], ["stdlib_tasks"])
  run = functools.partial(mteb_runner.run, widths=(16,), results=tmp_path, length=64)
  (first,) = run(model(Words()), chosen)
  (path,) = tmp_path.rglob("StdlibSTS.json")
  path.write_text(path.read_text()[:100])
  (second,) = run(model(Words()), chosen)
  assert (second.score, second.error) == (first.score, "")
  assert second.seconds > 0


def test_vectors_that_are_not_finite(tmp_path):
  def broken(texts):
    return np.full((len(texts), 16), np.nan, np.float32)

  chosen = mteb_runner.tasks(None, ["StdlibSTS"], ["stdlib_tasks"])
  (outcome,) = mteb_runner.run(model(broken), chosen, (16,), tmp_path, length=64)
  assert outcome.score is None
  assert "the embedding of text 0 is not finite" in outcome.error
  assert not list(tmp_path.rglob("StdlibSTS.json"))


def test_among_the_evaluations_of_a_run(tmp_path, monkeypatch):
  """`mteb:TASK`: the score that the runner gives, at each width."""
  import mteb

  (own,) = mteb_runner.tasks(None, ["StdlibClustering"], ["stdlib_tasks"])
  monkeypatch.setattr(mteb, "get_task", lambda name: type(own)())
  (evaluator,) = suite.evaluators({"topics": "mteb:StdlibClustering"}, (16, 8))
  evaluator.check()
  found = evaluator.evaluate(Words())
  again = evaluator.evaluate(Words())
  assert found == again, "the same samples every time"
  outcomes = mteb_runner.run(
    dataclasses.replace(model(Words()), prompts=prompts.PROMPTS),
    [own],
    (16, 8),
    tmp_path,
    length=64,
  )
  assert found == {f"main_score/{each.width}": each.score for each in outcomes}
  assert suite.main_scores({"topics": found}) == {"topics": outcomes[0].score}
  with pytest.raises(ConfigError, match="has its own kind"):
    suite.evaluators({"x": {"path": "mteb:STS12", "kind": "sts"}}, (16,))


def test_the_command(trained, tmp_path, capsys):
  """A checkpoint on one task, at its widths, into a folder of results."""
  flags = ["eval", f"--checkpoint={trained}", "--task_modules=stdlib_tasks"]
  flags += ["--tasks=StdlibSTS", f"--results={tmp_path}", "--widths=32,8"]
  flags.append("--vectors=float32,int8")
  cli.main(flags)
  said = capsys.readouterr().out
  assert "Mean(Task)" in said
  found = {path.parent.name: path for path in tmp_path.rglob("StdlibSTS.json")}
  assert {"embed_dim_8", "output_dtypes_int8", "embed_dim_8__output_dtypes_int8"} < set(
    found
  )
  (main,) = (path for name, path in found.items() if "_" not in name)
  content = json.loads(main.read_text())
  assert content["task_name"] == "StdlibSTS"
  assert main.parent.parent.name.startswith("embgemma__")
  assert "stdlib_tasks" in sys.modules
  with pytest.raises(SystemExit):
    cli.main([*flags, "--vectors=ubinary"])
  assert "vectors ubinary: mteb has float32" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main([*flags, "--data=x=y"])
  assert "--data: not for --benchmark, --tasks" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main([*flags, "--task_lengths=StdlibST=20"])
  assert "--task_lengths: StdlibST: not among" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main([*flags[:3], "--tasks=StdlibSTS"])
  assert "--results=DIR" in capsys.readouterr().err
