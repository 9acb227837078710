import argparse
import io
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from transformers.convert_slow_tokenizer import generate_merges

from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import ConfigError, DataError
from embgemma.interop.tokenizer_files import (
  inexact,
  tokenizer_config,
  tokenizer_json,
)
from embgemma.interop.tokenizer_reader import inspect, sentencepiece_model

_Piece = ModelProto.SentencePiece
_NAME = "folder/tokenizer.json"

_SENTENCES = [
  "The quick brown fox jumps over the lazy dog, doesn't it?",
  "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
  "Portez ce vieux whisky au juge blond qui fume ; où ça ? À l'île.",
  "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Y tú?",
  "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim.",
  "Pijamalı hasta yağız şoföre çabucak güvendi.",
  "Zażółć gęślą jaźń, proszę.",
  "Příliš žluťoučký kůň úpěl ďábelské ódy.",
  "Tiếng Việt có nhiều dấu thanh điệu.",
  "Съешь же ещё этих мягких французских булок, да выпей чаю.",
  "Жебракують філософи при ґанку церкви в Гадячі.",
  "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
  "דג סקרן שט בים מאוכזב ולפתע מצא חברה.",
  "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
  "فارسی را پاس بداریم؛ می‌خواهم بدانم.",
  "ऋषियों को सताने वाले दुष्ट राक्षसों का सर्वनाश।",
  "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।",
  "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல்",
  "తెలుగు లిపి చాలా అందమైనది",
  "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
  "ကျွန်ုပ်တို့သည် မြန်မာစာ ရေးသည်",
  "ភាសាខ្មែរ ជាភាសាផ្លូវការ",
  "ქართული ენა და ანბანი",
  "Կրնամ ապակի ուտել և ինծի անհանգիստ չըներ։",
  "የአማርኛ ፊደል ሰላም ለሁሉም",
  "我能吞下玻璃而不伤身体。你好，世界！",
  "視野無限廣，窗外有藍天",
  "いろはにほへと ちりぬるを 色は匂へど散りぬるを",
  "カタカナとﾊﾝｶｸ、全角　スペース",
  "키스의 고유조건은 입술끼리 만나야 하고",
  "ᎠᏴᏫᏯᎢ ᏣᎳᎩ",
  "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ ﬀ ½ Ⅷ №",
  "e\u0301 n\u0303 a\u0308\u0301 Z͑ͫ̓ͪ̂ͫ̽͏̴̙",
  "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 😀😀 ✈️",
  "if x:\n    return y\n\n\tz = {'a': 1_000}  # TODO\r\n",
  "https://example.org/a?b=c&d=%20 user@example.org 3.14159 -1e-10 2024-01-31",
]
_CONTROL_TEXTS = [
  *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>"),
  *("<unused98>", "<start_of_turn>user\nhi<end_of_turn>\n", "a <mask> b"),
  *("<start_of_image>", "<image_soft_token>", "<bos><bos>", "<eos>b<eos>"),
]
_EDGES = [
  *("", " ", "  ", "\t", "\n", "\r\n", "a", " a", "a ", "  a  b  ", "\ta\t\tb\t\t\t"),
  *("a\n\n\nb", "\n \n", "a" + " " * 70, "\n" * 70, "\t" * 70, "a" * 300, "ab" * 200),
  *("\x00", "a\x00b", "\x01\x02\x1b[0m\x7f\x80", "\u200b\u200e\ufeff", "\ufffd\uffff"),
  *("▁", "▁▁", "a▁b", " ▁ ▁▁ ", "▁▁▁▁▁▁ \n", "\U0010ffff", "\u0301", "<0x41><0x0A>"),
  *("<b>x</b>", "<<b>>", "<b", "<b><b> \n\n <table>", "</s><s>", "\u2028\u2029\u0085"),
]
_TEXTS = [
  *_EDGES,
  *_CONTROL_TEXTS,
  *_SENTENCES,
  *(f"  {s}" for s in _SENTENCES),
  *(s.replace(" ", "   ") + " \n\n" for s in _SENTENCES),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  code = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  return train_vocabulary([*code, *_SENTENCES * 20, *_CONTROL_TEXTS], 2500, path)


@pytest.fixture(scope="module")
def gemma_like(trained):
  """As Gemma's file: specials, tags and runs of whitespace are user-defined."""
  model = ModelProto.FromString(trained.serialized)
  for piece in model.pieces:
    if piece.type == _Piece.CONTROL and piece.piece not in ("<pad>", "<eos>", "<bos>"):
      piece.type = _Piece.USER_DEFINED
  runs = ["\n" * n for n in range(1, 32)]
  runs += [space * n for n in range(2, 32) for space in "▁\t"]
  runs += ["<b>", "</b>", "<table>", "[toxicity=0]"]
  defined = [_Piece(piece=run, type=_Piece.USER_DEFINED) for run in runs]
  specials, others = model.pieces[:107], model.pieces[107:]
  others = [piece for piece in others if piece.piece not in runs]
  model.ClearField("pieces")
  model.pieces.extend([*specials, *defined, *others])
  return SentencePieceVocabulary.from_serialized(model.SerializeToString())


@pytest.fixture(scope="module", params=["trained", "gemma_like"])
def vocabulary(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def fast(vocabulary):
  fast = tokenizers.Tokenizer.from_str(tokenizer_json(vocabulary).decode())
  fast.encode_special_tokens = True
  return fast


@pytest.fixture(scope="module")
def read_back(vocabulary):
  return _read_back(tokenizer_json(vocabulary), vocabulary.size)


@pytest.fixture
def folder(vocabulary, tmp_path, monkeypatch):
  """An exported checkpoint without weights, and no network."""
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
  (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(vocabulary))
  config = json.dumps(tokenizer_config(vocabulary, max_length=256))
  (tmp_path / "tokenizer_config.json").write_text(config)
  return tmp_path


def _piece_id(vocabulary, piece):
  return [each.piece for each in vocabulary.effective_model.pieces].index(piece)


def _read_back(content, rows):
  return SentencePieceVocabulary.from_serialized(
    sentencepiece_model(content, _NAME, rows)
  )


def _rewritten(vocabulary, edit):
  content = json.loads(tokenizer_json(vocabulary))
  edit(content)
  return json.dumps(content).encode()


def _ids(vocabulary, texts=_TEXTS):
  return {text: vocabulary.encode(text, 100_000) for text in texts}


def test_tokenizers_gives_our_ids(vocabulary, fast):
  assert {text: fast.encode(text).ids for text in _TEXTS} == _ids(vocabulary)


def test_read_back_gives_our_ids(vocabulary, read_back):
  assert _ids(read_back) == _ids(vocabulary)


_FRAGMENTS = st.sampled_from(
  [*_EDGES, *_CONTROL_TEXTS, *"  \n\tabcdeinrst<>=._", "the", "return", "日本", "é"]
)


@given(
  st.text(st.characters(exclude_categories=["Cs"]))
  | st.lists(_FRAGMENTS, max_size=12).map("".join)
)
def test_any_text_has_our_ids(vocabulary, fast, read_back, text):
  ids = vocabulary.encode(text, 100_000)
  assert fast.encode(text).ids == ids
  assert read_back.encode(text, 100_000) == ids


def test_pieces_are_read_back(vocabulary, read_back):
  model, again = vocabulary.effective_model, read_back.effective_model
  assert [(p.piece, p.type) for p in again.pieces] == [
    (p.piece, p.type) for p in model.pieces
  ]
  for role in ("pad", "eos", "bos", "unk"):
    for field in (f"{role}_id", f"{role}_piece"):
      ours, theirs = (getattr(m.trainer_spec, field) for m in (model, again))
      assert ours == theirs
  assert again.trainer_spec.vocab_size == vocabulary.size


def test_transformers_gives_our_ids(vocabulary, folder):
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  assert {text: auto(text)["input_ids"] for text in _TEXTS} == _ids(vocabulary)


def test_transformers_decodes(vocabulary, folder):
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  for text in _TEXTS:
    ids = vocabulary.encode(text, 100_000)
    assert auto.decode(ids, skip_special_tokens=True) == vocabulary.decode(ids)


@pytest.mark.parametrize("class_name", ["GemmaTokenizer", "GemmaTokenizerFast"])
def test_gemmas_tokenizer_class_gives_our_ids(vocabulary, folder, class_name):
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text()) | {"tokenizer_class": class_name}
  path.write_text(json.dumps(config))
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  assert {text: auto(text)["input_ids"] for text in _TEXTS} == _ids(vocabulary)


def test_tokenizer_model_beside_it_changes_nothing(vocabulary, folder):
  vocabulary.save(folder / "tokenizer.model")
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  assert {text: auto(text)["input_ids"] for text in _TEXTS} == _ids(vocabulary)


def test_transformers_truncates_and_pads_as_we_do(vocabulary, folder):
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  texts = [_SENTENCES[0], "", "a"]
  batch = auto(texts, truncation=True, max_length=7, padding=True)
  expected = [vocabulary.encode(text, 7) for text in texts]
  assert expected[0][-1] == vocabulary.eos_id
  assert len(expected[0]) == 7
  assert batch["input_ids"] == [
    ids + [vocabulary.pad_id] * (7 - len(ids)) for ids in expected
  ]
  assert list(batch) == ["input_ids", "attention_mask"]
  assert [sum(mask) for mask in batch["attention_mask"]] == [len(i) for i in expected]
  long = auto("a b " * 500, truncation=True)["input_ids"]
  assert long == vocabulary.encode("a b " * 500, 256)
  pair = auto("a", "b")["input_ids"]
  assert pair == vocabulary.encode("a", 9) + vocabulary.encode("b", 9)


def test_transformers_knows_the_special_tokens(vocabulary, folder):
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  roles = ("pad", "eos", "bos", "unk", "mask")
  ids = [getattr(auto, f"{role}_token_id") for role in roles]
  assert ids == [0, 1, 2, 3, 4]
  assert len(auto) == vocabulary.size


def test_folder_that_transformers_saves_is_read(vocabulary, folder, tmp_path):
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  auto.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
  auto.save_pretrained(tmp_path / "saved")
  content = (tmp_path / "saved" / "tokenizer.json").read_bytes()
  assert inspect(content, vocabulary.size).beyond == {
    "<image_soft_token>": vocabulary.size
  }
  assert _ids(_read_back(content, vocabulary.size)) == _ids(vocabulary)


def test_merges_are_transformers(vocabulary):
  pieces = vocabulary.effective_model.pieces
  vocab = {piece.piece: i for i, piece in enumerate(pieces)}
  scores = [(piece.piece, piece.score) for piece in pieces]
  others = [piece.piece for piece in pieces if piece.type != _Piece.NORMAL]
  expected = generate_merges(vocab, scores, skip_tokens=others)
  merges = json.loads(tokenizer_json(vocabulary))["model"]["merges"]
  assert len(merges) > 1000
  assert [tuple(merge) for merge in merges] == expected


def test_transformers_own_conversion_gives_our_ids(vocabulary, tmp_path):
  vocabulary.save(tmp_path / "tokenizer.model")
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(
      tokenizer_config(vocabulary, 256) | {"tokenizer_class": "GemmaTokenizer"}
    )
  )
  converted = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert type(converted) is transformers.GemmaTokenizer
  # It matches `▁▁` in the text as written, merges runs of spaces longer than a piece
  # otherwise, and matches control-named pieces where the file has them user-defined.
  odd = {*_CONTROL_TEXTS, *(t for t in _TEXTS if "▁" in t or " " * 32 in t)}
  texts = [text for text in _TEXTS if text not in odd]
  ids = {text: converted(text)["input_ids"] for text in texts}
  assert ids == _ids(vocabulary, texts)
  converted.save_pretrained(tmp_path)
  content = (tmp_path / "tokenizer.json").read_bytes()
  assert _ids(_read_back(content, vocabulary.size)) == _ids(vocabulary)


@given(st.data())
def test_splits_of_one_piece_tie_without_effect(trained, data):
  words = data.draw(st.sets(st.text("ab", min_size=2, max_size=6), max_size=20))
  order = data.draw(st.permutations(sorted(words)))
  model = trained.effective_model
  kept = [p for p in model.pieces if p.type != _Piece.NORMAL or p.piece in ("a", "b")]
  model.ClearField("pieces")
  model.pieces.extend(kept)
  for rank, word in enumerate(order):
    model.pieces.add(piece=word, score=-rank)
  vocabulary = SentencePieceVocabulary.from_serialized(model.SerializeToString())
  fast = tokenizers.Tokenizer.from_str(tokenizer_json(vocabulary).decode())
  for seed in range(20):
    text = "".join(random.Random(seed).choices("ab", k=20))
    assert fast.encode(text).ids == vocabulary.encode(text, 100)


@pytest.mark.parametrize("form", ["strings", "pairs"])
def test_both_forms_of_merges_are_read(trained, form):
  def edit(content):
    if form == "strings":
      content["model"]["merges"] = [" ".join(m) for m in content["model"]["merges"]]

  assert _ids(_read_back(_rewritten(trained, edit), 2500)) == _ids(trained)


def test_added_tokens_need_not_be_in_the_vocab(gemma_like):
  def edit(content):
    for token in content["added_tokens"]:
      del content["model"]["vocab"][token["content"]]

  again = _read_back(_rewritten(gemma_like, edit), gemma_like.size)
  assert _ids(again) == _ids(gemma_like)


def test_tab_in_place_of_its_byte_is_the_byte(gemma_like):
  def edit(content):
    vocab = content["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")
    content["model"]["merges"].append(["\t", "\t"])  # As transformers 4 writes it.

  again = _read_back(_rewritten(gemma_like, edit), gemma_like.size)
  assert _piece_id(again, "<0x09>") == _piece_id(gemma_like, "<0x09>")
  assert _ids(again) == _ids(gemma_like)


def test_pipeline_of_transformers_5_is_read(trained):
  def edit(content):
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}
    content["pre_tokenizer"] = content["post_processor"] = None

  assert _ids(_read_back(_rewritten(trained, edit), 2500)) == _ids(trained)


def test_tokens_without_a_row_are_listed_by_id(trained):
  def edit(content):
    for i, name in ((2501, "<b_soft_token>"), (2500, "<a_soft_token>")):
      content["added_tokens"].append({"id": i, "content": name, "special": True})

  content = _rewritten(trained, edit)
  beyond = inspect(content, 2500).beyond
  assert list(beyond.items()) == [("<a_soft_token>", 2500), ("<b_soft_token>", 2501)]
  assert inspect(content, 2502).beyond == {}
  assert _read_back(content, 2500).size == 2500
  assert _piece_id(_read_back(content, 2502), "<b_soft_token>") == 2501


def _template(*parts):
  names = {"A": {"Sequence": {"id": "A", "type_id": 0}}}
  single = [names.get(p, {"SpecialToken": {"id": p, "type_id": 0}}) for p in parts]
  return {"type": "TemplateProcessing", "single": single}


@pytest.mark.parametrize(
  ("processor", "added"),
  [
    (None, (False, False)),
    (_template("<bos>", "A", "<eos>"), (True, True)),
    (_template("<bos>", "A"), (True, False)),
    (_template("A", "<eos>"), (False, True)),
    (
      {"type": "Sequence", "processors": [{"type": "x"}, _template("<bos>", "A")]},
      (True, False),
    ),
  ],
)
def test_what_a_post_processor_adds(trained, processor, added):
  def edit(content):
    content["post_processor"] = processor
    content["normalizer"] = None  # of no Gemma: facts are read all the same

  facts = inspect(_rewritten(trained, edit), 2500)
  assert (facts.adds_bos, facts.adds_eos) == added
  assert facts.pieces[2] == "<bos>"
  assert len(facts.pieces) == trained.size


def _set(path, value):
  def edit(content):
    *parents, key = path
    for parent in parents:
      content = content[parent]
    content[key] = value

  return edit


def _append_added(parsed, **token):
  vocab = parsed["model"]["vocab"]
  token_id = vocab.setdefault(token["content"], len(vocab))
  parsed["added_tokens"].append({"id": token_id, **token})


def _rename(old, new):
  def edit(content):
    vocab = content["model"]["vocab"]
    vocab[new] = vocab.pop(old)
    for token in content["added_tokens"]:
      token["content"] = new if token["content"] == old else token["content"]

  return edit


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (_set(("model", "type"), "Unigram"), "Unigram, not BPE"),
    (_set(("model", "byte_fallback"), False), "no byte fallback"),
    (_set(("model", "ignore_merges"), True), "sets ignore_merges"),
    (_set(("model", "dropout"), 0.1), "sets dropout"),
    (_set(("model", "end_of_word_suffix"), "</w>"), "sets end_of_word_suffix"),
    (_set(("normalizer",), None), "its normalizer is not"),
    (_set(("normalizer",), {"type": "NFKC"}), "its normalizer is not"),
    (_set(("pre_tokenizer",), {"type": "ByteLevel"}), "its pre-tokenizer is not"),
    (_set(("model", "vocab", "<0x41>"), 9999), "id 172 is missing or taken twice"),
    (_set(("model", "vocab", "<0x41>"), 171), "id 171 is missing or taken twice"),
    (_set(("model", "vocab", "<bos>"), 7), "token '<bos>' has two ids"),
    (_set(("added_tokens", 9, "content"), "<other>"), "id 9 is missing or taken"),
    (_set(("model", "vocab", "zzqq"), 2500), "2501 pieces, the embedding table 2500"),
    (_set(("model", "merges", 9), ["<bos>", "a"]), "merges are not all splits"),
    (lambda c: random.Random(0).shuffle(c["model"]["merges"]), "merges are not all"),
    (lambda c: _append_added(c, content="th", lstrip=True), "'th' takes part of the"),
    (lambda c: _append_added(c, content="a", special=True), "'a' is a control piece"),
    (_rename("t", "tzzqq"), "holds a character that is no piece itself"),
    (_rename("<bos>", "<s>"), r"lacks pieces .*\(bos\)"),
    (_rename("<0x80>", "zzqq"), "does not load"),
  ],
)
def test_ids_that_no_sentencepiece_model_gives(trained, edit, message):
  content = _rewritten(trained, edit)
  with pytest.raises(DataError, match=message) as caught:
    sentencepiece_model(content, _NAME, 2500)
  assert _NAME in str(caught.value)


def test_special_token_of_any_name_is_read(trained):
  content = _rewritten(trained, _rename("<unused3>", "< >"))
  assert _ids(_read_back(content, 2500)) == _ids(trained)


def test_user_defined_token_with_a_space(gemma_like):
  content = _rewritten(gemma_like, _rename("<b>", "< b"))
  with pytest.raises(DataError, match=f"{_NAME}.*'< b' holds a space, not '▁'"):
    sentencepiece_model(content, _NAME, gemma_like.size)


@pytest.mark.parametrize(
  "content",
  [b"", b"[]", b"{}", b"\xff\xfe\x00", b"version https://git-lfs", b'{"model": 1}'],
)
def test_not_a_tokenizer_json(content):
  with pytest.raises(DataError, match=f"{_NAME} is not a tokenizer.json.*again"):
    sentencepiece_model(content, _NAME, 2500)
  with pytest.raises(DataError, match=f"{_NAME} is not a tokenizer.json.*again"):
    inspect(content, 2500, _NAME)


def _setting(spec, field, value):
  return lambda model: setattr(getattr(model, spec), field, value)


def _no_bytes(model):
  model.trainer_spec.byte_fallback = False
  for piece in model.pieces:
    if piece.type == _Piece.BYTE:
      piece.type = _Piece.NORMAL


def _nfkc(model):
  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c"]),
    model_writer=writer,
    model_type="char",
    vocab_size=7,
    normalization_rule_name="nfkc",
    minloglevel=2,
  )
  charsmap = ModelProto.FromString(writer.getvalue()).normalizer_spec
  model.normalizer_spec.precompiled_charsmap = charsmap.precompiled_charsmap


def _unused(model):
  next(p for p in model.pieces if p.piece == "th").type = _Piece.UNUSED


def _tie(model):
  pieces = {piece.piece: piece for piece in model.pieces}
  pieces["th"].score = pieces["re"].score


def _extra(piece, kind):
  return lambda model: model.pieces.add(piece=piece, type=kind)


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (_setting("trainer_spec", "model_type", TrainerSpec.UNIGRAM), "no BPE model"),
    (_no_bytes, "no byte fallback"),
    (_nfkc, "normalises text"),
    (_setting("normalizer_spec", "add_dummy_prefix", True), "add_dummy_prefix"),
    (
      _setting("normalizer_spec", "remove_extra_whitespaces", True),
      "remove_extra_whitespaces",
    ),
    (_setting("normalizer_spec", "escape_whitespaces", False), "escape_whitespaces"),
  ],
)
def test_vocabulary_that_tokenizer_json_cannot_express(trained, edit, message):
  model = ModelProto.FromString(trained.serialized)
  edit(model)
  vocabulary = SentencePieceVocabulary.from_serialized(model.SerializeToString())
  with pytest.raises(ConfigError, match=f"{message}.*; use Gemma's"):
    tokenizer_json(vocabulary)


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (_unused, "'th' is UNUSED"),
    (_tie, "'th' and 're'|'re' and 'th'"),
    (_extra("a b", _Piece.USER_DEFINED), "'a b' holds a space, not '▁'"),
    (_extra("₪", _Piece.CONTROL), "'₪' is a control piece of one character"),
    (_extra("₪₪", _Piece.NORMAL), "'₪₪' holds a character that is no piece itself"),
  ],
)
def test_vocabulary_that_gives_some_texts_other_ids(trained, edit, message):
  model = ModelProto.FromString(trained.serialized)
  edit(model)
  vocabulary = SentencePieceVocabulary.from_serialized(model.SerializeToString())
  assert re.search(message, inexact(vocabulary))
  assert not inexact(trained)
  assert tokenizers.Tokenizer.from_str(tokenizer_json(vocabulary).decode())


def test_unreachable_piece_of_other_characters_is_no_hindrance(trained):
  model = ModelProto.FromString(trained.serialized)
  model.pieces.add(piece="₪ab₪", score=-9999.0)
  vocabulary = SentencePieceVocabulary.from_serialized(model.SerializeToString())
  fast = tokenizers.Tokenizer.from_str(tokenizer_json(vocabulary).decode())
  for text in ("₪ab₪", "₪₪", "x₪ab"):
    assert fast.encode(text).ids == vocabulary.encode(text, 100)
