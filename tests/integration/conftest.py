"""Pairs, flags of a tiny run, and commands in processes of their own.

In this process the checks of jaxtyping and eight devices are on; the commands run as
users run them.
"""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]

_STEMS = (
  "river stone cloud engine table music garden window paper silver copper animal "
  "forest market doctor teacher"
)
_WORDS = [stem + ending for stem in _STEMS.split() for ending in ("", "s", "ing", "ed")]


def _pair(generator: random.Random, negatives: int) -> dict:
  words = generator.sample(_WORDS, 5)
  others = generator.sample(_WORDS, 3)
  record = {
    "query": " ".join(words[:3]),
    "positive": f"a text about {' '.join(words)} and {' '.join(others)}",
  }
  if negatives:
    record["negatives"] = [
      f"a text about {' '.join(generator.sample(_WORDS, 6))}" for _ in range(negatives)
    ]
  return record


def write_pairs(path: pathlib.Path, count: int, negatives: int, seed: int) -> None:
  generator = random.Random(seed)
  lines = (json.dumps(_pair(generator, negatives)) for _ in range(count))
  path.write_text("".join(f"{line}\n" for line in lines))


@dataclasses.dataclass(frozen=True)
class Workspace:
  """Files and commands that the tests of a session share.

  Attributes:
    root: Holds plain.jsonl and hard.jsonl (with negatives), and the cache.
    environment: One device; compiled programs are kept between processes.
  """

  root: pathlib.Path
  environment: dict[str, str]

  def flags(
    self, *more: str, stage: str = "prefinetune", steps: int = 30
  ) -> tuple[str, ...]:
    """Flags of a run of seconds; later flags override earlier ones."""
    tasks = {"plain": str(self.root / "plain.jsonl")}
    tasks["hard"] = str(self.root / "hard.jsonl")
    return (
      "--gin_file=gin/models/tiny.gin",
      f"--gin_file=gin/stages/{stage}.gin",
      "--gin.VOCABULARY_SIZE=800",
      "--gin.TransformerConfig.width=32",
      "--gin.TransformerConfig.mlp_width=48",
      "--gin.TransformerConfig.head_dim=16",
      "--gin.EmbedderConfig.hidden_width=48",
      "--gin.EmbedderConfig.embedding_width=32",
      "--gin.MATRYOSHKA_WIDTHS=(32, 16)",
      "--gin.TASK_FEATURE_LENGTHS={'query': 32, 'positive': 64, 'negatives': 64}",
      f"--gin.JSONL_TASKS={tasks}",
      "--gin.MAX_NEGATIVES=1",
      "--gin.BATCH_SIZE=16",
      f"--gin.TRAIN_STEPS={steps}",
      "--gin.LEARNING_RATE=5e-3",
      "--gin.CHECKPOINT_STEPS=10",
      *more,
    )

  def run(self, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The finished command, whatever its exit status."""
    return subprocess.run(
      [sys.executable, "-m", "embgemma", command, *flags],
      env=self.environment,
      cwd=self.root,
      capture_output=True,
      text=True,
    )

  def train(
    self, model_dir: pathlib.Path, *more: str, **options
  ) -> subprocess.CompletedProcess[str]:
    return self.run(
      "train", *self.flags(*more, **options), f"--gin.MODEL_DIR={model_dir}"
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
  root = tmp_path_factory.mktemp("workspace")
  write_pairs(root / "plain.jsonl", 160, negatives=0, seed=1)
  write_pairs(root / "hard.jsonl", 140, negatives=1, seed=2)
  kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environment = kept | {
    "JAX_PLATFORMS": "cpu",
    "EMBGEMMA_CACHE": str(root / "cache"),
    "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return Workspace(root, environment)


@pytest.fixture(scope="session")
def trained(workspace) -> pathlib.Path:
  """MODEL_DIR of a finished run with an evaluation on its own pairs. Do not change."""
  model_dir = workspace.root / "trained"
  plain = workspace.root / "plain.jsonl"
  done = workspace.train(model_dir, f"--gin.EVALUATIONS={{'plain': '{plain}'}}")
  assert done.returncode == 0, done.stderr
  return model_dir
