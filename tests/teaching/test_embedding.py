"""Each distinct input once, in windows that are kept."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from embgemma.data.vector_store import VectorStore
from embgemma.errors import DataError
from embgemma.teaching import embedding
from embgemma.teaching.embedding import embed_missing
from embgemma.teaching.teachers import Input, PartlyEncodedError


def _store(path, teacher) -> VectorStore:
  return VectorStore.create_or_open(
    path / "store", teacher.width, "float32", teacher.fingerprint
  )


def _inputs(numbers) -> list[Input]:
  return [Input(f"text {number}", "task" * (number % 2)) for number in numbers]


def _vectors(store, inputs) -> np.ndarray:
  return store.gather(
    store.locate(np.array([each.key() for each in inputs], np.uint64))
  )


def _quiet(line: str) -> None:
  del line


@hypothesis.given(
  st.lists(st.integers(0, 40), max_size=80),
  st.integers(0, 80),
  st.integers(1, 9),
  st.integers(1, 12),
)
@hypothesis.settings(max_examples=40)
def test_distinct_inputs_are_embedded_once(
  tmp_path_factory, fake, numbers, cut, window, looked_up
):
  """Of one call, and of one after another that was given some of them."""
  path = tmp_path_factory.mktemp("embedding")
  inputs = _inputs(numbers)
  first, second = fake(window=window), fake(window=window)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(embedding, "_LOOKED_UP", looked_up)
    known = embed_missing(_store(path, first), first, iter(inputs[:cut]), _quiet)
    counts = embed_missing(_store(path, first), second, iter(inputs), _quiet)
  distinct, earlier = list(dict.fromkeys(inputs)), set(inputs[:cut])
  assert known == len(earlier)
  assert counts == len(distinct) - len(earlier)
  lacking = [each for each in distinct if each not in earlier]
  assert [each for call in second.embedded for each in call] == lacking
  assert all(len(call) == window for call in second.embedded[:-1])
  expected = np.array([first.vector(each) for each in inputs], np.float32)
  np.testing.assert_array_equal(
    _vectors(_store(path, first), inputs), expected.reshape(-1, 4)
  )


def test_long_texts_end_a_window(tmp_path, fake, monkeypatch):
  monkeypatch.setattr(embedding, "_WINDOW_CHARACTERS", 50)
  monkeypatch.setattr(embedding, "_GROUP_CHARACTERS", 30)
  teacher = fake(window=100)
  texts = ["a" * 20, "b" * 20, "c" * 20, "d" * 200, "e", "f"]
  taken = []

  def come():
    for text in texts:
      # Nothing is read on before a window of long texts is embedded.
      taken.append(len(teacher.embedded))
      yield Input(text)

  embed_missing(_store(tmp_path, teacher), teacher, come(), _quiet)
  sizes = [[len(each.text) for each in call] for call in teacher.embedded]
  assert sizes == [[20, 20, 20], [200], [1, 1]]
  assert taken == [0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize(
  ("shards", "order"), [(2, (0, 1)), (2, (1, 0)), (3, (2, 0, 1))]
)
def test_shards_make_what_one_makes(tmp_path, fake, shards, order):
  inputs = _inputs(range(50))
  whole = fake()
  embed_missing(_store(tmp_path / "one", whole), whole, inputs, _quiet)
  embedded = 0
  for index in order:
    teacher = fake()
    store = _store(tmp_path / "many", teacher)
    counts = embed_missing(store, teacher, inputs, _quiet, (index, shards))
    assert 0 < counts < 50
    assert all(
      each.key() % shards == index for call in teacher.embedded for each in call
    )
    embedded += counts
  assert embedded == 50
  np.testing.assert_array_equal(
    _vectors(_store(tmp_path / "many", whole), inputs),
    _vectors(_store(tmp_path / "one", whole), inputs),
  )


def test_killed_in_any_window_it_goes_on(tmp_path, fake):
  inputs = _inputs(range(50))
  whole = fake()
  embed_missing(_store(tmp_path / "whole", whole), whole, inputs, _quiet)
  for call in range(len(whole.embedded)):
    killed, after = fake(fail_at=call), fake()
    path = tmp_path / str(call)
    with pytest.raises(KeyboardInterrupt):
      embed_missing(_store(path, killed), killed, inputs, _quiet)
    embed_missing(_store(path, after), after, inputs, _quiet)
    # The same windows: even vectors that depend on their window are the same.
    assert killed.embedded + after.embedded == whole.embedded
    np.testing.assert_array_equal(
      _vectors(_store(path, after), inputs),
      _vectors(_store(tmp_path / "whole", whole), inputs),
    )


def _spoil(vectors: np.ndarray, fault: str) -> np.ndarray:
  if fault == "width":
    return vectors[:, :3]
  if fault == "number":
    return vectors[:-1]
  vectors = vectors.copy()
  vectors[2] = {"nan": np.nan, "infinity": np.inf, "zero": 0}[fault]
  return vectors


@pytest.mark.parametrize(
  ("fault", "kept", "message"),
  [
    (
      *("width", 8),
      "the vector of text 8, which begins 'text 8', has width 3, expected 4",
    ),
    ("number", 8, "7 vectors for 8 texts, of which text 8 begins 'text 8'"),
    ("nan", 15, "the vector of text 10, which begins 'text 10', holds NaN"),
    ("infinity", 15, "text 10, which begins 'text 10', holds NaN or an infinity"),
    ("zero", 15, "text 10, which begins 'text 10', is zero"),
  ],
)
def test_a_broken_teacher(tmp_path, fake, fault, kept, message):
  """What is sound of its window is kept, and not asked for again."""
  teacher = fake()
  sound = teacher.encode

  def encode(inputs):
    vectors = sound(inputs)
    return vectors if len(teacher.embedded) == 1 else _spoil(vectors, fault)

  teacher.encode = encode
  store, inputs = _store(tmp_path, teacher), _inputs(range(20))
  message = f"teacher fake.*{message}.*The {kept} texts .* are kept"
  with pytest.raises(DataError, match=message):
    embed_missing(store, teacher, inputs, _quiet)
  assert len(_store(tmp_path, teacher)) == len(store) == kept
  after = fake()
  embed_missing(store, after, inputs, _quiet)
  asked = [each for call in after.embedded for each in call]
  assert asked == (inputs[8:] if kept == 8 else [inputs[10], *inputs[16:]])
  expected = [teacher.vector(each) for each in inputs]
  np.testing.assert_array_equal(_vectors(store, inputs), expected)


def test_what_a_teacher_had_embedded_is_kept(tmp_path, fake):
  teacher, inputs = fake(), _inputs(range(20))
  sound = teacher.encode

  def encode(window):
    if len(teacher.embedded) == 1:
      places = [5, 3, 2]
      vectors = sound([window[i] for i in places])
      vectors[1] = np.nan
      raise PartlyEncodedError("no more", places, vectors)
    return sound(window)

  teacher.encode = encode
  store = _store(tmp_path, teacher)
  with pytest.raises(DataError, match=r"no more\. The 10 texts embedded before"):
    embed_missing(store, teacher, inputs, _quiet)
  kept = [*inputs[:8], inputs[13], inputs[10]]
  assert len(store) == 10
  expected = [teacher.vector(each) for each in kept]
  np.testing.assert_array_equal(_vectors(_store(tmp_path, teacher), kept), expected)
  assert embed_missing(store, fake(), inputs, _quiet) == 10


def test_progress(tmp_path, fake, monkeypatch):
  monkeypatch.setattr(embedding, "_LOG_SECONDS", 0)
  lines: list[str] = []
  teacher = fake()
  embed_missing(_store(tmp_path, teacher), teacher, _inputs(range(20)), lines.append)
  assert [line.partition(" texts")[0] for line in lines] == [
    "fake: 8",
    "fake: 16",
    "fake: 20",
  ]
