"""Every gin file parses with what it goes with, and `explain` resolves it."""

import pathlib
import re
import sys

import gin
import pytest

from embgemma import checkpoints, cli, gin_config
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import ConfigError
from embgemma.models.config import EmbedderConfig, TransformerConfig

GIN = pathlib.Path(__file__).parents[2] / "gin"
MODELS = sorted(path.stem for path in (GIN / "models").glob("*.gin"))
STAGES = sorted(path.stem for path in (GIN / "stages").glob("*.gin"))
_LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 16 + 4 * 32
_BASE = 640 * 32 + 6 * _LAYER + 32 + 32 * 48 + 48 * 32
RECIPES = sorted(path.stem for path in (GIN / "recipes").glob("*.gin"))


@pytest.fixture(autouse=True)
def restored(monkeypatch):
  """What the command line sets for its process."""
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  yield
  gin.clear_config()


@pytest.fixture
def pairs(tmp_path, monkeypatch):
  path = tmp_path / "pairs.jsonl"
  path.write_text('{"query": "a", "positive": "b"}\n')
  monkeypatch.setenv("EMBGEMMA_CACHE", str(tmp_path / "cache"))
  return path


def explain(capsys, *flags: str) -> str:
  cli.main(["explain", "--gin.TRAIN_STEPS=100", "--gin.BATCH_SIZE=64", *flags])
  return capsys.readouterr().out


def total_parameters(output: str) -> int:
  return int(re.search(r"parameters: total\D+([\d,]+)", output)[1].replace(",", ""))


@pytest.fixture
def base(tmp_path) -> pathlib.Path:
  """What `explain` reads of a checkpoint."""
  transformer = TransformerConfig(
    vocab_size=640, num_layers=6, width=32, mlp_width=48, num_heads=2, num_kv_heads=1,
    head_dim=16,
  )  # fmt: skip
  config = EmbedderConfig(
    transformer, hidden_width=48, embedding_width=32, matryoshka_widths=(32, 8)
  )
  texts = ["some text to train a vocabulary on, and then some more of it"]
  vocabulary = train_vocabulary(texts, 420, tmp_path / "small.model", sentinels=4)
  lengths = {"query": 16, "positive": 16, "negatives": 16}
  description = checkpoints.Description(config, lengths, {})
  checkpoints.write_description(tmp_path / "base", description, vocabulary, "")
  return tmp_path / "base"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_model_with_stage(model, stage, pairs, base, capsys):
  text = (GIN / "models" / f"{model}.gin").read_text()
  own = "VOCABULARY_SIZE = None" in text and "checkpoint" not in text
  output = explain(
    capsys,
    f"--gin_file=gin/models/{model}.gin",
    f"--gin_file=gin/stages/{stage}.gin",
    f"--gin.JSONL_TASKS={{'pairs': '{pairs}'}}",
    # A model with a table of its own needs the file to train, not to be explained.
    *(["--gin.VOCABULARY=tokenizer.model"] if own else []),
    *([f"--gin.INITIAL_CHECKPOINT_PATH={base}"] if "checkpoint" in text else []),
  )
  assert "pairs" in output
  expected = {
    "embeddinggemma_300m": 307_581_696,
    "gemma3_270m": 268_098_176 + 4_325_376,
    # Table, layers and norms, heads; rank 16 beside seven kernels of each layer.
    "from_checkpoint": _BASE,
    "lora": _BASE + 6 * 16 * (64 + 48 + 48 + 64 + 80 + 80 + 80),
  }
  if model in expected:
    assert total_parameters(output) == expected[model]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, pairs, capsys):
  output = explain(capsys, f"--gin_file=gin/recipes/{recipe}.gin")
  assert total_parameters(output) > 0


def test_every_gin_file_is_tested():
  tested = {f"models/{name}" for name in MODELS} | {f"stages/{name}" for name in STAGES}
  tested |= {f"recipes/{name}" for name in RECIPES}
  files = {str(path.relative_to(GIN).with_suffix("")) for path in GIN.rglob("*.gin")}
  assert files == tested


def test_without_any_vocabulary(pairs, capsys):
  with pytest.raises(SystemExit):
    explain(
      capsys,
      "--gin_file=gin/models/embeddinggemma_300m.gin",
      "--gin_file=gin/stages/prefinetune.gin",
      f"--gin.JSONL_TASKS={{'pairs': '{pairs}'}}",
    )
  assert "set VOCABULARY" in capsys.readouterr().err


def parsed(*bindings: str):
  gin_config.register()
  files = ["gin/models/tiny.gin", "gin/stages/prefinetune.gin"]
  required = ["MODEL_DIR=run", "TRAIN_STEPS=10", "BATCH_SIZE=8"]
  tasks = "JSONL_TASKS={'pairs': 'pairs.jsonl'}"
  gin_config.parse(files, [*required, tasks, *bindings], [])
  return gin_config.train_arguments()


def test_overrides_in_order():
  arguments = parsed("LEARNING_RATE=1e-3", "train.seed=5", "LEARNING_RATE=2e-3")
  assert arguments["seed"] == 5
  assert arguments["optimizer"].schedule.peak == 2e-3


def test_a_value_may_lack_its_quotes():
  arguments = parsed(
    "MODEL_DIR=/tmp/a run",
    "CACHE_DIR='/tmp/cache'",
    "Schedule.kind=wsd",
    "TASKS=@jsonl_tasks()",
    "MODULES=[]",
  )
  assert arguments["model_dir"] == "/tmp/a run"
  assert arguments["data"].cache_dir == "/tmp/cache"
  assert arguments["optimizer"].schedule.kind == "wsd"
  assert arguments["data"].modules == ()


def test_a_list_may_stand_for_a_tuple():
  arguments = parsed("MATRYOSHKA_WIDTHS=[128, 32]")
  assert arguments["model"].matryoshka_widths == (128, 32)


@pytest.mark.parametrize(
  ("binding", "message"),
  [
    ("Schedule.peak=True", "Schedule.peak must be float, got True"),
    ("TransformerConfig.width=64.0", "TransformerConfig.width must be int, got 64.0"),
    ("EMA_DECAY='x'", "train.ema_decay must be float | None, got 'x'"),
    ("Nce.widths=(64, 'x')", "Nce.widths must be Sequence[int], got (64, 'x')"),
    ("TransformerConfig.window=8", "window must be Sequence[int], got 8"),
    ("TASK_FEATURE_LENGTHS={'query': 'x'}", "lengths must be Mapping[str, int]"),
    ("train.model=@Schedule()", "train.model must be EmbedderConfig"),
    ("Objective.terms=(@Schedule(),)", "Objective.terms must be Sequence[Term]"),
    ("Partitioner.rules=5", "Partitioner.rules must be tuple["),
  ],
)
def test_a_value_of_the_wrong_type(binding, message):
  with pytest.raises(ConfigError) as caught:
    parsed(binding)
  assert message in str(caught.value)


def test_search_paths(tmp_path):
  (tmp_path / "mine.gin").write_text("train.seed = 7\n")
  gin_config.register()
  gin_config.parse(["mine.gin"], [], [str(tmp_path)])
  assert gin.query_parameter("train.seed") == 7
