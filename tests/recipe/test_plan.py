"""What makes a stage another, and what does not."""

import dataclasses
import json
import os

import pytest

from embgemma.commands.recipe import reader
from embgemma.errors import ConfigError, DataError
from embgemma.gin_config import register
from embgemma.recipe.config import Recipe, Stage
from embgemma.recipe.plan import plan

_FILES = ("gin/models/tiny.gin", "gin/stages/prefinetune.gin")


@pytest.fixture(autouse=True)
def _registered():
  register()


@pytest.fixture
def pairs(tmp_path):
  path = tmp_path / "pairs.jsonl"
  path.write_text('{"query": "a", "positive": "b"}\n')
  return path


@pytest.fixture
def recipe(tmp_path, pairs):
  macros = {"JSONL_TASKS": {"pairs": str(pairs)}, "TRAIN_STEPS": 2, "BATCH_SIZE": 2}
  start = {"INITIAL_CHECKPOINT_PATH": "{base}"}
  return Recipe(
    str(tmp_path / "r"),
    {
      "base": Stage(gin_files=_FILES, macros=macros),
      "other": Stage(gin_files=_FILES, macros={**macros, "TRAIN_STEPS": 3}),
      "expert": Stage(gin_files=_FILES, macros=(macros, start)),
      "soup": Stage("soup", inputs=("{base}", "{expert}")),
    },
  )


def keys(recipe):
  return {stage.name: stage.key for stage in plan(recipe, reader(""))}


def changed(recipe, name, **fields):
  stage = dataclasses.replace(recipe.stages[name], **fields)
  return dataclasses.replace(recipe, stages={**recipe.stages, name: stage})


def differing(recipe, other):
  before, after = keys(recipe), keys(other)
  return {name for name in before if before[name] != after[name]}


def test_a_plan_is_the_same_again_and_elsewhere(recipe, tmp_path):
  moved = dataclasses.replace(recipe, directory=str(tmp_path / "elsewhere"))
  assert keys(recipe) == keys(recipe) == keys(moved)
  assert len(set(keys(recipe).values())) == 4


def test_a_changed_macro_changes_what_reads_it(recipe):
  macros = {**recipe.stages["base"].macros, "LEARNING_RATE": 0.5}
  assert differing(recipe, changed(recipe, "base", macros=macros)) == {
    "base",
    "expert",
    "soup",
  }


def test_changed_data_changes_what_trains_on_it(recipe, pairs):
  before = keys(recipe)
  pairs.write_text('{"query": "a", "positive": "other"}\n')
  after = keys(recipe)
  assert all(before[name] != after[name] for name in before)


def test_evaluation_data_counts(recipe, pairs, tmp_path):
  held_out = tmp_path / "dev.jsonl"
  held_out.write_text(pairs.read_text())
  macros = {**recipe.stages["other"].macros, "EVALUATIONS": {"dev": str(held_out)}}
  recipe = changed(recipe, "other", macros=macros)
  before = keys(recipe)
  os.utime(held_out, (0, 0))
  assert {name for name, key in keys(recipe).items() if key != before[name]} == {
    "other"
  }


@pytest.mark.parametrize("macro", ["CACHE_DIR", "PROFILE_STEPS"])
@pytest.mark.parametrize("value", ["elsewhere", "/a/long/path" * 10])
def test_where_caches_are_changes_nothing(recipe, macro, value):
  macros = {**recipe.stages["base"].macros, macro: value}
  assert differing(recipe, changed(recipe, "base", macros=macros)) == set()


def test_resources_change_nothing(recipe):
  assert differing(recipe, changed(recipe, "base", resources="v5e:4x4")) == set()


def given_model(directory):
  (directory / "checkpoints" / "0").mkdir(parents=True)
  (directory / "checkpoints" / "0" / "weights").write_text("0")
  (directory / "model.json").write_text("{}")
  return directory


@pytest.mark.parametrize("name", ["given", "rate=0.1", "a:b"])
def test_the_weights_of_a_checkpoint_given_count(recipe, tmp_path, name):
  given = given_model(tmp_path / name)
  macros = ({"INITIAL_CHECKPOINT_PATH": str(given)}, recipe.stages["other"].macros)
  recipe = changed(recipe, "other", macros=macros)
  before = keys(recipe)
  (given / "tensorboard").mkdir()  # no weights
  assert keys(recipe) == before
  os.utime(given / "checkpoints" / "0" / "weights", (0, 0))
  assert {name for name, key in keys(recipe).items() if key != before[name]} == {
    "other"
  }


@pytest.mark.parametrize("prefix", ["", "sentence_transformers:"])
def test_the_files_of_flags_count(tmp_path, pairs, prefix):
  searcher = tmp_path / "searcher"
  searcher.mkdir()
  (searcher / "model.safetensors").write_text("0")
  macros = {"JSONL_TASKS": {"pairs": str(pairs)}}
  flags = {"searcher": f"{prefix}{searcher}"}
  stage = Stage("mine", gin_files=_FILES, macros=macros, flags=flags)
  recipe = Recipe(str(tmp_path / "r"), {"mined": stage})
  before = keys(recipe)
  (searcher / "model.safetensors").write_text("other")
  assert keys(recipe) != before
  before = keys(recipe)
  free = dataclasses.replace(stage, flags={**flags, "keep_work": True})
  assert keys(dataclasses.replace(recipe, stages={"mined": free})) == before


def test_data_of_an_evaluation_count(tmp_path, pairs):
  flags = {"checkpoint": "none", "data": [f"own={pairs}:qa"]}
  recipe = Recipe(str(tmp_path / "r"), {"evaluation": Stage("eval", flags=flags)})
  before = keys(recipe)
  os.utime(pairs, (0, 0))
  assert keys(recipe) != before


def test_a_stage_is_complete_once_recorded(recipe):
  base = plan(recipe, reader(""))[0]
  assert base.seconds() is None
  base.root.mkdir()
  base.write_record(12.5)
  assert base.seconds() is None  # its directory is not there
  base.directory.mkdir()
  assert base.seconds() == 12.5
  assert json.loads(base.record.read_text())["arguments"] == base.arguments
  base.record.write_text("{")
  with pytest.raises(DataError, match="damaged; delete it, and the stage runs again"):
    base.seconds()


def test_what_writes_into_caches_is_never_complete(tmp_path, pairs):
  macros = {"JSONL_TASKS": {"pairs": str(pairs)}}
  stage = Stage("cache", gin_files=_FILES, macros=macros)
  (cached,) = plan(Recipe(str(tmp_path / "r"), {"cached": stage}), reader(""))
  cached.root.mkdir()
  cached.write_record(1.0)
  assert cached.seconds() is None


def test_a_missing_macro_is_said_before_anything_runs(recipe):
  macros = {**recipe.stages["other"].macros, "BATCH_SIZE": "%gin.REQUIRED"}
  with pytest.raises(ConfigError, match="stage 'other': .*--gin.BATCH_SIZE"):
    keys(changed(recipe, "other", macros=macros))


def test_missing_data_names_the_stage(recipe, pairs):
  pairs.unlink()
  with pytest.raises(DataError, match="stage 'base': .*pairs.jsonl"):
    keys(recipe)
