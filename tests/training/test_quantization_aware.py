"""Quantization-aware training: gradients are those of the rounded weights."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from embgemma.data.reader import Shards, StepSource
from embgemma.data.schedule import RecordSchedule
from embgemma.data.vocabularies import train_vocabulary
from embgemma.inference.embedder import TextEncoder
from embgemma.models import embedder, lora, quantization
from embgemma.models.config import LoraConfig
from embgemma.training import partitioning
from embgemma.training.learners import EmbeddingLearner
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import Partitioner, data_shards
from embgemma.training.train_state import abstract_state
from embgemma.training.train_step import TrainStep

QUICK = {"xla_backend_optimization_level": 0}
BATCH = 64
PRESETS = {
  "int8_block32": quantization.int8_block32(),
  "int4_block32": quantization.int4_block32(),
  "mixed_channel": quantization.mixed_channel(),
}


@pytest.fixture(scope="module")
def config(config):
  """Of whole blocks."""
  transformer = dataclasses.replace(
    config.transformer, num_layers=2, width=32, mlp_width=64, head_dim=16
  )
  return dataclasses.replace(
    config, transformer=transformer, hidden_width=64, embedding_width=32
  )


@pytest.fixture(scope="module")
def task(make_task):
  return make_task("pairs", examples=BATCH, negatives=1)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = ["some text to train a vocabulary on, and then some more of it"]
  return train_vocabulary(texts, 420, path, sentinels=4)


@pytest.fixture(scope="module")
def params(config):
  return jax.device_get(nn.unbox(embedder.init_params(config, jax.random.key(1))))


ONE = Partitioner(data=1)


def gradients(config, objective, task, params, partitioner=ONE, tokens=None):
  """Of one batch by the model's parameters, and the metrics."""
  devices = partitioner.data * partitioner.fsdp * partitioner.tensor
  mesh = partitioner.mesh(jax.devices()[:devices])
  learner = EmbeddingLearner(config, objective)
  _, abstract = abstract_state(learner, OptimizerConfig(), 1, False, partitioner, mesh)
  source = StepSource(
    RecordSchedule([task], BATCH, 0, config.transformer.vocab_size),
    Shards(data_shards(mesh)),
    tokens,
    row_lengths=(16,),
  )
  arrays = source.batch(0).arrays
  step = TrainStep(
    learner,
    OptimizerConfig().build(1),
    mesh,
    partitioning.manual_specs(abstract.params, mesh),
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params["model"])
  found, metrics = jax.jit(step.gradients, compiler_options=QUICK)(
    {"model": jax.device_put(params, shardings), "objective": {}},
    partitioning.place_batch(arrays, learner.batch_specs, mesh),
    np.int32(0),
  )
  return jax.device_get(found["model"]), jax.device_get(metrics)


def assert_alike(found, expected, tolerance=1e-5):
  def check(a, b):
    np.testing.assert_allclose(a, b, atol=tolerance * max(1e-3, np.abs(b).max()))

  jax.tree.map(check, found, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_step(preset, config, objective, task, params):
  rules = PRESETS[preset]
  quantized = dataclasses.replace(config, quantization=rules)
  found, metrics = gradients(quantized, objective, task, params)
  rounded = jax.device_get(jax.jit(lambda p: quantization.rounded(p, rules))(params))
  expected, plain = gradients(config, objective, task, rounded)
  assert_alike(found, expected)
  np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
  _, unrounded = gradients(config, objective, task, params)
  assert abs(metrics["loss"] - unrounded["loss"]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
  ("partitioner", "tokens"),
  [
    (ONE, 64),
    (Partitioner(data=2, fsdp=4), 32),
    (Partitioner(data=2, fsdp=2, tensor=2), 64),
  ],
)
def test_microbatches_and_devices(partitioner, tokens, config, objective, task, params):
  quantized = dataclasses.replace(config, quantization=PRESETS["int4_block32"])
  expected, plain = gradients(quantized, objective, task, params)
  found, metrics = gradients(quantized, objective, task, params, partitioner, tokens)
  assert_alike(found, expected)
  for name, value in plain.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_adapters_learn_through_the_merged_and_rounded_kernel(
  config, objective, task, params
):
  """By hand: dA = s dW B^T, dB = s A^T dW, where dW is of the rounded kernel."""
  adapters = LoraConfig(rank=2, targets=("attention/query$",))
  rules = PRESETS["int4_block32"]
  config = dataclasses.replace(config, lora=adapters, quantization=rules)
  boxed = embedder.init_params(config, jax.random.key(2))
  full = traverse_util.flatten_dict(jax.device_get(nn.unbox(boxed)))
  for path in full:
    if path[-1] == lora.B:
      full[path] = np.random.default_rng(0).normal(size=full[path].shape) * 0.1
      full[path] = full[path].astype(np.float32)
  nested = traverse_util.unflatten_dict(full)
  found, _ = gradients(config, objective, task, nested)

  plain = dataclasses.replace(config, lora=None, quantization=None)
  rounded = jax.device_get(jax.jit(lambda p: embedder.computed(p, config))(nested))
  of_kernels, _ = gradients(plain, objective, task, rounded)
  flat, of_kernels = map(traverse_util.flatten_dict, (found, of_kernels))
  checked = 0
  for path, gradient in flat.items():
    kernel = (*path[:-1], "kernel")
    if path[-1] == lora.A:
      b = full[*path[:-1], lora.B]
      expected = adapters.scale * of_kernels[kernel] @ np.swapaxes(b, -1, -2)
    elif path[-1] == lora.B:
      a = full[*path[:-1], lora.A]
      expected = adapters.scale * np.swapaxes(a, -1, -2) @ of_kernels[kernel]
    else:
      continue
    assert_alike(gradient, expected, 1e-4)
    checked += 1
  assert checked == 4  # two layers, one of each


def test_texts_are_embedded_with_rounded_weights(config, vocabulary):
  config = dataclasses.replace(
    config,
    transformer=dataclasses.replace(config.transformer, vocab_size=vocabulary.size),
  )
  params = jax.device_get(nn.unbox(embedder.init_params(config, jax.random.key(3))))
  texts = ["one text", "another one", "and a third"]
  rules = PRESETS["mixed_channel"]
  quantized = dataclasses.replace(config, quantization=rules)
  found = TextEncoder(quantized, vocabulary, 32).encode(params, texts)
  rounded = jax.jit(lambda p: quantization.rounded(p, rules))(params)
  expected = TextEncoder(config, vocabulary, 32).encode(rounded, texts)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  plain = TextEncoder(config, vocabulary, 32).encode(params, texts)
  assert np.abs(found - plain).max() > 1e-4
