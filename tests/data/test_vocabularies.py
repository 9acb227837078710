import os
import pickle
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from embgemma.data import vocabularies
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import ConfigError, DataError

_Piece = model_pb2.ModelProto.SentencePiece
_SIZE = 900
_CONTROL_TEXTS = [
  "<mask>",
  "[multimodal]",
  "<unused0>",
  "<unused98>",
  "<unused120>",
  "<start_of_turn>",
  "<end_of_turn>",
  "<start_of_image>",
  "<end_of_image>",
  "<pad>",
  "<eos>",
  "<bos>",
]


def _corpus():
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
  lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
  return [*lines, "if x:\n    return y\n\n\tz = 'é'  # 日本語 2024", *_CONTROL_TEXTS]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  train_vocabulary(_corpus(), _SIZE, path)
  return path


@pytest.fixture(scope="module")
def vocabulary(path):
  return SentencePieceVocabulary(path)


@pytest.fixture(scope="module")
def gemma_like(vocabulary):
  """As Gemma's file: specials, tags and runs of spaces or newlines user-defined."""
  model = model_pb2.ModelProto.FromString(vocabulary.serialized)
  for piece in model.pieces:
    if piece.type == _Piece.CONTROL and piece.piece not in ("<pad>", "<eos>", "<bos>"):
      piece.type = _Piece.USER_DEFINED
  for piece in ("<b>", "\n\n", "\n\n\n", "▁▁▁▁▁▁▁▁▁"):
    model.pieces.add(piece=piece, type=_Piece.USER_DEFINED)
  return SentencePieceVocabulary.from_serialized(model.SerializeToString())


def _edited(vocabulary, edit):
  model = model_pb2.ModelProto.FromString(vocabulary.serialized)
  edit(model)
  return model.SerializeToString()


def test_layout_is_gemmas(vocabulary):
  model = model_pb2.ModelProto.FromString(vocabulary.serialized)
  names = [piece.piece for piece in model.pieces]
  assert len(names) == vocabulary.size == _SIZE
  assert names[:8] == [
    *("<pad>", "<eos>", "<bos>", "<unk>"),
    *("<mask>", "[multimodal]", "<unused0>", "<unused1>"),
  ]
  assert names[104:107] == ["<unused98>", "<start_of_turn>", "<end_of_turn>"]
  assert names[107:363] == [f"<0x{i:02X}>" for i in range(256)]
  assert names[-130:-127] == ["<start_of_image>", "<end_of_image>", "<unused99>"]
  assert names[-1] == "<unused226>"
  control = {i for i, piece in enumerate(model.pieces) if piece.type == _Piece.CONTROL}
  assert control == {0, 1, 2, *range(4, 107), *range(_SIZE - 130, _SIZE)}
  assert model.trainer_spec.vocab_size == _SIZE
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (0, 1, 2)


def _piece_id(vocabulary, piece):
  return [each.piece for each in vocabulary.effective_model.pieces].index(piece)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@example("")
@example(" a\0b\r\n\t  \n\n ")
@example("<start_of_turn>user\n<0x41><unk></s> ⁇ \ufeff\ufffd")
def test_round_trip(vocabulary, gemma_like, text):
  for each in (vocabulary, gemma_like):
    assert each.decode(each.encode(text, 10_000)) == text


def test_spaces_mark_is_what_does_not_round_trip(vocabulary):
  assert vocabulary.decode(vocabulary.encode("a▁b", 100)) == "a b"


def test_ids_are_the_processors_between_bos_and_eos(path, vocabulary):
  processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
  texts = [*_corpus()[:50], "", "  two  spaces ", "日本"]
  batch = vocabulary.encode_batch(texts, 512)
  for text, ids in zip(texts, batch, strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == [2, *processor.encode(text), 1]
    assert vocabulary.encode(text, 512) == ids.tolist()
  assert vocabulary.encode("", 3) == [2, 1]
  assert vocabulary.encode_batch([], 8) == []


@pytest.mark.parametrize("max_length", [3, 4, 7, 10])
def test_truncation_keeps_eos(vocabulary, max_length):
  text = _corpus()[0]
  whole = vocabulary.encode(text, 512)
  assert len(whole) > 10
  expected = [*whole[: max_length - 1], 1]
  assert vocabulary.encode(text, max_length) == expected


def test_text_that_just_fits_is_whole(vocabulary):
  whole = vocabulary.encode("abc def", 512)
  assert vocabulary.encode("abc def", len(whole)) == whole


@pytest.mark.parametrize("max_length", [2, 0, -1])
def test_no_room_for_text(vocabulary, max_length):
  with pytest.raises(ConfigError, match="3 or more"):
    vocabulary.encode("a", max_length)


@given(
  st.text(st.sampled_from("ab  ▁\n<>é日"), min_size=150, max_size=400),
  st.integers(3, 9),
)
def test_truncated_ids_of_long_texts_are_exact(gemma_like, text, max_length):
  # Long enough that the text is cut before it is encoded.
  whole = gemma_like._processor.encode(text)
  room = max_length - 2
  assert gemma_like.encode(text, max_length) == [2, *whole[:room], 1]
  prefix = gemma_like._processor.encode(gemma_like._cut(text, room))
  assert len(prefix) >= room
  assert prefix == whole[: len(prefix)]


def test_long_text_is_cut_only_where_no_piece_crosses_a_space(vocabulary):
  text = "abc def " * 2000
  assert len(vocabulary._cut(text, 10)) < 400
  assert vocabulary._cut("a" * 5000, 10) == "a" * 5000

  def cross(model):
    model.pieces.add(piece="c▁d", type=_Piece.USER_DEFINED)

  crossing = SentencePieceVocabulary.from_serialized(_edited(vocabulary, cross))
  assert crossing._cut(text, 10) == text


def test_documents_are_the_processors_pieces(path, vocabulary):
  processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
  texts = [*_corpus()[:50], "", "  two  spaces ", "日本", "abc def " * 3000]
  for text, ids in zip(texts, vocabulary.encode_documents(texts), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == processor.encode(text)
  assert vocabulary.encode_documents([]) == []
  with pytest.raises(DataError, match="text 0 of the batch"):
    vocabulary.encode_documents(["\ud800"])


@given(st.text(st.sampled_from("ab  ▁\n<>é日"), max_size=400), st.integers(1, 50))
def test_documents_in_parts_are_exact(gemma_like, text, part):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(vocabularies, "_PART", part)
    parts = gemma_like._parts(text)
    (ids,) = gemma_like.encode_documents([text])
  assert "".join(parts) == text
  assert ids.tolist() == gemma_like._processor.encode(text)


def test_documents_are_whole_where_parts_would_differ(vocabulary):
  def prepend(model):
    model.normalizer_spec.add_dummy_prefix = True

  text = "abc def " * 20_000
  assert len(vocabulary._parts(text)) > 1
  other = SentencePieceVocabulary.from_serialized(_edited(vocabulary, prepend))
  assert other._parts(text) == [text]


@pytest.mark.parametrize("text", _CONTROL_TEXTS)
def test_text_that_spells_control_tokens_stays_text(vocabulary, gemma_like, text):
  plain = vocabulary.encode(f"a{text}b", 100)
  assert gemma_like.encode(f"a{text}b", 100) == plain
  assert _piece_id(vocabulary, text) not in plain[1:-1]
  # The file alone would have matched, for all but pad, eos and bos.
  raw = sentencepiece.SentencePieceProcessor(model_proto=gemma_like.serialized)
  matched = _piece_id(gemma_like, text) in raw.encode(f"a{text}b")
  assert matched == (text not in ("<pad>", "<eos>", "<bos>"))


def test_tags_and_runs_keep_matching(gemma_like):
  ids = gemma_like.encode("a<b>c\n\n\nd" + " " * 9, 100)
  for piece in ("<b>", "\n\n\n", "▁" * 9):
    assert _piece_id(gemma_like, piece) in ids


def test_image_soft_token_has_no_id(vocabulary, gemma_like):
  for each in (vocabulary, gemma_like):
    ids = each.encode("see <image_soft_token> here", 100)
    assert max(ids) < each.size
    assert each.decode(ids) == "see <image_soft_token> here"


def test_text_that_is_no_unicode_is_named(vocabulary):
  with pytest.raises(DataError, match="text 1 of the batch.*position 5: surrogates"):
    vocabulary.encode_batch(["fine", "lone \ud800"], 8)


def test_decode_refuses_foreign_ids(vocabulary):
  assert vocabulary.decode(np.array([0, 2, 1, 5])) == ""
  for bad in (_SIZE, -1, 262_144):
    with pytest.raises(DataError, match=f"id {bad} is outside"):
      vocabulary.decode([2, bad])


def test_saved_bytes_and_fingerprint_are_the_files(path, gemma_like, tmp_path):
  vocabulary = SentencePieceVocabulary(path)
  vocabulary.save(tmp_path / "copy.model")
  copy = SentencePieceVocabulary(tmp_path / "copy.model")
  assert copy.serialized == vocabulary.serialized == path.read_bytes()
  assert copy.fingerprint == vocabulary.fingerprint != gemma_like.fingerprint
  assert os.listdir(tmp_path) == ["copy.model"]


def test_pickles(gemma_like):
  copy = pickle.loads(pickle.dumps(gemma_like))
  assert copy.serialized == gemma_like.serialized
  assert copy.encode("a<mask> b", 20) == gemma_like.encode("a<mask> b", 20)


def test_missing_file(tmp_path):
  with pytest.raises(DataError, match=r"absent\.model.*cannot be read"):
    SentencePieceVocabulary(tmp_path / "absent.model")


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com"])
def test_not_a_sentencepiece_model(tmp_path, content):
  path = tmp_path / "other.model"
  path.write_bytes(content)
  with pytest.raises(DataError, match=r"other\.model is not a SentencePiece model"):
    SentencePieceVocabulary(path)


def test_missing_specials_are_named(vocabulary):
  def drop(model):
    model.trainer_spec.pad_id = model.trainer_spec.bos_id = -1
    model.pieces[0].piece, model.pieces[2].piece = "<p>", "<b>"

  with pytest.raises(DataError, match=r"lacks pieces .*\(pad, bos\)"):
    SentencePieceVocabulary.from_serialized(_edited(vocabulary, drop))


def test_model_that_does_not_load(vocabulary):
  def repeat(model):
    model.pieces[5].piece = model.pieces[4].piece

  with pytest.raises(DataError, match="does not load"):
    SentencePieceVocabulary.from_serialized(_edited(vocabulary, repeat))


def test_training_depends_on_the_texts_only(vocabulary, tmp_path):
  again = train_vocabulary(reversed(_corpus()), _SIZE, tmp_path / "other name.model")
  assert again.serialized == vocabulary.serialized


def test_training_takes_a_bounded_sample_of_the_texts(tmp_path):
  texts = [f"{chr(97 + i % 26) * 4} {i:x}" for i in range(1000)]
  seen = []
  vocabularies = [
    train_vocabulary((seen.append(t) or t for t in order), 540, path, max_bytes=800)
    for order, path in ((texts, tmp_path / "a"), (texts[::-1], tmp_path / "b"))
  ]
  assert len(seen) == 2000
  assert vocabularies[0].fingerprint == vocabularies[1].fingerprint
  everything = train_vocabulary(texts, 540, tmp_path / "c")
  assert everything.fingerprint != vocabularies[0].fingerprint


def test_digits_are_split_and_case_and_forms_kept(vocabulary):
  ids = vocabulary.encode("2024", 10)
  assert len(ids) == 6
  assert vocabulary.encode("ABC", 10) != vocabulary.encode("abc", 10)
  assert vocabulary.encode("ﬁ", 10) != vocabulary.encode("fi", 10)


def test_number_of_sentinels(tmp_path):
  few = train_vocabulary(_corpus(), 600, tmp_path / "few.model", sentinels=3)
  assert _piece_id(few, "<unused101>") == 599
  assert _piece_id(few, "<start_of_image>") == 595


def test_sentinel_ids(vocabulary, gemma_like):
  """As in Gemma, whose 256002 is `<unused100>`: the block but for its first."""
  for each in (vocabulary, gemma_like):
    assert each.sentinel_ids() == range(_SIZE - 127, _SIZE)
    assert _piece_id(each, "<unused100>") == _SIZE - 127

  def rename(model):
    model.pieces[_SIZE - 10].piece = "<other>"

  cut = SentencePieceVocabulary.from_serialized(_edited(vocabulary, rename))
  assert cut.sentinel_ids() == range(_SIZE - 127, _SIZE - 10)

  def drop(model):
    for piece in model.pieces[_SIZE - 128 :]:
      piece.piece = piece.piece.replace("unused", "other")

  none = SentencePieceVocabulary.from_serialized(_edited(vocabulary, drop))
  assert len(none.sentinel_ids()) == 0


def test_ids_that_texts_have(vocabulary, gemma_like):
  for each in (vocabulary, gemma_like):
    ids = {int(i) for text in _corpus() for i in each.encode_documents([text])[0]}
    assert all(map(each.is_text, ids))
    controls = [0, 1, 2, 4, 5, 6, 7, 8, 104, 105, 106, *each.sentinel_ids()]
    assert not any(map(each.is_text, [*controls, each.size, -1]))


def test_corpus_too_small_says_the_largest_size(tmp_path):
  texts = ["only a few words"]
  path = tmp_path / "small.model"
  with pytest.raises(DataError, match=r"largest size that works is \d+") as caught:
    train_vocabulary(texts, 5000, path)
  assert not path.exists()
  largest = int(str(caught.value).split("works is ")[1].split(";")[0])
  assert train_vocabulary(texts, largest, path).size == largest


@pytest.mark.parametrize("size", [1, 100, 493, 495])
def test_size_too_small_says_the_smallest_size(tmp_path, size):
  texts = ["only a few words"] * 5
  path = tmp_path / "v.model"
  with pytest.raises(ConfigError, match=r"alphabet take \d+") as caught:
    train_vocabulary(texts, size, path)
  smallest = int(str(caught.value).split("take ")[1].split(";")[0])
  assert train_vocabulary(texts, smallest, path).size == smallest


@pytest.mark.parametrize("texts", [[], ["", " \n\t "]])
def test_empty_corpus(tmp_path, texts):
  with pytest.raises(DataError, match="empty"):
    train_vocabulary(texts, 1000, tmp_path / "v.model")
