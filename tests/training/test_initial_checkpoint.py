"""What a run takes from a checkpoint's description."""

import dataclasses

import pytest

from embgemma import checkpoints
from embgemma.checkpoints import Description
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import BackboneConfig, EmbedderConfig, LoraConfig
from embgemma.training.initial_checkpoint import (
  checkpoint_encoder_decoder,
  checkpoint_model,
  checkpoint_vocabulary,
  checkpoint_widths,
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = ["some text to train a vocabulary on, and then some more of it"]
  return train_vocabulary(texts, 420, path, sentinels=4)


@pytest.fixture
def write(tmp_path, vocabulary):
  def written(config):
    described = Description(config, {"query": 8}, {})
    checkpoints.write_description(tmp_path, described, vocabulary, "")
    return str(tmp_path)

  return written


def test_defaults_are_the_checkpoints(config, write):
  transformer = dataclasses.replace(config.transformer, dtype="bfloat16", remat="full")
  kept = dataclasses.replace(config, transformer=transformer, lora=LoraConfig(rank=2))
  path = write(kept)
  expected = dataclasses.replace(
    kept, transformer=dataclasses.replace(transformer, remat="none")
  )
  assert checkpoint_model(path) == expected
  assert checkpoint_model(f"{path}/checkpoints/7") == expected
  assert checkpoint_widths(path) == config.matryoshka_widths
  assert checkpoint_vocabulary(path) == f"{path}/tokenizer.model"


@pytest.mark.parametrize(
  ("field", "value", "of_transformer"),
  [
    ("dtype", "bfloat16", True),
    ("remat", "full", True),
    ("window", (3, 3), True),
    ("matryoshka_widths", (16, 4), False),
    ("lora", LoraConfig(rank=3), False),
  ],
)
def test_what_training_may_change(config, write, field, value, of_transformer):
  model = checkpoint_model(write(config), **{field: value})
  changed = model.transformer if of_transformer else model
  assert getattr(changed, field) == value
  original = config.transformer if of_transformer else config
  assert dataclasses.replace(changed, **{field: getattr(original, field)}) == original


FUNCTIONS = (
  checkpoint_model,
  checkpoint_widths,
  checkpoint_vocabulary,
  checkpoint_encoder_decoder,
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_checkpoint(tmp_path, function):
  for path in (None, ""):
    with pytest.raises(ConfigError, match="--gin.INITIAL_CHECKPOINT_PATH"):
      function(path)
  with pytest.raises(CheckpointError, match="INITIAL_CHECKPOINT_PATH .*no model.json"):
    function(str(tmp_path / "none"))


@pytest.fixture
def decoder(config):
  return dataclasses.replace(config.transformer, mask="causal", window=(15, 0))


def test_an_embedder_of_pretrained_stacks(config, decoder, write):
  """The encoder where there is one, or else the decoder that sees both sides."""
  path = write(BackboneConfig(decoder=decoder))
  both_sides = dataclasses.replace(decoder, mask="bidirectional", window=(8, 8))
  expected = EmbedderConfig(
    both_sides, hidden_width=64, embedding_width=16, matryoshka_widths=(16,)
  )
  assert checkpoint_model(path) == expected
  assert checkpoint_widths(path) == (16,)
  assert checkpoint_vocabulary(path) == f"{path}/tokenizer.model"
  changed = checkpoint_model(path, remat="dots", window=(3, 4), lora=LoraConfig(rank=3))
  assert changed == dataclasses.replace(
    expected,
    transformer=dataclasses.replace(both_sides, remat="dots", window=(3, 4)),
    lora=LoraConfig(rank=3),
  )
  encoder = dataclasses.replace(config.transformer, window=(2, 2))
  path = write(BackboneConfig(encoder, decoder))
  assert checkpoint_model(path) == dataclasses.replace(expected, transformer=encoder)


def test_an_encoder_decoder_of_a_decoder(decoder, write):
  path = write(BackboneConfig(decoder=dataclasses.replace(decoder, remat="full")))
  encoder = dataclasses.replace(decoder, mask="bidirectional", window=(8, 8))
  assert checkpoint_encoder_decoder(path) == BackboneConfig(encoder, decoder)
  # The window is the encoder's alone.
  found = checkpoint_encoder_decoder(
    f"{path}/checkpoints/7",
    cross_attention="separate",
    shared_table=False,
    dtype="bfloat16",
    remat="dots",
    window=(3, 4),
  )
  trained = {"dtype": "bfloat16", "remat": "dots"}
  assert found == BackboneConfig(
    dataclasses.replace(encoder, window=(3, 4), **trained),
    dataclasses.replace(decoder, **trained),
    cross_attention="separate",
    shared_table=False,
  )


@pytest.mark.parametrize("cross_attention", ["merged", "separate"])
@pytest.mark.parametrize("shared_table", [True, False])
def test_an_encoder_decoder_goes_on(
  config, decoder, write, cross_attention, shared_table
):
  encoder = dataclasses.replace(config.transformer, num_layers=2)
  kept = BackboneConfig(encoder, decoder, cross_attention, shared_table)
  assert checkpoint_encoder_decoder(write(kept)) == kept


def test_an_encoder_decoder_of_two_checkpoints(
  decoder, write, vocabulary, tmp_path_factory
):
  """Of other widths: T5Gemma's 9B-2B is made so."""
  wide = dataclasses.replace(decoder, width=32)
  other = tmp_path_factory.mktemp("other")
  described = Description(BackboneConfig(decoder=wide), {"targets": 8}, {})
  checkpoints.write_description(other, described, vocabulary, "")
  second = write(BackboneConfig(decoder=decoder))
  encoder = dataclasses.replace(wide, mask="bidirectional", window=(8, 8))
  expected = BackboneConfig(encoder, decoder, "separate", shared_table=False)
  assert checkpoint_encoder_decoder(str(other), second) == expected


def test_an_encoder_decoder_needs_a_decoder(config, write):
  for alone in (config, BackboneConfig(encoder=config.transformer)):
    path = write(alone)
    with pytest.raises(CheckpointError, match=f"{path}: has no decoder"):
      checkpoint_encoder_decoder(path)
