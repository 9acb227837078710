import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from embgemma.errors import ConfigError
from embgemma.losses import distillation


def torch_distance(student, teacher, metric):
  if metric == "l2":
    return torch.linalg.vector_norm(student - teacher, dim=-1)
  if metric == "squared_l2":
    return ((student - teacher) ** 2).sum(-1)
  return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


def torch_align(student, teacher, alignment, kernel):
  if alignment == "prefix":
    cut = teacher[..., : student.shape[-1]]
    return student, torch.nn.functional.normalize(cut, dim=-1)
  if alignment == "projection":
    return student @ kernel, teacher
  return student, teacher


def arrays(alignment, shape=(5, 3)):
  rng = np.random.default_rng(0)
  teacher_width = 64 if alignment == "straight" else 96
  student = rng.normal(size=(*shape, 64))
  student /= np.linalg.norm(student, axis=-1, keepdims=True)
  teacher = rng.normal(size=(*shape, teacher_width))
  teacher /= np.linalg.norm(teacher, axis=-1, keepdims=True)
  kernel = rng.normal(size=(64, teacher_width)) / 8
  return [x.astype(np.float32) for x in (student, teacher, kernel)]


@pytest.mark.parametrize("metric", distillation.METRICS)
@pytest.mark.parametrize("alignment", distillation.ALIGNMENTS)
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient(metric, alignment, masked):
  student, teacher, kernel = arrays(alignment)
  mask = np.arange(15).reshape(5, 3) % 4 != 0 if masked else None

  def loss(student, kernel):
    return distillation.embedding_matching(
      student, teacher, mask, metric, alignment, kernel
    )

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(student, kernel)
  student, teacher, kernel = (
    torch.tensor(x, dtype=torch.float64) for x in (student, teacher, kernel)
  )
  student.requires_grad_()
  kernel.requires_grad_()
  pair = torch_align(student, teacher, alignment, kernel)
  distances = torch_distance(*pair, metric)
  expected = (distances[torch.tensor(mask)] if masked else distances).mean()
  expected.backward()

  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  exact = student.grad.numpy()
  assert np.linalg.norm(gradients[0] - exact) < 1e-5 * np.linalg.norm(exact)
  if alignment == "projection":
    exact = kernel.grad.numpy()
    assert np.linalg.norm(gradients[1] - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("metric", distillation.METRICS)
def test_zero_distance_has_zero_gradient(metric):
  student, *_ = arrays("straight")
  value, gradient = jax.value_and_grad(distillation.embedding_matching)(
    student, student, metric=metric, alignment="straight"
  )
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros_like(student))


def test_masked_vectors_have_no_effect():
  student, teacher, _ = arrays("prefix")
  mask = np.ones((5, 3), bool)
  mask[1] = False
  expected = distillation.embedding_matching(student, teacher, mask)
  teacher[1] = 0
  student[1] = 7
  value, gradient = jax.value_and_grad(distillation.embedding_matching)(
    student, teacher, mask
  )
  assert value == expected
  np.testing.assert_array_equal(gradient[1], 0)


def test_no_vectors_left_costs_nothing():
  student, teacher, _ = arrays("prefix")
  mask = np.zeros((5, 3), bool)
  value, gradient = jax.value_and_grad(distillation.embedding_matching)(
    student, teacher, mask
  )
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros_like(student))


@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_eight_shards_are_one_batch(on_one, on_eight, assert_close, kept):
  student, teacher, kernel = arrays("projection", shape=(16, 3))
  mask = np.random.default_rng(1).uniform(size=(16, 3)) < kept
  mask[2:4] = False  # a shard with nothing to match

  def loss(rows, kernel, axes):
    student, teacher, mask = rows
    matched = [
      distillation.embedding_matching(
        student, teacher, mask, alignment="projection", kernel=kernel, axes=axes
      )
      for mask in (mask, None)
    ]
    return matched[0] + 3 * matched[1], {}

  rows = (student, teacher, mask)
  assert_close(on_eight(loss, rows, kernel), on_one(loss, rows, kernel))


def test_stored_half_precision_is_computed_in_float32():
  student, teacher, _ = arrays("prefix")
  teacher = teacher.astype(np.float16)
  value = distillation.embedding_matching(student, teacher)
  assert value.dtype == jnp.float32
  assert value == distillation.embedding_matching(student, teacher.astype(np.float32))


@pytest.mark.parametrize(
  ("alignment", "width", "teacher_width", "remedy"),
  [
    ("straight", 768, 3072, "'prefix'"),
    ("straight", 768, 512, "'projection'"),
    ("prefix", 768, 512, "at most 512"),
  ],
)
def test_widths_that_cannot_be_aligned(alignment, width, teacher_width, remedy):
  with pytest.raises(ConfigError, match=f"'some_term'.*{teacher_width}.*{remedy}"):
    distillation.check_alignment("some_term", alignment, width, teacher_width)


@pytest.mark.parametrize(
  ("alignment", "teacher_width"),
  [("straight", 768), ("prefix", 768), ("prefix", 3072), ("projection", 384)],
)
def test_widths_that_can_be_aligned(alignment, teacher_width):
  distillation.check_alignment("some_term", alignment, 768, teacher_width)
