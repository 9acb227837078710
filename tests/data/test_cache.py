"""The record codec. What `build` writes is tested in test_seqio_registry.py."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data.cache import (
  Example,
  content_hash,
  decode_example,
  encode_example,
)
from embgemma.errors import DataError

_TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)


_TEXTS = st.lists(st.tuples(_TOKENS, st.integers(0, 2**64 - 1)), min_size=2, max_size=6)


def _example(texts) -> Example:
  tokens = tuple(np.array(tokens, np.int32) for tokens, _ in texts)
  return Example(tokens, np.array([hashed for _, hashed in texts], np.uint64))


@given(_TEXTS)
def test_round_trip(texts):
  example = _example(texts)
  decoded = decode_example(encode_example(example))
  np.testing.assert_array_equal(decoded.hashes, example.hashes)
  assert decoded.hashes.dtype == np.uint64
  for ours, expected in zip(decoded.tokens, example.tokens, strict=True):
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == np.int32


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
    decode_example(record[:size])


@pytest.mark.parametrize(
  "record",
  [
    b"",
    struct.pack("<IQIi", 1, 0, 1, 5),  # one text only
    struct.pack("<I", 2**32 - 1),
    struct.pack("<I2Q2I", 2, 0, 0, 2**32 - 1, 2**32 - 1),
    struct.pack("<I2Q2I2i", 2, 0, 0, 1, 1, 5, 6) + b"\0",
  ],
)
def test_damaged_records_are_refused(record):
  with pytest.raises(DataError, match="is damaged"):
    decode_example(record)


def test_content_hash():
  text = "naïve 文"
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  assert content_hash(text) == struct.unpack("<Q", digest)[0]
