"""What a batch of documents teaches does not depend on how it is laid out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from embgemma.data.denoising import Examples
from embgemma.data.sequence_packing import SequenceShape, lay_out, place
from embgemma.losses.denoising import Denoising
from embgemma.models import encoder_decoder
from embgemma.models.config import BackboneConfig, TransformerConfig
from embgemma.training.learners import DenoisingLearner, parameter_parts
from embgemma.training.optimizers import OptimizerConfig, Schedule
from embgemma.training.partitioning import Partitioner, manual_specs, place_batch
from embgemma.training.train_state import TrainState, abstract_state
from embgemma.training.train_step import TrainStep
from embgemma.typing import PackedSequences

# Compiling takes longer than the steps.
QUICK = {"xla_backend_optimization_level": 0}
OBJECTIVE = Denoising(z_loss=0.01)
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
DECODER = dataclasses.replace(STACK, mask="causal", window=(5, 0))
CONFIGS = {
  "merged": BackboneConfig(STACK, DECODER),
  "separate": BackboneConfig(
    dataclasses.replace(STACK, width=24),
    DECODER,
    cross_attention="separate",
    shared_table=False,
  ),
  "decoder alone": BackboneConfig(decoder=DECODER),
}
ONE = Partitioner(data=1)
EIGHT = Partitioner(data=4, fsdp=2)
CAPACITY = (14, 12)  # of a row: tokens of inputs and targets
BOS = 2


def flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


@functools.cache
def examples(has_inputs: bool) -> list[tuple[np.ndarray, np.ndarray]]:
  """Inputs and targets; their lengths differ, and so do the tokens of the shards."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 1 + np.array(CAPACITY), (24, 2)) * [has_inputs, 1]
  return [tuple(rng.integers(3, 64, n, dtype=np.int32) for n in own) for own in lengths]


def shifted(target: np.ndarray) -> np.ndarray:
  return np.concatenate([[BOS], target[:-1]]).astype(np.int32)


def weighted(sequences: PackedSequences) -> PackedSequences:
  """Some targets count nothing, as padding does, and some count half."""
  share = np.select(
    [sequences.targets % 5 == 0, sequences.targets % 5 == 1], [0, 0.5], 1
  )
  weights = (sequences.weights * share).astype(np.float32)
  return dataclasses.replace(sequences, weights=weights)


def packed(config: BackboneConfig, shards: int, rows: int) -> PackedSequences:
  """The examples in microbatches of `rows` rows of each shard."""
  has_inputs = config.encoder is not None
  pairs = examples(has_inputs)
  capacity = CAPACITY if has_inputs else (0, CAPACITY[1])
  sizes = np.array([[len(part) for part in pair] for pair in pairs])
  layouts = [lay_out(own, capacity) for own in np.split(sizes, shards)]
  microbatches = -(-max(layout.rows for layout in layouts) // rows)
  inputs, targets = zip(*pairs, strict=True)
  laid = Examples(
    inputs=np.concatenate(inputs),
    input_lengths=sizes[:, 0],
    targets=np.concatenate(targets),
    target_lengths=sizes[:, 1],
    decoder_inputs=np.concatenate([shifted(target) for target in targets]),
  )
  shape = SequenceShape(*capacity, microbatches, rows)
  return weighted(place(laid, layouts, shape))


def alone(config: BackboneConfig) -> PackedSequences:
  """Every example in a row of its own."""
  pairs = examples(config.encoder is not None)

  def side(texts: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack([np.pad(text, (0, size - len(text))) for text in texts])

  def places(texts: list[np.ndarray]) -> list[np.ndarray]:
    return [np.arange(len(text), dtype=np.int32) for text in texts]

  inputs, targets = (list(texts) for texts in zip(*pairs, strict=True))
  arrays = {
    "targets": side(targets, CAPACITY[1]),
    "decoder_inputs": side([shifted(target) for target in targets], CAPACITY[1]),
    "target_positions": side(places(targets), CAPACITY[1]),
    "target_ids": side([np.ones_like(x) for x in targets], CAPACITY[1]),
    "inputs": side(inputs, CAPACITY[0]),
    "input_positions": side(places(inputs), CAPACITY[0]),
    "input_ids": side([np.ones_like(x) for x in inputs], CAPACITY[0]),
  }
  if config.encoder is None:
    arrays |= dict.fromkeys(("inputs", "input_positions", "input_ids"))
  return weighted(PackedSequences(**arrays, weights=np.float32(arrays["target_ids"])))


@functools.cache
def random_params(config: BackboneConfig) -> Any:
  """Norms are drawn too: zeros would hide them."""
  rng = np.random.default_rng(1)
  drawn = {}
  for name, leaf in flat(encoder_decoder.abstract_params(config)).items():
    scale = 0.3 if name.endswith("/scale") else leaf.shape[-2] ** -0.5
    drawn[name] = (scale * rng.normal(size=leaf.shape)).astype(np.float32)
  return traverse_util.unflatten_dict(drawn, sep="/")


@functools.cache
def reference(name: str) -> tuple[Any, dict[str, Any]]:
  """Gradient and metrics of the mean over all targets, from whole logits."""
  config = CONFIGS[name]
  rows = alone(config)

  def loss(params):
    logits = encoder_decoder.logits(config, params, rows)

    def mean(values):
      return jnp.sum(values * rows.weights) / np.sum(rows.weights)

    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    entropy = mean(entropy)
    z_loss = OBJECTIVE.z_loss * mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    return entropy + z_loss, {
      "loss": entropy + z_loss,
      "cross_entropy": entropy,
      "z_loss": z_loss,
      "accuracy": mean(jnp.argmax(logits, axis=-1) == rows.targets),
      "targets": np.sum(rows.weights),
    }

  differentiate = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
  return jax.device_get(differentiate(random_params(config)))


@dataclasses.dataclass
class Setup:
  """A step on a mesh, and the random parameters there."""

  config: BackboneConfig
  partitioner: Partitioner = ONE
  trainable: tuple[str, ...] | None = None

  def __post_init__(self):
    self.shards = self.partitioner.data * self.partitioner.fsdp
    self.mesh = self.partitioner.mesh(jax.devices()[: self.shards])
    self.learner = DenoisingLearner(self.config, OBJECTIVE)
    optimizer = OptimizerConfig(
      schedule=Schedule("constant", peak=0.01, warmup_steps=0),
      trainable=self.trainable,
    )
    _, self.abstract = abstract_state(
      self.learner, optimizer, 1, True, self.partitioner, self.mesh
    )
    self.step = TrainStep(
      self.learner,
      optimizer.build(1),
      self.mesh,
      manual_specs(self.abstract.params, self.mesh),
      ema_decay=0.5,
      trainable=self.trainable,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.params["model"])
    model = jax.device_put(random_params(self.config), shardings)
    self.params = {"model": model, "objective": {}}
    self.differentiate = jax.jit(self.step.gradients, compiler_options=QUICK)

  def batch(self, rows: int) -> PackedSequences:
    return packed(self.config, self.shards, rows)

  def place(self, batch: PackedSequences) -> PackedSequences:
    return place_batch(batch, self.learner.batch_specs, self.mesh)

  def gradients(self, batch: PackedSequences, step: int = 0) -> tuple[Any, Any]:
    """Gradients of the model, and the metrics."""
    found, metrics = jax.device_get(
      self.differentiate(self.params, self.place(batch), jnp.int32(step))
    )
    assert found["objective"] == {}
    return found["model"], metrics

  def state(self) -> TrainState:
    """Before the first step."""
    moments = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract.opt_state
    )
    model = self.params["model"]
    return TrainState(jnp.int32(0), self.params, moments, model)


@functools.cache
def setup(name: str, partitioner: Partitioner) -> Setup:
  return Setup(CONFIGS[name], partitioner)


def assert_metrics(found: Any, expected: Any) -> None:
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(
  ("name", "partitioner", "rows", "microbatches"),
  [
    ("merged", EIGHT, 1, 3),
    ("separate", ONE, 4, 4),
    ("decoder alone", EIGHT, 1, 3),
  ],
)
def test_any_layout_teaches_the_same(name, partitioner, rows, microbatches):
  batch = setup(name, partitioner).batch(rows)
  assert batch.targets.shape[0] == microbatches
  assert batch.target_ids.max() > 1  # several examples in a row
  gradients, metrics = setup(name, partitioner).gradients(batch)
  expected, expected_metrics = reference(name)
  assert metrics.keys() == expected_metrics.keys()
  assert_metrics(metrics, expected_metrics)
  gradients, expected = flat(gradients), flat(expected)
  assert gradients.keys() == expected.keys()
  for path, leaf in expected.items():
    apart = np.linalg.norm(np.float64(gradients[path]) - leaf)
    assert apart < 1e-5 * np.linalg.norm(leaf), path


def test_what_is_frozen_stays_bit_for_bit():
  """Of a single microbatch. The table is frozen, on both of its sides."""
  own = Setup(CONFIGS["decoder alone"], trainable=("layer_0/attention/",))
  batch = own.batch(rows=24)
  assert len(batch.targets) == 1
  before = own.state()
  step = jax.jit(own.step, compiler_options=QUICK)
  after, metrics = jax.device_get(step(before, own.place(batch)))
  for old, new in (
    (before.params["model"], after.params["model"]),
    (before.ema, after.ema),
  ):
    new = flat(new)
    for path, value in flat(old).items():
      same = np.asarray(value).tobytes() == new[path].tobytes()
      assert same != ("layer_0/attention/" in path), path
  gradient, expected_metrics = reference("decoder alone")
  assert_metrics(metrics, expected_metrics)
  squares = [
    float(np.sum(np.float64(leaf) ** 2))
    for path, leaf in flat(gradient).items()
    if "layer_0/attention/" in path
  ]
  for name in ("gradient_norm", "gradient_norm/decoder"):
    assert float(metrics[name]) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
  assert not metrics.keys() & {"gradient_norm/table", "gradient_norm/encoder"}


def test_dropout_is_another_in_each_step_microbatch_and_shard():
  config = CONFIGS["decoder alone"]
  plain = setup("decoder alone", EIGHT)
  batch = plain.batch(rows=1)
  jax.tree.map(
    np.testing.assert_array_equal, plain.gradients(batch, 5), plain.gradients(batch, 0)
  )
  dropping = Setup(
    BackboneConfig(decoder=dataclasses.replace(config.decoder, dropout_rate=0.3)), EIGHT
  )
  first = dropping.gradients(batch)
  jax.tree.map(np.testing.assert_array_equal, dropping.gradients(batch), first)
  others = [
    plain.gradients(batch),
    dropping.gradients(batch, 1),
    # The same rows elsewhere: without dropout their gradients add up to the same.
    dropping.gradients(jax.tree.map(lambda x: x[::-1], batch)),
    dropping.gradients(jax.tree.map(lambda x: np.roll(x, 1, axis=1), batch)),
  ]
  for gradients, metrics in others:
    assert metrics["loss"] != first[1]["loss"]
    difference = jax.tree.map(np.subtract, gradients, first[0])
    assert optax.tree.norm(difference) > 0.1 * optax.tree.norm(first[0])


def test_parts_of_parameters():
  stack = {"groups": {"a": 1}, "final_norm": 2}
  with_table = {**stack, "embedder": {"table": 3}}
  shared = {"encoder": with_table, "decoder": stack}
  assert parameter_parts(shared) == {
    "table": {"encoder": {"table": 3}},
    "encoder": stack,
    "decoder": stack,
  }
  assert shared["encoder"] == with_table  # as it was
  assert parameter_parts({"decoder": with_table}) == {
    "table": {"decoder": {"table": 3}},
    "decoder": stack,
  }
  own = {"encoder": with_table, "decoder": with_table}
  assert parameter_parts(own)["table"] == {
    "encoder": {"table": 3},
    "decoder": {"table": 3},
  }
  heads = {"pooler": {"b": 4}, "projection_up": {"kernel": 5}}
  assert parameter_parts({"encoder": with_table, **heads}) == {
    "table": {"encoder": {"table": 3}},
    "encoder": stack,
    "heads": heads,
  }
  # Of a part that is trained.
  assert parameter_parts({"encoder": {"embedder": {"table": 3}}}) == {
    "table": {"encoder": {"table": 3}}
  }
