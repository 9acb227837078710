"""Import and export against sentence-transformers' own encode."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil

import flax.linen as nn
import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from embgemma.checkpoints import Description
from embgemma.data import prompts
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError, ConfigError, DataError
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import conversion, sentence_transformers_writer
from embgemma.interop.model import Model
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.models.embedder import init_params
from embgemma.typing import Params

_BOUND = 2e-5
# Windows of 16 and 512 end at 8 and 256 keys: errors show from the next length on.
_LENGTHS = [2, 3, 5, 9, 10, 17, 18, 33, 64, 100, 128, 200, 256, 257, 258, 300, 400]
_LENGTHS += [511, 512, 513, 514, 600, 650, 700]


def _compare(reference, embedder, texts, prompt, batch_size=16) -> None:
  prefix = embedder.prompt(prompt)
  theirs = reference.model.encode(
    texts, prompt_name=None if prompt == "none" else prompt, batch_size=batch_size
  )
  ours = embedder.encode([prefix + text for text in texts])
  np.testing.assert_allclose(ours, theirs, atol=_BOUND, rtol=0)
  # A bound that anything meets would prove nothing.
  assert np.median(np.abs(theirs[:-1] - theirs[1:]).max(axis=1)) > 1000 * _BOUND


def _same_ids(reference, vocabulary, texts) -> None:
  theirs = reference.model.tokenizer(texts)["input_ids"]
  ours = [ids.tolist() for ids in vocabulary.encode_batch(texts, 10_000)]
  assert ours == theirs


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_tiny_equals_the_reference(
  tmp_path, vocabulary, padding_side, make_reference, scripts, tiny_shape
):
  reference = make_reference(
    tmp_path, vocabulary, padding_side, heads=(40, 24), **tiny_shape
  )
  # Where nothing is to be seen of the padding, fewer will do.
  texts = scripts(200 if padding_side == "right" else 24, _LENGTHS, vocabulary)
  _same_ids(reference, conversion.open_embedder(reference.directory).vocabulary, texts)
  embedder = CheckpointEmbedder(reference.directory)
  _compare(reference, embedder, texts[:96], "none")
  for prompt in ("query", "document"):  # every length once
    _compare(reference, embedder, texts[:24], prompt)


@pytest.mark.slow
def test_true_width_equals_the_reference(tmp_path, vocabulary, make_reference, scripts):
  reference = make_reference(
    tmp_path,
    vocabulary,
    heads=(3072, 768),
    hidden_size=768,
    intermediate_size=1152,
    num_hidden_layers=7,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=512,
  )
  embedder = CheckpointEmbedder(reference.directory)
  config = embedder.description.embedder
  assert config.transformer.window == (256, 256)
  assert config.transformer.attention_pattern == ("local",) * 5 + ("global",)
  assert config.matryoshka_widths == (768, 512, 256, 128)
  texts = scripts(len(_LENGTHS), _LENGTHS, vocabulary)
  _compare(reference, embedder, texts, "none", batch_size=8)


def test_packaging(tiny):
  model = conversion.open_embedder(tiny.directory)
  assert model.description.max_length == 1024
  assert model.description.prompts == {**prompts.OFFICIAL_PROMPTS, "none": ""}
  config = model.description.embedder
  assert config.transformer.attention_pattern == ("local", "local", "global")
  assert config.transformer.window == (8, 8)
  assert (config.pooler, config.hidden_width, config.embedding_width) == (
    "mean",
    40,
    24,
  )
  assert config.matryoshka_widths == (24,)
  assert any("made from tokenizer.json" in note for note in model.notes)


def _rewrite(path: pathlib.Path, change) -> None:
  """Applies a change to what a JSON file holds."""
  path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _copy(tiny, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(tiny.directory, tmp_path / "copy"))


def _same_params(one: Model, other: Model) -> bool:
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, one.params, other.params)))


def _old_spelling(values: dict) -> dict:
  rope = values.pop("rope_parameters")
  pattern = values.pop("layer_types")
  assert pattern[5] == "full_attention"
  return values | {
    "rope_theta": rope["full_attention"]["rope_theta"],
    "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
    "rope_scaling": None,
    "sliding_window_pattern": 3,
  }


def test_old_and_new_spellings_agree(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)
  assert "rope_parameters" in json.loads((copy / "config.json").read_text())
  _rewrite(copy / "config.json", _old_spelling)
  again = conversion.open_embedder(copy).description
  assert again == conversion.open_embedder(tiny.directory).description
  # transformers reads the old spelling alike.
  old = SentenceTransformer(str(copy), device="cpu")
  text = "many words " * 40
  np.testing.assert_allclose(old.encode(text), tiny.model.encode(text), atol=1e-6)


def test_old_files_of_pooling_and_dense(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)
  _rewrite(
    copy / "1_Pooling" / "config.json",
    lambda _: {
      "word_embedding_dimension": 32,
      "pooling_mode_cls_token": False,
      "pooling_mode_mean_tokens": True,
      "pooling_mode_max_tokens": False,
      "include_prompt": True,
    },
  )
  _rewrite(
    copy / "modules.json",
    lambda modules: [
      m | {"type": f"sentence_transformers.models.{m['type'].rpartition('.')[2]}"}
      for m in modules
    ],
  )
  (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
  again = conversion.open_embedder(copy)
  assert again.description.max_length == 512
  assert _same_params(again, conversion.open_embedder(tiny.directory))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_shards_and_prefixes(tiny, tmp_path, prefix):
  copy = _copy(tiny, tmp_path)
  tensors = safetensors.numpy.load_file(copy / "model.safetensors")
  (copy / "model.safetensors").unlink()
  named = {prefix + name: tensor for name, tensor in sorted(tensors.items())}
  shards = {"a.safetensors": list(named)[::2], "b.safetensors": list(named)[1::2]}
  for file, names in shards.items():
    safetensors.numpy.save_file({n: named[n] for n in names}, copy / file)
  index = {"weight_map": {n: file for file, names in shards.items() for n in names}}
  (copy / "model.safetensors.index.json").write_text(json.dumps(index))
  assert _same_params(
    conversion.open_embedder(copy), conversion.open_embedder(tiny.directory)
  )


def test_bfloat16_computes_in_bfloat16(tiny, tmp_path):
  directory = tmp_path / "half"
  directory.mkdir()
  full = conversion.open_embedder(tiny.directory)
  sentence_transformers_writer.write(full, directory, "bfloat16", 1024)
  half = conversion.open_embedder(directory)
  assert half.description.embedder.transformer.dtype == "bfloat16"
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), full.params
  )
  assert _same_params(dataclasses.replace(full, params=rounded), half)
  # Both in bfloat16: close, not equal, as the order of roundings differs.
  reference = SentenceTransformer(str(directory), device="cpu")
  assert next(reference.parameters()).dtype == torch.bfloat16
  texts = ["some words", "и ещё немного слов"]
  ours = CheckpointEmbedder(directory).encode(texts)
  np.testing.assert_allclose(ours, reference.encode(texts), atol=0.05)


def test_bare_text_model_is_a_headless_mean_pooler(
  tmp_path, vocabulary, make_reference, scripts, tiny_shape
):
  reference = make_reference(tmp_path, vocabulary, **tiny_shape)
  embedder = CheckpointEmbedder(tmp_path / "inner")
  assert embedder.description.embedder.hidden_width is None
  _compare(reference, embedder, scripts(20, _LENGTHS, vocabulary), "none")
  again = tmp_path / "again"
  again.mkdir()
  sentence_transformers_writer.write(
    conversion.open_embedder(tmp_path / "inner"), again, "float32", 1024
  )
  exported = dataclasses.replace(
    reference, model=SentenceTransformer(str(again), device="cpu")
  )
  _compare(exported, embedder, ["one text", "another text"], "query")


def test_causal_model_is_a_decoder(tmp_path, vocabulary, tiny_shape, causal_logits):
  torch.manual_seed(0)
  config = Gemma3TextConfig(vocab_size=vocabulary.size, **tiny_shape)
  reference = Gemma3ForCausalLM(config).eval()
  with torch.no_grad():
    for name, parameter in reference.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  reference.save_pretrained(tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(vocabulary.serialized)
  model = conversion.load("hf", tmp_path)
  assert isinstance(model.description.config, BackboneConfig)
  decoder = model.description.config.decoder
  assert (decoder.mask, decoder.window) == ("causal", (15, 0))
  tokens = np.random.default_rng(0).integers(0, vocabulary.size, (2, 60), np.int32)
  with torch.no_grad():
    theirs = reference(torch.from_numpy(tokens).long()).logits.numpy()
  ours = causal_logits(model.description.config, model.params, tokens)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert np.abs(theirs).max() > 1
  with pytest.raises(CheckpointError, match="holds pretrained stacks"):
    CheckpointEmbedder(tmp_path)


@functools.cache
def _random_params(config: EmbedderConfig) -> Params:
  params = nn.unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
  return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), params)


def _trained(vocabulary: SentencePieceVocabulary, **changes) -> Model:
  config = EmbedderConfig(
    **{
      "transformer": TransformerConfig(
        vocab_size=vocabulary.size,
        num_layers=5,
        width=48,
        mlp_width=64,
        num_heads=3,
        num_kv_heads=1,
        head_dim=12,
        attention_pattern=("local", "global"),
        window=(7, 7),
        initial_branch_gain=0.1,
        max_length=800,
      ),
      "hidden_width": 64,
      "embedding_width": 160,
      "matryoshka_widths": (160, 128, 32),
    }
    | changes
  )
  lengths = {"query": 700, "positive": 700, "negatives": 700}
  description = Description(config, lengths, prompts.PROMPTS)
  return Model(description, vocabulary, _random_params(config))


def _export(model: Model, directory: pathlib.Path, **options) -> pathlib.Path:
  directory.mkdir()
  sentence_transformers_writer.write(
    model, directory, **{"dtype": "float32", "max_length": 700} | options
  )
  return directory


@pytest.mark.parametrize("pooler", ["mean", "first", "last"])
def test_export_equals_us(tmp_path, vocabulary, pooler, scripts):
  model = _trained(vocabulary, pooler=pooler)
  conversion.write_checkpoint(model, tmp_path / "checkpoint")
  ours = CheckpointEmbedder(tmp_path / "checkpoint")
  exported = _export(model, tmp_path / "hf")
  reference = SentenceTransformer(str(exported), device="cpu")
  texts = scripts(len(_LENGTHS), _LENGTHS, vocabulary)
  few = texts[::3]  # short and long
  for prompt, some in (("query", texts), ("document", few)):
    prefix = ours.prompt(prompt)
    theirs = reference.encode(some, prompt_name=prompt)
    mine = ours.encode([prefix + text for text in some])
    np.testing.assert_allclose(mine, theirs, atol=_BOUND, rtol=0)
  assert reference.max_seq_length == 700
  assert reference.similarity_fn_name == "cosine"
  # Cut by us and by sentence-transformers; it only renormalises when told to.
  theirs = reference.encode(
    few, prompt_name="query", truncate_dim=128, normalize_embeddings=True
  )
  prefix = ours.prompt("query")
  (mine,) = ours.stream([prefix + text for text in few], 128)
  np.testing.assert_allclose(mine, theirs, atol=_BOUND, rtol=0)


def test_import_of_export_is_identical(tmp_path, vocabulary):
  model = _trained(vocabulary)
  again = conversion.load("hf", _export(model, tmp_path / "hf"))
  assert _same_params(model, again)
  assert again.vocabulary.serialized == vocabulary.serialized
  assert again.description.prompts == model.description.prompts
  assert again.description.lengths == model.description.lengths
  config = model.description.embedder
  # How a run starts is no property of the weights; a default becomes a number.
  transformer = dataclasses.replace(
    config.transformer, initial_branch_gain=1.0, query_scalar=12.0
  )
  assert again.description.embedder == dataclasses.replace(
    config, transformer=transformer
  )
  assert not again.notes


def test_special_tokens_in_text_stay_text(tmp_path, vocabulary):
  exported = _export(_trained(vocabulary), tmp_path / "hf")
  tokenizer = SentenceTransformer(str(exported), device="cpu").tokenizer
  texts = ["a <bos> b", "<start_of_turn>user", "<unused7> <mask>", "<eos>"]
  ours = [ids.tolist() for ids in vocabulary.encode_batch(texts, 100)]
  assert tokenizer(texts)["input_ids"] == ours


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pooler": "attention"}, "no module for it"),
    ({"window": (255, 256)}, "same number on both sides"),
    ({"query_scalar": 12.5}, "whole numbers only"),
    ({"num_heads": 5}, "no multiple of num_heads"),
  ],
)
def test_what_cannot_be_exported(tmp_path, vocabulary, changes, message):
  model = _trained(vocabulary)
  config = model.description.embedder
  if "pooler" not in changes:
    changes = {"transformer": dataclasses.replace(config.transformer, **changes)}
  config = dataclasses.replace(config, **changes)
  description = dataclasses.replace(model.description, config=config)
  with pytest.raises(ConfigError, match=message):
    _export(dataclasses.replace(model, description=description), tmp_path / "hf")
  assert not list((tmp_path / "hf").iterdir())


@pytest.mark.parametrize("length", [2, 801])
def test_max_length_beyond_the_model(tmp_path, vocabulary, length):
  with pytest.raises(ConfigError, match="not in 3..800"):
    _export(_trained(vocabulary), tmp_path / "hf", max_length=length)


def _drop(name):
  return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def _put(name, tensor):
  return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_drop("layers.3.mlp.up_proj.weight"), "missing: layers.3.mlp.up_proj.weight"),
    (_put("layers.7.x", np.ones(2, np.float32)), "unknown: layers.7.x"),
    (
      _put("norm.weight", np.ones(31, np.float32)),
      r"misshapen: norm.weight is \[31\], the configuration says \[32\]",
    ),
    (_put("norm.weight", np.ones(32, np.float16)), r"norm.weight \(F16\)"),
    (_put("norm.weight", np.ones(32, np.int32)), r"norm.weight \(I32\)"),
    (
      _put("norm.weight", np.full(32, np.nan, np.float32)),
      "norm.weight holds NaN or infinity",
    ),
    (lambda tensors: {}, "missing: embed_tokens.weight\n(.*\n){9}  … and"),
  ],
)
def test_tensors_that_do_not_fit(tiny, tmp_path, change, message):
  copy = _copy(tiny, tmp_path)
  path = copy / "model.safetensors"
  tensors = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(CheckpointError, match=message):
    conversion.open_embedder(copy)


def _truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-100])


def _lfs_pointer(path: pathlib.Path) -> None:
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _pickled(path: pathlib.Path) -> None:
  path.rename(path.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (_truncate, "model.safetensors .*truncated"),
    (_lfs_pointer, "Git LFS pointer"),
    (lambda path: path.write_bytes(b""), "0 bytes.*no complete safetensors"),
    (_pickled, "pytorch_model.bin is a pickle.*never"),
    (lambda path: path.unlink(), "holds no model.safetensors"),
  ],
)
def test_damaged_weights(tiny, tmp_path, damage, message):
  copy = _copy(tiny, tmp_path)
  damage(copy / "model.safetensors")
  with pytest.raises(CheckpointError, match=message):
    conversion.open_embedder(copy)


def test_a_pickle_beside_safetensors_is_left_alone(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)
  (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  assert conversion.open_embedder(copy).size > 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hidden_size": None}, "keys are missing: hidden_size"),
    ({"rope_parameters": {}}, "no rope_theta for sliding_attention"),
    ({"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
    ({"layer_types": ["full_attention"]}, "must be 7"),
    ({"model_type": "gemma3"}, "'gemma3', not 'gemma3_text'"),
    ({"rope_parameters": None}, "missing: rope_theta, rope_local"),
    ({"sliding_window": "wide"}, "wide"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"head_dim": 11}, "head_dim must be even"),
    ({"num_attention_heads": "four"}, "num_heads"),
    ({"matryoshka_dimensions": [24, 999]}, "999"),
  ],
)
def test_configurations_refused(tiny, tmp_path, change, message):
  copy = _copy(tiny, tmp_path)
  _rewrite(copy / "config.json", lambda values: values | change)
  with pytest.raises(CheckpointError, match=message) as caught:
    conversion.open_embedder(copy)
  assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
  ("scaling", "message"),
  [
    ({"rope_type": "linear"}, "'linear' is not supported"),
    ({"rope_type": "yarn", "factor": 2.0}, "'yarn' is not supported"),
  ],
)
def test_other_rope_is_refused(tiny, tmp_path, scaling, message):
  copy = _copy(tiny, tmp_path)

  def scale(values):
    values["rope_parameters"]["full_attention"] |= scaling
    return values

  _rewrite(copy / "config.json", scale)
  with pytest.raises(CheckpointError, match=message):
    conversion.open_embedder(copy)


def test_linear_rope_of_global_layers(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)

  def scale(values):
    rope = values["rope_parameters"]["full_attention"]
    rope |= {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    return values

  _rewrite(copy / "config.json", scale)
  text = "many different words, and then " * 40
  theirs = SentenceTransformer(str(copy), device="cpu").encode([text])
  np.testing.assert_allclose(
    CheckpointEmbedder(copy).encode([text]), theirs, atol=_BOUND
  )
  assert np.abs(theirs - tiny.model.encode([text])).max() > 1e-3
  exported = _export(conversion.open_embedder(copy), tmp_path / "hf")
  again = SentenceTransformer(str(exported), device="cpu").encode([text])
  np.testing.assert_allclose(again, theirs, atol=_BOUND)


def _notes(directory: pathlib.Path) -> str:
  return "\n".join(conversion.open_embedder(directory).notes)


def test_a_halved_window_is_noted(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)
  _rewrite(copy / "config.json", lambda values: values | {"sliding_window": 257})
  assert "trained with 512" in _notes(copy)
  assert "window='(256, 256)'" in _notes(copy)
  assert "sliding_window" not in _notes(tiny.directory)
  transformer = conversion.open_embedder(copy).description.embedder.transformer
  assert transformer.window == (128, 128)  # as transformers reads it


def test_a_tokenizer_without_eos_is_noted(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)

  def only_bos(values):
    del values["post_processor"]["single"][-1]
    return values

  _rewrite(copy / "tokenizer.json", only_bos)
  assert "does not add EOS" in _notes(copy)
  assert "does not add" not in _notes(tiny.directory)


def test_truncation_at_the_beginning_is_noted(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)
  _rewrite(
    copy / "tokenizer_config.json", lambda values: values | {"truncation_side": "left"}
  )
  assert "cut at their beginning" in _notes(copy)


def test_tokenizers_that_disagree_are_noted(tiny, tmp_path, vocabulary):
  copy = _copy(tiny, tmp_path)
  model = vocabulary.effective_model
  (copy / "tokenizer.model").write_bytes(model.SerializeToString())
  assert "disagree" not in _notes(copy)
  model.pieces[2000].piece = "otter▁"
  (copy / "tokenizer.model").write_bytes(model.SerializeToString())
  assert "disagree on 1 tokens, such as 2000: 'otter▁'" in _notes(copy)


def test_a_left_over_tokenizer_model_gives_way(tiny, tmp_path, vocabulary):
  copy = _copy(tiny, tmp_path)
  model = vocabulary.effective_model
  del model.pieces[-70:]
  (copy / "tokenizer.model").write_bytes(model.SerializeToString())
  assert conversion.open_embedder(copy).vocabulary.size == vocabulary.size


def test_left_over_shards_are_not_read(tiny, tmp_path):
  copy = _copy(tiny, tmp_path)
  (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
  assert _same_params(
    conversion.open_embedder(copy), conversion.open_embedder(tiny.directory)
  )


@pytest.mark.parametrize("table", [{}, {"query": "", "document": ""}, {"query": "q: "}])
def test_prompts_of_its_own(tiny, tmp_path, table):
  copy = _copy(tiny, tmp_path)
  _rewrite(
    copy / "config_sentence_transformers.json",
    lambda values: values | {"prompts": table},
  )
  model = conversion.open_embedder(copy)
  assert "not EmbeddingGemma's" in "\n".join(model.notes)
  assert model.description.prompts == {**table, "none": ""}
  exported = _export(model, tmp_path / "hf")
  assert conversion.open_embedder(exported).description.prompts == {**table, "none": ""}


_ATOM = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
_LIST = st.lists(_ATOM, max_size=2)
_OBJECT = st.dictionaries(st.text(max_size=3), _ATOM | _LIST, max_size=2)
_JUNK = _ATOM | _LIST | _OBJECT | st.lists(_OBJECT, max_size=2)
_KEYS = {
  "config.json": ("layer_types", "rope_parameters", "sliding_window", "rms_norm_eps",
    "query_pre_attn_scalar", "hidden_size", "head_dim", "num_hidden_layers",
    "matryoshka_dimensions", "max_position_embeddings", "vocab_size"),
  "config_sentence_transformers.json": ("prompts", "default_prompt_name"),
  "1_Pooling/config.json": ("pooling_mode", "include_prompt"),
  "2_Dense/config.json": ("bias", "activation_function"),
  "sentence_bert_config.json": ("max_seq_length", "do_lower_case"),
  "tokenizer_config.json": ("model_max_length", "truncation_side"),
  "tokenizer.json": ("post_processor", "added_tokens", "model"),
}  # fmt: skip


@hypothesis.given(
  place=st.sampled_from([(f, key) for f, keys in _KEYS.items() for key in keys]),
  junk=_JUNK,
)
@hypothesis.settings(
  max_examples=60,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_junk_is_refused_or_read(tiny, tmp_path_factory, place, junk):
  file, key = place
  copy = _copy(tiny, tmp_path_factory.mktemp("junk"))
  # Sizes that fit no tensor are refused only after arrays of that size are made.
  hypothesis.assume(not (isinstance(junk, int) and junk > 10_000))
  _rewrite(copy / file, lambda values: values | {key: junk})
  with contextlib.suppress(CheckpointError, ConfigError, DataError):
    conversion.open_embedder(copy)


@pytest.mark.parametrize(
  ("file", "change", "message"),
  [
    ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling max is not"),
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is false"),
    ("2_Dense/config.json", {"bias": True}, "bias True"),
    (
      "3_Dense/config.json",
      {"activation_function": "torch.nn.modules.activation.Tanh"},
      "Tanh is not supported",
    ),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
  ],
)
def test_packaging_refused(tiny, tmp_path, file, change, message):
  copy = _copy(tiny, tmp_path)
  _rewrite(copy / file, lambda values: values | change)
  with pytest.raises(CheckpointError, match=message):
    conversion.open_embedder(copy)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda m: m[:3], "Transformer, Pooling, Dense; embgemma has"),
    (lambda m: m[:1] + [m[1] | {"path": "../../elsewhere"}] + m[2:], "outside"),
    (lambda m: m[:1] + [m[1] | {"path": "/etc"}] + m[2:], "outside"),
    (lambda m: m[1:], "must come first"),
    (lambda m: [{"idx": 0}], "damaged"),
  ],
)
def test_modules_refused(tiny, tmp_path, change, message):
  copy = _copy(tiny, tmp_path)
  _rewrite(copy / "modules.json", change)
  with pytest.raises(CheckpointError, match=message):
    conversion.open_embedder(copy)


def test_tokenizer_of_another_model(tiny, tmp_path, vocabulary):
  copy = _copy(tiny, tmp_path)
  (copy / "tokenizer.json").unlink()
  with pytest.raises(CheckpointError, match="neither tokenizer"):
    conversion.open_embedder(copy)
  model = vocabulary.effective_model
  del model.pieces[-70:]
  (copy / "tokenizer.model").write_bytes(model.SerializeToString())
  with pytest.raises(CheckpointError, match="2,930 pieces, the model's table 3,000"):
    conversion.open_embedder(copy)


def test_image_token_beyond_the_table(tiny, tmp_path, vocabulary):
  copy = _copy(tiny, tmp_path)
  token = {"id": vocabulary.size, "content": "<image_soft_token>", "special": True}
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

  def add(values):
    values["added_tokens"].append(token | flags)
    return values

  _rewrite(copy / "tokenizer.json", add)
  model = conversion.open_embedder(copy)
  assert any("<image_soft_token> (id 3000) has no row" in note for note in model.notes)
  vectors = CheckpointEmbedder(copy).encode(["an <image_soft_token> in a text"])
  assert np.isfinite(vectors).all()
