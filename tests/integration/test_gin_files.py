"""Every gin file parses with what it goes with, and `explain` resolves it."""

import dataclasses
import itertools
import pathlib
import re
import shlex
import sys

import gin
import jax
import numpy as np
import pytest

from embgemma import checkpoints, cli, gin_config
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import ConfigError
from embgemma.models import embedder, encoder_decoder
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig

GIN = pathlib.Path(__file__).parents[2] / "gin"
EMBEDDERS = (
  "embeddinggemma_300m",
  "from_checkpoint",
  "gemma3_270m",
  "lora",
  "mini",
  "small",
  "tiny",
)
STAGES_OF_PAIRS = ("finetune", "prefinetune")
# Files of a model, and the stage that trains it on documents.
BACKBONES = (
  (("tiny", "decoder"), "pretrain"),
  (("tiny", "encoder_decoder"), "adapt"),
  (("adapted",), "adapt"),
)
_LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 16 + 4 * 32
_BASE = 640 * 32 + 6 * _LAYER + 32 + 32 * 64 + 64 * 32
SCALES = ("mini", "paper", "small", "tiny")
ABLATIONS = ("initialization", "losses", "poolers", "quantization", "widths")


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


@pytest.fixture(scope="module")
def write_base(tmp_path_factory):
  """Writes a checkpoint of zeros of a small model."""
  root = tmp_path_factory.mktemp("bases")
  texts = ["some text to train a vocabulary on, and then some more of it"]
  vocabulary = train_vocabulary(texts, 620, root / "small.model", sentinels=200)

  def write(name, module, config) -> pathlib.Path:
    lengths = dict.fromkeys(("query", "positive", "negatives"), 16)
    description = checkpoints.Description(config, lengths, {})
    checkpoints.write_description(root / name, description, vocabulary, "")
    zeros = jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), module.abstract_params(config)
    )
    checkpoints.write_weights(root / name, zeros)
    return root / name

  return write


_STACK = TransformerConfig(
  vocab_size=640, num_layers=6, width=32, mlp_width=64, num_heads=2, num_kv_heads=1,
  head_dim=16, attention_pattern=("local", "global"),
)  # fmt: skip


@pytest.fixture(scope="module")
def base(write_base) -> pathlib.Path:
  """A checkpoint of an embedder."""
  config = EmbedderConfig(
    _STACK, hidden_width=64, embedding_width=32, matryoshka_widths=(32, 8)
  )
  return write_base("embedder", embedder, config)


@pytest.fixture(scope="module")
def pretrained(write_base) -> pathlib.Path:
  """A checkpoint of a decoder alone."""
  decoder = dataclasses.replace(_STACK, mask="causal", window=(511, 0))
  return write_base("decoder", encoder_decoder, BackboneConfig(decoder=decoder))


@pytest.mark.parametrize(
  ("model", "stage"),
  [
    *itertools.product(EMBEDDERS, STAGES_OF_PAIRS),
    *(("from_checkpoint", stage) for stage in ("probe", "distill", "quantize")),
  ],
)
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
    *(["--gin.TEACHER=vectors"] if stage in ("distill", "quantize") else []),
    *(["--gin.QUANTIZATION=@mixed_channel()"] if stage == "quantize" else []),
  )
  assert "pairs" in output
  expected = {
    "embeddinggemma_300m": 307_581_696,
    "gemma3_270m": 268_098_176 + 4_325_376,
    # Table, layers and norms, heads; rank 16 beside seven kernels of each layer.
    "from_checkpoint": _BASE,
    "lora": _BASE + 6 * 16 * (64 + 48 + 48 + 64 + 96 + 96 + 96),
  }
  if model in expected:
    assert total_parameters(output) == expected[model]
  # An embedder that goes on is not adapted.
  assert "part " not in output


@pytest.fixture
def documents(tmp_path, monkeypatch):
  path = tmp_path / "documents.jsonl"
  path.write_text('{"text": "a document"}\n')
  monkeypatch.setenv("EMBGEMMA_CACHE", str(tmp_path / "cache"))
  return path


@pytest.mark.parametrize(("models", "stage"), BACKBONES)
def test_backbone_with_stage(models, stage, documents, pretrained, capsys):
  output = explain(
    capsys,
    *(f"--gin_file=gin/models/{model}.gin" for model in models),
    f"--gin_file=gin/stages/{stage}.gin",
    f"--gin.TEXT_TASKS={{'documents': '{documents}'}}",
    *(
      [f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}"] if models == ("adapted",) else []
    ),
  )
  tiny = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 64 + 4 * 128) + 128
  small = 6 * _LAYER + 32
  expected, row, segment = {
    "decoder": (8192 * 128 + tiny, "512", 511),
    "encoder_decoder": (8192 * 128 + 2 * tiny, "1024 + 1024", 512),
    "adapted": (640 * 32 + 2 * small, "1024 + 1024", 512),
  }[models[-1]]
  assert total_parameters(output) == expected
  for part in (
    f"rows of {row} on a shard",
    f"segments of {segment} tokens",
    "logits of a chunk",
    "│ documents │ 1.000 │   100 │",
  ):
    assert part in output
  adapted = re.findall(r"^encoder token table +(\S+)  (.*)$", output, re.MULTILINE)
  source = f"{pretrained}, decoder token table"
  assert adapted == ([("20,480", source)] if models == ("adapted",) else [])


def test_an_embedder_of_a_pretrained_decoder(pairs, pretrained, capsys):
  flags = (
    "--gin_file=gin/models/from_checkpoint.gin",
    "--gin_file=gin/stages/prefinetune.gin",
    f"--gin.JSONL_TASKS={{'pairs': '{pairs}'}}",
    f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}",
  )
  output = explain(capsys, *flags)
  assert f"{pretrained}, decoder attention" in output
  assert re.search(r"projection_up +[\d,]+  random\n", output)
  # Of another vocabulary only training can tell once it is there.
  output = explain(capsys, *flags, "--gin.VOCABULARY=none.model")
  assert "where the parameters come from: known once" in output


def test_a_run_that_goes_on_adapts_nothing(pairs, pretrained, capsys):
  output = explain(
    capsys,
    "--gin_file=gin/models/from_checkpoint.gin",
    "--gin_file=gin/stages/prefinetune.gin",
    f"--gin.JSONL_TASKS={{'pairs': '{pairs}'}}",
    f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}",
    f"--gin.MODEL_DIR={pretrained}",  # as if it were a run's
  )
  assert "random" not in output


def test_quickstart(pairs, capsys):
  output = explain(capsys, "--gin_file=gin/recipes/quickstart.gin")
  assert total_parameters(output) > 0


def commands(capsys, *flags: str) -> dict[str, list[str]]:
  """Of a recipe's stages, by their names."""
  cli.main(["recipe", *flags, "--gin.RECIPE_DIR=runs", "--dry_run"])
  lines = capsys.readouterr().out.splitlines()
  names = [line[2:].partition(":")[0] for line in lines if line.startswith("# ")]
  found = [shlex.split(line)[1:] for line in lines if line.startswith("embgemma ")]
  return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("scale", SCALES)
def test_scale(scale, pairs, base, capsys):
  mixtures = ("DOCUMENTS=gin/mixtures/builtin_texts.gin",) if scale != "tiny" else ()
  if mixtures:
    names = ("PAIRS", "FINETUNING_PAIRS")
    mixtures += tuple(f"{name}=gin/mixtures/builtin.gin" for name in names)
  if scale == "paper":
    mixtures += (f"BASE={base}", "TEACHER_MODEL=gemini:any")
  found = commands(
    capsys, f"--gin_file=gin/recipes/{scale}.gin", *(f"--gin.{m}" for m in mixtures)
  )
  assert list(found)[-3:] == ["soup", "evaluation", "embedder"]
  assert found["prefinetuned"][0] == "train"
  if scale == "tiny":  # of the others the first stage has no data here
    output = explain(capsys, *found["decoder"][1:])
    assert "stdlib_modules" in output


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablation(ablation, pairs, base, pretrained, tmp_path, capsys):
  own = tmp_path / "pairs.gin"
  own.write_text(
    f"JSONL_TASKS = {{'pairs': '{pairs}'}}\n"
    "TASK_FEATURE_LENGTHS = {'query': 8, 'positive': 16, 'negatives': 16}\n"
  )
  other = tmp_path / "other"
  other.symlink_to(pretrained)
  starts = {
    "initialization": (f"ENCODER_DECODER={pretrained}", f"DECODER={other}"),
    "poolers": (f"STACKS={pretrained}",),
    "losses": (f"CHECKPOINT={base}",),
    "widths": (f"CHECKPOINT={base}", "FULL_WIDTH=32"),
    "quantization": (f"CHECKPOINT={base}", "TEACHER=before"),
  }
  macros = (*starts[ablation], f"PAIRS={own}")
  found = commands(
    capsys,
    f"--gin_file=gin/recipes/ablations/{ablation}.gin",
    *(f"--gin.{macro}" for macro in macros),
    "--gin.TRAINING={'TRAIN_STEPS': 10, 'BATCH_SIZE': 8}",
    "--gin.SEEDS=(0,)",
  )
  assert len(found) > 1
  for name, (command, *flags) in found.items():
    if command == "train":
      assert total_parameters(explain(capsys, *flags)) > 0, name
  distinct = {tuple(flags[:-1]) for flags in found.values()}  # but for MODEL_DIR
  assert len(distinct) == len(found)


def test_every_gin_file_is_tested():
  tested = {f"models/{name}" for name in EMBEDDERS}
  tested |= {f"models/{name}" for models, _ in BACKBONES for name in models}
  stages = (*STAGES_OF_PAIRS, "probe", "distill", "quantize")
  tested |= {f"stages/{name}" for name in stages}
  tested.add("stages/search")  # tests/integration/test_search.py
  tested |= {f"stages/{stage}" for _, stage in BACKBONES}
  tested |= {f"recipes/{name}" for name in (*SCALES, "quickstart", "stages")}
  tested |= {f"recipes/ablations/{name}" for name in (*ABLATIONS, "arms")}
  files = {str(path.relative_to(GIN).with_suffix("")) for path in GIN.rglob("*.gin")}
  # tests/data/test_public_sets.py has the mixtures.
  assert {name for name in files if not name.startswith("mixtures/")} == tested


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
