import dataclasses

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop import gguf_file, layout
from embgemma.interop.model import Model
from embgemma.models import quantization
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.models.embedder import Embedder, abstract_packed_texts, abstract_params

ARCH = "gemma-embedding"
TRANSFORMER = TransformerConfig(
  vocab_size=512,
  num_layers=7,
  width=32,
  mlp_width=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  window=(3, 3),
  rope_base_local=300.0,
  rope_base_global=40_000.0,
  norm_epsilon=1e-3,
  max_length=96,
)
CONFIG = EmbedderConfig(
  TRANSFORMER, hidden_width=96, embedding_width=32, matryoshka_widths=(32,)
)
# Names in the file to paths in a layer of our tree.
LAYER = {
  "attn_norm": "pre_attention_norm/scale",
  "attn_q": "attention/query/kernel",
  "attn_k": "attention/key/kernel",
  "attn_v": "attention/value/kernel",
  "attn_q_norm": "attention/query_norm/scale",
  "attn_k_norm": "attention/key_norm/scale",
  "attn_output": "attention/output/kernel",
  "post_attention_norm": "post_attention_norm/scale",
  "ffn_norm": "pre_mlp_norm/scale",
  "ffn_gate": "mlp/gate/kernel",
  "ffn_up": "mlp/up/kernel",
  "ffn_down": "mlp/down/kernel",
  "post_ffw_norm": "post_mlp_norm/scale",
}


def with_transformer(**changes):
  transformer = dataclasses.replace(TRANSFORMER, **changes)
  return dataclasses.replace(CONFIG, transformer=transformer)


def without_heads(config=CONFIG):
  return dataclasses.replace(config, hidden_width=None)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = [f"a window of {i} words, then  two spaces" for i in range(50)]
  return train_vocabulary(texts, 410, path, sentinels=2)


def random_model(config, vocabulary, seed=0):
  params = layout.allocate(abstract_params(config))
  generator = np.random.default_rng(seed)
  for leaf in jax.tree.leaves(params):
    leaf[...] = 0.3 * generator.standard_normal(leaf.shape)
  params["encoder"]["embedder"]["table"][5] = 0  # a block without a scale
  lengths = {"query": 32, "positive": 64, "negatives": 64}
  return Model(Description(config, lengths, PROMPTS), vocabulary, params)


def written(model, directory, weight_type="F32"):
  path = directory / "model.gguf"
  gguf_file.write(model, path, weight_type)
  return gguf.GGUFReader(path)


def value(reader, key):
  field = reader.get_field(key)
  return None if field is None else field.contents()


def tensors(reader):
  return {tensor.name: tensor for tensor in reader.tensors}


def expected_tensors(params):
  """What TRANSFORMER's file must hold: its groups have six layers, one is left."""
  encoder = params["encoder"]
  expected = {
    "token_embd.weight": encoder["embedder"]["table"],
    "output_norm.weight": np.float32(1) + encoder["final_norm"]["scale"],
  }
  for layer in range(7):
    for name, path in LAYER.items():
      leaf = encoder["groups" if layer < 6 else "remainder"][f"layer_{layer % 6}"]
      for key in path.split("/"):
        leaf = leaf[key]
      leaf = leaf[0] if layer < 6 else leaf
      leaf = leaf.T if leaf.ndim == 2 else np.float32(1) + leaf
      expected[f"blk.{layer}.{name}.weight"] = leaf
  for name, head in (("dense_2", "projection_up"), ("dense_3", "projection_down")):
    if head in params:
      expected[f"{name}.weight"] = params[head]["kernel"].T
  return expected


def q8_0(array):
  """Blocks of 32: a float16 scale, then codes round-half-away-from-zero(x / d)."""
  blocks = array.reshape(-1, 32)
  scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
  inverse = np.zeros_like(scale)
  np.divide(np.float32(1), scale, out=inverse, where=scale > 0)
  scaled = blocks * inverse
  codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
  stored = scale.astype(np.float16)
  packed = np.concatenate([stored.view(np.uint8), codes.astype(np.int8).view("u1")], 1)
  return packed.reshape(len(array), -1), (codes * stored).reshape(array.shape)


@pytest.mark.parametrize("config", [CONFIG, without_heads()], ids=["heads", "plain"])
@pytest.mark.parametrize("weight_type", gguf_file.WEIGHT_TYPES)
def test_every_tensor_is_ours(config, weight_type, vocabulary, tmp_path):
  rules = quantization.int4_block32(table="q8_0")
  if weight_type == "TRAINED":
    config = dataclasses.replace(config, quantization=rules)
  model = random_model(config, vocabulary)
  found = tensors(written(model, tmp_path, weight_type))
  expected = expected_tensors(model.params)
  trained = expected_tensors(jax.device_get(quantization.rounded(model.params, rules)))
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    tensor = found[name]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert tuple(tensor.shape[::-1]) == array.shape, name
    kind = weight_type if array.ndim == 2 else "F32"
    if kind in ("Q4_0", "TRAINED"):
      kind = "Q8_0" if name.startswith("token_embd") else "Q4_0"
      array = trained[name]  # what a model trained so computes with, bit for bit
    assert tensor.tensor_type.name == kind, name
    if kind == "BF16":
      array = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    elif weight_type == "Q8_0" and kind == "Q8_0":
      packed, array = q8_0(np.ascontiguousarray(array))
      np.testing.assert_array_equal(tensor.data, packed, name)
    np.testing.assert_array_equal(values, array, name)


def test_settings(vocabulary, tmp_path):
  reader = written(random_model(CONFIG, vocabulary), tmp_path, "Q8_0")
  expected = {
    "general.architecture": ARCH,
    "general.type": "model",
    "general.file_type": 7,
    "general.quantization_version": 2,
    f"{ARCH}.context_length": 96,
    f"{ARCH}.block_count": 7,
    f"{ARCH}.embedding_length": 32,
    f"{ARCH}.feed_forward_length": 64,
    f"{ARCH}.attention.head_count": 4,
    f"{ARCH}.attention.head_count_kv": 2,
    f"{ARCH}.attention.key_length": 16,
    f"{ARCH}.attention.value_length": 16,
    f"{ARCH}.attention.sliding_window": 6,
    f"{ARCH}.attention.sliding_window_pattern": None,
    f"{ARCH}.attention.causal": False,
    f"{ARCH}.attention.layer_norm_rms_epsilon": np.float32(1e-3),
    f"{ARCH}.rope.freq_base": 40_000.0,
    f"{ARCH}.rope.freq_base_swa": 300.0,
    f"{ARCH}.pooling_type": 1,
    f"{ARCH}.dense_2_feat_in": 32,
    f"{ARCH}.dense_2_feat_out": 96,
    f"{ARCH}.dense_3_feat_in": 96,
    f"{ARCH}.dense_3_feat_out": 32,
  }
  assert {key: value(reader, key) for key in expected} == expected


def test_settings_without_heads(vocabulary, tmp_path):
  reader = written(random_model(without_heads(), vocabulary), tmp_path)
  assert value(reader, "general.file_type") == 0
  assert not [key for key in reader.fields if "dense" in key]


@pytest.mark.parametrize(("pooler", "number"), [("mean", 1), ("first", 2), ("last", 3)])
def test_pooling_type(pooler, number, vocabulary, tmp_path):
  config = dataclasses.replace(CONFIG, pooler=pooler)
  reader = written(random_model(config, vocabulary), tmp_path)
  assert value(reader, f"{ARCH}.pooling_type") == number


def test_pattern_of_its_own(vocabulary, tmp_path):
  config = with_transformer(attention_pattern=("global", "local"), num_layers=3)
  reader = written(random_model(config, vocabulary), tmp_path)
  pattern = value(reader, f"{ARCH}.attention.sliding_window_pattern")
  assert pattern == [False, True, False]


def test_vocabulary(vocabulary, tmp_path):
  reader = written(random_model(CONFIG, vocabulary), tmp_path)
  pieces = ModelProto.FromString(vocabulary.serialized).pieces
  padding = [f"[PAD{i}]" for i in range(410, 512)]
  tokens = value(reader, "tokenizer.ggml.tokens")
  assert tokens == [piece.piece for piece in pieces] + padding
  scores = [piece.score for piece in pieces] + [-10_000.0] * 102
  assert value(reader, "tokenizer.ggml.scores") == scores
  types = value(reader, "tokenizer.ggml.token_type")
  assert types == [piece.type for piece in pieces] + [gguf.TokenType.UNUSED] * 102
  of = dict(zip(tokens, types, strict=True))
  kinds = {"<unk>": "UNKNOWN", "<mask>": "CONTROL", "<0x41>": "BYTE", "▁w": "NORMAL"}
  assert {piece: gguf.TokenType(of[piece]).name for piece in kinds} == kinds
  expected = {
    "model": "llama",
    "pre": "default",
    "padding_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "unknown_token_id": 3,
    "mask_token_id": 4,
    "add_bos_token": True,
    "add_eos_token": True,
    "add_sep_token": False,
    "add_space_prefix": False,
  }
  assert {k: value(reader, f"tokenizer.ggml.{k}") for k in expected} == expected


def changed(vocabulary, change):
  """A vocabulary whose model `change` has edited."""
  model = ModelProto.FromString(vocabulary.serialized)
  change(model)
  return SentencePieceVocabulary.from_serialized(model.SerializeToString())


def test_vocabulary_as_it_encodes(vocabulary, tmp_path):
  """Gemma's file has user-defined runs of "▁", and control names that would match."""

  def as_in_gemma(model):
    model.pieces[6].piece = "▁▁▁"
    for i in (4, 6):
      model.pieces[i].type = ModelProto.SentencePiece.USER_DEFINED

  model = random_model(CONFIG, changed(vocabulary, as_in_gemma))
  reader = written(model, tmp_path)
  types = value(reader, "tokenizer.ggml.token_type")
  tokens = value(reader, "tokenizer.ggml.tokens")
  assert (tokens[4], types[4]) == ("<mask>", gguf.TokenType.CONTROL)
  assert (tokens[6], types[6]) == ("   ", gguf.TokenType.USER_DEFINED)


def embed_from_file(reader, ids):
  """Gemma-embedding in float64 from nothing but the file; as llama.cpp reads it."""

  def key(name):
    return value(reader, f"{ARCH}.{name}")

  weights = {
    name.removesuffix(".weight"): np.float64(tensor.data)
    for name, tensor in tensors(reader).items()
  }
  heads, shared = key("attention.head_count"), key("attention.head_count_kv")
  size, epsilon = (
    key("attention.key_length"),
    key("attention.layer_norm_rms_epsilon"),
  )

  def norm(x, name):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weights[name]

  def rotated(x, base):
    angles = np.arange(len(ids))[:, None] / base ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  distance = np.abs(np.subtract.outer(np.arange(len(ids)), np.arange(len(ids))))
  x = weights["token_embd"][ids] * np.sqrt(key("embedding_length"))
  for layer in range(key("block_count")):
    at = f"blk.{layer}."
    local = layer % 6 != 5
    base = key("rope.freq_base_swa" if local else "rope.freq_base")
    h = norm(x, at + "attn_norm")
    q, k, v = (
      (h @ weights[at + name].T).reshape(len(ids), -1, size)
      for name in ("attn_q", "attn_k", "attn_v")
    )
    q = rotated(norm(q, at + "attn_q_norm"), base)
    k = rotated(norm(k, at + "attn_k_norm"), base)
    k, v = (np.repeat(a, heads // shared, 1) for a in (k, v))
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
    if local:
      logits[:, distance > key("attention.sliding_window") // 2] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
    h = mixed.reshape(len(ids), -1) @ weights[at + "attn_output"].T
    x = x + norm(h, at + "post_attention_norm")
    h = norm(x, at + "ffn_norm")
    gate, up = (h @ weights[at + name].T for name in ("ffn_gate", "ffn_up"))
    tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    h = 0.5 * gate * (1 + tanh) * up
    x = x + norm(h @ weights[at + "ffn_down"].T, at + "post_ffw_norm")
  x = norm(x, "output_norm").mean(0)
  for head in ("dense_2", "dense_3"):
    x = weights[head] @ x
  return x / np.linalg.norm(x)


def test_file_computes_our_embedding(vocabulary, tmp_path):
  model = random_model(CONFIG, vocabulary)
  ids = np.random.default_rng(1).integers(0, vocabulary.size, 40)
  packed = dataclasses.replace(
    abstract_packed_texts(),
    tokens=jnp.asarray(ids[None], jnp.int32),
    positions=jnp.arange(40, dtype=jnp.int32)[None],
    text_ids=jnp.zeros((1, 40), jnp.int32),
    lengths=jnp.array([40], jnp.int32),
  )
  ours = jax.jit(Embedder(CONFIG).embed)(model.params, packed)[0]
  theirs = embed_from_file(written(model, tmp_path), ids)
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
  ("config", "said"),
  [
    (dataclasses.replace(CONFIG, pooler="attention"), "pooler is 'attention'"),
    (with_transformer(mask="causal", window=(3, 0)), "mask is 'causal'"),
    (with_transformer(window=(3, 2)), r"window is \(3, 2\)"),
    (with_transformer(query_scalar=32.0), r"query_scalar is 32.0.*head_dim \(16\)"),
    (with_transformer(num_layers=5), "all layers are local"),
    (with_transformer(attention_pattern=("global",)), "all layers are global"),
    (
      dataclasses.replace(CONFIG, embedding_width=16, matryoshka_widths=(16,)),
      r"embedding_width is 16.*width \(32\)",
    ),
  ],
)
def test_refuses_what_llama_cpp_computes_otherwise(config, said, vocabulary, tmp_path):
  path = tmp_path / "model.gguf"
  with pytest.raises(ConfigError, match=said):
    gguf_file.write(random_model(config, vocabulary), path, "F32")
  assert not path.exists()


def test_accepts_query_scalar_of_head_dim(vocabulary, tmp_path):
  config = with_transformer(query_scalar=16.0)
  assert written(random_model(config, vocabulary), tmp_path).tensors


def test_q8_0_needs_whole_blocks(vocabulary, tmp_path):
  config = with_transformer(mlp_width=48)
  model = random_model(config, vocabulary)
  with pytest.raises(ConfigError, match=r"blk\.0\.ffn_down\.weight.* 48; use BF16"):
    gguf_file.write(model, tmp_path / "model.gguf", "Q8_0")
  assert written(model, tmp_path, "BF16").tensors


@pytest.mark.parametrize(
  ("weight_type", "said"),
  [
    ("F16", "65,504"),
    ("Q5_0", "F32, BF16, Q8_0"),
    ("TRAINED", "was not trained in a format"),
  ],
)
def test_other_weight_types(weight_type, said):
  with pytest.raises(ConfigError, match=said):
    gguf_file.check_exportable(CONFIG, weight_type)


def test_channels_have_no_gguf():
  config = dataclasses.replace(CONFIG, quantization=quantization.mixed_channel())
  with pytest.raises(ConfigError, match="was trained as int.*GGUF has no scales of"):
    gguf_file.check_exportable(config, "TRAINED")


def test_refuses_pretrained_stacks(vocabulary, tmp_path):
  model = random_model(CONFIG, vocabulary)
  backbone = dataclasses.replace(
    model.description, config=BackboneConfig(encoder=TRANSFORMER)
  )
  with pytest.raises(CheckpointError, match="without pooling"):
    gguf_file.write(
      dataclasses.replace(model, description=backbone), tmp_path / "a.gguf", "F32"
    )


def set_unigram(model):
  model.trainer_spec.model_type = model.trainer_spec.UNIGRAM


def set_no_bytes(model):
  model.trainer_spec.byte_fallback = False
  for piece in model.pieces:
    if piece.type == piece.BYTE:
      piece.type = piece.CONTROL


def set_prefix(model):
  model.normalizer_spec.add_dummy_prefix = True


def set_strip(model):
  model.normalizer_spec.remove_extra_whitespaces = True


def set_spaces(model):
  model.normalizer_spec.escape_whitespaces = False


def set_unused(model):
  model.pieces[6].type = model.pieces[6].UNUSED


def set_twice(model):
  model.pieces[6].piece = "[PAD411]"


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (set_unigram, "no BPE"),
    (set_no_bytes, "no byte fallback"),
    (set_prefix, "add_dummy_prefix"),
    (set_strip, "remove_extra_whitespaces"),
    (set_spaces, "escape_whitespaces"),
    (set_unused, r"UNUSED pieces \['<unused0>'\]"),
    (set_twice, r"\['\[PAD411\]'\] would be there twice"),
  ],
)
def test_refuses_other_vocabularies(change, said, vocabulary, tmp_path):
  model = random_model(CONFIG, changed(vocabulary, change))
  with pytest.raises(ConfigError, match=said):
    gguf_file.write(model, tmp_path / "model.gguf", "F32")
  assert not (tmp_path / "model.gguf").exists()
