"""The chunked token loss against float64 numpy and optax on whole logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.errors import ConfigError
from embgemma.losses import denoising, global_batch
from embgemma.losses.denoising import Denoising, TokenLosses


def batch(seed: int, shape: tuple[int, ...], vocab: int, width: int) -> dict[str, Any]:
  """Hidden states, table, targets and weights; a third of the weights are 0."""
  rng = np.random.default_rng(seed)
  weights = rng.choice([0.0, 1.0, 0.25], shape)
  return {
    "hidden": rng.normal(size=(*shape, width)).astype(np.float32),
    "table": rng.normal(size=(vocab, width)).astype(np.float32),
    "targets": rng.integers(0, vocab, shape, dtype=np.int32),
    "weights": weights.astype(np.float32),
  }


def reference(batch: dict[str, Any], z_loss: float) -> tuple[TokenLosses, Any, Any]:
  """Sums and both gradients in float64, from whole logits."""
  table = np.asarray(batch["table"], np.float64)
  hidden = np.asarray(batch["hidden"], np.float64)
  flat = hidden.reshape(-1, table.shape[1])
  targets, weights = batch["targets"].ravel(), batch["weights"].ravel().astype(float)
  logits = flat @ table.T
  top = logits.max(-1, initial=-np.inf)
  log_z = top + np.log(np.exp(logits - top[:, None]).sum(-1))
  entropy = log_z - logits[np.arange(len(flat)), targets]
  sums = TokenLosses(
    weights @ (entropy + z_loss * log_z**2),
    weights @ entropy,
    weights @ (logits.argmax(-1) == targets),
    weights.sum(),
  )
  dlogits = np.exp(logits - log_z[:, None]) * (1 + 2 * z_loss * log_z[:, None])
  dlogits[np.arange(len(flat)), targets] -= 1
  dlogits *= weights[:, None]
  return sums, (dlogits @ table).reshape(hidden.shape), dlogits.T @ flat


@functools.cache
def differentiated(z_loss: float, chunk_tokens: int | None) -> Any:
  """Loss and sums, and the gradients by hidden states and table."""

  def loss(hidden, table, targets, weights):
    sums = denoising.cross_entropy(
      hidden, table, targets, weights, z_loss, chunk_tokens
    )
    return sums.loss, sums

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def check(values: dict[str, Any], z_loss: float, chunk_tokens: int | None) -> None:
  (_, sums), gradients = differentiated(z_loss, chunk_tokens)(*values.values())
  expected, *exact = reference(values, z_loss)
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
  for gradient, truth in zip(gradients, exact, strict=True):
    assert gradient.dtype == jnp.float32
    assert np.linalg.norm(gradient - truth) <= 1e-5 * np.linalg.norm(truth)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [None, 7, 20])
def test_sums_and_gradients_against_float64(chunk_tokens, z_loss):
  check(batch(0, (4, 10), 97, 24), z_loss, chunk_tokens)


def test_chunks_that_the_platform_chooses():
  values = batch(1, (600,), 4000, 8)
  program = differentiated(0.1, None).lower(*values.values()).compile().as_text()
  assert "300,4000" in program
  assert "600,4000" not in program
  check(values, 0.1, None)


@settings(max_examples=8)
@given(
  shape=st.sampled_from([(), (0,), (2, 3), (3, 1, 5)]),
  chunk_tokens=st.sampled_from([None, 1, 4, 16]),
  vocab=st.sampled_from([1, 33]),
  seed=st.integers(0, 99),
)
def test_any_shape_and_chunk(shape, chunk_tokens, vocab, seed):
  check(batch(seed, shape, vocab, 5), 0.01, chunk_tokens)


def test_values_and_gradients_against_optax():
  values = batch(2, (3, 14), 50, 16)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def whole(hidden, table):
    logits = jnp.einsum("...d,vd->...v", hidden, table)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, values["targets"])
    return jnp.sum(losses * values["weights"])

  arrays = values["hidden"], values["table"]
  expected, exact = whole(*arrays)
  (value, _), gradients = differentiated(0.0, 16)(*values.values())
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for gradient, truth in zip(gradients, exact, strict=True):
    np.testing.assert_allclose(gradient, truth, rtol=1e-4, atol=1e-5)


def test_bfloat16_products_accumulate_in_float32():
  values = batch(3, (40,), 97, 64)
  rounded = {"hidden": jnp.asarray(values["hidden"], jnp.bfloat16)}
  (_, sums), gradients = differentiated(1e-4, 16)(*(values | rounded).values())
  table = np.asarray(jnp.asarray(values["table"], jnp.bfloat16))
  expected, *exact = reference(values | rounded | {"table": table}, 1e-4)
  np.testing.assert_allclose(sums, expected, rtol=1e-5)
  assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]
  for gradient, truth in zip(gradients, exact, strict=True):
    error = np.linalg.norm(np.asarray(gradient, np.float64) - truth)
    assert error < 5e-3 * np.linalg.norm(truth)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_without_weight_a_token_may_hold_anything(chunk_tokens):
  values = batch(4, (12,), 31, 8)
  bad = np.flatnonzero(values["weights"] == 0)
  assert 0 < len(bad) < 12
  expected = differentiated(0.1, chunk_tokens)(*values.values())
  values["hidden"][bad[0]] = np.nan
  values["hidden"][bad[1:]] = np.inf
  values["targets"][bad] = 31
  actual = differentiated(0.1, chunk_tokens)(*values.values())
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert not np.any(actual[1][0][bad])


def test_an_unknown_target_is_no_number():
  values = batch(5, (6,), 31, 8)
  values["targets"][np.flatnonzero(values["weights"])[0]] = 31
  (loss, _), _ = differentiated(0.1, None)(*values.values())
  assert np.isnan(loss)


def test_a_target_is_correct_where_no_token_is_likelier():
  hidden = jnp.eye(3)
  table = np.array([[2, 0, 1], [2, 1, 0]], np.float32)
  targets, weights = np.array([0, 0, 1]), np.array([1, 0.5, 0.25], np.float32)
  assert denoising.cross_entropy(hidden, table, targets, weights).correct == 1
  sums = denoising.cross_entropy(hidden, table, 1 - targets, weights)
  assert sums.correct == 1.75


def test_products_are_three_and_none_is_made_in_vain():
  values = batch(6, (32,), 16, 8)
  arrays = values.pop("hidden"), values.pop("table")

  def loss(hidden, table):
    return denoising.cross_entropy(hidden, table, **values, chunk_tokens=8).loss

  def products(function: Any) -> int:
    return str(jax.make_jaxpr(function)(*arrays)).count("dot_general[")

  assert products(loss) == 1
  assert products(jax.grad(loss, 0)) == 2
  assert products(jax.grad(loss, 1)) == 2
  assert products(jax.grad(loss, (0, 1))) == 3
  np.testing.assert_array_equal(
    jax.grad(loss, 0)(*arrays), jax.grad(loss, (0, 1))(*arrays)[0]
  )


def test_only_the_loss_has_a_gradient():
  values = batch(7, (8,), 16, 8)

  def others(hidden):
    sums = denoising.cross_entropy(**values | {"hidden": hidden}, z_loss=0.1)
    return sums.cross_entropy + sums.correct + sums.weight

  np.testing.assert_array_equal(jax.grad(others)(jnp.asarray(values["hidden"])), 0)


def test_gradients_follow_the_scale_of_the_loss():
  values = batch(8, (8,), 16, 8)
  _, *exact = reference(values, 0.0)

  def loss(hidden, table):
    return 3 * denoising.cross_entropy(hidden, table, **values).loss

  arrays = values.pop("hidden"), values.pop("table")
  gradients = jax.grad(loss, (0, 1))(*arrays)
  for gradient, truth in zip(gradients, exact, strict=True):
    np.testing.assert_allclose(gradient, 3 * truth, rtol=1e-4, atol=1e-5)


def test_memory_stays_far_below_whole_logits():
  tokens, vocab, width = 2048, 8192, 32
  shapes = (
    jax.ShapeDtypeStruct((tokens, width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
    jax.ShapeDtypeStruct((tokens,), jnp.float32),
  )

  def temporary(chunk_tokens: int | None) -> int:  # metrics included
    compiled = differentiated(1e-4, chunk_tokens).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * tokens * vocab
  assert temporary(tokens) > logits
  assert temporary(None) < logits / 3
  assert temporary(128) < logits / 10


def test_eight_shards_are_one_batch(on_one, on_eight, assert_close):
  values = batch(9, (64, 72), 41, 16)  # more than a chunk on each
  table = values.pop("table")

  def loss(rows, table, axes):
    sums = denoising.cross_entropy(
      rows["hidden"], table, rows["targets"], rows["weights"], 0.01
    )
    whole = global_batch.total(jax.lax.stop_gradient(sums), axes)
    return sums.loss / whole.weight, Denoising.metrics(whole)

  eight = on_eight(loss, values, table)
  assert_close(eight, on_one(loss, values, table), 3e-6)
  expected, dhidden, _ = reference(values | {"table": table}, 0.01)
  assert_close(eight[0], expected.loss / expected.weight, 1e-5)
  assert_close(eight[2][0]["hidden"], dhidden / expected.weight, 1e-5)


def test_microbatches_in_a_scan_add_up():
  values = batch(10, (4, 6), 23, 8)
  table = values.pop("table")
  expected, _, dtable = reference(values | {"table": table}, 0.01)

  @jax.jit
  def summed(table, microbatches):
    def step(carry, rows):
      def loss(table):
        sums = denoising.cross_entropy(table=table, z_loss=0.01, chunk_tokens=4, **rows)
        return sums.loss, sums

      gradient, sums = jax.grad(loss, has_aux=True)(table)
      return jax.tree.map(jnp.add, carry, (sums, gradient)), None

    zeros = TokenLosses(*jnp.zeros(4)), jnp.zeros_like(table)
    return jax.lax.scan(step, zeros, microbatches)[0]

  sums, gradient = summed(table, values)
  np.testing.assert_allclose(sums, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, dtable, rtol=1e-4, atol=1e-5)


def test_metrics_are_means_over_targets():
  values = batch(11, (30,), 7, 8)
  values["hidden"] = jnp.asarray(values["hidden"])
  sums = Denoising(z_loss=0.5)(**values)
  expected, *_ = reference(values, 0.5)
  metrics = Denoising.metrics(sums)
  np.testing.assert_allclose(metrics["loss"], expected.loss / expected.weight, 1e-5)
  np.testing.assert_allclose(
    metrics["loss"], metrics["cross_entropy"] + metrics["z_loss"], 1e-6
  )
  assert metrics["accuracy"] == expected.correct / expected.weight
  assert metrics["targets"] == expected.weight
  values["weights"][:] = 0
  empty = Denoising.metrics(Denoising()(**values))
  assert set(map(float, empty.values())) == {0.0}


@pytest.mark.parametrize("z_loss", [-1e-4, float("inf"), float("nan")])
def test_an_impossible_z_loss_is_refused(z_loss):
  with pytest.raises(ConfigError, match=r"Denoising\.z_loss"):
    Denoising(z_loss=z_loss)
