"""The page of a report, from files as commands leave them."""

import json
import re

import numpy as np
import pytest
from sklearn.decomposition import PCA

from embgemma.errors import DataError
from embgemma.reporting import page, records
from embgemma.reporting.spaces import Space, principal_components
from embgemma.training.metric_writers import EventWriter


def result(**tasks):
  return {
    task: {f"ndcg@10/{width}": score for width, score in zip((64, 16), of, strict=True)}
    for task, of in tasks.items()
  }


@pytest.fixture
def make_run(tmp_path):
  def make(name, evaluations, scalars=(), gin=""):
    run = tmp_path / name
    run.mkdir()
    (run / "model.json").write_text(json.dumps({"lineage": "abc"}))
    (run / "evaluations.json").write_text(json.dumps(evaluations))
    (run / "operative.gin").write_text(gin)
    if scalars:
      writer = EventWriter(run / "tensorboard")
      for step, values in scalars:
        writer.scalars(step, values)
      writer.close()
    return run

  return make


def made(*paths, **places):
  return page.page(records.read([str(path) for path in paths]), "title", places)


def table(text, heading):
  """Rows of the first table under a heading, by their first cells."""
  part = text.split(f"## {heading}")[1].split("\n## ")[0]
  rows = [line.strip("| ").split(" | ") for line in part.splitlines() if "|" in line]
  return {tuple(row[:3]): row[3:] for row in rows[2:]}


def test_results_are_the_last_steps_side_by_side(make_run):
  steps = {
    "0": result(a=(0.1, 0.1)),
    "10": result(a=(0.5, 0.3)),
    "9": result(a=(0.0, 0.0)),
  }
  text = made(make_run("one", steps), make_run("two", {"10": result(a=(0.4, 0.4))}))
  rows = table(text.markdown(), "Held-out evaluation")
  assert rows["a", "ndcg@10", "64"] == ["**50.00**", "40.00"]
  assert rows["a", "ndcg@10", "16"] == ["30.00", "**40.00**"]
  assert rows["mean", "of main metrics", "64"] == ["**50.00**", "40.00"]
  assert text.cards["best mean score: one"] == "50.00"


def test_bm25_has_no_width(make_run, tmp_path):
  run = make_run("one", {"1": result(a=(0.5, 0.3))})
  file = tmp_path / "results.json"
  of_eval = {"soup-0123abcd": result(a=(0.6, 0.2)), "BM25": {"a": {"ndcg@10": 0.4}}}
  file.write_text(json.dumps(of_eval))
  rows = table(made(run, file).markdown(), "Held-out evaluation")
  assert rows["a", "ndcg@10", "16"] == ["30.00", "20.00", "**40.00**"]
  assert rows["mean", "of main metrics", "64"] == ["50.00", "**60.00**", "40.00"]


def test_files_of_one_model_and_of_two(tmp_path):
  """Other sets of "step 5" join it; the same sets are of another model."""
  contents = {
    "one": result(a=(0.5, 0.3)),
    "more": {"x": {"mrr@10/64": 0.25, "mrr@10:hi/64": 0.2}},
    "other": result(a=(0.7, 0.1)),
    "again": result(a=(0.5, 0.3)),
  }
  files = []
  for name, of in contents.items():
    files.append(tmp_path / f"{name}.json")
    files[-1].write_text(json.dumps({"step 5": of}))
  text = made(*files).markdown()
  assert "| task | metric | width | step 5 | step 5 (other.json) |" in text
  rows = table(text, "Held-out evaluation")
  assert rows["a", "ndcg@10", "64"] == ["50.00", "**70.00**"]
  assert rows["x", "mrr@10", "64"] == ["25.00", "–"]
  assert ("x", "mrr@10:hi", "64") not in rows
  assert rows["mean", "of main metrics", "64"] == ["50.00", "**70.00**"]


def test_other_json_is_refused(tmp_path):
  for content in ({"a": 1}, [1], {"a": {"b": {"c": "d"}}}):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not what `embgemma eval --output` writes"):
      made(file)


def test_what_is_not_done_has_no_results(make_run, tmp_path):
  for name, score in (("done", 0.5), ("begun", 0.9)):
    make_run(name, {"1": result(a=(score, score))})
  stages = {
    name: {
      "state": state,
      "seconds": None,
      "needs": [],
      "command": ["train"],
      "directory": name,
    }
    for name, state in (("done", "complete"), ("begun", "running"))
  }
  (tmp_path / "recipe.json").write_text(json.dumps({"stages": stages}))
  text = made(tmp_path)
  rows = table(text.markdown(), "Held-out evaluation")
  assert rows["a", "ndcg@10", "64"] == ["50.00"]
  assert text.cards["stages complete"] == "1 of 2"


def test_an_evaluation_has_the_name_of_what_it_evaluates(tmp_path):
  (tmp_path / "evaluation-1").mkdir()
  results = {"step 0": result(a=(0.6, 0.2)), "BM25": {"a": {"ndcg@10": 0.4}}}
  (tmp_path / "evaluation-1" / "results.json").write_text(json.dumps(results))
  stage = {
    "state": "complete",
    "seconds": 1.0,
    "needs": [],
    "directory": "evaluation-1",
  }
  stage["command"] = ["eval", "--checkpoint=r/soup-0123abcd", "--bm25"]
  recipe = {"stages": {"evaluation": stage}}
  (tmp_path / "recipe.json").write_text(json.dumps(recipe))
  assert "| task | metric | width | soup | BM25 |" in made(tmp_path).markdown()


def test_a_model_without_a_task_has_no_mean(make_run):
  both = make_run("both", {"1": result(a=(0.5, 0.3), b=(0.3, 0.3))})
  rows = table(
    made(both, make_run("one", {"1": result(a=(0.9, 0.9))})).markdown(),
    "Held-out evaluation",
  )
  assert rows["mean", "of main metrics", "64"] == ["40.00", "–"]


def test_seeds_of_one_model_have_a_mean(make_run):
  runs = [
    make_run(f"arm_seed{seed}", {"1": result(a=(score, score))})
    for seed, score in ((0, 0.5), (1, 0.6))
  ]
  text = made(*runs, make_run("other_seed0", {"1": result(a=(0.0, 0.0))})).markdown()
  assert "| arm | 2 | 55.00 | 50.00 | 60.00 |" in text
  assert "other |" not in text


def test_losses_have_a_section_where_less_is_better(make_run):
  runs = [
    make_run(name, {"1": {"dev": {"loss": loss}}})
    for name, loss in (("a", 2.0), ("b", 3.0))
  ]
  rows = table(made(*runs).markdown(), "Held-out loss")
  assert rows["dev", "loss", ""] == ["**2.000**", "3.000"]


def test_curves_are_what_was_written(make_run, tmp_path):
  scalars = [(step, {"loss": 10 / step, "nce/64": 1.0}) for step in range(1, 6)]
  run = make_run("run", {}, scalars)
  writer = EventWriter(run / "tensorboard")  # resumed at step 4
  writer.scalars(5, {"loss": 7.0})
  writer.close()
  newest = max((run / "tensorboard").iterdir(), key=lambda file: file.name)
  with newest.open("ab") as file:  # killed while it wrote
    file.write(newest.read_bytes()[:20])
  curve = records.read([str(run)]).runs[0].curves["loss"]
  np.testing.assert_array_equal(curve.steps, [1, 2, 3, 4, 5])
  np.testing.assert_allclose(curve.values, [10, 5, 10 / 3, 2.5, 7.0], rtol=1e-6)
  html = made(run).html()
  assert 'aria-label="Loss (run)"' in html
  assert "currentColor" in html


def test_what_users_wrote_is_text(make_run):
  run = make_run("<b>run", {"1": result(**{"<i>": (0.1, 0.1)})}, [(1, {"loss": 1.0})])
  html = made(run).html()
  assert "<b>run" not in html
  assert "<i>" not in html


def test_ids_of_charts_are_their_own(make_run):
  scalars = [(step, {"loss": 1.0, "real_token_share": 0.9}) for step in (1, 2)]
  html = made(make_run("run", {}, scalars)).html()
  ids = re.findall(r'\bid="([^"]+)"', html)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))


def test_a_search_shows_its_mixtures(tmp_path):
  trials = [
    {
      "index": index,
      "role": "seed" if index == 0 else "proposed",
      "rates": {"x": rate, "y": 1 - rate},
      "scores": {"mean": score},
      "state": "complete",
      "seconds": 1.0,
    }
    for index, (rate, score) in enumerate([(0.5, 0.3), (0.2, 0.4)])
  ]
  trials.append({**trials[0], "index": 2, "scores": {}, "state": "failed"})
  expert = {"name": "expert_1", "trial": 1, "chosen_for": "mean"}
  expert |= {key: trials[1][key] for key in ("rates", "scores")}
  content = {
    "groups": {"x": 0.5, "y": 0.5},
    "objectives": ["mean"],
    "noise": {"mean": 0.01},
    "trials": trials,
    "experts": [expert],
  }
  (tmp_path / "search.json").write_text(json.dumps(content))
  text = made(tmp_path)
  assert "| expert_1 | 2 | mean | 40.00 | 0.200 | 0.800 |" in text.markdown()
  assert "Trials: 2 complete, 1 failed" in text.markdown()
  assert "mean 1.00 points" in text.markdown()
  html = text.html()
  assert html.index("2 expert_1") < html.index("1 seed")


def test_places_are_principal_components():
  generator = np.random.default_rng(0)
  vectors = {"a": generator.normal(size=(20, 8)), "b": generator.normal(size=(5, 8))}
  found = principal_components(vectors)
  expected = PCA(2).fit_transform(np.concatenate(list(vectors.values())))
  places = np.concatenate(list(found.values()))
  signs = np.sign(np.sum(places * expected, axis=0))
  np.testing.assert_allclose(places * signs, expected, atol=1e-9)
  assert [len(of) for of in found.values()] == [20, 5]


def test_damaged_files_are_named(make_run):
  run = make_run("run", {})
  (run / "evaluations.json").write_text("{")
  with pytest.raises(DataError, match=r"evaluations.json: damaged"):
    made(run)


def test_vectors_of_other_formats_alone(tmp_path):
  """An evaluation without float32 has no mean score, and its rows are there."""
  path = tmp_path / "results.json"
  path.write_text(json.dumps({"m": {"a": {"ndcg@10 (int8)/16": 0.5}}}))
  text = made(path).markdown()
  assert "| a | ndcg@10 (int8) | 16 | 50.00 |" in text
  assert "best mean score" not in text


def test_a_benchmark():
  scores = {"x": {"a": 0.5, "b": 0.7}, "y": {"a": 0.6}}
  kinds = {"a": "STS", "b": "Retrieval"}
  shown = page.page(
    records.read([]), "title", {}, benchmark="B", scores=scores, kinds=kinds
  )
  text = shown.markdown()
  assert "| x | 1 | 1 | 60.00 | 60.00 | 50.00 | 70.00 |  |" in text
  assert "| b | Retrieval | 70.00 | – |" in text
  assert "<table" in shown.html()


def test_spaces():
  """Numbers of sets, and for each query what lies next to it."""
  vectors = np.eye(12, 16, dtype=np.float32)
  texts = [f"document {i}" for i in range(12)]
  queries = [f"query {i}" for i in range(3)]
  space = Space(vectors[:3], vectors, queries, texts, np.array([0, 1, 5]))
  shown = page.page(records.read([]), "title", {}, {"set": space})
  assert "| set | 0.667 | -4.000 | 0.000 | 12.000 |" in shown.markdown()
  html = shown.html()
  assert "1.000 * document 0" in html
  assert "1.000   document 2" in html
