import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data import packing
from embgemma.errors import DataError

_CAPACITY = 64
_LENGTHS = st.lists(st.integers(0, _CAPACITY), min_size=1, max_size=60)


def _texts(lengths, start=1):
  """Texts of ids that occur once: a token tells its text and place."""
  ids = np.arange(start, start + sum(lengths), dtype=np.int32)
  return np.split(ids, np.cumsum(lengths)[:-1])


@given(_LENGTHS)
def test_layout_holds_every_text_once(lengths):
  layout = packing.best_fit(lengths, _CAPACITY)
  taken = np.zeros((layout.rows, _CAPACITY), int)
  for length, row, offset in zip(lengths, layout.row, layout.offset, strict=True):
    if length:
      assert 0 <= offset <= _CAPACITY - length
      taken[row, offset : offset + length] += 1
  assert taken.sum() == sum(lengths)
  assert taken.max(initial=0) <= 1
  # Rows fill from the left: no gap that a text could still take.
  assert (np.diff(taken, axis=1) <= 0).all()
  assert (taken[:, 0] == 1).all()


@given(_LENGTHS)
def test_layout_is_best_fit_decreasing(lengths):
  """The rule, carried out by looking at every row."""
  free: list[int] = []
  held: list[list[int]] = []
  for length in sorted(filter(None, lengths), reverse=True):
    fitting = [(space, row) for row, space in enumerate(free) if space >= length]
    if not fitting:
      fitting = [(_CAPACITY, len(free))]
      free.append(_CAPACITY)
      held.append([])
    _, row = min(fitting)
    free[row] -= length
    held[row].append(length)
  layout = packing.best_fit(lengths, _CAPACITY)
  # Which of two rows with equal room is taken is not part of the rule.
  assert layout.rows == len(held)
  space = np.full(layout.rows, _CAPACITY)
  for row, length in zip(layout.row, lengths, strict=True):
    if length:
      space[row] -= length
  assert sorted(space) == sorted(free)


@given(st.integers(1, _CAPACITY), st.integers(1, 50))
def test_equal_texts_stay_in_order(length, count):
  layout = packing.best_fit([length] * count, _CAPACITY)
  places = list(zip(layout.row, layout.offset, strict=True))
  assert places == sorted(places)


@pytest.mark.parametrize("seed", range(5))
def test_layout_is_near_the_lower_bound(seed):
  """On lengths as texts have them, within 3 % of no padding at all."""
  rng = np.random.default_rng(seed)
  lengths = np.minimum(rng.lognormal(3.5, 1, 2000).astype(int) + 2, 256)
  bound = np.ceil(lengths.sum() / 256)
  assert bound <= packing.best_fit(lengths.tolist(), 256).rows <= 1.03 * bound


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


def test_row_ladder():
  values = [packing.round_up_rows(rows) for rows in range(1, 5000)]
  for rows, value in enumerate(values, 1):
    assert rows <= value <= rows * 1.125
  assert values == sorted(values)
  for octave in (8, 64, 1024):
    assert len({v for v in values if octave < v <= 2 * octave}) == 8


@st.composite
def _shards(draw):
  slots = draw(st.integers(1, 12))
  lengths = st.lists(st.integers(0, 32), min_size=slots, max_size=slots)
  return draw(st.lists(lengths, min_size=1, max_size=4))


@given(_shards())
def test_packed_texts_are_the_texts(shard_lengths):
  num_shards, slots = len(shard_lengths), len(shard_lengths[0])
  texts = [_texts(lengths, 1000 * s + 1) for s, lengths in enumerate(shard_lengths)]
  packed = packing.pack_texts(texts, 32)
  rows, length = packed.tokens.shape
  assert length == 32
  assert rows % num_shards == 0
  assert rows // num_shards == packing.round_up_rows(rows // num_shards)
  assert packed.num_shards == num_shards
  flat = {
    name: getattr(packed, name).reshape(num_shards, -1)
    for name in ("tokens", "positions", "text_ids")
  }
  starts = packed.starts.reshape(num_shards, slots)
  lengths = packed.lengths.reshape(num_shards, slots)
  for shard in range(num_shards):
    for slot, text in enumerate(texts[shard]):
      assert lengths[shard, slot] == len(text)
      span = slice(starts[shard, slot], starts[shard, slot] + len(text))
      np.testing.assert_array_equal(flat["tokens"][shard, span], text)
      np.testing.assert_array_equal(flat["positions"][shard, span], range(len(text)))
      mine = np.flatnonzero(flat["text_ids"][shard] == slot)
      assert mine.tolist() == (list(range(span.start, span.stop)) if len(text) else [])
      assert len({place // 32 for place in mine}) <= 1  # one row
      assert len(text) or starts[shard, slot] == 0
    padding = flat["text_ids"][shard] == slots
    assert padding.sum() == padding.size - sum(shard_lengths[shard])
    assert not flat["tokens"][shard, padding].any()
    assert not flat["positions"][shard, padding].any()


def test_packing_is_deterministic():
  texts = [_texts(np.random.default_rng(0).integers(0, 30, 40))]
  first, second = packing.pack_texts(texts, 32), packing.pack_texts(texts, 32)
  for name in ("tokens", "positions", "text_ids", "starts", "lengths"):
    np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_roles_come_back_in_the_order_of_the_examples(num_shards, negatives):
  batch, width = 8, 5
  rng = np.random.default_rng(0)
  query, positive = rng.normal(size=(2, batch, width))
  negative = rng.normal(size=(batch, negatives, width))
  size = batch // num_shards
  slots = []
  for start in range(0, batch, size):
    own = slice(start, start + size)
    slots += [query[own], positive[own], negative[own].reshape(-1, width)]
  found = packing.split_roles(np.concatenate(slots), num_shards, batch)
  for ours, expected in zip(found, (query, positive, negative), strict=True):
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_hash_words_keep_every_bit(hashes):
  words = packing.hash_words(np.array(hashes, np.uint64))
  assert words.dtype == np.uint32
  again = [int(low) | int(high) << 32 for low, high in words]
  assert again == hashes
