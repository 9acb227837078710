"""What a run takes from a checkpoint's description."""

import dataclasses

import pytest

from embgemma import checkpoints
from embgemma.checkpoints import Description
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import BackboneConfig, LoraConfig
from embgemma.training.initial_checkpoint import (
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


@pytest.mark.parametrize(
  "function", [checkpoint_model, checkpoint_widths, checkpoint_vocabulary]
)
def test_no_embedder(config, write, tmp_path, function):
  for path in (None, ""):
    with pytest.raises(ConfigError, match="--gin.INITIAL_CHECKPOINT_PATH"):
      function(path)
  with pytest.raises(CheckpointError, match="INITIAL_CHECKPOINT_PATH .*no model.json"):
    function(str(tmp_path / "none"))
  decoder = dataclasses.replace(config.transformer, mask="causal")
  path = write(BackboneConfig(decoder=decoder))
  with pytest.raises(CheckpointError, match=f"{path}.*only an embedder"):
    function(path)
