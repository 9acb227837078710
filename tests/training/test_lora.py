"""Runs that train a part of the model: adapters, or what patterns choose."""

import dataclasses
import functools

import jax
import jax.extend
import numpy as np
import pytest
from flax import traverse_util

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointPolicy, CheckpointStore, Description
from embgemma.data.reader import Shards, StepSource
from embgemma.data.schedule import RecordSchedule
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models import lora
from embgemma.models.config import LoraConfig
from embgemma.training import partitioning
from embgemma.training.learners import EmbeddingLearner
from embgemma.training.optimizers import (
  OptimizerConfig,
  Schedule,
  join,
  split_trainable,
)
from embgemma.training.partitioning import Partitioner, data_shards, place_batch
from embgemma.training.train_state import abstract_state, restored_state, save_state
from embgemma.training.train_step import TrainStep
from embgemma.training.warm_start import open_starting_points, state_from_checkpoints

STEPS = 3
BATCH = 16
# Compiling takes longer than the steps.
QUICK = {"xla_backend_optimization_level": 0}
OPTIMIZER = OptimizerConfig(
  schedule=Schedule("constant", peak=1e-2, warmup_steps=0), epsilon=1e-3
)
ONE_DEVICE = Partitioner(data=1)


@pytest.fixture(scope="module")
def config(config):
  """With adapters, and without the remainder of the scan: half to compile."""
  transformer = dataclasses.replace(config.transformer, num_layers=2)
  return dataclasses.replace(
    config, transformer=transformer, lora=LoraConfig(rank=2, alpha=3.0)
  )


def flat(tree) -> dict:
  return traverse_util.flatten_dict(tree, sep="/")


def is_adapter(name: str) -> bool:
  return name.endswith(("/lora_a", "/lora_b"))


@dataclasses.dataclass
class Setup:
  """A run's functions and its first state."""

  config: object
  objective: object
  optimizer: OptimizerConfig = OPTIMIZER
  ema_decay: float | None = None
  partitioner: Partitioner = ONE_DEVICE

  def __post_init__(self):
    count = 8 if self.partitioner.fsdp > 1 else 1
    self.mesh = self.partitioner.mesh(jax.devices()[:count])
    self.learner = EmbeddingLearner(self.config, self.objective)
    self.init, self.abstract = abstract_state(
      self.learner,
      self.optimizer,
      STEPS,
      self.ema_decay is not None,
      self.partitioner,
      self.mesh,
    )
    self.step = TrainStep(
      self.learner,
      self.optimizer.build(STEPS),
      self.mesh,
      partitioning.manual_specs(self.abstract.params, self.mesh),
      self.ema_decay,
      self.optimizer.trainable,
    )

  def state(self):
    return self.init(jax.random.key(0))

  def state_from(self, directory):
    vocabulary = checkpoints.read_vocabulary(directory)
    points = open_starting_points(str(directory), None, self.config, vocabulary)
    key = jax.random.key(0)
    return state_from_checkpoints(self.init, key, points, self.abstract, self.config)

  def batches(self, task):
    schedule = RecordSchedule([task], BATCH, 0, self.config.transformer.vocab_size)
    source = StepSource(schedule, Shards(data_shards(self.mesh)))
    specs = self.learner.batch_specs
    return [place_batch(source.batch(n).arrays, specs, self.mesh) for n in range(STEPS)]

  def train(self, task):
    """The first and the last state, on the host, and the metrics of the last step."""
    run = jax.jit(
      self.step,
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda x: x.sharding, self.abstract), None),
      compiler_options=QUICK,
    )
    state = self.state()
    first = jax.device_get(state)
    for pairs in self.batches(task):
      state, metrics = run(state, pairs)
    return first, jax.device_get(state), jax.device_get(metrics)


@pytest.fixture
def task(make_task):
  return make_task("pairs", examples=48, negatives=2)


@pytest.mark.parametrize("ema_decay", [None, 0.3])
def test_only_adapters_change(config, objective, task, ema_decay):
  # Decay alone would move them, too.
  optimizer = dataclasses.replace(OPTIMIZER, weight_decay=0.0)
  setup = Setup(config, objective, optimizer, ema_decay=ema_decay)
  first, last, metrics = setup.train(task)
  trees = [(first.params["model"], last.params["model"])]
  if ema_decay is not None:
    trees.append((first.ema, last.ema))
  for before, after in trees:
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    for name, value in before.items():
      assert np.array_equal(value, after[name]) != is_adapter(name), name
  assert metrics["gradient_norm/encoder"] > 0
  assert metrics["gradient_norm"] == metrics["gradient_norm/encoder"]
  assert not metrics.keys() & {"gradient_norm/table", "gradient_norm/heads"}


def test_the_optimizer_keeps_state_of_adapters_only(config, objective):
  abstract = Setup(config, objective).abstract
  adapters = {n: x for n, x in flat(abstract.params).items() if is_adapter(n)}
  assert len(adapters) == 2 * 7 * 2
  moments = next(s for s in abstract.opt_state if hasattr(s, "mu"))
  for moment in (moments.mu, moments.nu):
    found = flat({"model": moment["model"]})
    assert {n: x.shape for n, x in found.items()} == {
      n: x.shape for n, x in adapters.items()
    }
  # None of the other states holds an array of a parameter's size.
  for other in abstract.opt_state:
    if other is not moments:
      assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(other))


def computed_shapes(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of everything that a program computes, in its inner programs as well."""
  shapes = set()
  for equation in jaxpr.eqns:
    inner = list(jax.extend.core.jaxprs_in_params(equation.params))
    for sub in inner:
      shapes |= computed_shapes(sub)
    if not inner:
      shapes |= {tuple(variable.aval.shape) for variable in equation.outvars}
  return shapes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_frozen_parameters_are_not_computed(
  config, objective, task, remat
):
  # Sizes that no activation has.
  transformer = dataclasses.replace(
    config.transformer, vocab_size=67, mlp_width=37, remat=remat
  )
  config = dataclasses.replace(config, transformer=transformer)
  weights = {(67, 16), (16, 37), (37, 16), (1, 16, 37), (1, 37, 16)}

  def computed(optimizer):
    setup = Setup(config, objective, optimizer, ema_decay=0.5)
    pairs = setup.batches(task)[0]
    return computed_shapes(jax.make_jaxpr(setup.step)(setup.abstract, pairs).jaxpr)

  everything = dataclasses.replace(OPTIMIZER, trainable=(".",))
  assert {(67, 16), (1, 16, 37), (1, 37, 16)} <= computed(everything)
  shapes = computed(OPTIMIZER)
  assert (1, 2, 37) in shapes  # of an adapter
  assert not shapes & weights


def test_naming_everything_is_the_default(config, objective, task):
  config = dataclasses.replace(config, lora=None)
  everything = dataclasses.replace(OPTIMIZER, trainable=(".",))
  runs = [
    Setup(config, objective, optimizer, ema_decay=0.5).train(task)
    for optimizer in (OPTIMIZER, everything)
  ]
  jax.tree.map(np.testing.assert_array_equal, *runs)
  first, last, _ = runs[0]
  for name, value in flat(first.params["model"]).items():
    assert not np.array_equal(value, flat(last.params["model"])[name]), name


def test_patterns_choose_what_is_trained(config, objective, task):
  config = dataclasses.replace(config, lora=None)
  optimizer = dataclasses.replace(
    OPTIMIZER,
    trainable=["projection_", "layer_1/.*/kernel$"],
    rate_multipliers={"projection_up": 2.0},
  )
  first, last, metrics = Setup(config, objective, optimizer).train(task)
  changed = {
    name
    for name, value in flat(first.params["model"]).items()
    if not np.array_equal(value, flat(last.params["model"])[name])
  }
  assert changed == {
    name
    for name in flat(first.params["model"])
    if "projection_" in name or ("layer_1/" in name and name.endswith("/kernel"))
  }
  assert metrics.keys() >= {"gradient_norm/encoder", "gradient_norm/heads"}
  assert "gradient_norm/table" not in metrics


def test_splitting_and_joining():
  params = {
    "model": {"encoder": {"a": 1, "b": {"kernel": 2}}, "heads": {"kernel": 3}},
    "objective": {},
  }
  trainable, frozen = split_trainable(params, ["kernel$"])
  assert trainable == {
    "model": {"encoder": {"b": {"kernel": 2}}, "heads": {"kernel": 3}},
    "objective": {},
  }
  assert frozen == {"model": {"encoder": {"a": 1}}}
  assert join(trainable, frozen) == params
  assert split_trainable(params, None) == (params, {})
  learned = {**params, "objective": {"nce": {"scale": 4}}}
  assert split_trainable(learned, ["heads"])[0] == {
    "model": {"heads": {"kernel": 3}},
    "objective": {"nce": {"scale": 4}},
  }
  adapted = {"model": {"up": {"kernel": 1, "lora_a": 2, "lora_b": 3}}}
  assert split_trainable(adapted, None) == (
    {"model": {"up": {"lora_a": 2, "lora_b": 3}}},
    {"model": {"up": {"kernel": 1}}},
  )


def test_patterns_that_match_nothing(config, objective):
  optimizer = dataclasses.replace(OPTIMIZER, trainable=("lora_", "poler"))
  with pytest.raises(
    ConfigError, match=r"trainable: 'poler' matches no parameter of the model"
  ):
    Setup(config, objective, optimizer)
  # Frozen: a factor on its rate would do nothing.
  optimizer = dataclasses.replace(OPTIMIZER, rate_multipliers={"table": 2.0})
  with pytest.raises(ConfigError, match=r"\['table'\] match no parameter .* trained"):
    Setup(config, objective, optimizer)


def test_adapters_that_stay_as_they_are(config, objective):
  optimizer = dataclasses.replace(OPTIMIZER, trainable=("projection",))
  with pytest.raises(ConfigError, match="leaves every adapter as it is"):
    Setup(config, objective, optimizer)


def test_patterns_see_paths_of_the_model(config, objective):
  params = Setup(config, objective).abstract.params["model"]
  trainable, _ = split_trainable(
    {"model": params, "objective": {}}, ["^encoder/final_norm", "lora_a"]
  )
  assert "final_norm" in trainable["model"]["encoder"]
  assert "embedder" not in trainable["model"]["encoder"]


@pytest.mark.parametrize("trainable", [(), "lora", ("(",)])
def test_patterns_that_are_none(trainable):
  with pytest.raises(ConfigError, match=r"OptimizerConfig.trainable"):
    OptimizerConfig(trainable=trainable)


@pytest.mark.slow
def test_eight_devices_train_as_one_does(config, objective, task):
  _, expected, _ = Setup(config, objective, ema_decay=0.5).train(task)
  many = Setup(
    config,
    objective,
    ema_decay=0.5,
    partitioner=Partitioner(data=2, fsdp=2, tensor=2),
  )
  down = flat(many.abstract.params)["model/encoder/groups/layer_0/mlp/down/lora_a"]
  assert down.sharding.shard_shape(down.shape) == (1, 16, 2)
  _, found, _ = many.train(task)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
  )


def test_saving_and_restoring(config, objective, task, tmp_path):
  setup = Setup(config, objective, ema_decay=0.5)
  run = jax.jit(setup.step, compiler_options=QUICK)
  pairs = setup.batches(task)
  state, _ = run(setup.state(), pairs[0])
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save_state(store, state, 1, {"next_step": 1}, None)
  store.wait()
  restored = restored_state(store, 1, setup.abstract)
  store.close()
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  further, again = run(state, pairs[1])[0], run(restored, pairs[1])[0]
  jax.tree.map(np.testing.assert_array_equal, again, further)


@pytest.fixture(scope="module")
def write_checkpoint(tmp_path_factory):
  """Writes the state of a Setup, with its description."""
  directory = tmp_path_factory.mktemp("vocabulary")
  words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
  texts = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
  vocabulary = train_vocabulary(texts, 600, directory / "tokenizer.model")

  def write(directory, setup, state):
    description = Description(setup.config, {"query": 8}, {})
    checkpoints.write_description(directory, description, vocabulary, "")
    store = CheckpointStore(directory, CheckpointPolicy())
    save_state(store, state, 1, {"next_step": 1}, None)
    store.close()

  return write


def moved(state, amount: float):
  """The state with every parameter of the model shifted."""
  model = jax.tree.map(lambda x: x + amount, state.params["model"])
  return dataclasses.replace(state, params={**state.params, "model": model})


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_adapters_start_beside_a_base_model(
  config, objective, write_checkpoint, tmp_path, ema_decay
):
  base = Setup(dataclasses.replace(config, lora=None), objective)
  theirs = moved(base.state(), 0.5)
  write_checkpoint(tmp_path, base, theirs)
  setup = Setup(config, objective, ema_decay=ema_decay)
  fresh = setup.state()
  state = setup.state_from(tmp_path)
  kernels, adapters = lora.split(state.params["model"])
  equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  equal(kernels, theirs.params["model"])
  equal(adapters, lora.split(fresh.params["model"])[1])
  assert jax.tree.structure(state) == jax.tree.structure(setup.abstract)
  if ema_decay is not None:
    equal(state.ema, state.params["model"])
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(pointers) == len(set(pointers))  # or it could not be donated
  # The objective's parameters and the optimizer's state start as in any run.
  equal(state.params["objective"], fresh.params["objective"])
  equal(state.opt_state, fresh.opt_state)


def test_adapters_go_on_from_their_own_checkpoint(
  config, objective, write_checkpoint, tmp_path
):
  setup = Setup(config, objective)
  theirs = moved(setup.state(), 0.5)
  write_checkpoint(tmp_path, setup, theirs)
  state = setup.state_from(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal,
    state.params["model"],
    theirs.params["model"],
  )
  for adapters in (None, dataclasses.replace(config.lora, alpha=4.0)):
    other = Setup(dataclasses.replace(config, lora=adapters), objective)
    with pytest.raises(CheckpointError, match="has adapters.*alpha=3.0.*merge"):
      other.state_from(tmp_path)
