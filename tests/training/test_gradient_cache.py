"""Gradients of a batch do not depend on how it is cut, over microbatches or devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embgemma.data.reader import Shards, StepSource
from embgemma.data.schedule import RecordSchedule
from embgemma.losses.objective import EmbeddingMatching, Nce, Objective
from embgemma.models.config import LoraConfig
from embgemma.models.embedder import Embedder, abstract_params
from embgemma.training import partitioning
from embgemma.training.gradient_cache import embed_groups
from embgemma.training.learners import EmbeddingLearner, pair_batch
from embgemma.training.optimizers import OptimizerConfig, join, split_trainable
from embgemma.training.partitioning import Partitioner, data_shards
from embgemma.training.train_state import abstract_state
from embgemma.training.train_step import TrainStep
from embgemma.typing import PackedTexts

BATCH = 512
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def config(config):
  """Without the remainder of the scan, which doubles what there is to compile."""
  transformer = dataclasses.replace(config.transformer, num_layers=2)
  return dataclasses.replace(config, transformer=transformer)


@dataclasses.dataclass
class Computed:
  gradients: Any
  metrics: dict[str, float]
  microbatches: int


def compute(
  config,
  objective,
  task,
  partitioner,
  devices,
  microbatch_tokens=None,
  batch_size=BATCH,
  teachers=None,
):
  """Gradients and metrics of one batch on a mesh."""
  mesh = partitioner.mesh(devices)
  learner = EmbeddingLearner(config, objective)
  init, abstract = abstract_state(
    learner, OptimizerConfig(), 1, False, partitioner, mesh
  )
  source = StepSource(
    RecordSchedule([task], batch_size, 0, config.transformer.vocab_size),
    Shards(data_shards(mesh)),
    microbatch_tokens,
    row_lengths=(16,),  # short, so that a shard has rows for 32 microbatches
    teachers=teachers,
  )
  batch = source.batch(0)
  specs = partitioning.manual_specs(abstract.params, mesh)
  step = TrainStep(learner, OptimizerConfig().build(1), mesh, specs)
  state = init(jax.random.key(0))
  gradients, metrics = jax.jit(step.gradients, compiler_options=QUICK)(
    state.params,
    partitioning.place_batch(batch.arrays, learner.batch_specs, mesh),
    state.step,
  )
  microbatches = len(batch.arrays.groups[-1].tokens)
  return Computed(jax.device_get(gradients), jax.device_get(metrics), microbatches)


def relative_difference(ours, theirs) -> float:
  """Of two trees as vectors."""
  pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
  apart = sum(float(np.sum((np.float64(a) - b) ** 2)) for a, b in pairs)
  return (apart / sum(float(np.sum(np.float64(b) ** 2)) for _, b in pairs)) ** 0.5


@pytest.fixture(scope="module")
def task(make_task):
  return make_task("pairs", examples=BATCH, negatives=1)


@pytest.fixture(scope="module")
def whole(config, objective, task):
  """One microbatch on one device."""
  found = compute(config, objective, task, Partitioner(), jax.devices()[:1])
  assert found.microbatches == 1
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("microbatches", "data", "fsdp"),
  [(4, 1, 1), (32, 1, 1), (1, 8, 1), (32, 8, 1), (4, 2, 4)],
)
def test_microbatches_and_devices(
  microbatches, data, fsdp, config, objective, task, whole
):
  shards = data * fsdp
  tokens = int(task.statistics["tokens"] / shards / microbatches)
  found = compute(
    config,
    objective,
    task,
    Partitioner(data=data, fsdp=fsdp),
    jax.devices()[:shards],
    None if microbatches == 1 else tokens,
  )
  assert found.microbatches >= microbatches
  assert relative_difference(found.gradients, whole.gradients) < 1e-5
  for name, value in whole.metrics.items():
    np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_teacher_vectors_over_devices_and_microbatches(config, task, teach):
  """Each text is matched with its own vector, wherever either lies."""
  teacher = teach(task, 24)
  matching = EmbeddingMatching(alignment="projection", teacher_width=24)
  objective = Objective((Nce(widths=(16,), temperature=0.5), matching))
  options = {"batch_size": 64, "teachers": [teacher]}
  whole = compute(config, objective, task, Partitioner(), jax.devices()[:1], **options)
  split = Partitioner(data=4, fsdp=2)
  found = compute(config, objective, task, split, jax.devices(), 32, **options)
  assert found.microbatches > 1
  assert relative_difference(found.gradients, whole.gradients) < 1e-5
  assert whole.gradients["objective"]
  assert 0.7 < whole.metrics["embedding_matching/taught"] < 0.9
  for name, value in whole.metrics.items():
    np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5, err_msg=name)


def roles_loss(objective, vectors, pairs):
  return objective(pair_batch(vectors, pairs), {})[0]


@pytest.mark.parametrize("change", ["none", "lora", "remat", "dropout", "heads only"])
def test_against_differentiating_all_at_once(change, config, objective, task):
  """Autodiff of one function that embeds microbatch after microbatch."""
  transformer = config.transformer
  lora = trainable = key = None
  if change == "lora":
    lora = LoraConfig(rank=2)
  elif change == "remat":
    transformer = dataclasses.replace(transformer, remat="full")
  elif change == "dropout":
    transformer = dataclasses.replace(transformer, dropout_rate=0.3)
    key = jax.random.key(5)
  elif change == "heads only":
    trainable = ("projection_",)
  model = Embedder(dataclasses.replace(config, transformer=transformer, lora=lora))
  init, _ = abstract_state(
    EmbeddingLearner(model.config, objective),
    OptimizerConfig(trainable=trainable),
    1,
    False,
    Partitioner(),
    Partitioner().mesh(jax.devices()[:1]),
  )
  params = init(jax.random.key(0)).params
  if lora is not None:  # B starts at zero, where A has no gradient
    params = jax.tree.map(lambda x: x + 0.01, params)
  moving, still = split_trainable(params, trainable)
  source = StepSource(RecordSchedule([task], 64, 0, 64), microbatch_tokens=256)
  pairs = jax.device_put(source.batch(0).arrays)
  assert pairs.groups[-1].tokens.shape[0] > 1

  def cached(moving):
    vectors, pull = embed_groups(
      model, moving["model"], still.get("model", {}), pairs.groups, key
    )
    return pull(jax.grad(lambda v: roles_loss(objective, v, pairs))(vectors))

  def at_once(params):
    whole = join({"model": params, "objective": {}}, still)["model"]
    parts = []
    for index, group in enumerate(pairs.groups):
      for number in range(group.tokens.shape[0]):
        packed = jax.tree.map(lambda x, n=number: x[n], group)
        own = key
        if key is not None:
          own = jax.random.fold_in(jax.random.fold_in(key, index), number)
        parts.append(model.embed(whole, packed, None, own))
    return roles_loss(objective, jnp.concatenate(parts), pairs)

  ours = jax.jit(cached, compiler_options=QUICK)(moving)
  theirs = jax.jit(jax.grad(at_once), compiler_options=QUICK)(moving["model"])
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  assert relative_difference(ours, theirs) < 1e-5


def test_rows_of_one_shape_are_traced_once(config, monkeypatch):
  """However many steps have them, with whatever else: tracing is most of a start."""
  traced = []
  embed = Embedder.embed
  monkeypatch.setattr(
    Embedder, "embed", lambda *args: traced.append(args[2].tokens.shape) or embed(*args)
  )
  params = abstract_params(config)

  def shapes(*groups):
    rows = [jnp.zeros((k, r, length), jnp.int32) for k, r, length in groups]
    texts = [
      PackedTexts(tokens, tokens, tokens, *[jnp.zeros(tokens.shape[:2], int)] * 2)
      for tokens in rows
    ]

    def gradients(params):
      vectors, pull = embed_groups(Embedder(config), params, {}, texts)
      return pull(vectors)

    jax.eval_shape(gradients, params)

  shapes((1, 3, 16), (2, 3, 32))
  shapes((1, 3, 32), (1, 5, 16), (1, 3, 16))
  assert sorted(traced) == [(3, 16), (3, 32), (5, 16)]
