"""From documents to an embedder: decoder, encoder-decoder by UL2, contrastive stage."""

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import time

import jax
import kill_resume
import numpy as np
import pytest
from flax import traverse_util

from embgemma import checkpoints
from embgemma.interop import weights
from embgemma.models import adaptation
from embgemma.models.config import BackboneConfig

pytestmark = pytest.mark.slow

_WORDS = ["river", "stone", "cloud", "engine", "table", "music", "garden", "window"]
_WORDS += [f"{word}s" for word in _WORDS]
_NARROW = (
  "--gin.TransformerConfig.width=32",
  "--gin.TransformerConfig.mlp_width=48",
  "--gin.TransformerConfig.head_dim=16",
)


def _document(generator: random.Random) -> str:
  sentences = (
    f"the {' '.join(generator.choices(_WORDS, k=7))} of a {generator.choice(_WORDS)}."
    for _ in range(generator.randint(1, 12))
  )
  return " ".join(sentences)


@pytest.fixture(scope="module")
def documents(workspace) -> dict[str, pathlib.Path]:
  """Documents to train on, and others to evaluate on."""
  generator = random.Random(0)
  paths = {}
  for name, count in (("documents", 300), ("held_out", 20)):
    paths[name] = workspace.root / f"{name}.jsonl"
    lines = (json.dumps({"text": _document(generator)}) for _ in range(count))
    paths[name].write_text("".join(f"{line}\n" for line in lines))
  return paths


def _stage_flags(documents, stage: str, *more: str) -> tuple[str, ...]:
  return (
    f"--gin_file=gin/stages/{stage}.gin",
    f"--gin.TEXT_TASKS={{'text': '{documents['documents']}'}}",
    f"--gin.EVALUATIONS={{'held_out': '{documents['held_out']}'}}",
    "--gin.SEGMENT_TOKENS=40",
    "--gin.TRAIN_STEPS=40",
    "--gin.WARMUP_STEPS=5",
    "--gin.BATCH_SIZE=16",
    "--gin.LEARNING_RATE=1e-2",
    "--gin.CHECKPOINT_STEPS=10",
    *more,
  )


def _pretrain_flags(documents, *more: str) -> tuple[str, ...]:
  return (
    "--gin_file=gin/models/tiny.gin",
    "--gin_file=gin/models/decoder.gin",
    *_stage_flags(
      documents,
      "pretrain",
      "--gin.VOCABULARY_SIZE=600",
      "--gin.TASK_FEATURE_LENGTHS={'targets': 64}",
      *_NARROW,
      *more,
    ),
  )


def _adapt_flags(documents, initial, *more: str) -> tuple[str, ...]:
  return (
    "--gin_file=gin/models/adapted.gin",
    *_stage_flags(
      documents,
      "adapt",
      f"--gin.INITIAL_CHECKPOINT_PATH={initial}",
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 64}",
      *more,
    ),
  )


def _results(model_dir: pathlib.Path) -> dict[int, dict[str, float]]:
  kept = json.loads((model_dir / "evaluations.json").read_text())
  return {int(step): results["held_out"] for step, results in kept.items()}


def _params(model_dir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  config = checkpoints.read_description(model_dir).config
  tree = weights.read(model_dir, step, config)
  return traverse_util.flatten_dict({"params": tree}, sep="/")


@pytest.fixture(scope="module")
def decoder(workspace, documents) -> pathlib.Path:
  """MODEL_DIR of a pretrained decoder. Do not change."""
  model_dir = workspace.root / "decoder"
  done = workspace.run(
    "train", *_pretrain_flags(documents), f"--gin.MODEL_DIR={model_dir}"
  )
  assert done.returncode == 0, done.stderr
  return model_dir


@pytest.fixture(scope="module")
def encoder_decoder(workspace, documents, decoder):
  """MODEL_DIR of the decoder adapted with UL2, and what the run printed."""
  model_dir = workspace.root / "encoder_decoder"
  flags = _adapt_flags(documents, decoder)
  done = workspace.run("train", *flags, f"--gin.MODEL_DIR={model_dir}")
  assert done.returncode == 0, done.stderr
  return model_dir, done.stdout


def test_a_decoder_learns_the_documents(decoder):
  results = _results(decoder)
  assert results[0].keys() == {"loss", "perplexity", "accuracy"}
  assert results[40]["loss"] < 0.7 * results[0]["loss"]
  assert np.isclose(results[40]["perplexity"], np.exp(results[40]["loss"]))
  assert checkpoints.read_description(decoder).config.encoder is None


def test_adaptation_accounts_for_every_parameter(encoder_decoder, decoder):
  model_dir, printed = encoder_decoder
  report = json.loads((model_dir / "adaptation.json").read_text())
  held = _params(model_dir, 40)
  assert {f"params/{path}" for path in report["sources"]} == held.keys()
  assert "random" not in report["sources"].values()
  assert report["parameters"] == sum(leaf.size for leaf in held.values())
  assert report["unused"] == {}
  assert f"{decoder}, decoder attention" in printed


def test_ul2_is_evaluated_by_denoiser(encoder_decoder):
  results = _results(encoder_decoder[0])
  names = ("R_3_15", "X_12_50", "X_32_15", "X_32_50", "S_75")
  for name in names:
    assert results[40][f"loss/{name}"] < results[0][f"loss/{name}"]
  shares = np.array([1, 1, 1, 1, 4]) / 8
  losses = [results[40][f"loss/{name}"] for name in names]
  assert np.isclose(results[40]["loss"], shares @ losses)


@pytest.mark.parametrize("start", ["encoder_decoder", "decoder"])
def test_an_embedder_starts_from_either(start, workspace, request, decoder):
  """Two rows of the paper's Table 2; the third is the same without a checkpoint."""
  initial = request.getfixturevalue(start)
  initial = initial if start == "decoder" else initial[0]
  model_dir = workspace.root / f"from_{start}"
  plain = workspace.root / "plain.jsonl"
  done = workspace.run(
    "train",
    "--gin_file=gin/models/from_checkpoint.gin",
    "--gin_file=gin/stages/prefinetune.gin",
    f"--gin.INITIAL_CHECKPOINT_PATH={initial}",
    f"--gin.JSONL_TASKS={{'plain': '{plain}'}}",
    f"--gin.EVALUATIONS={{'plain': '{plain}'}}",
    "--gin.TASK_FEATURE_LENGTHS={'query': 32, 'positive': 64, 'negatives': 64}",
    "--gin.BATCH_SIZE=16",
    "--gin.TRAIN_STEPS=10",
    "--gin.LEARNING_RATE=5e-3",
    f"--gin.MODEL_DIR={model_dir}",
  )
  assert done.returncode == 0, done.stderr
  report = json.loads((model_dir / "adaptation.json").read_text())
  random_paths = {k for k, v in report["sources"].items() if v == "random"}
  assert random_paths == {"projection_up/kernel", "projection_down/kernel"}
  config = checkpoints.read_description(model_dir).config
  assert config.transformer.mask == "bidirectional"
  assert config.embedding_width == 32
  assert config.hidden_width == 4 * 32
  kept = json.loads((model_dir / "evaluations.json").read_text())
  assert kept["10"]["plain"]["ndcg@10/32"] > kept["0"]["plain"]["ndcg@10/32"]


def test_a_stopped_adaptation_ends_bit_for_bit_alike(
  workspace, documents, decoder, encoder_decoder, tmp_path
):
  flags = _adapt_flags(documents, decoder)
  training = kill_resume.Training(flags, workspace.environment)
  model_dir = tmp_path / "run"
  process = training.start(model_dir)
  while not kill_resume.saved_steps(model_dir) and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  log = model_dir.with_suffix(".log")
  assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
  stopped = kill_resume.saved_steps(model_dir)[-1]
  assert stopped < 40
  training.finish(model_dir)
  assert f"resuming from step {stopped}" in log.read_text()
  expected = kill_resume.final_state(encoder_decoder[0])
  assert kill_resume.differences(kill_resume.final_state(model_dir), expected) == []


@pytest.fixture(scope="module")
def narrow(decoder, tmp_path_factory) -> pathlib.Path:
  """A decoder of half the width with the same vocabulary."""
  directory = tmp_path_factory.mktemp("narrow")
  described = checkpoints.read_description(decoder)
  stack = dataclasses.replace(described.config.decoder, width=16)
  described = dataclasses.replace(described, config=BackboneConfig(decoder=stack))
  vocabulary = checkpoints.read_vocabulary(decoder)
  checkpoints.write_description(directory, described, vocabulary, "")
  generator = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(np.float32),
    adaptation.abstract_params(described.config),
  )
  checkpoints.write_weights(directory, params)
  return directory


def test_a_narrower_decoder_learns_to_read_first(
  workspace, documents, decoder, narrow, tmp_path
):
  """Unbalanced, prefix language modelling, parameters split over devices, resumed."""
  model_dir = tmp_path / "run"
  flags = _adapt_flags(
    documents,
    decoder,
    f"--gin.INITIAL_DECODER_CHECKPOINT_PATH={narrow}",
    "--gin.DENOISERS=@prefix_lm()",
    "--gin.ALONE_STEPS=4",
    "--gin.TRAIN_STEPS=6",
    "--gin.CHECKPOINT_STEPS=2",
    "--gin.Partitioner.fsdp=2",
  )
  own = workspace.environment
  split = "--xla_force_host_platform_device_count=4"
  environment = own | {"XLA_FLAGS": f"{own['XLA_FLAGS']} {split}"}
  training = kill_resume.Training(flags, environment)
  training.finish(model_dir)
  report = json.loads((model_dir / "adaptation.json").read_text())
  random_paths = {k for k, v in report["sources"].items() if v == "random"}
  assert random_paths
  assert all("cross_attention" in path for path in random_paths)
  by_step = {step: _params(model_dir, step) for step in (2, 4, 6)}
  moved = {
    (a, b): {
      path.removeprefix("params/")
      for path, value in by_step[a].items()
      if not np.array_equal(value, by_step[b][path])
    }
    for a, b in ((2, 4), (4, 6))
  }
  assert moved[2, 4] == random_paths
  assert moved[4, 6] == report["sources"].keys()
  whole = kill_resume.final_state(model_dir)
  for step in (4, 6):
    shutil.rmtree(model_dir / "checkpoints" / str(step))
  training.finish(model_dir)
  assert "resuming from step 2" in model_dir.with_suffix(".log").read_text()
  assert kill_resume.differences(kill_resume.final_state(model_dir), whole) == []


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      (
        "--gin_file=gin/models/tiny.gin",
        "--gin_file=gin/stages/adapt.gin",
        "--gin.TASKS=@builtin_text_tasks()",
      ),
      "do not belong together",
    ),
    (
      (
        "--gin_file=gin/models/tiny.gin",
        "--gin_file=gin/models/encoder_decoder.gin",
        "--gin_file=gin/stages/pretrain.gin",
        "--gin.TASKS=@builtin_text_tasks()",
      ),
      "causal_lm is for a decoder alone",
    ),
    (
      ("--gin_file=gin/models/adapted.gin", "--gin_file=gin/stages/adapt.gin"),
      "give --gin.INITIAL_CHECKPOINT_PATH=",
    ),
  ],
)
def test_what_does_not_belong_together_is_refused(flags, message, workspace, tmp_path):
  """Before anything is tokenised."""
  model_dir = tmp_path / "run"
  more = (
    "--gin.TRAIN_STEPS=200",
    "--gin.BATCH_SIZE=16",
    f"--gin.MODEL_DIR={model_dir}",
  )
  done = workspace.run("train", *flags, *more)
  assert done.returncode == 1
  assert done.stderr.startswith("embgemma: error: ")
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_another_vocabulary_is_refused(workspace, documents, decoder, tmp_path):
  model_dir = tmp_path / "run"
  done = workspace.train(model_dir, f"--gin.INITIAL_CHECKPOINT_PATH={decoder}")
  assert done.returncode == 1
  assert f"VOCABULARY = '{decoder}/tokenizer.model'" in done.stderr
  assert not model_dir.exists()
