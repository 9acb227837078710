"""The record codec."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data.records import (
  Example,
  content_hash,
  decode_records,
  encode_example,
)
from embgemma.errors import DataError

_TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)


_TEXTS = st.lists(st.tuples(_TOKENS, st.integers(0, 2**64 - 1)), min_size=2, max_size=6)


def _example(texts) -> Example:
  tokens = tuple(np.array(tokens, np.int32) for tokens, _ in texts)
  return Example(tokens, np.array([hashed for _, hashed in texts], np.uint64))


@given(st.lists(_TEXTS, min_size=1, max_size=5), st.integers(6, 8))
def test_round_trip(batch, texts):
  examples = [_example(drawn) for drawn in batch]
  read = decode_records([encode_example(example) for example in examples], texts)
  assert read.starts.shape == read.lengths.shape == (len(batch), texts)
  for row, example in enumerate(examples):
    words = read.hashes[row].astype(np.uint64)
    joined = words[:, 0] | words[:, 1] << np.uint64(32)
    np.testing.assert_array_equal(joined, example.hashes[:2])
    for start, length, tokens in zip(
      read.starts[row], read.lengths[row], example.tokens, strict=False
    ):
      np.testing.assert_array_equal(read.words[start : start + length], tokens)
    assert not read.lengths[row, len(example.tokens) :].any()


@given(st.lists(st.tuples(_TOKENS, st.integers(0, 2**64 - 1)), min_size=1, max_size=5))
def test_segments_round_trip(segments):
  examples = [_example([segment]) for segment in segments]
  read = decode_records([encode_example(example) for example in examples], 1)
  assert read.hashes.shape == (len(segments), 1, 2)
  for row, (tokens, hashed) in enumerate(segments):
    low, high = read.hashes[row, 0].tolist()
    assert low | high << 32 == hashed
    start, length = read.starts[row, 0], read.lengths[row, 0]
    assert read.words[start : start + length].tolist() == tokens


def test_pairs_are_no_segments():
  record = encode_example(_example([([1, 2], 0), ([3], 0)]))
  with pytest.raises(DataError, match="is damaged"):
    decode_records([record], 1)
  with pytest.raises(DataError, match="is damaged"):
    decode_records([encode_example(_example([([1, 2], 0)]))], 2)


def test_format():
  """As documented, byte for byte: caches outlive versions."""
  example = Example(
    (np.array([2, 7, 1], np.int32), np.array([2, 1], np.int32)),
    np.array([1, 2**64 - 2], np.uint64),
  )
  expected = struct.pack("<I2Q2I5i", 2, 1, 2**64 - 2, 3, 2, 2, 7, 1, 2, 1)
  assert encode_example(example) == expected


@given(_TEXTS, st.data())
def test_cut_records_are_refused(texts, data):
  record = encode_example(_example(texts))
  size = data.draw(st.integers(0, len(record) - 1))
  with pytest.raises(DataError, match=f"record of {size} bytes is damaged"):
    decode_records([record, record[:size]], 6)


@pytest.mark.parametrize(
  "record",
  [
    b"",
    struct.pack("<IQIi", 1, 0, 1, 5),  # one text only
    struct.pack("<I", 2**32 - 1),
    struct.pack("<I2Q2I", 2, 0, 0, 2**32 - 1, 2**32 - 1),
    struct.pack("<I2Q2I2i", 2, 0, 0, 1, 1, 5, 6) + b"\0",
    struct.pack("<I2Q2I2i", 2, 0, 0, 1, 1, 5, 6) + b"\0\0\0\0",
    struct.pack("<I7Q7I7i", 7, *[0] * 7, *[1] * 7, *[5] * 7),  # more than there are
  ],
)
def test_damaged_records_are_refused(record):
  with pytest.raises(DataError, match="is damaged"):
    decode_records([record], 6)


def test_content_hash():
  text = "naïve 文"
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  assert content_hash(text) == struct.unpack("<Q", digest)[0]
