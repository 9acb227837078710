"""Plans: dense rows, few shapes, the same on every shard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embgemma.data import packing, shape_plan
from embgemma.errors import DataError


def _lengths(seed, count, negatives=0, median=None):
  """Queries of about 15 tokens, documents of 100 to 250 or about the median."""
  rng = np.random.default_rng(seed)

  def documents():
    if median is None:
      return np.clip(rng.normal(175, 40, count).astype(int), 100, 250)
    return np.clip(rng.lognormal(np.log(median), 0.75, count).astype(int), 2, 1024)

  queries = np.clip(rng.lognormal(np.log(15), 0.5, count).astype(int), 3, 128)
  others = [documents() * (rng.random(count) < 0.8) for _ in range(negatives)]
  return np.stack([queries, documents(), *others], axis=1)


@pytest.mark.parametrize(
  ("batch_size", "num_shards", "microbatch_tokens", "negatives", "median"),
  [
    (128, 1, None, 0, None),
    (128, 1, None, 1, 60),
    (4096, 1, None, 0, None),
    (4096, 1, 8192, 1, None),
    (4096, 8, 8192, 0, None),
    (4096, 8, None, 0, 60),
    (4096, 8, None, 1, 300),
  ],
)
def test_dense_rows_of_few_shapes(
  batch_size, num_shards, microbatch_tokens, negatives, median
):
  examples = _lengths(0, 20_000, negatives, median)
  plan = shape_plan.plan_shapes(
    examples[:4096], batch_size, num_shards, microbatch_tokens
  )
  rng = np.random.default_rng(1)
  steps = 200 if batch_size < 1000 else 6
  real = slots = 0
  shapes = set()
  for _ in range(steps):
    lengths = examples[rng.integers(len(examples), size=batch_size)]
    shards = shape_plan.deal_examples(lengths, num_shards)
    found, _ = plan.lay_out([shape_plan.shard_texts(lengths[s]) for s in shards])
    shapes.add(found)
    real += lengths.sum()
    slots += num_shards * sum(shape.tokens for shape in found)
    for shape in found:
      if microbatch_tokens:
        assert shape.length * shape.rows <= microbatch_tokens
  assert real / slots >= 0.95
  assert len(shapes) <= 8
  # What is compiled ahead of a run is near what the run has.
  typical = num_shards * sum(shape.tokens for shape in plan.typical)
  assert typical == pytest.approx(slots / steps, rel=0.08)


@pytest.mark.parametrize(("batch_size", "num_shards"), [(128, 1), (512, 4)])
def test_one_shape_has_room_for_nearly_all_batches(batch_size, num_shards):
  examples = _lengths(0, 20_000, 1, 60)
  options = (examples[:4096], batch_size, num_shards)
  plans = {
    one: shape_plan.plan_shapes(*options, one_shape=one) for one in (True, False)
  }
  rng = np.random.default_rng(1)
  shapes, tokens = {True: [], False: []}, {True: 0, False: 0}
  for _ in range(100):
    lengths = examples[rng.integers(len(examples), size=batch_size)]
    shards = shape_plan.deal_examples(lengths, num_shards)
    texts = [shape_plan.shard_texts(lengths[shard]) for shard in shards]
    for one, plan in plans.items():
      laid_out, _ = plan.lay_out(texts)
      shapes[one].append(laid_out)
      tokens[one] += sum(shape.tokens for shape in laid_out)
  assert len(set(shapes[False])) > 1
  assert max(map(shapes[True].count, shapes[True])) >= 98
  assert tokens[True] < 1.25 * tokens[False]


def test_short_texts_get_short_rows():
  """Where they are many enough to fill rows of their own."""
  rng = np.random.default_rng(0)
  queries = rng.integers(20, 60, 4096)
  documents = np.where(rng.random(4096) < 0.9, queries[::-1], 1000)
  plan = shape_plan.plan_shapes(np.stack([queries, documents], axis=1), 2048)
  assert plan.length >= 1024
  short = sum(shape.tokens for shape in plan.short if shape.length <= 128)
  texts = queries.sum() + documents[documents < 1000].sum()
  assert short > 0.8 * texts / 2


def test_the_longest_text_there_may_be_has_room():
  lengths = np.full((64, 2), 40)
  assert shape_plan.plan_shapes(lengths, 16).length < 512
  assert shape_plan.plan_shapes(lengths, 16, longest=500).length >= 512
  with pytest.raises(DataError, match=r"40 tokens is longer .* \(32\)"):
    shape_plan.plan_shapes(lengths, 16, row_lengths=(16, 32))


_EXAMPLE = st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(0, 64))


@settings(max_examples=60)
@given(
  st.lists(_EXAMPLE, min_size=8, max_size=8).map(np.array),
  st.lists(_EXAMPLE, min_size=1, max_size=30).map(np.array),
  st.sampled_from([1, 2, 4]),
  st.sampled_from([None, 16, 64, 200]),
)
def test_every_text_has_one_place(batch, sample, num_shards, microbatch_tokens):
  """Whatever the plan was made for, the batch included that is quite unlike it."""
  ladder = (8, 16, 32, 64)
  plan = shape_plan.plan_shapes(sample, 8, num_shards, microbatch_tokens, ladder, 64)
  shards = [
    shape_plan.shard_texts(batch[shard])
    for shard in shape_plan.deal_examples(batch, num_shards)
  ]
  shapes, placements = plan.lay_out(shards)
  for lengths, placed in zip(shards, placements, strict=True):
    texts = np.concatenate([placement.texts for placement in placed])
    assert sorted(texts) == np.flatnonzero(lengths).tolist()
    for shape, placement in zip(shapes, placed, strict=True):
      taken = np.zeros((shape.microbatches * shape.rows, shape.length), int)
      for text, row, offset in zip(
        placement.texts, placement.row, placement.offset, strict=True
      ):
        assert offset + lengths[text] <= shape.length
        taken[row, offset : offset + lengths[text]] += 1
      assert taken.max(initial=0) <= 1
      assert len(set(placement.slot)) == len(placement.slot)
      assert (placement.slot < shape.vectors).all()
      batches = placement.slot // shape.slots
      np.testing.assert_array_equal(batches, placement.row // shape.rows)


@given(
  st.lists(_EXAMPLE, min_size=24, max_size=24).map(np.array),
  st.sampled_from([1, 2, 3, 8]),
)
def test_shards_have_like_numbers_of_tokens(lengths, num_shards):
  shards = shape_plan.deal_examples(lengths, num_shards)
  assert sorted(shards.ravel()) == list(range(24))
  assert (np.diff(shards, axis=1) > 0).all()
  sums = lengths.sum(axis=1)[shards].sum(axis=1)
  totals = lengths.sum(axis=1)
  assert sums.max() - sums.min() <= totals.max() - totals.min()


def test_plans_are_the_same_for_the_same():
  lengths = _lengths(3, 1000, 1, 60)
  first = shape_plan.plan_shapes(lengths, 64, 2, 4096)
  assert first == shape_plan.plan_shapes(lengths.copy(), 64, 2, 4096)


@pytest.mark.parametrize(("microbatch_tokens", "groups"), [(None, 1), (512, 4)])
def test_abstract_pairs(microbatch_tokens, groups):
  plan = shape_plan.plan_shapes(np.full((50, 3), 60), 32, 2, microbatch_tokens)
  pairs = packing.abstract_pairs(plan.typical, 32, 1, 2)
  assert pairs.teacher is pairs.teacher_mask is None
  taught = packing.abstract_pairs(plan.typical, 32, 1, 2, teacher_width=24)
  assert (taught.teacher.shape, taught.teacher.dtype) == ((32 * 3, 24), np.float16)
  assert (taught.teacher_mask.shape, taught.teacher_mask.dtype) == ((32 * 3,), bool)
  assert [(g.tokens.shape, g.starts.shape) for g in pairs.groups] == [
    ((s.microbatches, 2 * s.rows, s.length), (s.microbatches, 2 * s.slots))
    for s in plan.typical
  ]
  assert len({shape.microbatches for shape in plan.typical} & {1}) == (groups == 1)
  assert pairs.slots.shape == (32 * 3,)
  assert pairs.negative_mask.shape == (32, 1)
  assert pairs.query_hash.shape == pairs.positive_hash.shape == (32, 2)
