"""Embedders out of pretrained stacks, from the command on; transformers as a judge."""

import dataclasses
import functools
import json
import pathlib
import signal
import sys
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel

from embgemma import checkpoints, cli
from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import conversion, extraction
from embgemma.interop.extraction import Extracted
from embgemma.interop.model import Model
from embgemma.models import encoder_decoder
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.models.extraction import bidirectional, embedder_config

_CAUSAL = TransformerConfig(
  vocab_size=640,
  num_layers=3,
  width=16,
  mlp_width=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  attention_pattern=("local", "global"),
  mask="causal",
  window=(5, 0),
  dtype="bfloat16",
  max_length=128,
)
_ENCODER = dataclasses.replace(_CAUSAL, mask="bidirectional", window=(2, 3))
_BOTH = BackboneConfig(_ENCODER, _CAUSAL)
_DECODER = BackboneConfig(decoder=_CAUSAL)


def stack(width: int, window: tuple[int, int] = (511, 0)) -> TransformerConfig:
  return dataclasses.replace(_CAUSAL, width=width, window=window)


def test_the_default_is_embeddinggemma():
  """Of a Gemma 3 of its width: the values that EmbedderConfig has from the paper."""
  found = embedder_config(BackboneConfig(decoder=stack(768)))
  encoder = dataclasses.replace(stack(768), mask="bidirectional", window=(256, 256))
  assert found == EmbedderConfig(encoder)


@pytest.mark.parametrize(
  ("width", "options", "expected"),
  [
    (512, {}, (2048, 512, (512, 256, 128))),
    (640, {}, (2560, 640, (640, 512, 256, 128))),
    (128, {}, (512, 128, (128,))),
    (64, {}, (256, 64, (64,))),
    (640, {"embedding_width": 300}, (2560, 300, (300, 256, 128))),
    (640, {"hidden_width": None}, (None, 640, (640, 512, 256, 128))),
    (640, {"hidden_width": 7, "matryoshka_widths": [9, 3]}, (7, 640, (9, 3))),
  ],
)
def test_widths(width, options, expected):
  found = embedder_config(BackboneConfig(decoder=stack(width)), **options)
  assert found.pooler == "mean"
  assert (
    found.hidden_width,
    found.embedding_width,
    found.matryoshka_widths,
  ) == expected


@pytest.mark.parametrize("span", [1, 2, 6, 7, 8, 9, 512, 1024])
def test_windows_are_those_of_transformers(span):
  theirs = Gemma3TextConfig(sliding_window=span, use_bidirectional_attention=True)
  radius = theirs.sliding_window - 1  # which it keeps as an exclusive one
  assert bidirectional(stack(16, (span - 1, 0))).window == (radius, radius)


def test_an_encoder_stays_as_it_is():
  for backbone in (_BOTH, BackboneConfig(_ENCODER)):
    assert embedder_config(backbone, pooler="last").transformer == _ENCODER


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"hidden_width": None, "embedding_width": 8}, "embedding_width"),
    ({"matryoshka_widths": (32,)}, "matryoshka_widths"),
    ({"pooler": "median"}, "pooler"),
    ({"hidden_width": 0}, "hidden_width"),
  ],
)
def test_what_does_not_fit(options, named):
  with pytest.raises(ConfigError, match=named):
    embedder_config(_BOTH, **options)


@functools.cache
def drawn(config: BackboneConfig) -> Any:
  generator = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: (0.3 * generator.normal(size=leaf.shape)).astype(np.float32),
    dict(encoder_decoder.abstract_params(config)),
  )


@pytest.fixture(scope="module")
def write_backbone(tmp_path_factory, tokenizer):
  def write(config: BackboneConfig, lengths: dict[str, int]) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("backbone")
    description = Description(config, lengths, PROMPTS)
    vocabulary = SentencePieceVocabulary(tokenizer)
    conversion.write_checkpoint(
      Model(description, vocabulary, drawn(config)), directory
    )
    return directory

  return write


@pytest.fixture(scope="module")
def decoder(write_backbone) -> pathlib.Path:
  return write_backbone(_DECODER, {"targets": 30})


@pytest.fixture(scope="module")
def of_decoder(decoder) -> Extracted:
  return extraction.extract(f"{decoder}/checkpoints/0", embedder_config)


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs a command of embgemma here: its exit status, stdout and stderr."""
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main sets its own
  handler = signal.getsignal(signal.SIGTERM)

  def run(*arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
      cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()

  yield run
  signal.signal(signal.SIGTERM, handler)


def test_the_encoder_of_two_stacks(write_backbone, command, tmp_path):
  source = write_backbone(_BOTH, {"inputs": 24, "targets": 40})
  output = tmp_path / "embedder"
  code, printed, notes = command(
    "extract", f"--checkpoint={source}", f"--output={output}", "--widths=12,4",
    "--embedding_width=12", "--hidden_width=20", "--pooler=attention", "--seed=3",
  )  # fmt: skip
  assert code == 0, notes
  model = conversion.open_embedder(output)
  assert model.step == 0
  assert model.description.config == EmbedderConfig(
    _ENCODER,
    pooler="attention",
    hidden_width=20,
    embedding_width=12,
    matryoshka_widths=(12, 4),
  )
  assert model.description.lengths == dict.fromkeys(
    ("query", "positive", "negatives"), 24
  )
  assert model.description.prompts == PROMPTS
  jax.tree.map(
    np.testing.assert_array_equal, model.params["encoder"], drawn(_BOTH)["encoder"]
  )

  report = json.loads((output / "adaptation.json").read_text())
  random = {path for path, origin in report["sources"].items() if origin == "random"}
  assert {path.split("/")[0] for path in random} == {
    "pooler",
    "projection_up",
    "projection_down",
  }
  taken = [o for path, o in report["sources"].items() if path not in random]
  assert {origin["checkpoint"] for origin in taken} == {str(source)}
  assert report["parameters"] == model.size
  assert "encoder attention" in printed
  assert f"not used: {source}, decoder attention" in printed
  assert not report["notes"]
  vectors = CheckpointEmbedder(output).encode(["nusa kela", "mita"])
  assert vectors.shape == (2, 12)


def test_the_seed_is_of_the_heads_alone(decoder, of_decoder):
  one = of_decoder.model.params
  other = extraction.extract(decoder, embedder_config, seed=1).model.params
  assert one.keys() == other.keys() == {"encoder", "projection_up", "projection_down"}
  for name, part in one.items():
    for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(other[name]), strict=True):
      assert np.array_equal(a, b) == (name == "encoder")


def test_a_decoder_embeds_as_transformers_has_it(
  command, tmp_path, tokenizer, tiny_shape
):
  """Imported, made bidirectional and pooled without heads: two commands."""
  torch.manual_seed(0)
  config = Gemma3TextConfig(vocab_size=640, **tiny_shape)
  causal = Gemma3ForCausalLM(config).eval()
  with torch.no_grad():
    for name, parameter in causal.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
  saved, imported, output = (tmp_path / name for name in ("hf", "imported", "embedder"))
  causal.save_pretrained(saved)
  (saved / "tokenizer.model").write_bytes(tokenizer.read_bytes())
  code, _, error = command(
    "import", "--from=hf", f"--source={saved}", f"--output={imported}"
  )
  assert code == 0, error
  flags = ("extract", f"--checkpoint={imported}", f"--output={output}")
  code, printed, error = command(*flags, "--hidden_width=none")
  assert code == 0, error
  assert "random" not in printed
  assert "decoder attention" in printed
  assert checkpoints.read_description(output).embedder.transformer.window == (8, 8)

  # Longer than both windows, the causal one's 15 and 8 on both sides.
  texts = ["nusa", "kela mita tona " * 12, "pexi sura " * 20]
  ours = CheckpointEmbedder(output).encode(texts)
  shape = {**tiny_shape, "vocab_size": 640, "use_bidirectional_attention": True}
  theirs = Gemma3TextModel(Gemma3TextConfig(**shape)).eval()
  theirs.load_state_dict(causal.model.state_dict())
  vocabulary = SentencePieceVocabulary(tokenizer)
  for vector, text in zip(ours, texts, strict=True):
    tokens = vocabulary.encode(text, 1000)
    with torch.no_grad():
      hidden = theirs(torch.tensor([[int(token) for token in tokens]]))
    pooled = hidden.last_hidden_state[0].double().mean(0).numpy()
    np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=2e-5)
  assert len(tokens) > 40


def test_what_else_a_decoder_hands_on(of_decoder):
  """Its compute dtype, and where texts were cut; nothing is left of it."""
  description = of_decoder.model.description
  assert description.max_length == 30
  assert description.embedder.transformer.dtype == "bfloat16"
  assert not of_decoder.report["unused"]


def test_what_is_refused(decoder, of_decoder, command, tmp_path):
  source, embedder, taken = decoder, tmp_path / "embedder", tmp_path / "taken"
  extraction.write(of_decoder, embedder)
  taken.mkdir()
  (taken / "notes.txt").write_text("mine")
  before = sorted(tmp_path.rglob("*"))
  new = f"--output={tmp_path / 'new'}"
  of = f"--checkpoint={source}"
  cases = [
    ((f"--checkpoint={embedder}", new), f"{embedder}: holds an embedder already"),
    ((f"--checkpoint={tmp_path}", new), "not a checkpoint directory"),
    ((f"--checkpoint={source}/checkpoints/4", new), "no step 4; there are [0]"),
    ((of, new, "--hidden_width=wide"), "--hidden_width=wide: write 3072, or none"),
    ((of, new, "--hidden_width=0"), "--hidden_width=0"),
    ((of, new, "--widths=12,x"), "--widths=12,x"),
    ((of, new, "--widths=99"), "matryoshka_widths: 99 is not in 1..16"),
    ((of, new, "--hidden_width=none", "--embedding_width=8"), "embedding_width (8)"),
    ((of, new, "--seed=-1"), "--seed=-1"),
    ((of, f"--output={embedder}"), "--overwrite"),
    ((of, f"--output={taken}", "--overwrite"), "does not delete it"),
    ((of, f"--output={source}", "--overwrite"), "holds what is read"),
  ]
  for flags, said in cases:
    code, printed, error = command("extract", *flags)
    assert (code, printed) == (1, ""), flags
    assert error.startswith("embgemma: error: ")
    assert said in error
    assert "Traceback" not in error
  assert sorted(tmp_path.rglob("*")) == before
  flags = (of, f"--output={embedder}", "--overwrite", "--hidden_width=none")
  code, _, error = command("extract", *flags)
  assert code == 0, error
  assert checkpoints.read_description(embedder).embedder.hidden_width is None
