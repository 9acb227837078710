"""Aggregates by hand, and against mteb's own."""

import csv
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from embgemma.errors import DataError
from embgemma.evaluation import benchmark_scores
from embgemma.evaluation.benchmark_scores import borda_points, standings

TYPES = {"a": "STS", "b": "STS", "c": "Retrieval"}


def test_means():
  found = standings({"m": {"a": 0.2, "b": 0.4, "c": 0.9}}, TYPES)["m"]
  assert found.mean_task == pytest.approx(0.5)
  assert found.by_type == pytest.approx({"STS": 0.3, "Retrieval": 0.9})
  assert found.mean_type == pytest.approx(0.6)
  assert found.missing == ()


def test_a_missing_task_has_no_mean_and_no_points():
  models = {"all": {"a": 0.1, "b": 0.1, "c": 0.1}, "some": {"a": 0.9, "b": 0.9}}
  found = standings(models, TYPES)
  assert found["some"].mean_task is found["some"].mean_type is None
  assert found["some"].by_type == pytest.approx({"STS": 0.9, "Retrieval": None})
  assert found["some"].missing == ("c",)
  assert (found["some"].points, found["all"].points) == (2, 1)
  assert (found["some"].rank, found["all"].rank) == (1, 2)


def test_borda_by_hand():
  """Three models: 2, 1 and 0 points a task; equal scores share."""
  models = {
    "x": {"a": 0.9, "b": 0.5, "c": 0.5},
    "y": {"a": 0.8, "b": 0.5, "c": 0.7},
    "z": {"a": 0.7, "b": 0.1, "c": 0.9},
  }
  points = borda_points(models, list(TYPES))
  assert points == {"x": 2 + 1.5 + 0, "y": 1 + 1.5 + 1, "z": 0 + 0 + 2}
  ranks = {name: of.rank for name, of in standings(models, TYPES).items()}
  assert ranks == {"x": 1, "y": 1, "z": 3}


@given(
  st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=3), min_size=1
  )
)
def test_borda_is_that_of_scipys_ranks(rows):
  models = {f"m{i}": dict(zip(TYPES, row, strict=True)) for i, row in enumerate(rows)}
  ranks = stats.rankdata(-np.array(rows), axis=0)
  expected = (len(rows) - ranks).sum(axis=1)
  assert list(borda_points(models, list(TYPES)).values()) == pytest.approx(expected)


def task_file(path, task, scores):
  """A result in mteb's format; scores by split and subset."""
  content = {
    "dataset_revision": "1",
    "task_name": task.metadata.name,
    "mteb_version": "2.26.0",
    "evaluation_time": 1.0,
    "scores": {
      split: [
        {"main_score": score, "hf_subset": subset, "languages": ["eng-Latn"]}
        for subset, score in of.items()
      ]
      for split, of in scores.items()
    },
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def tasks():
  mteb = pytest.importorskip("mteb")
  return mteb.get_tasks(tasks=["STS12", "STS22.v2", "SciFact", "NFCorpus"])


def test_folders_are_read_as_mteb_reads_them(tasks, tmp_path):
  import mteb

  draw = np.random.default_rng(0)
  places = {
    "one/model": "results/one__model/rev1",
    "other/model": "results/other__model/rev9",
    "one/model (embed_dim_128)": "results/one__model/rev1/experiments/embed_dim_128",
  }
  for place in places.values():
    for task in tasks:
      scores = {
        # A split that is no evaluation split does not count.
        split: {subset: draw.uniform() for subset in task.hf_subsets}
        for split in (*task.eval_splits, "train")
      }
      task_file(tmp_path / place / f"{task.metadata.name}.json", task, scores)
  found = benchmark_scores.read_results([tmp_path], tasks)
  assert found.keys() == places.keys()
  types = {task.metadata.name: task.metadata.type for task in tasks}
  assert sorted(types.values()) == ["Retrieval", "Retrieval", "STS", "STS"]
  ours = standings(found, types)
  for name, place in places.items():
    for task in tasks:
      path = tmp_path / place / f"{task.metadata.name}.json"
      result = mteb.TaskResult.from_disk(path).validate_and_filter_scores(task)
      assert found[name][task.metadata.name] == pytest.approx(result.get_score())
    by_type = {
      kind: np.mean([found[name][task] for task, of in types.items() if of == kind])
      for kind in types.values()
    }
    assert ours[name].by_type == pytest.approx(by_type)


def test_a_result_without_a_subset_is_missing(tasks, tmp_path):
  task = next(task for task in tasks if task.metadata.name == "STS22.v2")
  subsets = dict.fromkeys(task.hf_subsets[1:], 0.5)
  scores = dict.fromkeys(task.eval_splits, subsets)
  place = tmp_path / "results" / "one__model" / "rev"
  task_file(place / "STS22.v2.json", task, scores)
  assert benchmark_scores.read_results([tmp_path], tasks) == {}
  (place / "STS22.v2.json").write_text("{}")
  with pytest.raises(DataError, match=r"STS22.v2.json: not a result of mteb's"):
    benchmark_scores.read_results([tmp_path], tasks)
  with pytest.raises(DataError, match="no results of mteb's"):
    benchmark_scores.read_results([tmp_path / "none"], tasks)


@pytest.mark.parametrize(
  ("benchmark", "mean_task", "mean_type", "count"),
  [
    ("MTEB(Multilingual, v2)", 61.15, 54.31, 131),
    ("MTEB(eng, v2)", 69.67, 65.11, 41),
    ("MTEB(Code, v1)", 68.76, 68.76, 12),
  ],
)
def test_the_papers_means(benchmark, mean_task, mean_type, count):
  """Of Tables 5 and 6 of arXiv 2509.20354, from the scores of tasks."""
  path = pathlib.Path(__file__).parents[2] / "docs" / "paper_results.csv"
  models = benchmark_scores.read_table(path, benchmark)
  with path.open() as file:
    rows = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
  types = {row["task"]: row["type"] for row in rows}
  assert len(types) == count
  found = standings(models, types)["EmbeddingGemma"]
  assert 100 * found.mean_task == pytest.approx(mean_task, abs=0.005)
  assert 100 * found.mean_type == pytest.approx(mean_type, abs=0.005)


def test_tables_come_back(tmp_path):
  models = {"x": {"a": 0.5, "b": 0.25, "c": 1.0}, "y": {"a": 0.75}}
  path = tmp_path / "table.csv"
  with path.open("w", newline="") as file:
    benchmark_scores.write_table(file, "B, v1", models, TYPES)
  assert benchmark_scores.read_table(path, "B, v1") == models
  assert benchmark_scores.read_table(path, "other") == {}
  path.write_text("benchmark,task,type,m\nB,t,STS,high\n")
  with pytest.raises(DataError, match=r"table.csv:2: m is 'high'"):
    benchmark_scores.read_table(path, "B")
  path.write_text("task,m\nt,1\n")
  with pytest.raises(DataError, match="needs the columns benchmark, task, type"):
    benchmark_scores.read_table(path, "B")


def test_tables():
  models = {"x": {"a": 0.5, "b": 0.25, "c": 1.0}, "y": {"a": 0.75}}
  heads, rows = benchmark_scores.standings_table(standings(models, TYPES), TYPES)
  assert heads[3:7] == ["Mean(Task)", "Mean(Type)", "STS", "Retrieval"]
  assert rows[0] == ["x", "1", "2", "58.33", "68.75", "37.50", "100.00", ""]
  assert rows[1] == ["y", "2", "1", "–", "–", "–", "–", "2"]
  heads, rows = benchmark_scores.tasks_table(models, TYPES)
  assert heads == ["task", "type", "x", "y"]
  assert rows[1] == ["b", "STS", "25.00", "–"]
