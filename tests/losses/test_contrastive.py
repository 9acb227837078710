import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from embgemma.losses import contrastive
from embgemma.losses.matryoshka import truncate

WIDTHS = (768, 512, 256, 128)


def paper(batch: dict, temperature: float, hardness: float) -> tuple[float, dict]:
  """Equations 2-3 written out pair by pair, in float64."""
  arrays = {name: np.asarray(batch[name], np.float64) for name in EMBEDDINGS}
  q, p, n = arrays["query"], arrays["positive"], arrays["negative"]
  losses, in_batch, hard, correct = [], [], [], []
  for i in range(len(q)):
    positive = q[i] @ p[i]
    terms, others = [np.exp(positive / temperature)], []
    for j in range(len(q)):
      same_query = (batch["query_hash"][i] == batch["query_hash"][j]).all()
      same_positive = (batch["positive_hash"][i] == batch["positive_hash"][j]).all()
      if j == i or same_query or same_positive:
        continue
      others.append(q[i] @ p[j])
      in_batch.append(others[-1])
      terms.append(np.exp(others[-1] / temperature))
    for m in np.flatnonzero(batch["negative_mask"][i]):
      others.append(q[i] @ n[i, m])
      hard.append(others[-1])
      terms.append(np.exp(hardness * others[-1]) * np.exp(others[-1] / temperature))
    losses.append(np.log1p(sum(terms[1:]) / terms[0]))
    correct.append(all(positive >= other - 1e-6 for other in others))
  return np.mean(losses), {
    "similarity/positive": np.mean(np.sum(q * p, axis=-1)),
    "similarity/negative": np.mean(in_batch) if in_batch else 0.0,
    "similarity/hard_negative": np.mean(hard) if hard else 0.0,
    "accuracy": np.mean(correct),
  }


def torch_nce(arrays, batch: dict, width: int, temperature: float, hardness: float):
  """The loss on normalized prefixes, for float64 autograd."""
  q, p, n = (torch.nn.functional.normalize(x[..., :width], dim=-1) for x in arrays)
  ids = [
    torch.tensor(batch[x].astype(np.int64)) for x in ("query_hash", "positive_hash")
  ]
  same = functools.reduce(
    torch.logical_or, [(x[:, None] == x[None]).all(-1) for x in ids]
  )
  same.fill_diagonal_(False)
  scores = (q @ p.T / temperature).masked_fill(same, -torch.inf)
  hard = torch.einsum("be,bme->bm", q, n)
  hard_logits = hard / temperature + hardness * hard.detach()
  mask = torch.tensor(batch["negative_mask"])
  logits = torch.cat([scores, hard_logits.masked_fill(~mask, -torch.inf)], dim=1)
  return torch.nn.functional.cross_entropy(logits, torch.arange(len(q)))


EMBEDDINGS = ("query", "positive", "negative")


@functools.partial(jax.jit, static_argnames=("width", "temperature", "hardness"))
def loss_at(batch: dict, width: int = 768, temperature=0.05, hardness=5.0):
  """(loss, diagnostics) and the gradients of the full-width embeddings."""

  def at(*arrays):
    rows = contrastive.Rows(**batch | dict(zip(EMBEDDINGS, arrays, strict=True)))
    losses, metrics = contrastive.nce(rows, (width,), temperature, hardness)
    return losses[width], metrics

  arrays = [batch[name] for name in EMBEDDINGS]
  return jax.value_and_grad(at, argnums=(0, 1, 2), has_aux=True)(*arrays)


def duplicate_queries(batch):
  batch["query_hash"][3] = batch["query_hash"][0]
  batch["query"][3] = batch["query"][0]


def duplicate_positives(batch):
  batch["positive_hash"][[4, 5]] = batch["positive_hash"][2]
  batch["positive"][[4, 5]] = batch["positive"][2]


def some_negatives_missing(batch):
  batch["negative_mask"][::2] = False
  batch["negative"][::2] = 0


def one_negative_of_each_missing(batch):
  batch["negative_mask"][:, 0] = False


def no_negatives(batch):
  batch["negative_mask"][:] = False
  batch["negative"][:] = 0


CHANGES = {
  "plain": lambda batch: None,
  "duplicate_queries": duplicate_queries,
  "duplicate_positives": duplicate_positives,
  "some_negatives_missing": some_negatives_missing,
  "no_negatives": no_negatives,
}


def assert_near(actual, expected):
  """Relative error below 1e-5, by the norm for arrays."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
  error = np.linalg.norm(actual - expected)
  assert error <= 1e-5 * np.linalg.norm(expected) + 1e-12


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_value_diagnostics_and_gradient(make_pairs, change, negatives):
  batch = make_pairs(seed=negatives, batch=9, negatives=negatives)
  CHANGES[change](batch)
  (loss, diagnostics), gradients = loss_at(batch)
  expected, expected_diagnostics = paper(batch, temperature=0.05, hardness=5.0)
  assert_near(loss, expected)
  assert diagnostics.keys() == expected_diagnostics.keys()
  for name, value in expected_diagnostics.items():
    assert_near(diagnostics[name], value)

  arrays = [
    torch.tensor(batch[name], dtype=torch.float64, requires_grad=True)
    for name in EMBEDDINGS
  ]
  torch_nce(arrays, batch, 768, temperature=0.05, hardness=5.0).backward()
  for gradient, array in zip(gradients, arrays, strict=True):
    assert_near(gradient, array.grad.numpy())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("temperature", "hardness"), [(0.02, 9.0), (0.05, 0.0)])
def test_every_width_in_value_and_gradient(make_pairs, width, temperature, hardness):
  batch = make_pairs(seed=width, batch=8, negatives=2)
  one_negative_of_each_missing(batch)
  (loss, _), gradients = loss_at(batch, width, temperature, hardness)
  arrays = [
    torch.tensor(batch[name], dtype=torch.float64, requires_grad=True)
    for name in EMBEDDINGS
  ]
  expected = torch_nce(arrays, batch, width, temperature, hardness)
  expected.backward()
  assert_near(loss, expected.item())
  for gradient, array in zip(gradients, arrays, strict=True):
    assert_near(gradient, array.grad.numpy())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_duplicates_and_missing_negatives(make_pairs, data):
  size = data.draw(st.sampled_from([1, 2, 6]))
  negatives = data.draw(st.sampled_from([0, 1, 3]))
  batch = make_pairs(data.draw(st.integers(0, 99)), size, negatives, width=16)
  ids = st.lists(st.integers(0, 3), min_size=size, max_size=size)
  for name in ("query_hash", "positive_hash"):
    batch[name] = np.stack([data.draw(ids), data.draw(ids)], -1).astype(np.uint32)
  flags = st.lists(st.booleans(), min_size=size * negatives, max_size=size * negatives)
  batch["negative_mask"] = np.array(data.draw(flags), bool).reshape(size, negatives)
  (loss, diagnostics), gradients = loss_at(batch, width=16)
  # Embeddings that share a hash differ here: the mask goes by text, not by vector.
  batch |= {name: np.asarray(truncate(batch[name], 16)) for name in EMBEDDINGS}
  expected, expected_diagnostics = paper(batch, temperature=0.05, hardness=5.0)
  np.testing.assert_allclose(loss, expected, rtol=2e-5)
  for name, value in expected_diagnostics.items():
    np.testing.assert_allclose(diagnostics[name], value, rtol=1e-5, atol=1e-6)
  assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("size", [1, 5])
def test_nothing_to_contrast_costs_nothing(make_pairs, size, negatives):
  batch = make_pairs(seed=0, batch=size, negatives=negatives)
  batch["query_hash"][:] = 7
  no_negatives(batch)
  (loss, diagnostics), gradients = loss_at(batch)
  assert loss == 0
  assert diagnostics["accuracy"] == 1
  assert diagnostics["similarity/negative"] == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_all_texts_the_same_still_contrasts_hard_negatives(make_pairs):
  batch = make_pairs(seed=1, batch=4, negatives=1)
  batch["positive_hash"][:] = 7
  (loss, _), _ = loss_at(batch)
  assert_near(loss, paper(batch, temperature=0.05, hardness=5.0)[0])


def test_missing_negative_has_no_effect_whatever_its_vector(make_pairs):
  batch = make_pairs(seed=2, batch=4, negatives=2)
  some_negatives_missing(batch)
  zeros = loss_at(batch)
  batch["negative"][::2] = 1e3
  (loss, diagnostics), gradients = loss_at(batch)
  jax.tree.map(np.testing.assert_array_equal, (loss, diagnostics), zeros[0])
  np.testing.assert_array_equal(gradients[2][::2], 0)


def test_negatives_of_other_queries_take_no_part(make_pairs):
  batch = make_pairs(seed=3, batch=3, negatives=1)
  rows = [np.array([0]), np.array([1, 2])]
  changed = {**batch, "negative": batch["negative"].copy()}
  changed["negative"][2] = batch["query"][2]
  first, second = (
    contrastive.score_rows(rows_of(b, rows[0]), candidates_of(b))
    for b in (batch, changed)
  )
  np.testing.assert_array_equal(first.loss, second.loss)
  others = contrastive.score_rows(rows_of(changed, rows[1]), candidates_of(changed))
  assert others.loss[1] > 5.0


def test_ties_are_correct_and_cost_log_two(make_pairs):
  # Many, because the two ways to compute a similarity need not round alike.
  for seed in range(20):
    batch = make_pairs(seed=seed, batch=2, negatives=0)
    batch["positive"][1] = batch["positive"][0]
    batch["query"][1] = batch["query"][0]
    (loss, diagnostics), _ = loss_at(batch)
    assert_near(loss, np.log(2))
    assert diagnostics["accuracy"] == 1


def test_accuracy_counts_rows_that_rank_a_negative_first(make_pairs):
  batch = make_pairs(seed=5, batch=4, negatives=1)
  batch["negative"][1, 0] = batch["query"][1]
  batch["positive"][2] = batch["query"][3]
  (_, diagnostics), _ = loss_at(batch)
  assert diagnostics["accuracy"] == 0.25  # 1 and 3 lose; 2's positive is 3's query


def rows_of(batch: dict, index: np.ndarray) -> contrastive.Rows:
  return contrastive.Rows(**{name: x[index] for name, x in batch.items()})


def candidates_of(batch: dict) -> contrastive.Candidates:
  names = ("positive", "query_hash", "positive_hash")
  return contrastive.Candidates(**{name: batch[name] for name in names})


def score(rows, params, axes, **options):
  """The sum over widths, so that one gradient is that of them all."""
  shares, metrics = contrastive.nce(
    contrastive.Rows(**rows), (32, 8), axes=axes, **options
  )
  return sum(shares.values()), metrics


# Five rows a shard of forty are blocks of two, two and one.
in_blocks_of_two = functools.partial(score, block_elements=2 * 40)


@pytest.mark.parametrize("rows_at_a_time", [1, 5, 12])
def test_blocks_of_rows_are_the_whole(make_pairs, on_one, assert_close, rows_at_a_time):
  batch = make_pairs(seed=7, batch=13, negatives=2, width=32)
  duplicate_queries(batch)
  some_negatives_missing(batch)
  blocks = functools.partial(score, block_elements=13 * rows_at_a_time + 1)
  assert_close(on_one(blocks, batch), on_one(score, batch))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("negatives", [0, 2])
def test_eight_shards_in_blocks_are_one_batch(
  make_pairs, on_one, on_eight, assert_close, change, negatives
):
  # Those that `CHANGES` makes equal are on the first two shards.
  batch = make_pairs(seed=8, batch=40, negatives=negatives, width=32)
  CHANGES[change](batch)
  loss, metrics, gradients = on_eight(in_blocks_of_two, batch)
  assert_close((loss, metrics, gradients), on_one(score, batch))

  arrays = [
    torch.tensor(batch[name], dtype=torch.float64, requires_grad=True)
    for name in EMBEDDINGS
  ]
  expected = sum(torch_nce(arrays, batch, width, 0.05, 5.0) for width in (32, 8))
  expected.backward()
  assert_near(loss, expected.item())
  for name, array in zip(EMBEDDINGS, arrays, strict=True):
    assert_near(gradients[0][name], array.grad.numpy())
  normalized = batch | {
    name: np.asarray(truncate(batch[name], 32)) for name in EMBEDDINGS
  }
  _, diagnostics = paper(normalized, temperature=0.05, hardness=5.0)
  for name, value in diagnostics.items():
    assert_near(metrics[name], value)


@pytest.mark.parametrize("shards", [1, 8])
def test_the_largest_batch_holds_no_matrix_of_it(mesh, shards):
  size, width, f32 = 32_768, 64, jnp.float32
  rows = {
    "query": jax.ShapeDtypeStruct((size, width), f32),
    "positive": jax.ShapeDtypeStruct((size, width), f32),
    "negative": jax.ShapeDtypeStruct((size, 1, width), f32),
    "negative_mask": jax.ShapeDtypeStruct((size, 1), bool),
    "query_hash": jax.ShapeDtypeStruct((size, 2), jnp.uint32),
    "positive_hash": jax.ShapeDtypeStruct((size, 2), jnp.uint32),
  }
  axes = mesh.axis_names if shards > 1 else ()
  gradient = jax.grad(lambda *x: score(*x, (), axes)[0], allow_int=True)

  def step(rows):
    return {name: gradient(rows)[name] for name in EMBEDDINGS}

  if axes:
    spec = PartitionSpec(axes)
    step = jax.shard_map(
      step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
  memory = jax.jit(step).lower(rows).compile().memory_analysis()
  assert memory.temp_size_in_bytes < size * size / 8


def test_low_precision_inputs_are_computed_in_float32(make_pairs):
  batch = make_pairs(seed=9, batch=6, negatives=1)
  low = {**batch, **{x: jnp.asarray(batch[x], jnp.bfloat16) for x in EMBEDDINGS}}
  losses, diagnostics = contrastive.nce(contrastive.Rows(**low), (768,))
  loss = losses[768]
  rounded = {x: np.asarray(truncate(low[x], 768)) for x in EMBEDDINGS}
  assert loss.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in diagnostics.values())
  assert_near(loss, paper({**batch, **rounded}, temperature=0.05, hardness=5.0)[0])
