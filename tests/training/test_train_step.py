import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from embgemma.data.reader import Shards, StepSource
from embgemma.data.schedule import RecordSchedule
from embgemma.training import partitioning
from embgemma.training.learners import EmbeddingLearner
from embgemma.training.optimizers import OptimizerConfig, Schedule
from embgemma.training.partitioning import Partitioner, data_shards, place_batch
from embgemma.training.train_state import abstract_state
from embgemma.training.train_step import TrainStep, gradient_norms, make_train_step

STEPS = 3
BATCH = 16
# Compiling takes longer than the steps.
QUICK = {"xla_backend_optimization_level": 0}
# A large epsilon: with AdamW's own, the sign of a gradient that is only rounding
# noise moves a parameter by the whole rate.
OPTIMIZER = OptimizerConfig(
  schedule=Schedule("constant", peak=1e-2, warmup_steps=0), epsilon=1e-3
)


@pytest.fixture(scope="module")
def config(config):
  """Without the remainder of the scan, which doubles what there is to compile."""
  transformer = dataclasses.replace(config.transformer, num_layers=2)
  return dataclasses.replace(config, transformer=transformer)


@dataclasses.dataclass
class Trained:
  state: Any
  metrics: list[dict[str, float]]


def train(config, objective, task, partitioner, devices, ema_decay=0.9) -> Trained:
  mesh = partitioner.mesh(devices)
  learner = EmbeddingLearner(config, objective)
  init, abstract = abstract_state(
    learner, OPTIMIZER, STEPS, ema_decay is not None, partitioner, mesh
  )
  schedule = RecordSchedule([task], BATCH, 0, config.transformer.vocab_size)
  source = StepSource(schedule, Shards(data_shards(mesh)))
  step = make_train_step(learner, OPTIMIZER, STEPS, mesh, abstract, ema_decay)
  state = init(jax.random.key(0))
  metrics = []
  for number in range(STEPS):
    batch = source.batch(number)
    arrays = place_batch(batch.arrays, learner.batch_specs, mesh)
    state, values = step(state, arrays)
    metrics.append(jax.device_get(values))
  return Trained(jax.device_get(state), metrics)


@pytest.fixture(scope="module")
def one_device(config, objective):
  """The same run on one device, made once."""
  kept = {}

  def trained(task):
    if not kept:
      kept["run"] = train(config, objective, task, Partitioner(), jax.devices()[:1])
    return kept["run"]

  return trained


@pytest.mark.slow
@pytest.mark.parametrize(
  "partitioner",
  [
    Partitioner(data=8),
    Partitioner(data=1, fsdp=8),
    Partitioner(data=2, fsdp=2, tensor=2),
  ],
  ids=lambda p: f"data{p.data}_fsdp{p.fsdp}_tensor{p.tensor}",
)
def test_eight_devices_train_as_one_does(
  partitioner, config, objective, make_task, one_device
):
  task = make_task("pairs", examples=48, negatives=2)
  expected = one_device(task)
  found = train(config, objective, task, partitioner, jax.devices())
  for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours:
      np.testing.assert_allclose(
        ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name
      )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    found.state,
    expected.state,
  )
  assert int(found.state.step) == STEPS


def build_state(config, objective, keep_ema):
  partitioner = Partitioner()
  mesh = partitioner.mesh(jax.devices()[:1])
  learner = EmbeddingLearner(config, objective)
  return abstract_state(learner, OPTIMIZER, STEPS, keep_ema, partitioner, mesh)


@pytest.fixture(scope="module")
def state(config, objective):
  init, _ = build_state(config, objective, keep_ema=True)
  return init(jax.random.key(0))


def test_average_and_gradient_norms(config, objective, make_task, state):
  task = make_task("pairs", examples=16, negatives=1)
  schedule = RecordSchedule([task], BATCH, 0, config.transformer.vocab_size)
  source = StepSource(schedule)
  mesh = Partitioner().mesh(jax.devices()[:1])
  _, abstract = build_state(config, objective, keep_ema=True)
  learner = EmbeddingLearner(config, objective)
  pairs = place_batch(source.batch(0).arrays, learner.batch_specs, mesh)
  step = TrainStep(
    learner,
    OPTIMIZER.build(STEPS),
    mesh,
    partitioning.manual_specs(abstract.params, mesh),
    ema_decay=0.75,
  )
  new, metrics = jax.jit(step, compiler_options=QUICK)(state, pairs)

  jax.tree.map(
    lambda before, after, average: np.testing.assert_allclose(
      average, 0.75 * before + 0.25 * after, atol=1e-6
    ),
    state.params["model"],
    new.params["model"],
    new.ema,
  )
  gradients, _ = jax.jit(step.gradients, compiler_options=QUICK)(
    state.params, pairs, state.step
  )
  squares = {
    jax.tree_util.keystr(path, simple=True, separator="/"): float(
      np.sum(np.asarray(leaf, np.float64) ** 2)
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]
  }
  table = sum(v for k, v in squares.items() if k.startswith("model/encoder/embedder"))
  encoder = sum(v for k, v in squares.items() if k.startswith("model/encoder/"))
  everything = sum(squares.values())
  for name, square in (
    ("gradient_norm", everything),
    ("gradient_norm/table", table),
    ("gradient_norm/encoder", encoder - table),
    ("gradient_norm/heads", everything - encoder),
  ):
    assert square > 0
    assert float(metrics[name]) == pytest.approx(square**0.5, rel=1e-4), name
  assert gradient_norms(gradients).keys() < metrics.keys()


def test_without_average_inference_uses_the_parameters(config, objective):
  _, plain = build_state(config, objective, keep_ema=False)
  assert plain.ema is None
  assert plain.inference_params is plain.params["model"]
  _, averaged = build_state(config, objective, keep_ema=True)
  assert averaged.inference_params is averaged.ema


def test_a_donated_state_holds_no_buffer_twice(state):
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(pointers) == len(set(pointers))
