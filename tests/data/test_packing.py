"""Every text in one place, nothing over another, and slots that say where."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data import packing
from embgemma.errors import DataError

_CAPACITY = 64
_LENGTHS = st.lists(st.integers(0, _CAPACITY), min_size=1, max_size=60).map(np.array)


def _texts(lengths, start=1):
  """Texts of ids that occur once: a token tells its text and place."""
  ids = np.arange(start, start + sum(lengths), dtype=np.int32)
  return np.split(ids, np.cumsum(lengths)[:-1])


@given(_LENGTHS, st.none() | st.integers(0, 12))
def test_layout_holds_texts_once(lengths, max_rows):
  layout = packing.best_fit(lengths, _CAPACITY, max_rows)
  taken = np.zeros((layout.rows, _CAPACITY), int)
  for length, row, offset in zip(lengths, layout.row, layout.offset, strict=True):
    if row >= 0:
      assert length
      assert 0 <= offset <= _CAPACITY - length
      taken[row, offset : offset + length] += 1
  assert taken.max(initial=0) <= 1
  # Rows fill from the left: no gap that a text could still take.
  assert (np.diff(taken, axis=1) <= 0).all()
  assert (taken[:, 0] == 1).all()
  left_out = lengths[(layout.row < 0) & (lengths > 0)]
  if max_rows is None:
    assert not len(left_out)
  else:
    assert layout.rows <= max_rows
    # Left out is what no row could hold.
    space = max(_CAPACITY - taken.sum(axis=1), default=0)
    assert not len(left_out) or space < left_out.min()


@given(_LENGTHS, st.none() | st.integers(0, 12))
def test_layout_is_best_fit_decreasing(lengths, max_rows):
  """The rule, carried out text by text and looking at every row."""
  free: list[int] = []
  for length in sorted(lengths[lengths > 0], reverse=True):
    fitting = [(space, row) for row, space in enumerate(free) if space >= length]
    if fitting:
      free[min(fitting)[1]] -= length
    elif max_rows is None or len(free) < max_rows:
      free.append(_CAPACITY - length)
  layout = packing.best_fit(lengths, _CAPACITY, max_rows)
  # Which of two rows with equal room is taken is not part of the rule.
  assert layout.rows == len(free)
  space = np.full(layout.rows, _CAPACITY)
  np.subtract.at(space, layout.row[layout.row >= 0], lengths[layout.row >= 0])
  assert sorted(space) == sorted(free)


@given(st.integers(1, _CAPACITY), st.integers(1, 50))
def test_equal_texts_stay_in_order(length, count):
  layout = packing.best_fit(np.full(count, length), _CAPACITY)
  places = list(zip(layout.row, layout.offset, strict=True))
  assert places == sorted(places)


@pytest.mark.parametrize("seed", range(5))
def test_layout_is_near_the_lower_bound(seed):
  """On lengths as texts have them, within 3 % of no padding at all."""
  rng = np.random.default_rng(seed)
  lengths = np.minimum(rng.lognormal(3.5, 1, 2000).astype(int) + 2, 256)
  bound = np.ceil(lengths.sum() / 256)
  assert bound <= packing.best_fit(lengths, 256).rows <= 1.03 * bound


@pytest.mark.parametrize(
  ("longest", "expected"),
  [(0, 64), (64, 64), (65, 128), (1025, 2048), (2048, 2048)],
)
def test_row_length(longest, expected):
  assert packing.row_length(longest) == expected


def test_row_length_of_an_unsorted_ladder():
  assert packing.row_length(5, (32, 8, 16)) == 8


def test_no_row_is_long_enough():
  with pytest.raises(DataError, match=r"2049 tokens .* longest row \(2048\)"):
    packing.row_length(2049)


@st.composite
def _shards(draw):
  """Lengths of each shard's texts, microbatches, and slots of one microbatch."""
  count = draw(st.integers(1, 12))
  lengths = st.lists(st.integers(0, 32), min_size=count, max_size=count)
  shards = draw(st.lists(lengths, min_size=1, max_size=4))
  return shards, draw(st.integers(1, 4)), draw(st.integers(1, 12))


@given(_shards())
def test_packed_texts_are_the_texts(drawn):
  shard_lengths, microbatches, slots = drawn
  shards = len(shard_lengths)
  layouts = [packing.best_fit(np.array(lengths), 32) for lengths in shard_lengths]
  rows = max(1, *(-(-layout.rows // microbatches) for layout in layouts))
  shape = packing.GroupShape(32, microbatches, rows, slots)
  dealt = [packing.deal(layout, shape) for layout in layouts]
  texts = [_texts(lengths, 1000 * s + 1) for s, lengths in enumerate(shard_lengths)]
  given_texts = [texts[s][i] for s, p in enumerate(dealt) for i in p.texts]
  packed = packing.place_texts(given_texts, dealt, shape)
  assert packed.tokens.shape == (microbatches, shards * rows, 32)
  assert packed.starts.shape == (microbatches, shards * slots)
  for shard, placement in enumerate(dealt):
    # As the shard sees it: its part of each axis.
    view = jax.tree.map(lambda a: np.split(a, shards, axis=1)[shard], packed)  # noqa: B023
    tokens, positions, ids = (
      a.reshape(microbatches, -1) for a in (view.tokens, view.positions, view.text_ids)
    )
    found = 0
    for text, place in zip(placement.texts, placement.slot, strict=True):
      batch, slot = divmod(place, slots)
      start, length = view.starts[batch, slot], view.lengths[batch, slot]
      span = slice(start, start + length)
      np.testing.assert_array_equal(tokens[batch, span], texts[shard][text])
      np.testing.assert_array_equal(positions[batch, span], np.arange(length))
      mine = np.argwhere(ids[batch] == slot).ravel()
      np.testing.assert_array_equal(mine, np.arange(start, start + length))
      assert start // 32 == (start + length - 1) // 32  # one row
      found += length
    padding = ids == slots
    assert (~padding).sum() == found
    assert not tokens[padding].any()
    assert not positions[padding].any()
    empty = np.ones(microbatches * slots, bool)
    empty[placement.slot] = False
    assert not view.starts.ravel()[empty].any()
    assert not view.lengths.ravel()[empty].any()
    # What has no place would have gone to a microbatch that is full.
    missing = np.setdiff1d(np.flatnonzero(shard_lengths[shard]), placement.texts)
    most = packing.crowding(layouts[shard], microbatches)
    assert bool(len(missing)) == (most > slots)


@pytest.mark.parametrize("seed", range(3))
def test_microbatches_have_like_numbers_of_texts(seed):
  rng = np.random.default_rng(seed)
  lengths = np.minimum(rng.lognormal(3.5, 1, 4000).astype(int) + 2, 256)
  layout = packing.best_fit(lengths, 256)
  mean = len(lengths) / 16
  assert mean <= packing.crowding(layout, 16) <= 1.1 * mean


@given(st.integers(1, 5), st.integers(0, 3), st.randoms())
def test_split_roles(examples, negatives, random):
  """Vectors of texts wherever they lie, zeros for those that are nowhere."""
  count = examples * (2 + negatives)
  vectors = np.random.default_rng(0).normal(size=(count + 3, 4)).astype(np.float32)
  places = list(range(count + 3))
  random.shuffle(places)
  slots = np.array(places[:count], np.int32)
  absent = np.array([random.random() < 0.3 for _ in slots])
  absent[: 2 * examples] = False
  slots[absent] = len(vectors)
  split = packing.split_roles(vectors, slots, examples)
  expected = np.append(vectors, np.zeros((1, 4), np.float32), axis=0)[slots]
  np.testing.assert_array_equal(split[0], expected[:examples])
  np.testing.assert_array_equal(split[1], expected[examples : 2 * examples])
  assert split[2].shape == (examples, negatives, 4)
  np.testing.assert_array_equal(np.reshape(split[2], (-1, 4)), expected[2 * examples :])
