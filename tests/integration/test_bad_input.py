"""Whatever is wrong: one message that says what, where and what to do; no traceback.

What was there before stays as it was.
"""

import contextlib
import dataclasses
import gzip
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence

import pytest


@pytest.fixture(scope="module")
def run(workspace) -> Callable[..., subprocess.CompletedProcess]:
  return workspace.run


def check_message(
  done: subprocess.CompletedProcess, mentions: Sequence[str], prints: Sequence[str] = ()
) -> None:
  """One error on stderr, after lines of progress at most, that mentions these."""
  assert done.returncode == 1, (done.stdout, done.stderr)
  assert "Traceback" not in done.stderr
  before, prefix, message = done.stderr.partition("embgemma: error: ")
  assert prefix, done.stderr
  assert "embgemma: error: " not in message
  progress = ("tokenising the tasks", "training a vocabulary", "cached ", *prints)
  strange = [line for line in before.splitlines() if not line.startswith(progress)]
  assert not strange
  for text in mentions:
    assert text in message


def contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }


@dataclasses.dataclass(frozen=True)
class Case:
  """Flags that override a good run's, and what the message mentions."""

  name: str
  flags: tuple[str, ...]
  mentions: tuple[str, ...]


SETTINGS = [
  Case("gin file", ("--gin_file=nowhere.gin",), ("nowhere.gin",)),
  Case("gin syntax", ("--gin.BATCH_SIZE=@missing()",), ("@missing()",)),
  Case("override without a value", ("--gin.BATCH_SIZE",), ("--gin.NAME=VALUE",)),
  Case("parameter", ("--gin.Nce.wings=1",), ("Nce", "wings")),
  Case("parameter of train", ("--gin.train.wings=1",), ("train", "wings")),
  Case("configurable", ("--gin.Wings.span=1",), ("Wings",)),
  Case("macro", ("--gin.TRAINSTEPS=4",), ("TRAINSTEPS", "spelling")),
  Case("required macro", ("--gin.TRAIN_STEPS=%gin.REQUIRED",), ("TRAIN_STEPS",)),
  Case("steps", ("--gin.TRAIN_STEPS='many'",), ("train_steps", "int", "'many'")),
  Case("half a step", ("--gin.TRAIN_STEPS=2.5",), ("train_steps", "int", "2.5")),
  Case("no steps", ("--gin.TRAIN_STEPS=0",), ("TRAIN_STEPS", "at least 1")),
  Case("true steps", ("--gin.TRAIN_STEPS=True",), ("train_steps", "True")),
  Case("batch", ("--gin.BATCH_SIZE=0",), ("BATCH_SIZE", "at least 1")),
  Case("rate", ("--gin.LEARNING_RATE=-1",), ("Schedule.peak", "-1")),
  Case("rate in words", ("--gin.LEARNING_RATE='low'",), ("Schedule.peak", "'low'")),
  Case("warm-up", ("--gin.Schedule.warmup_steps=99",), ("99 warm-up", "TRAIN_STEPS")),
  Case("seed", ("--gin.RANDOM_SEED=-1",), ("RANDOM_SEED",)),
  Case("average", ("--gin.EMA_DECAY=2",), ("EMA_DECAY", "between 0 and 1")),
  Case("clip", ("--gin.OptimizerConfig.clip_norm='x'",), ("clip_norm", "'x'")),
  Case(
    "rate multipliers",
    ("--gin.OptimizerConfig.rate_multipliers={'wing': 2.0}",),
    ("rate_multipliers", "wing"),
  ),
  Case("log", ("--gin.Intervals.log=0",), ("Intervals.log",)),
  Case("evaluations", ("--gin.EVALUATIONS=5",), ("evaluations", "5")),
  Case("evaluation", ("--gin.EVALUATIONS={'e': 'no.jsonl'}",), ("no.jsonl", "'e'")),
  Case(
    "best metric",
    (
      "--gin.CheckpointPolicy.best_metric='score'",
      "--gin.EVALUATIONS={'plain': 'plain.jsonl'}",
    ),
    ("'score'", "mean", "plain/ndcg@10/32"),
  ),
  Case("checkpoints", ("--gin.CHECKPOINT_STEPS=0",), ("every_steps",)),
  Case("keep", ("--gin.CheckpointPolicy.keep_last=0",), ("keep_last",)),
  Case("vocabulary", ("--gin.VOCABULARY=no.model",), ("no.model", "VOCABULARY")),
  Case("not one", ("--gin.VOCABULARY=plain.jsonl",), ("plain.jsonl", "SentencePiece")),
  Case("mesh", ("--gin.Partitioner.data=3",), ("'data': 3", "1 devices")),
  Case("mesh in words", ("--gin.Partitioner.fsdp='x'",), ("Partitioner.fsdp", "'x'")),
  Case("large batch", ("--gin.BATCH_SIZE=150",), ("BATCH_SIZE 150", "'hard'", "140")),
  Case("widths", ("--gin.MATRYOSHKA_WIDTHS=(64,)",), ("64", "embedding_width")),
  Case("heads", ("--gin.TransformerConfig.num_heads=3.5",), ("num_heads", "3.5")),
  Case("float16", ("--gin.TransformerConfig.dtype=float16",), ("float16", "bfloat16")),
  Case("lengths", ("--gin.TASK_FEATURE_LENGTHS={'query': 9}",), ("positive",)),
  Case("task file", ("--gin.JSONL_TASKS={'a': 'no.jsonl'}",), ("no.jsonl",)),
  Case("task entry", ("--gin.JSONL_TASKS={'a': 5}",), ("jsonl_tasks.files", "5")),
  Case("no tasks", ("--gin.JSONL_TASKS={}",), ("no tasks", "JSONL_TASKS")),
  Case("module", ("--gin.MODULES=('no_module',)",), ("no_module", "PYTHONPATH")),
  Case("source", ("--gin.INITIAL_CHECKPOINT_PATH=nowhere",), ("nowhere",)),
  Case("model directory", ("--gin.MODEL_DIR=plain.jsonl",), ("plain.jsonl",)),
  Case("number as directory", ("--gin.MODEL_DIR=5",), ("model_dir", "5")),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case.name)
def test_setting(case, run, workspace, trained, tmp_path):
  del trained  # its run filled the caches
  model_dir = tmp_path / "run"
  flags = workspace.flags(f"--gin.MODEL_DIR={model_dir}", *case.flags)
  check_message(run("train", *flags), case.mentions)
  assert not (model_dir / "checkpoints").is_dir() or not any(
    (model_dir / "checkpoints").iterdir()
  )


def test_no_gin_file(run):
  check_message(run("train"), ["--gin_file"])


def test_only_a_model(run):
  check_message(run("train", "--gin_file=gin/models/tiny.gin"), ["gin/stages/"])


def test_no_model(run):
  flags = [
    "--gin_file=gin/stages/prefinetune.gin",
    "--gin.MODEL_DIR=x",
    "--gin.TRAIN_STEPS=1",
    "--gin.BATCH_SIZE=1",
  ]
  check_message(run("train", *flags), ["no model", "gin/models/"])


def test_required_macros_are_named_together(run):
  done = run("train", "--gin_file=gin/recipes/quickstart.gin")
  check_message(done, ["--gin.MODEL_DIR="])
  files = ("--gin_file=gin/models/tiny.gin", "--gin_file=gin/stages/prefinetune.gin")
  done = run("explain", *files)
  check_message(done, ["--gin.BATCH_SIZE=… --gin.TRAIN_STEPS=…"])


def test_gin_flags_where_there_are_none(run):
  done = run("embed", "--checkpoint=x", "--input=x", "--output=x.npy", "--gin.A=1")
  check_message(done, ["`embgemma embed` takes no --gin flags"])


GOOD = b'{"query": "a good query", "positive": "a good passage"}\n'
RECORDS = {
  "malformed": (GOOD + b'{"query": "a\n', (":2", "malformed JSON")),
  "empty line": (GOOD + GOOD + b"\n" + GOOD, (":3", "empty line")),
  "no object": (b"[1, 2]\n", (":1", "JSON object")),
  "no positive": (GOOD + b'{"query": "a"}\n', (":2", '"positive"')),
  "number": (b'{"query": 5, "positive": "a"}\n', (":1", '"query"', "string")),
  "negatives": (
    b'{"query": "a", "positive": "b", "negatives": "c"}\n',
    (":1", '"negatives"', "list"),
  ),
  "negative": (
    b'{"query": "a", "positive": "b", "negatives": ["c", 1]}\n',
    (":1", "negatives[1]"),
  ),
  "invalid UTF-8": (GOOD + b'{"query": "\xff"}\n', (":2", "UTF-8")),
  "empty text": (b'{"query": "  ", "positive": "b"}\n', (":1", '"query" is empty')),
  "surrogate": (b'{"query": "\\ud800", "positive": "b"}\n', (":1", "surrogate")),
  "kind": (b'{"query": "a", "positive": "b", "task": "fly"}\n', ("'fly'", "search")),
  "empty file": (b"", ("no examples",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_record(name, run, workspace, trained, tmp_path):
  content, mentions = RECORDS[name]
  data, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
  data.write_bytes(content)
  done = run(
    "cache",
    *workspace.flags(f"--gin.JSONL_TASKS={{'pairs': '{data}'}}"),
    f"--gin.CACHE_DIR={cache}",
    f"--gin.VOCABULARY={trained / 'tokenizer.model'}",
  )
  check_message(done, mentions)
  # Nothing that counts as complete, and nothing half-written.
  left = {path.name for path in cache.rglob("*") if path.is_file()} - {".lock"}
  assert not [name for name in left if name.startswith(".") or name.endswith(".json")]


@pytest.mark.slow
def test_a_bad_record_stops_training_with_one_message(run, workspace, tmp_path):
  """The command that trains and the one that it caches with speak once."""
  data = tmp_path / "pairs.jsonl"
  data.write_bytes(GOOD + b"{}\n")
  flags = workspace.flags(f"--gin.JSONL_TASKS={{'pairs': '{data}'}}")
  done = run("train", *flags, f"--gin.MODEL_DIR={tmp_path / 'run'}")
  check_message(done, [f"{data}:2", '"query"', "--on_bad_record=skip"])
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_vocabulary_that_is_larger_than_the_table(run, workspace, trained, tmp_path):
  flags = workspace.flags(
    f"--gin.VOCABULARY={trained / 'tokenizer.model'}",
    "--gin.TransformerConfig.vocab_size=700",
    f"--gin.MODEL_DIR={tmp_path / 'run'}",
  )
  check_message(run("train", *flags), ["800 pieces", "700 rows"])


@pytest.fixture
def finished(trained, tmp_path) -> pathlib.Path:
  """A copy of a finished run."""
  return shutil.copytree(trained, tmp_path / "finished")


RESUMES = [
  Case("batch", ("--gin.BATCH_SIZE=8",), ("batch_size: 16 then, 8 now", "finished")),
  Case("seed", ("--gin.RANDOM_SEED=1",), ("seed: 0 then, 1 now",)),
  Case("data", ("--gin.MAX_NEGATIVES=0",), ("mixture", "INITIAL_CHECKPOINT_PATH")),
  Case("fewer steps", ("--gin.TRAIN_STEPS=20",), ("at step 30", "TRAIN_STEPS")),
  Case(
    "architecture",
    ("--gin.TransformerConfig.mlp_width=64",),
    ("transformer.mlp_width: 48 there, 64 here", "MODEL_DIR"),
  ),
  Case(
    "optimizer",
    ("--gin.OptimizerConfig.name='adafactor'",),
    ("opt_state/1/mu/model", "checkpoint (", "model -"),
  ),
  Case("average", ("--gin.EMA_DECAY=0.9",), ("checkpoints/30/ema",)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_resuming_with_another(case, run, workspace, finished):
  before = contents(finished)
  # A good run would go on to step 40.
  flags = workspace.flags("--gin.TRAIN_STEPS=40", *case.flags)
  check_message(run("train", *flags, f"--gin.MODEL_DIR={finished}"), case.mentions)
  assert contents(finished) == before


@pytest.mark.slow
def test_starting_from_another_architecture(run, workspace, trained, tmp_path):
  flags = workspace.flags(
    "--gin.TransformerConfig.mlp_width=64",
    f"--gin.INITIAL_CHECKPOINT_PATH={trained}",
    f"--gin.MODEL_DIR={tmp_path / 'run'}",
  )
  mentions = ["mlp/up/kernel: checkpoint (1, 32, 48), model (1, 32, 64)"]
  check_message(run("train", *flags), mentions)


@pytest.mark.slow
def test_a_loss_that_is_not_finite(run, workspace, finished):
  before = contents(finished / "checkpoints")
  flags = workspace.flags(
    "--gin.TRAIN_STEPS=60", "--gin.LEARNING_RATE=1e30", "--gin.Schedule.kind=constant"
  )
  done = run("train", *flags, f"--gin.MODEL_DIR={finished}")
  # At step 31 parameters leap, at step 32 nothing can be computed from them.
  check_message(done, ["step 32", "task '", "is nan", "last saved step is 30"])
  metric = done.stderr.partition("': ")[2].partition(" is ")[0]
  known = ("similarity", "loss", "nce", "vector_gradient_norm", "gradient_norm")
  assert metric.startswith(known)
  assert contents(finished / "checkpoints") == before


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
  """A file system of that size."""
  path.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
  if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small file system is not permitted here")
  try:
    yield path
  finally:
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_model_directory_on_a_full_disk(run, workspace, trained, tmp_path):
  with small_disk(tmp_path / "disk", "1200k") as disk:
    model_dir = disk / "run"
    flags = workspace.flags(
      "--gin.CheckpointPolicy.keep_last=9",
      "--gin.CHECKPOINT_STEPS=5",
      f"--gin.MODEL_DIR={model_dir}",
    )
    done = run("train", *flags)
    check_message(done, [str(model_dir), "No space left on device", "free space"])
    names = sorted(path.name for path in (model_dir / "checkpoints").iterdir())
    complete = [name for name in names if name.isdigit()]
    assert complete
    # What is complete can be used.
    embed = run(
      "embed",
      f"--checkpoint={model_dir}",
      f"--input={workspace.root / 'plain.jsonl'}",
      "--field=query",
      f"--output={tmp_path / 'out.npy'}",
    )
    assert embed.returncode == 0, embed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "32k", "64k", "128k"])
def test_disk_that_fills_early(size, run, workspace, trained, tmp_path):
  """Wherever it fills up: vocabulary, description, evaluations, events, weights."""
  with small_disk(tmp_path / "disk", size) as disk:
    plain = workspace.root / "plain.jsonl"
    flags = workspace.flags(
      f"--gin.EVALUATIONS={{'plain': '{plain}'}}", f"--gin.MODEL_DIR={disk / 'run'}"
    )
    check_message(run("train", *flags), [str(disk), "No space left on device"])


@pytest.mark.slow
def test_cache_on_a_full_disk(run, workspace, trained, tmp_path):
  with small_disk(tmp_path / "disk", "32k") as disk:
    flags = workspace.flags(
      f"--gin.CACHE_DIR={disk}", f"--gin.VOCABULARY={trained / 'tokenizer.model'}"
    )
    check_message(run("cache", *flags), [str(disk), "No space left on device"])
    assert not [path for path in disk.rglob("*") if ".unfinished" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_embedding_onto_a_full_disk(suffix, run, workspace, trained, tmp_path):
  with small_disk(tmp_path / "disk", "16k") as disk:
    output = disk / f"out.{suffix}"
    output.write_bytes(b"what was there")
    done = run(
      "embed",
      f"--checkpoint={trained}",
      f"--input={workspace.root / 'plain.jsonl'}",
      "--field=query",
      f"--output={output}",
    )
    check_message(done, [str(output), "No space left on device", "nothing was changed"])
    assert output.read_bytes() == b"what was there"
    assert [path.name for path in disk.iterdir()] == [output.name]


EMBEDS = [
  Case("checkpoint", ("--checkpoint=nowhere",), ("nowhere", "MODEL_DIR")),
  Case("step", ("--checkpoint={trained}/checkpoints/25",), ("no step 25", "[20, 30]")),
  Case("input", ("--input=nowhere.txt",), ("nowhere.txt", "no such file")),
  Case("output", ("--output={tmp}/out.txt",), (".npy or .parquet",)),
  Case("directory", ("--output=plain.jsonl/out.npy",), ("plain.jsonl", "written")),
  Case("width", ("--dim=33",), ("33", "1..32")),
  Case("no width", ("--dim=0",), ("0", "1..32")),
  Case("prompt", ("--prompt=wings",), ("'wings'", "'query'")),
  Case("length", ("--max_length=2",), ("max_length 2",)),
  Case("long length", ("--max_length=4096",), ("4096", "512")),
  Case("field", ("--field=passage",), ("plain.jsonl:1", '"passage"')),
  Case("empty line", ("--input={tmp}/empty.txt",), ("empty.txt:2", "empty text")),
  Case("UTF-8", ("--input={tmp}/latin.txt",), ("latin.txt:1", "invalid UTF-8")),
  Case("JSON", ("--input={tmp}/bad.jsonl",), ("bad.jsonl:1", "malformed JSON")),
  Case("number", ("--input={tmp}/number.jsonl",), ("number.jsonl:1", "string")),
  Case("gzip", ("--input={tmp}/cut.txt.gz",), ("cut.txt.gz", "cannot be read")),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", EMBEDS, ids=lambda case: case.name)
def test_embed(case, run, trained, tmp_path):
  (tmp_path / "empty.txt").write_text("one\n\nthree\n")
  (tmp_path / "latin.txt").write_bytes("né\n".encode("latin-1"))
  (tmp_path / "bad.jsonl").write_text('{"query": \n')
  (tmp_path / "number.jsonl").write_text('{"query": 5}\n')
  (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text\n" * 99)[:-12])
  output = tmp_path / "out.npy"
  output.write_bytes(b"what was there")
  options = {
    "--checkpoint": str(trained),
    "--input": "plain.jsonl",
    "--field": "query",
    "--output": str(output),
  }
  for flag in case.flags:
    name, _, value = flag.format(trained=trained, tmp=tmp_path).partition("=")
    options[name] = value
  done = run("embed", *(f"{name}={value}" for name, value in options.items()))
  check_message(done, case.mentions)
  assert output.read_bytes() == b"what was there"
  assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


EVALS = [
  Case("no path", ("--data=plain",), ("--data=plain", "NAME=PATH")),
  Case("kind", ("--data=a=plain.jsonl:wings",), ("'wings'", "search")),
  Case("missing", ("--data=a=nowhere.jsonl",), ("nowhere.jsonl",)),
  Case("built-in", ("--data=a=builtin:wings",), ("wings", "stdlib_docs")),
  Case("width", ("--data=a=plain.jsonl", "--widths=64"), ("64", "32")),
  Case("no width", ("--data=a=plain.jsonl", "--widths=x"), ("--widths=x",)),
  Case("checkpoint", ("--data=a=plain.jsonl", "--checkpoint=no"), ("no model.json",)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", EVALS, ids=lambda case: case.name)
def test_eval(case, run, trained, tmp_path):
  output = tmp_path / "results.json"
  done = run("eval", f"--checkpoint={trained}", f"--output={output}", *case.flags)
  check_message(done, case.mentions)
  assert not output.exists()


@pytest.mark.slow
def test_a_damaged_vocabulary(run, workspace, finished):
  (finished / "tokenizer.model").write_bytes(b"not a model")
  done = run("eval", f"--checkpoint={finished}", "--data=a=plain.jsonl")
  check_message(done, ["tokenizer.model", "SentencePiece"])


@pytest.mark.slow
def test_a_damaged_checkpoint(run, finished):
  shutil.rmtree(finished / "checkpoints" / "30" / "params" / "d")
  shutil.rmtree(finished / "checkpoints" / "30" / "params" / "ocdbt.process_0")
  done = run("eval", f"--checkpoint={finished}", "--data=a=plain.jsonl")
  check_message(done, ["checkpoints/30", "delete the step's directory"])
