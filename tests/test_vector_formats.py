"""Formats of vectors against sentence-transformers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sentence_transformers.util.quantization import quantize_embeddings

from embgemma import vector_formats
from embgemma.errors import ConfigError
from embgemma.models.config import VECTOR_FORMATS
from embgemma.vector_formats import VectorFormat

_VECTORS = hnp.arrays(
  np.float32,
  (6, 20),
  # Of ranges next to nothing a quotient overflows, there and here.
  elements=st.floats(-1, 1, width=32).map(lambda x: round(x, 6)).map(np.float32),
)


@pytest.mark.parametrize("name", ["float32", "int8", "uint8", "binary", "ubinary"])
@given(vectors=_VECTORS, sample=_VECTORS)
def test_codes_are_sentence_transformers(name, vectors, sample):
  found = vector_formats.calibrated(name, sample).codes(vectors)
  expected = quantize_embeddings(vectors, name, calibration_embeddings=sample)
  np.testing.assert_array_equal(found, expected)
  assert found.dtype == expected.dtype


@pytest.mark.parametrize("name", VECTOR_FORMATS)
def test_values_are_what_codes_stand_for(name):
  vectors = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
  kept = vector_formats.calibrated(name, vectors)
  codes = kept.codes(vectors)
  assert codes.shape == (50, kept.columns(20))
  assert codes.nbytes == 50 * kept.bytes(20)
  assert codes.dtype == np.dtype(kept.dtype)
  values = kept.values(codes, 20)
  assert values.dtype == np.float32
  np.testing.assert_array_equal(kept.codes(values), codes)
  if name.endswith("binary"):
    np.testing.assert_array_equal(values, np.where(vectors > 0, 1, -1))
  else:
    span = np.ptp(vectors, axis=0).max()
    tolerance = {"float32": 0, "float16": 2e-3}.get(name, span / 255)
    np.testing.assert_allclose(values, vectors, atol=tolerance)


def test_signs_of_odd_widths():
  vectors = np.array([[1, -1, 1, 1, -1, 1, 1, 1, 1, -1]], np.float32)
  for name in ("binary", "ubinary"):
    kept = VectorFormat(name)
    np.testing.assert_array_equal(kept.values(kept.codes(vectors), 10), vectors)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: VectorFormat("int4"), "vectors 'int4': there are float32, float16"),
    (lambda: VectorFormat("int8"), "'int8' need ranges"),
    (
      lambda: vector_formats.calibrated("int8", np.ones((1, 4), np.float32)),
      "need two texts at least",
    ),
  ],
)
def test_messages(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
