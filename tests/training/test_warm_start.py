"""Runs that start from other checkpoints: a decoder, then both stacks, an embedder."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointPolicy, CheckpointStore, Description
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.losses.denoising import Denoising
from embgemma.losses.objective import Nce, Objective
from embgemma.models import adaptation, extraction
from embgemma.models.config import (
  BackboneConfig,
  EmbedderConfig,
  LoraConfig,
  TransformerConfig,
)
from embgemma.training.learners import DenoisingLearner, EmbeddingLearner
from embgemma.training.optimizers import OptimizerConfig, Schedule
from embgemma.training.partitioning import Partitioner, manual_specs, place_batch
from embgemma.training.train_state import TrainState, abstract_state
from embgemma.training.train_step import TrainStep
from embgemma.training.warm_start import (
  Start,
  StartingPoint,
  find_start,
  is_adapted,
  keep_report,
  lineage,
  open_starting_points,
  state_from_checkpoints,
  training_alone,
)
from embgemma.typing import PackedSequences

# Compiling takes longer than the steps.
QUICK = {"xla_backend_optimization_level": 0}
STACK = TransformerConfig(
  vocab_size=64,
  num_layers=1,  # beside the scan over groups: half to compile
  width=16,
  mlp_width=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  attention_pattern=("local", "global"),
  window=(4, 4),
)
CAUSAL = dataclasses.replace(STACK, mask="causal", window=(7, 0))
DECODER = BackboneConfig(decoder=CAUSAL)
MERGED = BackboneConfig(STACK, CAUSAL)
SEPARATE = BackboneConfig(STACK, CAUSAL, cross_attention="separate", shared_table=False)
WIDE = dataclasses.replace(STACK, width=24)
UNBALANCED = dataclasses.replace(SEPARATE, encoder=WIDE)
EMBEDDER = extraction.embedder_config(MERGED, hidden_width=32)
ONE = Partitioner(data=1)
EIGHT = Partitioner(data=2, fsdp=4)
KEY = jax.random.key(3)
# Of one parameter: the whole step is traced and donates its state, little is compiled.
OPTIMIZER = OptimizerConfig(
  schedule=Schedule("constant", peak=0.01, warmup_steps=0),
  trainable=("decoder/final_norm",),
)


def flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def trained(folder: Any, words: str) -> SentencePieceVocabulary:
  return train_vocabulary([words], 420, folder / "tokenizer.model", sentinels=4)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  words = "some text to train a vocabulary on, and then some more of it"
  return trained(tmp_path_factory.mktemp("vocabulary"), words)


def random_params(config: Any, seed: int) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    adaptation.abstract_params(config),
  )


def write(folder: Any, config: Any, params: Any, vocabulary: Any) -> str:
  """An imported checkpoint."""
  description = Description(config, {"targets": 8}, {}, "an import")
  checkpoints.write_description(folder, description, vocabulary, "")
  checkpoints.write_weights(folder, params)
  return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, vocabulary):
  """A decoder-only run's path, and the averaged parameters that it ships."""
  folder = tmp_path_factory.mktemp("decoder")
  description = Description(DECODER, {"targets": 8}, {}, "a decoder")
  checkpoints.write_description(folder, description, vocabulary, "")
  store = CheckpointStore(folder, CheckpointPolicy())
  shipped = random_params(DECODER, 1)
  store.save(5, random_params(DECODER, 2), shipped, {"step": np.int32(5)}, {}, None)
  store.close()
  return str(folder), flat(shipped)


def assert_is_like(state: TrainState, abstract: TrainState) -> None:
  def check(leaf: Any, expected: jax.ShapeDtypeStruct) -> None:
    assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

  jax.tree.map(check, state, abstract)


def assert_no_buffer_twice(state: TrainState) -> None:
  """Or it could not be donated."""
  pointers = [
    (shard.device, shard.data.unsafe_buffer_pointer())
    for leaf in jax.tree.leaves(state)
    for shard in leaf.addressable_shards
  ]
  assert len(pointers) == len(set(pointers))


@dataclasses.dataclass
class Setup:
  """A run's functions."""

  config: Any
  partitioner: Partitioner = ONE
  optimizer: OptimizerConfig = OPTIMIZER

  def __post_init__(self):
    size = self.partitioner.data * self.partitioner.fsdp
    self.mesh = self.partitioner.mesh(jax.devices()[:size])
    if isinstance(self.config, EmbedderConfig):
      self.learner = EmbeddingLearner(self.config, Objective((Nce(widths=(16,)),)))
    else:
      self.learner = DenoisingLearner(self.config, Denoising())
    self.init, self.abstract = abstract_state(
      self.learner, self.optimizer, 1, True, self.partitioner, self.mesh
    )

  def new_params(self) -> dict[str, Any]:
    """Of a model of the same seed."""

    def new(key: jax.Array) -> Any:
      return nn.unbox(self.learner.init(key)["model"])

    return flat(jax.jit(new, compiler_options=QUICK)(KEY))

  def state_from(self, points: tuple[StartingPoint, ...]) -> TrainState:
    """Placed as a run's, averages included, and no buffer twice."""
    state = state_from_checkpoints(self.init, KEY, points, self.abstract, self.config)
    assert_is_like(state, self.abstract)
    assert_no_buffer_twice(state)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params["model"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert int(state.step) == 0
    return state

  def train(self, state: TrainState) -> tuple[TrainState, Any]:
    """The state, which is donated, after a step."""
    step = TrainStep(
      self.learner,
      self.optimizer.build(1),
      self.mesh,
      manual_specs(self.abstract.params, self.mesh),
      ema_decay=0.5,
      trainable=self.optimizer.trainable,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    run = jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(shardings, None),
      compiler_options=QUICK,
    )
    return run(state, place_batch(some_rows(), self.learner.batch_specs, self.mesh))


def some_rows() -> PackedSequences:
  """Eight rows of an example each."""
  ids = np.random.default_rng(0).integers(1, 64, (2, 1, 8, 6), dtype=np.int32)
  positions = np.tile(np.arange(6, dtype=np.int32), (1, 8, 1))
  one = np.ones_like(positions)
  return PackedSequences(
    inputs=ids[0],
    input_positions=positions,
    input_ids=one,
    targets=ids[1],
    decoder_inputs=ids[1],
    target_positions=positions,
    target_ids=one,
    weights=np.float32(one),
  )


def self_attention(path: str) -> str:
  """What stands in for a parameter of a decoder that reads an encoder."""
  return path.replace("cross_attention", "attention")


@pytest.mark.parametrize(
  ("config", "partitioner"),
  [(MERGED, ONE), (SEPARATE, EIGHT)],
  ids=["merged", "separate, sharded"],
)
def test_a_decoder_becomes_both_stacks(config, partitioner, decoder, vocabulary):
  path, shipped = decoder
  setup = Setup(config, partitioner)
  points = open_starting_points(path, None, config, vocabulary)
  state = setup.state_from(points)
  leaves = {k: np.array(x) for k, x in flat(state.params["model"]).items()}
  assert ("decoder/embedder/table" in leaves) != config.shared_table
  assert any("cross_attention/" in name for name in leaves) == (config is SEPARATE)
  for name, leaf in leaves.items():
    source = shipped[f"decoder/{self_attention(name.partition('/')[2])}"]
    np.testing.assert_array_equal(leaf, source, err_msg=name)
  if partitioner is EIGHT:
    table = state.params["model"]["encoder"]["embedder"]["table"]
    assert table.sharding.shard_shape(table.shape) == (16, 16)
  after, metrics = setup.train(state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert all(np.isfinite(value) for value in metrics.values())
  for name, leaf in flat(after.params["model"]).items():
    moved = name == "decoder/final_norm/scale"
    assert np.array_equal(leaf, leaves[name]) != moved, name


def test_an_embedder_starts_with_the_heads_of_a_new_one(vocabulary, tmp_path):
  """And with its adapters."""
  adapters = LoraConfig(rank=2, targets=("mlp/up$",))
  setup = Setup(dataclasses.replace(EMBEDDER, lora=adapters), EIGHT, OptimizerConfig())
  params = random_params(MERGED, 4)
  path, shipped = write(tmp_path, MERGED, params, vocabulary), flat(params)
  points = open_starting_points(path, None, setup.config, vocabulary)
  leaves = flat(setup.state_from(points).params["model"])
  fresh = setup.new_params()
  for name, leaf in leaves.items():
    if name in shipped:
      np.testing.assert_array_equal(leaf, shipped[name], err_msg=name)
    else:
      np.testing.assert_allclose(leaf, fresh[name], rtol=1e-6, err_msg=name)
  assert leaves.keys() - shipped.keys() == {
    "projection_up/kernel",
    "projection_down/kernel",
    "encoder/remainder/layer_0/mlp/up/lora_a",
    "encoder/remainder/layer_0/mlp/up/lora_b",
  }
  assert shipped.keys() - leaves.keys() == {n for n in shipped if n[:8] == "decoder/"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, vocabulary):
  """A wider encoder alone: its path and parameters."""
  config = BackboneConfig(encoder=WIDE)
  params = random_params(config, 5)
  path = write(tmp_path_factory.mktemp("encoder"), config, params, vocabulary)
  return path, flat(params)


def test_cross_attention_between_two_widths_is_random(
  encoder, decoder, vocabulary, tmp_path
):
  (encoder_path, of_encoder), (decoder_path, of_decoder) = encoder, decoder
  points, report = find_start(
    tmp_path, encoder_path, decoder_path, UNBALANCED, vocabulary
  )
  assert [point.path for point in points] == [encoder_path, decoder_path]
  setup = Setup(UNBALANCED)
  fresh = setup.new_params()
  leaves = flat(setup.state_from(points).params["model"])
  random = {name for name in leaves if "cross_attention" in name}
  assert len(random) == 8
  for name, leaf in leaves.items():
    if name in random:
      np.testing.assert_allclose(leaf, fresh[name], rtol=1e-6, err_msg=name)
    else:
      source = (of_encoder | of_decoder)[name]
      np.testing.assert_array_equal(leaf, source, err_msg=name)
  assert {name for name, x in report["sources"].items() if x == "random"} == random
  assert report["sources"].keys() == leaves.keys()
  patterns = training_alone(OptimizerConfig(), report).alone
  for prefix in ("", "model/"):
    assert random == {
      name for name in leaves if any(re.search(p, prefix + name) for p in patterns)
    }
  # The optimizer finds them too.
  Setup(UNBALANCED, ONE, OptimizerConfig(alone=patterns, alone_steps=1))


def test_a_run_keeps_the_report_of_its_start(decoder, vocabulary, tmp_path):
  start = functools.partial(
    find_start, tmp_path, decoder_path=None, config=SEPARATE, vocabulary=vocabulary
  )
  _, report = start(decoder[0])
  keep_report(tmp_path, report)
  # Until there is a checkpoint the run starts anew.
  assert len(start(decoder[0]).points) == 1
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  assert start("gone") == ((), report)
  (tmp_path / adaptation.REPORT_FILE).write_text("{")
  with pytest.raises(CheckpointError, match=f"{adaptation.REPORT_FILE}: damaged"):
    start(decoder[0])
  keep_report(tmp_path, None)  # a run that starts from nothing, in its place
  assert start(decoder[0]) == ((), None)


def test_what_is_balanced_has_nothing_to_train_alone(decoder, vocabulary, tmp_path):
  _, report = find_start(tmp_path, decoder[0], None, SEPARATE, vocabulary)
  assert training_alone(OptimizerConfig(), report).alone == ()
  assert find_start(tmp_path, None, None, SEPARATE, vocabulary) == ((), None)


def test_what_is_random_must_be_trained(decoder, vocabulary, tmp_path):
  config = dataclasses.replace(EMBEDDER, lora=LoraConfig(rank=2))
  _, report = find_start(tmp_path, decoder[0], None, config, vocabulary)
  for trainable in (None, ("projection_up", "lora_")):
    with pytest.raises(ConfigError, match="projection_down/kernel.* are random"):
      training_alone(OptimizerConfig(trainable=trainable), report)
  both = OptimizerConfig(trainable=("projection_", "lora_"))
  assert training_alone(both, report).alone
  assert training_alone(OptimizerConfig(alone=("lora_",), trainable=(".",)), report)


def test_an_embedder_with_adapters_may_be_a_start_too(vocabulary, tmp_path):
  config = dataclasses.replace(EMBEDDER, lora=LoraConfig(rank=2))
  params = random_params(config, 7)
  path = write(tmp_path / "embedder", config, params, vocabulary)
  points, report = find_start(tmp_path, path, None, MERGED, vocabulary)
  assert "random" not in report["sources"].values()
  leaves = flat(Setup(MERGED).state_from(points).params["model"])
  name = "remainder/layer_0/mlp/up/kernel"
  own = flat(params)[f"encoder/{name}"]
  up, down = (flat(params)[f"encoder/{name[:-6]}{x}"] for x in ("lora_a", "lora_b"))
  merged = own + config.lora.scale * up @ down
  for side in ("encoder", "decoder"):
    np.testing.assert_allclose(leaves[f"{side}/{name}"], merged, rtol=1e-5, atol=1e-5)


def test_another_vocabulary_is_refused(decoder, tmp_path):
  other = trained(tmp_path, "other words make other pieces of a vocabulary")
  path = decoder[0]
  remedy = f"set VOCABULARY = '{path}/tokenizer.model'"
  for config in (MERGED, DECODER, EMBEDDER):
    with pytest.raises(CheckpointError, match=f"another vocabulary.*{remedy}"):
      open_starting_points(path, None, config, other)


def test_a_decoders_path_needs_an_encoders(decoder, encoder, vocabulary):
  path = decoder[0]
  for own, config in (
    (None, MERGED),
    (path, EMBEDDER),
    (encoder[0], BackboneConfig(encoder=WIDE)),
  ):
    with pytest.raises(ConfigError, match=f"INITIAL_DECODER_CHECKPOINT_PATH {path}"):
      open_starting_points(own, path, config, vocabulary)


def test_a_step_may_be_named(decoder, vocabulary):
  path = decoder[0]
  (point,) = open_starting_points(f"{path}/checkpoints/5", None, MERGED, vocabulary)
  assert (str(point.directory), point.step, point.config) == (path, 5, DECODER)
  with pytest.raises(CheckpointError, match=r"no step 6; there are \[5\]"):
    open_starting_points(f"{path}/checkpoints/6", None, MERGED, vocabulary)


def test_only_an_embedder_of_an_embedder_is_not_adapted(tmp_path):
  def adapted(source: Any, target: Any) -> bool:
    return is_adapted((StartingPoint("a", tmp_path, 0, source, "one"),), target)

  assert not adapted(EMBEDDER, EMBEDDER)
  assert adapted(DECODER, EMBEDDER)
  assert adapted(EMBEDDER, DECODER)
  assert adapted(DECODER, DECODER)
  assert not is_adapted((), DECODER)


def test_lineage_of_random_parameters_is_their_seed():
  nothing = Start((), None)
  one = lineage(nothing, MERGED, 1)
  computed = dataclasses.replace(
    MERGED, encoder=dataclasses.replace(STACK, remat="full")
  )
  assert lineage(nothing, computed, 1) == one
  assert len({one, lineage(nothing, MERGED, 2), lineage(nothing, SEPARATE, 1)}) == 3


def test_lineage_of_an_embedder_is_kept(tmp_path):
  start = Start((StartingPoint("a", tmp_path, 3, EMBEDDER, "first"),), None)
  assert lineage(start, EMBEDDER, 1) == lineage(start, EMBEDDER, 2) == "first"
  unknown = Start((dataclasses.replace(start.points[0], lineage=""),), None)
  assert lineage(unknown, EMBEDDER, 1) == ""


def test_lineage_of_adapted_stacks(decoder, encoder, vocabulary, tmp_path):
  """The seed counts where something is random."""
  balanced = find_start(tmp_path, decoder[0], None, SEPARATE, vocabulary)
  kept = lineage(balanced, SEPARATE, 1)
  assert kept == lineage(balanced, SEPARATE, 2)
  drawn = find_start(tmp_path, encoder[0], decoder[0], UNBALANCED, vocabulary)
  assert len({kept, *(lineage(drawn, UNBALANCED, seed) for seed in (1, 2))}) == 3
