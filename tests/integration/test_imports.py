"""What importing costs, and which way it goes."""

import pathlib
import subprocess
import sys

import pytest
from importlinter import api

REPOSITORY = pathlib.Path(__file__).parents[2]
HEAVY = {"tensorflow", "torch", "jax", "seqio", "flax", "transformers", "orbax"}


def imported(*arguments: str) -> set[str]:
  """Top-level modules that a fresh interpreter imports."""
  done = subprocess.run(
    [sys.executable, "-X", "importtime", *arguments],
    capture_output=True,
    text=True,
    check=True,
  )
  lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
  return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
  "arguments",
  [
    ("-m", "embgemma", "--help"),
    ("-m", "embgemma", "train", "--help"),
    ("-m", "embgemma", "embed", "--help"),
    ("-c", "import embgemma"),
  ],
  ids=" ".join,
)
def test_help_is_light(arguments):
  modules = imported(*arguments)
  assert "embgemma" in modules
  assert not modules & HEAVY


@pytest.mark.parametrize(
  "module",
  ["embgemma.training.loop", "embgemma.inference.embedder", "embgemma.gin_config"],
)
def test_training_and_inference_import_no_tensorflow(module):
  modules = imported("-c", f"import {module}")
  assert not modules & {"tensorflow", "torch", "seqio", "transformers"}


def test_layers(monkeypatch):
  """The contracts of pyproject.toml."""
  monkeypatch.chdir(REPOSITORY)
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      "from importlinter.cli import lint_imports_command as c; c()",
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  assert "0 broken" in done.stdout
  assert len(api.read_configuration()["contracts_options"]) >= 2
