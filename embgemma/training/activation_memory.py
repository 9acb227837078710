"""How many token slots a microbatch may have, from the memory of a device."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from embgemma.errors import ConfigError
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import CPU_TOKENS, Embedder, abstract_params
from embgemma.training.optimizers import split_trainable
from embgemma.training.partitioning import bytes_per_device
from embgemma.training.train_state import TrainState
from embgemma.typing import PackedTexts, PyTree

# What XLA needs beside the activations themselves: cotangents and copies in flight.
_WORKING_SHARE = 1.5
# Of a device's memory; the rest is the runtime's and lost between arrays.
_USABLE_SHARE = 0.9
# Of a CPU's microbatch: writing more new pages costs more than embedding twice
# (docs/performance.md).
_CPU_BYTES = 2**29
_ROWS = 8


def bytes_per_slot(config: EmbedderConfig, length: int) -> float:
  """Bytes of activations that the backward pass needs, for one slot of a row.

  What the backward pass keeps is read off the traced pullback; under remat it is
  also what one group of layers, computed again, keeps.

  Args:
    config: Of the model; its `dtype`, `remat` and `attention` matter.
    length: Of the row.
  """
  kept = _kept_bytes(config, length)
  transformer = config.transformer
  if transformer.remat != "none":
    plain = dataclasses.replace(transformer, remat="none")
    groups = math.ceil(plain.num_layers / len(plain.attention_pattern))
    again = _kept_bytes(dataclasses.replace(config, transformer=plain), length)
    kept += again / groups
  return kept * _WORKING_SHARE


@functools.cache  # tracing a large model takes seconds
def _kept_bytes(config: EmbedderConfig, length: int) -> float:
  def pullback(params: PyTree, packed: PackedTexts):
    return jax.vjp(lambda p: Embedder(config).embed(p, packed), params)[1]

  def size(rows: int) -> int:
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    slots = jax.ShapeDtypeStruct((rows,), jnp.int32)
    packed = PackedTexts(ids, ids, ids, slots, slots)
    leaves = jax.tree.leaves(jax.eval_shape(pullback, abstract_params(config), packed))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

  # The difference: parameters among the kept arrays do not grow with rows.
  return (size(2 * _ROWS) - size(_ROWS)) / (_ROWS * length)


def microbatch_tokens(
  config: EmbedderConfig, row_length: int, memory_bytes: float
) -> int:
  """The most token slots, whole rows of them, whose activations fit.

  Args:
    config: Of the model.
    row_length: The longest rows.
    memory_bytes: For activations, of one device.

  Raises:
    ConfigError: not even one row fits.
  """
  of_row = bytes_per_slot(config, row_length) * row_length
  rows = int(memory_bytes / of_row)
  if rows < 1:
    raise ConfigError(
      f"a row of {row_length} tokens needs about {of_row / 2**20:,.0f} MiB of "
      f"activations, a device has {max(memory_bytes, 0) / 2**20:,.0f} MiB for them; "
      "set TransformerConfig.remat = 'full', shorten TASK_FEATURE_LENGTHS, or split "
      "the parameters over more devices (Partitioner.fsdp)"
    )
  return rows * row_length


def fitting_tokens(
  config: EmbedderConfig,
  row_length: int,
  abstract: TrainState,
  device_bytes: int,
  trainable: Sequence[str] | None = None,
) -> int:
  """`microbatch_tokens` of a device that also holds its part of a training state.

  On CPU fewer, where that is faster.

  Args:
    config: Of the model.
    row_length: The longest rows.
    abstract: The state's shapes and shardings.
    device_bytes: Memory of a device.
    trainable: See `OptimizerConfig.trainable`.
  """
  gradients = split_trainable(abstract.params, trainable)[0]
  held = bytes_per_device(abstract) + 4 * _elements(gradients)
  if any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(abstract)):
    held += 4 * _elements(abstract.params)  # gathered for the step
  most = microbatch_tokens(config, row_length, _USABLE_SHARE * device_bytes - held)
  if abstract.step.sharding.mesh.devices.flat[0].platform != "cpu":
    return most
  quick = min(CPU_TOKENS, int(_CPU_BYTES / bytes_per_slot(config, row_length)))
  return min(most, max(quick, row_length))


def _elements(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def device_memory(mesh: Mesh) -> int:
  """Bytes of the mesh's smallest device of this process, which must exist.

  A CPU's are half of the machine's: it has other things to do.
  """
  return min(_memory(device) for device in mesh.local_devices)


def _memory(device: jax.Device) -> int:
  statistics = device.memory_stats()
  if statistics and "bytes_limit" in statistics:
    return statistics["bytes_limit"]
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return total // (2 * jax.local_device_count())
