"""A random EmbeddingGemma at small sizes, made by transformers and packaged by ST."""

import dataclasses
import itertools
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers import models as tokenizer_models
from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

from embgemma.checkpoints import Description
from embgemma.data import builtin_corpus, prompts
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.inference.embedder import TextEncoder
from embgemma.interop import layout
from embgemma.interop.model import Model
from embgemma.models import encoder_decoder
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import abstract_params
from embgemma.typing import PackedSequences

_SCRIPTS = (
  "The quick brown fox jumps over the lazy dog, twice; then it rests. ",
  "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
  "זה כיף סתם לשמוע איך תנצח קרפד עץ טוב בגן. ",
  "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. ",
  "いろはにほへと ちりぬるを わかよたれそ つねならむ。",
  "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
  "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. ",
  "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। ",
  "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ",
  "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Zażółć gęślą jaźń. Đây là tiếng Việt. ",
  "def f(x):\n\treturn {'a': x ** 2}  # 🙂👍🏽 café naïve e\u0301\n\n",
)


def _scripts(count: int, lengths: list[int], vocabulary, seed: int = 0) -> list[str]:
  """Texts in many scripts whose numbers of tokens (BOS, EOS too) are as asked for.

  A text whose length cannot be met to the token comes as close from below as it can.
  """
  generator = np.random.default_rng(seed)
  texts = []
  for i in range(count):
    target = lengths[i % len(lengths)]
    text = ""
    while len(vocabulary.encode(text, 10_000)) < target:
      text += str(generator.choice(_SCRIPTS))
    while len(vocabulary.encode(text, 10_000)) > target:
      text = text[:-1]
    texts.append(text)
  return texts


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> SentencePieceVocabulary:
  docs = (r["positive"] for r in builtin_corpus.examples("stdlib_docs", "train"))
  texts = [*(text for _, text in zip(range(300), docs, strict=False)), *_SCRIPTS * 3]
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  return train_vocabulary(texts, 3000, path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> pathlib.Path:
  """A SentencePiece model of 640 pieces."""
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  words = [f"{a}{b}{c}" for a in "kstpm" for b in "aeiou" for c in "nrlxd"]
  texts = [" ".join(words[i::7]) for i in range(7)]
  train_vocabulary(texts, 640, path, sentinels=128)
  return path


@pytest.fixture(scope="session")
def causal_logits():
  """Logits of a decoder alone for rows of one text, [R, L]."""

  def logits(config, params, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(
      np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
    )
    sequences = PackedSequences(
      inputs=None,
      input_positions=None,
      input_ids=None,
      targets=tokens,
      decoder_inputs=tokens,
      target_positions=positions,
      target_ids=np.ones_like(tokens),
      weights=np.ones(tokens.shape, np.float32),
    )
    return np.asarray(encoder_decoder.logits(config, params, sequences))

  return logits


@dataclasses.dataclass(frozen=True)
class Reference:
  """A directory that sentence-transformers wrote, and the model that it holds."""

  directory: pathlib.Path
  model: SentenceTransformer


def _tokenizer(vocabulary: SentencePieceVocabulary) -> PreTrainedTokenizerFast:
  """Written out here: Gemma's pipeline by transformers' rule for its merges."""
  pieces = vocabulary.effective_model.pieces
  scores = {p.piece: p.score for p in pieces if p.type == p.NORMAL}
  merges = [
    (scores[piece], piece[:i], piece[i:])
    for piece in scores
    for i in range(1, len(piece))
    if piece[:i] in scores and piece[i:] in scores
  ]
  merges.sort(key=lambda merge: -merge[0])
  ids = {p.piece: i for i, p in enumerate(pieces)}
  bpe = tokenizer_models.BPE(
    ids,
    [(left, right) for _, left, right in merges],
    unk_token="<unk>",
    fuse_unk=True,
    byte_fallback=True,
  )
  tokenizer = Tokenizer(bpe)
  tokenizer.normalizer = normalizers.Replace(" ", "▁")
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.add_special_tokens([p.piece for p in pieces if p.type == p.CONTROL])
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<bos>",
    eos_token="<eos>",
    pad_token="<pad>",
    unk_token="<unk>",
    padding_side="right",
    model_max_length=1024,
  )


def _make_reference(
  directory: pathlib.Path,
  vocabulary: SentencePieceVocabulary,
  padding_side: str = "right",
  heads: tuple[int, ...] = (),
  **shape,
) -> Reference:
  """A bidirectional Gemma 3 of the given shape, packaged and saved.

  Args:
    directory: Made.
    vocabulary: Of its table.
    padding_side: Of its tokenizer.
    heads: Widths between and after the two Dense modules, or nothing.
    **shape: Of Gemma3TextConfig.
  """
  torch.manual_seed(0)
  config = Gemma3TextConfig(
    vocab_size=vocabulary.size,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    use_bidirectional_attention=True,
    use_cache=False,
    **shape,
  )
  text_model = Gemma3TextModel(config).eval()
  with torch.no_grad():
    for name, parameter in text_model.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  inner = directory / "inner"
  text_model.save_pretrained(inner)
  tokenizer = _tokenizer(vocabulary)
  tokenizer.padding_side = padding_side
  tokenizer.save_pretrained(inner)
  transformer = st_modules.Transformer(str(inner), max_seq_length=1024)
  widths = [config.hidden_size, *heads]
  modules = [transformer, st_modules.Pooling(widths[0], "mean")]
  for left, right in itertools.pairwise(widths):
    identity = torch.nn.Identity()
    modules.append(
      st_modules.Dense(left, right, bias=False, activation_function=identity)
    )
  modules.append(st_modules.Normalize())
  named = dict(prompts.OFFICIAL_PROMPTS)
  model = SentenceTransformer(modules=modules, prompts=named, device="cpu")
  packaged = directory / "packaged"
  model.save(str(packaged), create_model_card=False)
  return Reference(packaged, SentenceTransformer(str(packaged), device="cpu"))


_TINY = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 7,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "query_pre_attn_scalar": 24,
  "sliding_window": 16,
  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
  + ["sliding_attention"],
}


@pytest.fixture(scope="session")
def tiny_shape() -> dict:
  """Seven layers in groups of three; every count differs from every other."""
  return _TINY


@pytest.fixture(scope="session")
def make_reference():
  """The function `_make_reference`."""
  return _make_reference


@pytest.fixture(scope="session")
def scripts():
  """The function `_scripts`."""
  return _scripts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, vocabulary) -> Reference:
  """With heads of widths 40 and 24."""
  return _make_reference(
    tmp_path_factory.mktemp("tiny"), vocabulary, heads=(40, 24), **_TINY
  )


@pytest.fixture(scope="session")
def export_texts() -> list[str]:
  """Short, longer, and longer than `export_model` takes."""
  return [
    "one text",
    "another text, a little longer than the first one",
    "texts of many words and more " * 6,
  ]


@pytest.fixture(scope="session")
def export_model(vocabulary) -> Model:
  """Random weights with local and global layers, for texts of up to 64 tokens."""
  length = 64
  config = EmbedderConfig(
    transformer=TransformerConfig(
      vocab_size=3000,
      num_layers=3,
      width=64,
      mlp_width=96,
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      attention_pattern=("local", "local", "global"),
      window=(8, 8),
      max_length=length,
    ),
    hidden_width=128,
    embedding_width=64,
    matryoshka_widths=(64, 32),
  )
  params = layout.allocate(abstract_params(config))
  generator = np.random.default_rng(0)
  for leaf in jax.tree.leaves(params):
    leaf[...] = 0.2 * generator.standard_normal(leaf.shape)
  lengths = {"query": length, "positive": length, "negatives": length}
  return Model(Description(config, lengths, prompts.PROMPTS), vocabulary, params)


@pytest.fixture(scope="session")
def export_vectors(export_model, export_texts) -> np.ndarray:
  """Our own vectors of `export_texts`, [3, E]."""
  model = export_model
  encoder = TextEncoder(
    model.description.embedder, model.vocabulary, model.description.lengths["query"]
  )
  return encoder.encode(model.params, export_texts)
