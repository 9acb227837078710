import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec

from embgemma.errors import ConfigError
from embgemma.losses import contrastive, distillation, spread_out
from embgemma.losses.matryoshka import truncate
from embgemma.losses.objective import (
  EmbeddingMatching,
  Nce,
  Objective,
  PairBatch,
  SpreadOut,
)

KEY = jax.random.key(0)
DIAGNOSTICS = {
  "similarity/positive",
  "similarity/negative",
  "similarity/hard_negative",
  "accuracy",
}


@pytest.fixture
def make_batch(make_pairs):
  def make(size=6, negatives=2, width=768, teacher_width=None):
    pairs = make_pairs(seed=1, batch=size, negatives=negatives, width=width)
    if teacher_width is None:
      return PairBatch(**pairs)
    teacher = make_pairs(seed=2, batch=size, negatives=negatives, width=teacher_width)
    names = ("query", "positive", "negative")
    return PairBatch(**pairs, **{f"teacher_{name}": teacher[name] for name in names})

  return make


def test_the_papers_objective_is_the_weighted_sum_of_its_terms(make_batch):
  batch = make_batch(teacher_width=1024)
  terms = (Nce(weight=2.0), SpreadOut(weight=0.5), EmbeddingMatching(weight=3.0))
  loss, metrics = Objective(terms)(batch, {})

  widths = (768, 512, 256, 128)
  names = {f"{term}/{width}" for term in ("nce", "spread_out") for width in widths}
  assert metrics.keys() == {"loss", "embedding_matching/768"} | names | DIAGNOSTICS
  assert all(x.shape == () and x.dtype == np.float32 for x in metrics.values())
  total = sum(
    2.0 * float(metrics[f"nce/{width}"]) + 0.5 * float(metrics[f"spread_out/{width}"])
    for width in widths
  )
  total += 3.0 * float(metrics["embedding_matching/768"])
  np.testing.assert_allclose(loss, total, rtol=1e-6)
  assert metrics["loss"] == loss


def test_terms_are_the_losses_on_truncated_vectors(make_batch):
  batch = make_batch(teacher_width=1024)
  terms = (
    Nce(widths=(256,), temperature=0.1, hardness=2.0),
    SpreadOut(widths=(128,)),
    EmbeddingMatching(widths=(512,), metric="squared_l2"),
  )
  _, metrics = Objective(terms)(batch, {})

  names = [field.name for field in dataclasses.fields(contrastive.Rows)]
  rows = contrastive.Rows(**{name: getattr(batch, name) for name in names})
  expected, diagnostics = contrastive.nce(rows, (256,), temperature=0.1, hardness=2.0)
  assert metrics["nce/256"] == expected[256]
  assert {name: metrics[name] for name in DIAGNOSTICS} == diagnostics
  assert metrics["spread_out/128"] == spread_out.spread_out(
    truncate(batch.query, 128), truncate(batch.positive, 128)
  )
  matched = [
    distillation.embedding_matching(
      truncate(student, 512), teacher, metric="squared_l2"
    )
    for student, teacher in (
      (batch.query, batch.teacher_query),
      (batch.positive, batch.teacher_positive),
      (batch.negative, batch.teacher_negative),
    )
  ]
  np.testing.assert_allclose(metrics["embedding_matching/512"], sum(matched), rtol=1e-6)


def test_diagnostics_are_those_of_the_widest_contrastive_term(make_batch):
  batch = make_batch()
  _, alone = Objective((Nce(widths=(768,)),))(batch, {})
  terms = (
    Nce(widths=(128,), name="narrow"),
    Nce(widths=(256, 768), name="wide"),
    Nce(widths=(512,), name="middle"),
  )
  _, metrics = Objective(terms)(batch, {})
  for name in DIAGNOSTICS:
    assert metrics[name] == alone[name]
  assert {"narrow/128", "wide/256", "wide/768", "middle/512"} < metrics.keys()


def test_without_a_contrastive_term_there_are_no_diagnostics(make_batch):
  _, metrics = Objective((SpreadOut(widths=(128,)),))(make_batch(), {})
  assert metrics.keys() == {"loss", "spread_out/128"}


def test_missing_negatives_are_not_matched(make_batch):
  batch = make_batch(teacher_width=768)
  mask = np.array(batch.negative_mask)
  mask[:, 1] = False
  objective = Objective((EmbeddingMatching(),))
  missing, _ = objective(batch.replace(negative_mask=mask), {})
  fewer = batch.replace(
    negative=batch.negative[:, :1],
    negative_mask=batch.negative_mask[:, :1],
    teacher_negative=batch.teacher_negative[:, :1],
  )
  np.testing.assert_allclose(missing, objective(fewer, {})[0], rtol=1e-6)


def test_no_negatives_need_no_teacher(make_batch):
  batch = make_batch(negatives=0, teacher_width=768).replace(teacher_negative=None)
  loss, _ = Objective((EmbeddingMatching(),))(batch, {})
  expected = distillation.embedding_matching(batch.query, batch.teacher_query)
  expected += distillation.embedding_matching(batch.positive, batch.teacher_positive)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_projection_learns_one_kernel_a_width(make_batch):
  term = EmbeddingMatching(
    widths=(768, 128), alignment="projection", teacher_width=1024
  )
  objective = Objective((Nce(), term))
  params = objective.init(KEY, 768)
  kernels = params["embedding_matching"]
  assert params.keys() == {"embedding_matching"}
  shapes = {name: x.shape for name, x in meta.unbox(kernels).items()}
  assert shapes == {"kernel_768": (768, 1024), "kernel_128": (128, 1024)}
  specs = nn.get_partition_spec(kernels)
  assert set(specs.values()) == {PartitionSpec("embed", "teacher")}

  batch = make_batch(teacher_width=1024)
  boxed, metrics = objective(batch, params)
  unboxed = meta.unbox(params)
  assert boxed == objective(batch, unboxed)[0]
  kernel = unboxed["embedding_matching"]["kernel_128"]
  expected = sum(
    distillation.embedding_matching(
      truncate(student, 128), teacher, alignment="projection", kernel=kernel
    )
    for student, teacher in (
      (batch.query, batch.teacher_query),
      (batch.positive, batch.teacher_positive),
      (batch.negative, batch.teacher_negative),
    )
  )
  np.testing.assert_allclose(metrics["embedding_matching/128"], expected, rtol=1e-6)
  gradients = jax.grad(lambda p: objective(batch, p)[0])(unboxed)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


def test_nothing_to_learn_has_no_parameters():
  assert Objective((Nce(), SpreadOut(), EmbeddingMatching())).init(KEY, 768) == {}


def test_projection_without_its_parameters(make_batch):
  term = EmbeddingMatching(alignment="projection", teacher_width=1024)
  with pytest.raises(ConfigError, match="embedding_matching/kernel_768"):
    Objective((term,))(make_batch(teacher_width=1024), {})


def test_only_distillation_needs_a_teacher():
  assert not Objective((Nce(), SpreadOut())).needs_teacher
  assert Objective((Nce(), EmbeddingMatching())).needs_teacher


def test_a_batch_without_teacher_vectors(make_batch):
  objective = Objective((Nce(), EmbeddingMatching(name="from_gemini")))
  with pytest.raises(ConfigError, match=r"'from_gemini'.*'query'.*embgemma teach"):
    objective(make_batch(), {})
  batch = make_batch(teacher_width=768).replace(teacher_negative=None)
  with pytest.raises(ConfigError, match=r"'from_gemini'.*'negative'"):
    objective(batch, {})


@pytest.mark.parametrize(
  ("term", "said"),
  [
    (EmbeddingMatching(), "first 768 coordinates.*only 512"),
    (EmbeddingMatching(alignment="straight"), "width 768.*width 512"),
    (EmbeddingMatching(teacher_width=1024), "width 1024.*have 512"),
  ],
)
def test_a_teacher_of_the_wrong_width(make_batch, term, said):
  with pytest.raises(ConfigError, match=said):
    Objective((term,))(make_batch(teacher_width=512), {})


@pytest.mark.parametrize(
  ("build", "said"),
  [
    (lambda: Objective(()), "no terms"),
    (lambda: Objective((Nce(), Nce(widths=(64,)))), "2 terms named 'nce'"),
    (lambda: Nce(temperature=0.0), "'nce'.*temperature 0.0"),
    (lambda: EmbeddingMatching(metric="dot"), "metric 'dot'.*squared_l2"),
    (lambda: EmbeddingMatching(alignment="pad"), "alignment 'pad'.*prefix"),
    (lambda: EmbeddingMatching(alignment="projection"), "teacher_width"),
  ],
)
def test_settings_that_cannot_work(build, said):
  with pytest.raises(ConfigError, match=said):
    build()


@pytest.mark.parametrize(
  ("term", "said"),
  [
    (Nce(), "'nce'.*width 768"),
    (SpreadOut(widths=(128, 512)), "'spread_out'.*width 512"),
    (EmbeddingMatching(widths=(257,)), "'embedding_matching'.*width 257"),
    (EmbeddingMatching(teacher_width=128), "'embedding_matching'.*only 128"),
  ],
)
def test_no_width_is_dropped_in_silence(make_batch, term, said):
  objective = Objective((term,))
  for use in (
    lambda: objective.check(256),
    lambda: objective.init(KEY, 256),
    lambda: objective(make_batch(width=256, teacher_width=256), {}),
  ):
    with pytest.raises(ConfigError, match=said):
      use()


def test_lists_as_gin_gives_them_make_equal_hashable_objectives():
  lists = Objective([Nce(widths=[256, 128]), EmbeddingMatching(widths=[256])])
  tuples = Objective((Nce(widths=(256, 128)), EmbeddingMatching(widths=(256,))))
  assert lists == tuples
  assert hash(lists) == hash(tuples)


def test_eight_shards_are_one_batch(make_batch, on_one, on_eight, assert_close):
  batch = make_batch(size=32, width=256, teacher_width=384)
  mask = np.array(batch.negative_mask)
  mask[::3] = False
  hashes = np.array(batch.positive_hash)
  hashes[20] = hashes[1]
  batch = batch.replace(negative_mask=mask, positive_hash=hashes)
  widths = (256, 8)
  matching = EmbeddingMatching(widths=widths, alignment="projection", teacher_width=384)
  terms = (Nce(widths=widths), SpreadOut(weight=0.5, widths=widths), matching)
  objective = Objective(terms)
  params = meta.unbox(objective.init(KEY, 256))
  loss, metrics, gradients = on_eight(objective, batch, params)
  assert_close((loss, metrics, gradients), on_one(objective, batch, params))
  np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
  assert metrics.keys() > DIAGNOSTICS


def test_matrix_products_are_full_float32_where_the_hardware_has_less(make_batch):
  matching = EmbeddingMatching(alignment="projection", teacher_width=384)
  objective = Objective((Nce(widths=(32,)), SpreadOut(widths=(32, 2)), matching))
  batch = make_batch(width=32, teacher_width=384)
  params = meta.unbox(objective.init(KEY, 32))

  def loss(query, params):
    return objective(batch.replace(query=query), params)[0]

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  lines = gradient.lower(batch.query, params).as_text().splitlines()
  products = [line for line in lines if "dot_general" in line]
  assert products
  assert all("HIGHEST, HIGHEST" in line for line in products)
