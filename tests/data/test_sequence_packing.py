"""Packing on two sides keeps every example whole, in one row, under one id."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data import sequence_packing
from embgemma.data.denoising import Examples
from embgemma.data.sequence_packing import (
  SequenceShape,
  abstract_sequences,
  lay_out,
  place,
  plan_rows,
)
from embgemma.data.shape_plan import deal_examples
from embgemma.errors import DataError

_CAPACITY = (40, 24)
_BOS = 2
_SIZES = st.lists(
  st.tuples(st.integers(1, _CAPACITY[0]), st.integers(1, _CAPACITY[1])), max_size=30
)


def _packed(examples, capacity, rows):
  """All examples in microbatches of so many rows."""
  layout = lay_out(examples.sizes, capacity)
  microbatches = max(1, -(-layout.rows // rows))
  return place(examples, [layout], SequenceShape(*capacity, microbatches, rows))


def _examples(sizes) -> Examples:
  """Tokens that occur once, from 10 on."""
  sizes = np.asarray(sizes, int).reshape(-1, 2)
  inputs, targets = sizes.T
  tokens = np.arange(10, 10 + sizes.sum(), dtype=np.int32)
  predicted = tokens[inputs.sum() :]
  shifted = np.roll(predicted, 1)
  shifted[np.cumsum(targets) - targets] = _BOS
  return Examples(tokens[: inputs.sum()], inputs, predicted, targets, shifted)


def _parts(flat, lengths) -> list[list[int]]:
  return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


def _side(ids, *arrays) -> list[list[list]]:
  """What one row's arrays hold of each example, in the order of their ids."""
  real = ids[ids > 0]
  # Ids ascend from 1 without gaps, from the row's first token on.
  assert (ids[: len(real)] > 0).all()
  assert (np.diff(real) >= 0).all()
  assert set(real.tolist()) == set(range(1, 1 + int(ids.max())))
  for array in arrays:
    assert not array[ids == 0].any()
  numbers = range(1, 1 + int(ids.max()))
  return [[array[ids == i].tolist() for array in arrays] for i in numbers]


def _unpacked(packed) -> list[tuple[list[int], list[int], list[int]]]:
  """Inputs, targets and decoder inputs of each example."""
  found = []
  for at in np.ndindex(packed.targets.shape[:2]):
    targets = _side(
      packed.target_ids[at],
      packed.targets[at],
      packed.decoder_inputs[at],
      packed.target_positions[at],
      packed.weights[at],
    )
    inputs: list[list[list]] = [[[], []] for _ in targets]
    if packed.inputs is not None:
      inputs = _side(
        packed.input_ids[at], packed.inputs[at], packed.input_positions[at]
      )
    for (tokens, places), (wanted, shifted, later, weights) in zip(
      inputs, targets, strict=True
    ):
      assert places == list(range(len(tokens)))
      assert later == list(range(len(wanted)))
      assert weights == [1.0] * len(wanted)
      found.append((tokens, wanted, shifted))
  return found


def _expected(examples):
  return list(
    zip(
      _parts(examples.inputs, examples.input_lengths),
      _parts(examples.targets, examples.target_lengths),
      _parts(examples.decoder_inputs, examples.target_lengths),
      strict=True,
    )
  )


@given(_SIZES, st.integers(1, 4))
def test_packing_keeps_every_example(sizes, rows):
  examples = _examples(sizes)
  packed = _packed(examples, _CAPACITY, rows)
  assert packed.targets.shape[1:] == (rows, _CAPACITY[1])
  assert packed.inputs.shape == (len(packed.targets), rows, _CAPACITY[0])
  if sizes:
    assert sorted(_unpacked(packed)) == sorted(_expected(examples))
  else:
    assert not packed.weights.any()
  for array in jax.tree.leaves(packed):
    assert array.dtype == (np.float32 if array is packed.weights else np.int32)


@given(st.lists(st.integers(1, 24), min_size=1, max_size=30))
def test_decoder_alone(lengths):
  examples = _examples([(0, n) for n in lengths])
  packed = _packed(examples, (0, 24), 2)
  assert packed.inputs is packed.input_positions is packed.input_ids is None
  found = sorted(tokens for _, tokens, _ in _unpacked(packed))
  assert found == sorted(tokens for _, tokens, _ in _expected(examples))
  assert np.count_nonzero(packed.target_ids) == sum(lengths)


@given(_SIZES.filter(bool))
def test_layout(sizes):
  sizes = np.array(sizes)
  layout = lay_out(sizes, _CAPACITY)
  used = np.zeros((layout.rows, 2), int)
  np.add.at(used, layout.row, sizes)
  assert (used <= _CAPACITY).all()
  assert used.any(axis=1).all()
  for row in range(layout.rows):
    own = np.flatnonzero(layout.row == row)
    own = own[np.argsort(layout.number[own])]
    np.testing.assert_array_equal(layout.number[own], np.arange(1, 1 + len(own)))
    ends = np.cumsum(sizes[own], axis=0)
    np.testing.assert_array_equal(layout.offset[own], ends - sizes[own])
  # No row takes all of another: a row is opened only for what fits nowhere.
  for i in range(layout.rows):
    for j in range(i):
      assert (used[i] + used[j] > _CAPACITY).any()


def test_examples_of_two_kinds_share_rows():
  """Long inputs go with long targets of others, as S denoisers go with R."""
  sizes = np.array([(30, 10), (9, 18)] * 200)
  layout = lay_out(sizes, (40, 28))
  assert layout.rows == 200
  packed = _packed(_examples(sizes), (40, 28), 200)
  assert np.mean(packed.input_ids > 0) == pytest.approx(39 / 40)
  assert (packed.target_ids > 0).all()


def test_mixed_sizes_fill_the_rows():
  """At least 94 % of the fuller side, with rows of some four examples."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(20, 257, 2000)
  shares = rng.choice([0.25, 0.5, 0.85], 2000, p=[0.5, 0.25, 0.25])
  inputs = np.rint(lengths * shares).astype(int)
  sizes = np.stack([inputs, lengths - inputs], axis=1)
  layout = lay_out(sizes, (512, 512))
  fullest = sizes.sum(axis=0).max() / 512
  assert fullest <= layout.rows <= fullest / 0.94


def test_large_batches_are_laid_out_in_parts(monkeypatch):
  sizes = _sizes(500)
  whole = lay_out(sizes, _CAPACITY).rows
  monkeypatch.setattr(sequence_packing, "_TOGETHER", 100)
  layout = lay_out(sizes, _CAPACITY)
  assert whole <= layout.rows <= 1.1 * whole
  packed = place(_examples(sizes), [layout], SequenceShape(*_CAPACITY, 1, layout.rows))
  assert sorted(_unpacked(packed)) == sorted(_expected(_examples(sizes)))


def test_an_example_larger_than_a_row():
  with pytest.raises(
    DataError, match=r"of \[41, 3\] tokens is larger than a row, \(40"
  ):
    lay_out(np.array([[1, 1], [41, 3]]), _CAPACITY)


def _sizes(count, seed=0):
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(5, 33, count), rng.integers(2, 21, count)], axis=1)


@pytest.mark.parametrize(("batch_size", "num_shards"), [(64, 1), (256, 4), (4096, 1)])
@pytest.mark.parametrize("microbatch_tokens", [None, 1024])
def test_few_shapes_hold_all_batches(batch_size, num_shards, microbatch_tokens):
  sizes = _sizes(8192)
  plan = plan_rows(sizes, _CAPACITY, batch_size, num_shards, microbatch_tokens)
  shapes, slots, rows = set(), 0, 0
  batches = 40 if batch_size < 1000 else 6
  for seed in range(batches):
    drawn = _sizes(batch_size, 1 + seed)
    shards = deal_examples(drawn, num_shards)
    needed = max(lay_out(drawn[shard], _CAPACITY).rows for shard in shards)
    shape = plan.shape(needed)
    assert shape.microbatches * shape.rows >= needed
    assert (shape.inputs, shape.targets) == _CAPACITY
    if microbatch_tokens:
      assert shape.rows * sum(_CAPACITY) <= microbatch_tokens
    else:
      assert shape.microbatches == 1
    shapes.add(shape)
    slots, rows = slots + shape.tokens, rows + needed
  assert len(shapes) <= 6
  assert rows * sum(_CAPACITY) / slots > 0.85
  assert plan.typical in shapes
  assert plan == plan_rows(sizes, _CAPACITY, batch_size, num_shards, microbatch_tokens)


def test_shards_lie_end_to_end():
  parts = [_sizes(20, 1), _sizes(13, 2), _sizes(0), _sizes(9, 3)]
  layouts = [lay_out(sizes, _CAPACITY) for sizes in parts]
  shape = SequenceShape(*_CAPACITY, microbatches=3, rows=4)
  packed = place(_examples(np.concatenate(parts)), layouts, shape)
  expected = iter(_expected(_examples(np.concatenate(parts))))
  for shard, sizes in enumerate(parts):
    own = jax.tree.map(lambda array, s=shard: np.split(array, 4, axis=1)[s], packed)
    wanted = [next(expected) for _ in sizes]
    assert sorted(_unpacked(own)) == sorted(wanted)


@pytest.mark.parametrize("inputs", [40, 0])
def test_abstract_sequences(inputs):
  shape = SequenceShape(inputs, 24, microbatches=3, rows=4)
  sizes = _sizes(9)
  if not inputs:
    sizes[:, 0] = 0
  layouts = [lay_out(sizes, (inputs, 24))] * 2
  packed = place(_examples(np.concatenate([sizes, sizes])), layouts, shape)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), packed)
  assert abstract_sequences(shape, 2) == shapes
  assert shape.tokens == 3 * 4 * (inputs + 24)
