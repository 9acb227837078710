"""How many token slots a microbatch may have, from the memory of a device."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from embgemma.data.sequence_packing import SequenceShape, abstract_sequences
from embgemma.errors import ConfigError
from embgemma.losses.denoising import logits_bytes
from embgemma.models import embedder, encoder_decoder
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.models.embedder import CPU_TOKENS, Embedder
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


def bytes_per_slot(
  config: EmbedderConfig | BackboneConfig, row: tuple[int, ...]
) -> float:
  """Bytes of activations that the backward pass needs, for one slot of a row.

  What the backward pass keeps is read off the traced pullback; under remat it is
  also what one group of layers, computed again, keeps. The logits of documents come
  on top, a chunk at a time (`losses.denoising`).

  Args:
    config: Of the model; its `dtype`, `remat` and `attention` matter.
    row: Its tokens: of an embedder, of a decoder alone, or of encoder and decoder.
  """
  kept = _kept_bytes(config, row)
  stacks = [stack for stack in _stacks(config) if stack.remat != "none"]
  if stacks:
    groups = min(math.ceil(s.num_layers / len(s.attention_pattern)) for s in stacks)
    kept += _kept_bytes(_without_remat(config), row) / groups
  return kept * _WORKING_SHARE


def _stacks(config: EmbedderConfig | BackboneConfig) -> Sequence[TransformerConfig]:
  return (config.transformer,) if isinstance(config, EmbedderConfig) else config.stacks


def _without_remat(
  config: EmbedderConfig | BackboneConfig,
) -> EmbedderConfig | BackboneConfig:
  def plain(stack: TransformerConfig | None) -> Any:
    return stack and dataclasses.replace(stack, remat="none")

  if isinstance(config, EmbedderConfig):
    return dataclasses.replace(config, transformer=plain(config.transformer))
  return dataclasses.replace(
    config, encoder=plain(config.encoder), decoder=plain(config.decoder)
  )


@functools.cache  # tracing a large model takes seconds
def _kept_bytes(config: EmbedderConfig | BackboneConfig, row: tuple[int, ...]) -> float:
  def pullback(params: PyTree, batch: PyTree):
    if isinstance(config, EmbedderConfig):
      return jax.vjp(lambda p: Embedder(config).embed(p, batch), params)[1]
    return jax.vjp(lambda p: encoder_decoder.hidden_states(config, p, batch), params)[1]

  def size(rows: int) -> int:
    if isinstance(config, EmbedderConfig):
      params, batch = embedder.abstract_params(config), _abstract_texts(rows, row[0])
    else:
      inputs, targets = (0, *row)[-2:]
      shape = SequenceShape(inputs, targets, 1, rows)
      batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        abstract_sequences(shape, 1),
      )
      params = encoder_decoder.abstract_params(config)
    leaves = jax.tree.leaves(jax.eval_shape(pullback, params, batch))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

  # The difference: parameters among the kept arrays do not grow with rows.
  return (size(2 * _ROWS) - size(_ROWS)) / (_ROWS * sum(row))


def _abstract_texts(rows: int, length: int) -> PackedTexts:
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  slots = jax.ShapeDtypeStruct((rows,), jnp.int32)
  return PackedTexts(ids, ids, ids, slots, slots)


def microbatch_tokens(
  config: EmbedderConfig | BackboneConfig, row: tuple[int, ...], memory_bytes: float
) -> int:
  """The most token slots, whole rows of them, whose activations fit.

  Args:
    config: Of the model.
    row: Tokens of the longest rows, see `bytes_per_slot`.
    memory_bytes: For activations, of one device.

  Raises:
    ConfigError: not even one row fits.
  """
  of_row = bytes_per_slot(config, row) * sum(row)
  rows = int(memory_bytes / of_row)
  if rows < 1:
    raise ConfigError(
      f"a row of {sum(row)} tokens needs about {of_row / 2**20:,.0f} MiB of "
      f"activations, a device has {max(memory_bytes, 0) / 2**20:,.0f} MiB for them; "
      "set TransformerConfig.remat = 'full', shorten TASK_FEATURE_LENGTHS, or split "
      "the parameters over more devices (Partitioner.fsdp)"
    )
  return rows * sum(row)


def fitting_tokens(
  config: EmbedderConfig | BackboneConfig,
  row: tuple[int, ...],
  abstract: TrainState,
  device_bytes: int,
  trainable: Sequence[str] | None = None,
) -> int:
  """`microbatch_tokens` of a device that also holds its part of a training state.

  On CPU fewer, where that is faster.

  Args:
    config: Of the model.
    row: Tokens of the longest rows, see `bytes_per_slot`.
    abstract: The state's shapes and shardings.
    device_bytes: Memory of a device.
    trainable: See `OptimizerConfig.trainable`.
  """
  gradients = split_trainable(abstract.params, trainable)[0]
  held = bytes_per_device(abstract) + 4 * _elements(gradients)
  if any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(abstract)):
    held += 4 * _elements(abstract.params)  # gathered for the step
  if isinstance(config, BackboneConfig):
    decoder = _stacks(config)[-1]
    # Beside the sum of gradients those of a microbatch, and of its loss the table's.
    held += 4 * _elements(gradients) + 4 * decoder.vocab_size * decoder.width
    held += logits_bytes(decoder.vocab_size)
  elif config.quantization is not None:
    held += 8 * _elements(abstract.params)  # rounded, and gradients of what is rounded
  most = microbatch_tokens(config, row, _USABLE_SHARE * device_bytes - held)
  if abstract.step.sharding.mesh.devices.flat[0].platform != "cpu":
    return most
  quick = min(CPU_TOKENS, int(_CPU_BYTES / bytes_per_slot(config, row)))
  return min(most, max(quick, sum(row)))


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
