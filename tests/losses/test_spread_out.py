import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.losses import spread_out
from embgemma.losses.matryoshka import truncate


def direct(x: torch.Tensor) -> torch.Tensor:
  """The mean squared similarity of distinct rows, from the B x B similarities."""
  squares = (x @ x.T) ** 2
  pairs = len(x) * (len(x) - 1)
  return (squares.sum() - squares.diagonal().sum()) / max(pairs, 1)


@pytest.mark.parametrize("batch", [2, 127, 900])
@pytest.mark.parametrize("width", [768, 512, 256, 128])
def test_value_and_gradient_against_the_direct_form(make_pairs, batch, width):
  pairs = make_pairs(seed=batch, batch=batch, negatives=0)
  arrays = [pairs["query"], pairs["positive"]]

  def loss(query, positive):
    return spread_out.spread_out(truncate(query, width), truncate(positive, width))

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(*arrays)
  references = [
    torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays
  ]
  prefixes = [torch.nn.functional.normalize(x[:, :width], dim=-1) for x in references]
  expected = direct(prefixes[0]) + direct(prefixes[1])
  expected.backward()

  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  for gradient, reference in zip(gradients, references, strict=True):
    exact = reference.grad.numpy()
    assert np.linalg.norm(gradient - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("batch", [16, 32, 63, 64])
def test_evenest_spread_loses_no_digits(batch):
  noise = np.random.default_rng(batch).normal(size=(batch, 32))
  x = np.concatenate([np.eye(32), np.linalg.qr(noise[:32].T @ noise[:32])[0]])[:batch]
  x = (x + 1e-3 * noise).astype(np.float32)
  expected = direct(torch.tensor(x, dtype=torch.float64)).item()
  np.testing.assert_allclose(spread_out.second_moment(x), expected, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
  batch=st.sampled_from([1, 2, 3, 9]),
  width=st.sampled_from([1, 2, 4]),
  seed=st.integers(0, 99),
)
def test_any_shape(batch, width, seed):
  x = np.random.default_rng(seed).normal(size=(batch, width)).astype(np.float32)
  expected = direct(torch.tensor(x, dtype=torch.float64)).item()
  np.testing.assert_allclose(
    spread_out.second_moment(x), expected, rtol=1e-4, atol=1e-4
  )


def test_one_example_has_no_pairs(make_pairs):
  pairs = make_pairs(seed=0, batch=1, negatives=0)
  for width in (768, 1):
    query, positive = (x[:, :width] for x in (pairs["query"], pairs["positive"]))
    value, gradient = jax.value_and_grad(spread_out.spread_out)(query, positive)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(query))


def test_equal_vectors_cost_one_a_side():
  x = np.tile(np.eye(1, 8, dtype=np.float32), (5, 1))
  assert spread_out.spread_out(x, x) == 2


@pytest.mark.parametrize("width", [16, 128])  # one for each form
def test_eight_shards_are_one_batch(make_pairs, on_one, on_eight, assert_close, width):
  pairs = make_pairs(seed=1, batch=64, negatives=0, width=width)
  rows = {name: pairs[name] for name in ("query", "positive")}

  def loss(rows, params, axes):
    return spread_out.spread_out(rows["query"], rows["positive"], axes), {}

  eight = on_eight(loss, rows)
  assert_close(eight, on_one(loss, rows))
  references = {
    name: torch.tensor(x, dtype=torch.float64, requires_grad=True)
    for name, x in rows.items()
  }
  expected = sum(direct(x) for x in references.values())
  expected.backward()
  exact = {name: x.grad.numpy() for name, x in references.items()}
  assert_close((eight[0], eight[2][0]), (expected.item(), exact), 1e-5)
