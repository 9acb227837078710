import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from embgemma.errors import ConfigError
from embgemma.losses import matryoshka


@pytest.mark.parametrize("width", [768, 512, 256, 128, 2])
def test_truncate_is_the_normalized_prefix_in_value_and_gradient(width):
  rng = np.random.default_rng(width)
  x = rng.normal(size=(3, 2, 768)).astype(np.float32)
  cotangent = rng.normal(size=(3, 2, width)).astype(np.float32)
  actual, pullback = jax.vjp(lambda x: matryoshka.truncate(x, width), x)
  reference = torch.tensor(x, dtype=torch.float64, requires_grad=True)
  expected = torch.nn.functional.normalize(reference[..., :width], dim=-1)
  expected.backward(torch.tensor(cotangent, dtype=torch.float64))

  np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-5, atol=1e-7)
  scale = float(reference.grad.abs().max()) + 1e-6
  np.testing.assert_allclose(
    pullback(cotangent)[0], reference.grad.numpy(), rtol=1e-5, atol=1e-5 * scale
  )


def test_zero_prefix_stays_zero_with_zero_gradient():
  x = jnp.zeros((2, 8)).at[:, 6].set(1.0)
  value, gradient = jax.value_and_grad(lambda x: matryoshka.truncate(x, 4).sum())(x)
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros((2, 8)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_truncate_returns_float32(dtype):
  x = np.eye(2, 4).astype(dtype)
  assert matryoshka.truncate(x, 2).dtype == jnp.float32


@pytest.mark.parametrize(
  ("widths", "said"),
  [
    ((768, 1024), "width 1024"),
    ((0,), "width 0"),
    ((-1, 128), "width -1"),
    ((128.0,), "width 128.0"),
    ((128, 128), "more than once"),
    ((), "no widths"),
  ],
)
def test_unusable_widths_are_named(widths, said):
  with pytest.raises(ConfigError, match=f"'some_term'.*{said}"):
    matryoshka.check_widths("some_term", widths, 768)


def test_widths_from_one_to_the_full_width_are_usable():
  matryoshka.check_widths("some_term", [1, 768], 768)
