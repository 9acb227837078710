"""What tests of attention share."""

import functools

import jax
import jax.numpy as jnp
import pytest

from embgemma.models import attention
from embgemma.models.attention import Memory


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend_with_memory(
  config, kind, query, key, value, gradient, text_ids, memory_ids
):
  memory = Memory(jnp.zeros((*memory_ids.shape, 1)), memory_ids)
  if kind == "across":
    cross = attention.prepare_cross(config, text_ids, memory)
    compute = functools.partial(attention.attend_across, config, inputs=cross)
  else:
    inputs = attention.prepare(config, jnp.zeros_like(text_ids), text_ids, memory)
    compute = functools.partial(attention.attend, config, kind, inputs=inputs[kind])
  out, pull_back = jax.vjp(compute, query, key, value)
  return out, *pull_back(gradient)


@pytest.fixture(scope="session")
def attend_with_memory():
  """Result and gradients, jitted; of the kind "across" over the memory alone."""
  return _attend_with_memory
