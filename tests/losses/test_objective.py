import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from flax.core import meta
from jax.sharding import PartitionSpec
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

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
TAUGHT = "embedding_matching/taught"
ROLES = ("query", "positive", "negative")


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
  matching = {"embedding_matching/768", TAUGHT}
  assert metrics.keys() == {"loss"} | matching | names | DIAGNOSTICS
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


def distances(batch, role, metric):
  """Of each text to its teacher's prefix, float64."""
  student = np.asarray(getattr(batch, role), np.float64)
  teacher = np.asarray(getattr(batch, f"teacher_{role}"), np.float64)
  teacher = teacher[..., : student.shape[-1]]
  norm = np.linalg.norm(teacher, axis=-1, keepdims=True)
  teacher = teacher / np.where(norm > 0, norm, 1)
  squares = ((student - teacher) ** 2).sum(-1)
  return {"l2": np.sqrt(squares), "squared_l2": squares, "cosine": squares / 2}[metric]


def with_masks(batch, shares, dtype=np.float16):
  """Teacher vectors of a share of each role's texts, zeros elsewhere."""
  rng = np.random.default_rng(0)
  changed = {}
  for role, share in zip(ROLES, shares, strict=True):
    teacher = getattr(batch, f"teacher_{role}").astype(dtype)
    mask = rng.uniform(size=teacher.shape[:-1]) < share
    teacher[~mask] = 0
    changed |= {f"teacher_{role}": teacher, f"teacher_{role}_mask": mask}
  return batch.replace(**changed)


@pytest.mark.parametrize("metric", distillation.METRICS)
@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (0.6, 0.3, 0.5), (0.5, 0.0, 0.4)])
def test_the_mean_of_a_role_is_over_the_texts_with_a_teacher(
  make_batch, metric, shares
):
  """Against float64, with examples that lack a negative."""
  batch = with_masks(make_batch(size=20, teacher_width=1024), shares)
  missing = np.array(batch.negative_mask)
  missing[::3, 1] = False
  batch = batch.replace(negative_mask=missing)
  objective = Objective((EmbeddingMatching(metric=metric),))

  def loss(query, positive, negative):
    own = batch.replace(query=query, positive=positive, negative=negative)
    return objective(own, {})

  students = [getattr(batch, role) for role in ROLES]
  (value, metrics), gradients = jax.value_and_grad(
    loss, argnums=(0, 1, 2), has_aux=True
  )(*students)
  there = [np.ones(20, bool), np.ones(20, bool), missing]
  masks = [getattr(batch, f"teacher_{role}_mask") for role in ROLES]
  counted = [mask & own for mask, own in zip(masks, there, strict=True)]
  expected = sum(
    distances(batch, role, metric)[own].mean() if own.any() else 0.0
    for role, own in zip(ROLES, counted, strict=True)
  )
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  for gradient, own in zip(gradients, counted, strict=True):
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, own)
  share = sum(own.sum() for own in counted) / sum(own.sum() for own in there)
  np.testing.assert_allclose(metrics[TAUGHT], share, rtol=1e-6)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("metric", distillation.METRICS)
def test_a_batch_of_which_nothing_has_a_teacher_costs_nothing(
  make_batch, metric, negatives
):
  batch = with_masks(make_batch(negatives=negatives, teacher_width=768), (0, 0, 0))
  objective = Objective((EmbeddingMatching(metric=metric),))
  (loss, metrics), gradient = jax.value_and_grad(
    lambda query: objective(batch.replace(query=query), {}), has_aux=True
  )(batch.query)
  assert loss == metrics["embedding_matching/768"] == metrics[TAUGHT] == 0
  np.testing.assert_array_equal(gradient, np.zeros_like(batch.query))


@pytest.mark.parametrize(
  "roles", [("query",), ("query", "positive"), ("negative",), ROLES]
)
def test_roles_that_are_matched(make_batch, roles):
  batch = make_batch(teacher_width=768)
  objective = Objective((EmbeddingMatching(roles=roles),))
  others = {f"teacher_{role}": None for role in ROLES if role not in roles}
  loss, _ = objective(batch.replace(**others), {})
  expected = sum(distances(batch, role, "l2").mean() for role in roles)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine", "mse"])
@pytest.mark.parametrize("projected", [False, True])
def test_against_sentence_transformers(make_batch, metric, projected):
  """Its loss is the mean over roles of means, and its mse one over columns too."""
  width = 96 if projected else 64
  batch = make_batch(width=64, negatives=1, teacher_width=width)
  ours = EmbeddingMatching(
    metric="squared_l2" if metric == "mse" else metric,
    alignment="projection" if projected else "straight",
    teacher_width=width,
  )
  params = meta.unbox(Objective((ours,)).init(KEY, 64))
  theirs = EmbedDistillLoss(None, distance_metric=metric)
  if projected:
    theirs.projection = torch.nn.Linear(64, width, bias=False)
    kernel = np.array(params["embedding_matching"]["kernel_64"])
    theirs.projection.weight = torch.nn.Parameter(torch.tensor(kernel.T))
  columns = [
    [torch.tensor(np.reshape(getattr(batch, prefix + role), (6, -1))) for role in ROLES]
    for prefix in ("", "teacher_")
  ]
  expected = theirs.compute_loss_from_embeddings(*columns).item() * len(ROLES)
  if metric == "mse":
    expected *= width
  loss, _ = Objective((ours,))(batch, params)
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
    (lambda: EmbeddingMatching(roles=("query", "title")), "role 'title'.*negative"),
    (lambda: EmbeddingMatching(roles=()), "has roles .*; give some of query"),
    (lambda: EmbeddingMatching(roles=("query",) * 2), "has roles .*, each once"),
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


@pytest.mark.parametrize(
  ("term", "width", "said"),
  [
    (EmbeddingMatching(), 512, "first 768 coordinates.*only 512"),
    (EmbeddingMatching(alignment="straight"), 1024, "width 768.*width 1024"),
    (
      EmbeddingMatching(alignment="projection", teacher_width=1024),
      512,
      "width 1024.*have 512.*teacher_width.*embgemma teach",
    ),
  ],
)
def test_a_teacher_of_the_wrong_width_is_known_before_a_batch(term, width, said):
  objective = Objective((Nce(), term))
  objective.check(768)
  with pytest.raises(ConfigError, match=said):
    objective.check(768, width)


def test_the_teachers_width_as_far_as_it_is_known():
  assert Objective((Nce(), SpreadOut())).teacher_width(768) is None
  assert Objective((Nce(), EmbeddingMatching())).teacher_width(768) == 768
  assert Objective((EmbeddingMatching(widths=(256, 128)),)).teacher_width(768) == 256
  given = EmbeddingMatching(alignment="projection", teacher_width=3072, name="wide")
  assert Objective((EmbeddingMatching(), given)).teacher_width(768) == 3072


def test_lists_as_gin_gives_them_make_equal_hashable_objectives():
  lists = Objective(
    [Nce(widths=[256, 128]), EmbeddingMatching(widths=[256], roles=["query"])]
  )
  tuples = Objective(
    (Nce(widths=(256, 128)), EmbeddingMatching(widths=(256,), roles=("query",)))
  )
  assert lists == tuples
  assert hash(lists) == hash(tuples)


def test_eight_shards_are_one_batch(make_batch, on_one, on_eight, assert_close):
  batch = make_batch(size=32, width=256, teacher_width=384)
  mask = np.array(batch.negative_mask)
  mask[::3] = False
  hashes = np.array(batch.positive_hash)
  hashes[20] = hashes[1]
  batch = batch.replace(negative_mask=mask, positive_hash=hashes)
  batch = with_masks(batch, (0.7, 0.4, 0.5), np.float32)
  batch.teacher_query_mask[4:8] = False  # a shard with nothing to match
  widths = (256, 8)
  matching = EmbeddingMatching(widths=widths, alignment="projection", teacher_width=384)
  terms = (Nce(widths=widths), SpreadOut(weight=0.5, widths=widths), matching)
  objective = Objective(terms)
  params = meta.unbox(objective.init(KEY, 256))
  loss, metrics, gradients = on_eight(objective, batch, params)
  assert_close((loss, metrics, gradients), on_one(objective, batch, params))
  np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
  assert metrics.keys() > DIAGNOSTICS | {TAUGHT}


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


def test_gradients_term_by_term_are_those_of_the_sum(make_batch, assert_close):
  batch = make_batch(width=64, negatives=1, teacher_width=96)
  matching = EmbeddingMatching(
    weight=3.0, widths=(64, 16), alignment="projection", teacher_width=96
  )
  objective = Objective(
    (Nce(weight=2.0, widths=(64, 16)), SpreadOut(widths=(32,)), matching)
  )
  params = meta.unbox(objective.init(KEY, 64))
  vectors = np.concatenate([batch.query, batch.positive, batch.negative[:, 0]])

  def to_batch(vectors):
    query, positive, negative = np.split(np.arange(18), 3)
    return batch.replace(
      query=vectors[query],
      positive=vectors[positive],
      negative=vectors[negative][:, None],
    )

  def loss(vectors, params):
    return objective(to_batch(vectors), params)

  expected, metrics = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
    vectors, params
  )
  *found, with_norms = jax.jit(
    lambda vectors, params: objective.gradients(vectors, params, to_batch)
  )(vectors, params)
  assert_close(tuple(found), expected)
  norms = {name: with_norms.pop(name) for name in list(with_norms) if "norm" in name}
  assert_close(with_norms, metrics)

  def of_spread_out(vectors):
    parts = to_batch(vectors)
    return spread_out.spread_out(
      truncate(parts.query, 32), truncate(parts.positive, 32)
    )

  alone = np.asarray(jax.grad(of_spread_out)(vectors), np.float64)
  assert norms.keys() == {
    f"vector_gradient_norm/{name}"
    for name in ("nce", "spread_out", "embedding_matching")
  }
  np.testing.assert_allclose(
    norms["vector_gradient_norm/spread_out"], np.sqrt((alone**2).sum()), rtol=1e-5
  )
