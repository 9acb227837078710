"""Pairs, flags of a tiny run, and commands in processes of their own.

In this process the checks of jaxtyping and eight devices are on; the commands run as
users run them, but for programs that are compiled in less time.
"""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

# Forks a process for each command line that it reads: imports are paid for once.
_SERVER = textwrap.dedent(
  """
  import gc, json, logging, os, sys
  import embgemma.cli, embgemma.data.cache_builder, embgemma.evaluation.suite
  import embgemma.gin_config, embgemma.mining.mine, embgemma.training.stages
  embgemma.gin_config.register()  # imports what stages are made of
  logging.getLogger().handlers.clear()  # some import made one
  gc.freeze()  # what is imported is no garbage: neither looked through nor copied
  for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
      for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
      embgemma.cli.main(request["arguments"])
      sys.exit()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  """
)

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
    server: Runs commands, see `_SERVER`.
  """

  root: pathlib.Path
  environment: dict[str, str]
  server: subprocess.Popen[str]

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
    """The finished command, whatever its exit status, in a process of its own."""
    arguments = [command, *flags]
    paths = {name: self.root / name for name in ("stdout", "stderr")}
    request = {"arguments": arguments} | {n: str(path) for n, path in paths.items()}
    print(json.dumps(request), file=self.server.stdin, flush=True)
    code = int(self.server.stdout.readline())
    texts = {name: path.read_text() for name, path in paths.items()}
    return subprocess.CompletedProcess(arguments, code, **texts)

  def train(
    self, model_dir: pathlib.Path, *more: str, **options
  ) -> subprocess.CompletedProcess[str]:
    return self.run(
      "train", *self.flags(*more, **options), f"--gin.MODEL_DIR={model_dir}"
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Iterator[Workspace]:
  root = tmp_path_factory.mktemp("workspace")
  write_pairs(root / "plain.jsonl", 160, negatives=0, seed=1)
  write_pairs(root / "hard.jsonl", 140, negatives=1, seed=2)
  flags = os.environ["XLA_FLAGS"].split()
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join(f for f in flags if "device_count" not in f),
    "EMBGEMMA_CACHE": str(root / "cache"),
    "WANDB_MODE": "offline",
    "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  with subprocess.Popen(
    [sys.executable, "-c", _SERVER],
    env=environment,
    cwd=root,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as server:
    yield Workspace(root, environment, server)
    server.stdin.close()


@pytest.fixture(scope="session")
def trained(workspace) -> pathlib.Path:
  """MODEL_DIR of a finished run with an evaluation on its own pairs. Do not change."""
  model_dir = workspace.root / "trained"
  plain = workspace.root / "plain.jsonl"
  done = workspace.train(model_dir, f"--gin.EVALUATIONS={{'plain': '{plain}'}}")
  assert done.returncode == 0, done.stderr
  return model_dir
