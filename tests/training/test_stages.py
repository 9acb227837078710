"""What a stage refuses, and that it reads what its objective needs."""

import dataclasses

import jax
import numpy as np
import pytest

from embgemma.data.cache import Manifest
from embgemma.data.config import FEATURES, DataConfig
from embgemma.data.tasks import builtin_tasks
from embgemma.errors import ConfigError, DataError
from embgemma.losses.objective import EmbeddingMatching, Nce, Objective
from embgemma.training.partitioning import Partitioner
from embgemma.training.stages import EmbeddingStage

DATA = DataConfig(
  "pairs",
  dict.fromkeys(FEATURES, 16),
  builtin_tasks(),
  vocabulary_size=1000,
  teacher="t",
)
MATCHING = EmbeddingMatching(widths=(16,))


def objective(*terms) -> Objective:
  return Objective((Nce(widths=(16, 8)), *terms))


@pytest.fixture
def mesh():
  return Partitioner().mesh(jax.devices()[:2])


@pytest.fixture
def manifest(make_task, tmp_path):
  tasks = (make_task("first", 40, 1), make_task("second", 32, 2, seed=1))
  return Manifest(tasks, tmp_path / "tokenizer.model")


def source(stage, manifest, mesh, batch_size=16):
  return stage.source(manifest, mesh, batch_size, 0, 1024)


def test_distillation_without_a_teacher(config):
  data = dataclasses.replace(DATA, teacher=None)
  with pytest.raises(ConfigError, match="distillation term.*`embgemma teach`.*TEACHER"):
    EmbeddingStage(config, objective(MATCHING), data)
  assert EmbeddingStage(config, objective(), data)


def test_a_typical_batch_with_a_teacher_is_one_that_is_read(
  config, manifest, mesh, teach
):
  for task in manifest.tasks:
    teach(task, 24)
  matching = dataclasses.replace(MATCHING, teacher_width=24)
  stage = EmbeddingStage(config, objective(matching), DATA)
  batches = [source(stage, manifest, mesh).batch(step) for step in range(4)]
  assert {batch.task for batch in batches} == {"first", "second"}
  for batch in batches:
    negatives = batch.arrays.negative_mask.shape[1]
    assert batch.arrays.teacher.shape == (16 * (2 + negatives), 24)
    task = next(t for t in manifest.tasks if t.name == batch.task)
    lengths = np.asarray(task.lengths(), int)
    typical = stage.typical_batch(lengths, 16, 2, 1024).arrays
    names = ("slots", "negative_mask", "teacher", "teacher_mask")
    for name in names:
      ours, theirs = getattr(batch.arrays, name), getattr(typical, name)
      assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_without_a_teacher(config, manifest, mesh):
  stage = EmbeddingStage(config, objective(), dataclasses.replace(DATA, teacher=None))
  assert source(stage, manifest, mesh).batch(0).arrays.teacher is None
  assert stage.typical_batch(np.full((9, 3), 5), 8, 2, 1024).arrays.teacher is None
  assert source(stage, manifest, mesh).settings["teacher"] == []


def test_vectors_that_no_term_takes(config):
  with pytest.raises(ConfigError, match="TEACHER is 't', and the objective has no dis"):
    EmbeddingStage(config, objective(), DATA)


def test_a_run_resumes_with_the_same_teacher(config, manifest, mesh, teach):
  for task in manifest.tasks:
    teach(task, 24)
  stage = EmbeddingStage(config, objective(MATCHING), DATA)
  settings = source(stage, manifest, mesh).settings
  assert settings == {"avoid_duplicates": True, "teacher": ["random"]}


def test_a_task_that_was_not_taught(config, manifest, mesh, teach):
  teach(manifest.tasks[0], 24)
  stage = EmbeddingStage(config, objective(MATCHING), DATA)
  with pytest.raises(
    DataError, match=f"{manifest.tasks[1].directory}: .*embgemma teach"
  ):
    source(stage, manifest, mesh)


def test_vectors_that_are_gone_are_missed_before_the_first_step(
  config, manifest, mesh, teach
):
  for task in manifest.tasks:
    teach(task, 24)
  (manifest.tasks[1].directory / "t").rmtree()
  stage = EmbeddingStage(config, objective(MATCHING), DATA)
  with pytest.raises(DataError, match="cannot be used .*embgemma teach"):
    source(stage, manifest, mesh)


@pytest.mark.parametrize(
  ("term", "widths", "said"),
  [
    (MATCHING, (8, 8), "first 16 coordinates of the teacher, which has only 8"),
    (
      EmbeddingMatching(alignment="projection", teacher_width=32),
      (24, 24),
      "expects teacher vectors of width 32, but the run's have 24",
    ),
    (MATCHING, (24, 32), "task 'second' have width 32, those of task 'first' 24"),
  ],
)
def test_teachers_of_the_wrong_width(term, widths, said, config, manifest, mesh, teach):
  for task, width in zip(manifest.tasks, widths, strict=True):
    teach(task, width)
  stage = EmbeddingStage(config, objective(term), DATA)
  with pytest.raises(ConfigError, match=said):
    source(stage, manifest, mesh)


@pytest.mark.parametrize("avoid", [False, True])
def test_duplicates_are_counted_where_they_are_avoided(config, manifest, mesh, avoid):
  data = dataclasses.replace(DATA, avoid_duplicates=avoid, teacher=None)
  stage = EmbeddingStage(config, objective(), data)
  assert source(stage, manifest, mesh).batch(0).duplicates == (0 if avoid else None)
