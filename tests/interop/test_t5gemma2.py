"""A random T5Gemma 2 that transformers saved, read and run by us."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
  Gemma3TextConfig,
  Gemma3TextModel,
  T5Gemma2Config,
  T5Gemma2ForConditionalGeneration,
)

from embgemma import checkpoints
from embgemma.data.prompts import PROMPTS
from embgemma.errors import CheckpointError
from embgemma.interop import huggingface, layout, t5gemma2
from embgemma.models.config import TransformerConfig
from embgemma.models.transformer import Transformer

_ROWS = 640
_LAYERS = 7  # two groups of three and one more
_LENGTHS = (8, 9, 16, 17, 40)  # around the edges of both windows
_TOLERANCE = 2e-5
_EOI = 500
_TEXT = {
  "vocab_size": _ROWS,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": _LAYERS,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "max_position_embeddings": 1024,
  "query_pre_attn_scalar": 24,
  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
  + ["sliding_attention"],
  "rope_parameters": {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    # As in the released models, where it is 8 and the base 1e6.
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
  },
}
_VISION = {
  "hidden_size": 16,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": 28,
  "patch_size": 14,
}


def _model(window: int) -> T5Gemma2ForConditionalGeneration:
  """Random weights; encoder and decoder have windows and depths of their own."""
  torch.manual_seed(0)
  encoder = {
    "text_config": {**_TEXT, "sliding_window": window},
    "vision_config": _VISION,
    "eoi_token_index": _EOI,
  }
  decoder = {
    **_TEXT,
    "sliding_window": window + 3,
    "num_hidden_layers": _LAYERS - 1,
    "layer_types": _TEXT["layer_types"][:-1],
  }
  config = T5Gemma2Config(encoder=encoder, decoder=decoder, image_token_index=501)
  model = T5Gemma2ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  return model


@pytest.fixture(scope="module")
def model() -> T5Gemma2ForConditionalGeneration:
  return _model(16)


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> pathlib.Path:
  directory = tmp_path_factory.mktemp("saved")
  model.save_pretrained(directory)
  shutil.copy(tokenizer, directory)
  return directory


@pytest.fixture(scope="module")
def loaded(saved):
  return t5gemma2.load(saved)


def _tokens(length: int) -> np.ndarray:
  # No token of images: transformers gives these other embeddings.
  return np.random.default_rng(length).integers(0, _EOI, length).astype(np.int32)


def _forward(config, params, texts: list[np.ndarray]) -> list[np.ndarray]:
  """Hidden states of texts that are padded to the longest."""
  longest = max(map(len, texts))
  tokens = np.stack([np.pad(text, (0, longest - len(text))) for text in texts])
  positions = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens.shape)
  text_ids = np.stack([np.arange(longest) >= len(text) for text in texts])
  apply = jax.jit(Transformer(config).apply)
  hidden = apply({"params": params}, tokens, positions, text_ids.astype(np.int32))
  return [np.asarray(h[: len(text)]) for h, text in zip(hidden, texts, strict=True)]


def _reference(stack, text: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    return stack(torch.from_numpy(text)[None].long()).last_hidden_state[0].numpy()


def test_description(loaded):
  config = loaded.description.config
  assert (config.encoder.mask, config.encoder.window) == ("bidirectional", (7, 8))
  assert (config.decoder.mask, config.decoder.window) == ("causal", (18, 0))
  assert (config.encoder.num_layers, config.decoder.num_layers) == (7, 6)
  assert config.encoder.query_scalar == 24.0
  assert config.encoder.rope_factor_global == 3.0
  assert config.encoder.attention_pattern == ("local", "local", "global")
  assert loaded.description.lengths == dict.fromkeys(
    ("query", "positive", "negatives"), 1024
  )
  assert loaded.description.prompts == PROMPTS
  assert loaded.vocabulary.size == _ROWS
  assert any("vision tower and projector" in note for note in loaded.notes)
  assert any("the end of an image" in note for note in loaded.notes)


def test_every_weight(loaded, model):
  """Ours are transformers' to the last bit, and there is none beside them."""
  config = loaded.description.config
  assert "embedder" in loaded.params["encoder"]
  assert "embedder" not in loaded.params["decoder"]
  total = 0
  for name, stack, source in (
    ("encoder", config.encoder, model.model.encoder.text_model),
    ("decoder", config.decoder, model.model.decoder),
  ):
    table = "embed_tokens.weight" if name == "encoder" else None
    tensors = huggingface.stack_tensors(
      stack, (name,), names=huggingface.T5GEMMA2_NAMES, table=table
    )
    state = {n: p.numpy() for n, p in source.state_dict().items()}
    unread = {"embed_tokens.weight", "embed_tokens.eoi_embedding"} - {table}
    assert {tensor.name for tensor in tensors} == state.keys() - unread
    for tensor in tensors:
      (part,) = tensor.parts
      ours = part.slot.view(loaded.params)
      np.testing.assert_array_equal(ours, part.pick(state[tensor.name]), tensor.name)
      total += ours.size
  assert total == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))


@pytest.mark.parametrize("window", [16, 9])
def test_encoder_against_transformers(window, tokenizer, tmp_path):
  """Odd spans have as many keys on both sides, even ones one more to the right."""
  model = _model(window)
  model.save_pretrained(tmp_path)
  shutil.copy(tokenizer, tmp_path)
  loaded = t5gemma2.load(tmp_path)
  config = loaded.description.config.encoder
  params = loaded.params["encoder"]
  texts = [_tokens(length) for length in _LENGTHS]
  expected = [_reference(model.model.encoder, text) for text in texts]
  for ours, theirs in zip(_forward(config, params, texts), expected, strict=True):
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=_TOLERANCE)
  left, right = config.window
  other = dataclasses.replace(config, window=(left + 1, right))
  (ours,) = _forward(other, params, texts[-1:])
  assert np.abs(ours - expected[-1]).max() > 10 * _TOLERANCE


def test_decoder_is_a_gemma_3(loaded, model):
  """Without an encoder's states it is the causal stack that we pretrain from."""
  decoder = model.model.decoder
  config = Gemma3TextConfig(
    **{k: v for k, v in decoder.config.to_dict().items() if k != "model_type"},
    use_bidirectional_attention=False,
  )
  renamed = {
    name.replace("pre_self_attn_layernorm", "input_layernorm").replace(
      "post_self_attn_layernorm", "post_attention_layernorm"
    ): weight
    for name, weight in decoder.state_dict().items()
    if not name.endswith("eoi_embedding")
  }
  reference = Gemma3TextModel(config).eval()
  reference.load_state_dict(renamed)
  params = {
    **loaded.params["decoder"],
    "embedder": loaded.params["encoder"]["embedder"],
  }
  text = _tokens(60)
  (ours,) = _forward(loaded.description.config.decoder, params, [text])
  expected = _reference(reference, text)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(ours, expected, atol=_TOLERANCE)


@pytest.fixture
def rewrite(saved, tmp_path):
  """Copies the saved model with its tensors or its configuration changed."""

  def rewrite(tensors=lambda weights: weights, config=lambda values: values):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(config(values) or values))
    weights = load_file(tmp_path / "model.safetensors")
    save_file(tensors(weights) or weights, tmp_path / "model.safetensors")
    return tmp_path

  return rewrite


def _without_model(weights):
  return {name.removeprefix("model."): w for name, w in weights.items()}


def _as_in_memory(weights):
  """Names of the modules, and the shared table wherever it is used."""
  named = {
    name.replace("model.encoder.", "model.encoder.text_model.", 1)
    if "vision_tower" not in name and "projector" not in name
    else name: weight
    for name, weight in weights.items()
  }
  table = named["model.encoder.text_model.embed_tokens.weight"]
  eoi = named["model.encoder.text_model.embed_tokens.eoi_embedding"]
  return {
    **named,
    "lm_head.out_proj.weight": table,
    "model.decoder.embed_tokens.weight": table,
    "model.decoder.embed_tokens.eoi_embedding": eoi,
  }


@pytest.mark.parametrize("names", [_without_model, _as_in_memory])
def test_other_names(names, rewrite, loaded):
  again = t5gemma2.load(rewrite(names))
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def _drop(name):
  return lambda weights: {n: w for n, w in weights.items() if n != name}


def _add(name):
  return lambda weights: {**weights, name: np.ones(3, np.float32)}


def _damage(weights):
  weights["model.decoder.norm.weight"][3] = np.nan


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      _drop("model.decoder.layers.5.self_attn.k_norm.weight"),
      r"missing: model.decoder.layers.5.self_attn.k_norm.weight\n",
    ),
    (
      _drop("model.encoder.embed_tokens.weight"),
      r"missing: model.encoder.embed_tokens.weight\n",
    ),
    (
      _add("model.decoder.layers.0.cross_attn.q_proj.weight"),
      r"unknown: model.decoder.layers.0.cross_attn.q_proj.weight\n",
    ),
    (
      _add("model.encoder.norm.weight"),
      r"misshapen: model.encoder.norm.weight is \[3\], .* \[32\]",
    ),
    (_damage, r"model.decoder.norm.weight holds NaN or infinity"),
  ],
)
def test_other_tensors_are_refused(change, message, rewrite):
  directory = rewrite(tensors=change)
  with pytest.raises(CheckpointError, match=message) as error:
    t5gemma2.load(directory)
  assert str(error.value).startswith(str(directory))


def _gemma(values):
  values["model_type"] = "gemma3_text"


def _no_decoder(values):
  del values["decoder"]


def _no_text(values):
  values["encoder"]["text_config"] = None


def _untied(values):
  values["tie_word_embeddings"] = False


def _narrower(values):
  values["decoder"]["hidden_size"] = 16


def _no_window(values):
  del values["encoder"]["text_config"]["sliding_window"]


def _capped(values):
  values["decoder"]["final_logit_softcapping"] = 30.0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_gemma, r"model_type is 'gemma3_text', not 't5gemma2'; give the directory"),
    (_no_decoder, r"has no configuration decoder; .*download it again"),
    (_no_text, r"has no configuration encoder.text_config; .*download it again"),
    (_untied, r"tie_word_embeddings is False; only T5Gemma 2's one table"),
    (_narrower, r"width of the encoder is 32, of the decoder 16; they share"),
    (_no_window, r"keys are missing: sliding_window"),
    (_capped, r"final_logit_softcapping is 30.0; only None"),
  ],
)
def test_other_configurations_are_refused(change, message, rewrite):
  directory = rewrite(config=change)
  with pytest.raises(CheckpointError, match=message) as error:
    t5gemma2.load(directory)
  assert str(error.value).startswith(str(directory / "config.json"))


def test_the_command(saved, loaded, tmp_path):
  output = tmp_path / "backbone"
  command = ["import", "--from=t5gemma2", f"--source={saved}", f"--output={output}"]
  done = subprocess.run(
    [sys.executable, "-m", "embgemma", *command], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "not read" in done.stderr
  written = checkpoints.read_description(output)
  assert written.lineage
  assert dataclasses.replace(written, lineage="") == loaded.description
  store = checkpoints.CheckpointStore(output)
  restored = store.restore(0, {"params": loaded.params})["params"]
  jax.tree.map(np.testing.assert_array_equal, restored, loaded.params)


def test_stacks_without_query_and_key_norms_are_refused():
  plain = TransformerConfig(64, 1, 32, 32, 2, 1, 16, query_key_norm=False)
  with pytest.raises(CheckpointError, match="query_key_norm is False"):
    layout.stack_slots(plain, ("decoder",))
