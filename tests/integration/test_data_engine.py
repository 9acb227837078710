"""`cache`, `teach` and `mine` as users run them, and training on what they make."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from embgemma.data.vector_store import VectorStore

pytestmark = pytest.mark.slow


def _flags(workspace, trained, *more: str) -> tuple[str, ...]:
  """Of a stage that goes on from the trained model, with its vocabulary."""
  return workspace.flags(
    "--gin_file=gin/models/from_checkpoint.gin",
    f"--gin.INITIAL_CHECKPOINT_PATH={trained}",
    f"--gin.VOCABULARY={trained / 'tokenizer.model'}",
    *more,
    stage="distill",
    steps=12,
  )


def _ok(done) -> str:
  assert done.returncode == 0, done.stderr
  return done.stderr


def test_cache_on_workers_and_as_a_pipeline(workspace, tmp_path):
  def build(name: str, *more: str) -> dict[str, bytes]:
    root = tmp_path / name
    flags = workspace.flags(f"--gin.CACHE_DIR={root}", stage="finetune")
    said = _ok(workspace.run("cache", *flags, *more))
    assert "cached plain: 160 examples" in said
    assert _ok(workspace.run("cache", *flags, *more)) == ""  # nothing to do
    files = (path for path in root.rglob("*") if path.is_file())
    return {
      str(path.relative_to(root)): path.read_bytes()
      for path in files
      if path.name != ".lock"
    }

  one = build("one")
  assert build("two", "--workers=2") == one
  assert build("beam", "--pipeline_options=") == one
  bad = workspace.run("cache", *workspace.flags(), "--workers=0")
  assert bad.stderr == "embgemma: error: --workers=0: give 1 or more\n"


def test_a_changed_prompt_caches_its_tasks_anew(workspace, trained, tmp_path):
  tasks = {
    name: {"path": str(workspace.root / "plain.jsonl"), "kind": kind}
    for name, kind in (("qa", "qa"), ("code", "code"))
  }
  flags = (
    *_flags(workspace, trained, f"--gin.CACHE_DIR={tmp_path}", "--gin.TEACHER=x"),
    f"--gin.JSONL_TASKS={tasks}",
  )
  said = _ok(workspace.run("cache", *flags))
  assert [line.split(":")[0] for line in said.splitlines()] == [
    *("cached code", "cached qa")
  ]
  changed = "--gin.PROMPTS={'QuestionAnswering': 'question: '}"
  said = _ok(workspace.run("cache", *flags, changed))
  assert [line.split(":")[0] for line in said.splitlines()] == ["cached qa"]


@pytest.fixture(scope="module")
def mined(workspace, trained, tmp_path_factory) -> pathlib.Path:
  output = tmp_path_factory.mktemp("mined") / "out"
  flags = _flags(workspace, trained, "--gin.TEACHER=x", "--gin.MiningOptions.depth=20")
  done = workspace.run("mine", *flags, f"--searcher={trained}", f"--output={output}")
  _ok(done)
  assert "plain" in done.stdout
  return output


def test_mine(workspace, trained, mined):
  with gzip.open(mined / "plain.jsonl.gz", "rt") as file:
    records = [json.loads(line) for line in file]
  lines = (workspace.root / "plain.jsonl").read_text().splitlines()
  source = [json.loads(line) for line in lines]
  assert [record["query"] for record in records] == [r["query"] for r in source]
  positives = {record["positive"] for record in source}
  with_negatives = [record for record in records if record.get("negatives")]
  assert len(with_negatives) > len(records) / 2
  for record in with_negatives:
    assert set(record["negatives"]) <= positives - {record["positive"]}
  again = workspace.run(
    "mine",
    *_flags(workspace, trained, "--gin.TEACHER=x", "--gin.MiningOptions.depth=20"),
    f"--searcher={trained}",
    f"--output={mined}",
  )
  assert again.returncode == 0  # the same command: done already


def test_bm25_needs_no_model(workspace, trained, tmp_path):
  flags = _flags(workspace, trained, "--gin.TEACHER=x")
  _ok(workspace.run("mine", *flags, "--searcher=bm25", f"--output={tmp_path / 'out'}"))
  assert json.loads((tmp_path / "out" / "report.json").read_text())


def test_teach_then_distil(workspace, trained, mined, tmp_path):
  """Batches carry the vectors; another teacher is another run."""
  given = _flags(
    workspace,
    trained,
    f"--gin_file={mined / 'tasks.gin'}",
    "--gin.TEACHER=own",
    f"--gin.CACHE_DIR={tmp_path / 'cache'}",
  )
  # A flag would win over the file.
  flags = [flag for flag in given if not flag.startswith("--gin.JSONL_TASKS=")]
  run = f"--gin.MODEL_DIR={tmp_path / 'run'}"
  _ok(workspace.run("cache", *flags))
  early = workspace.run("train", *flags, run)
  assert early.returncode == 1
  assert "embgemma teach" in early.stderr
  said = _ok(workspace.run("teach", *flags, f"--teacher={trained}"))
  assert "plain: " in said
  assert ", ready" in said
  (store,) = (tmp_path / "cache" / "teachers").iterdir()
  assert len(VectorStore(store)) > 160
  said = _ok(workspace.run("teach", *flags, f"--teacher={trained}"))
  assert "0 texts embedded" in said
  done = workspace.run("train", *flags, run)
  _ok(done)
  assert "trained to step 12" in done.stdout
  terms = "--gin.Objective.terms=(@Nce(), @SpreadOut())"
  for changes, setting in (
    (("--gin.TEACHER=None", terms), "teacher"),
    (("--gin.AVOID_DUPLICATES=False",), "avoid_duplicates"),
    (("--gin.MIXTURE_RATES=even",), "mixture"),
  ):
    other = workspace.run("train", *flags, run, *changes, "--gin.TRAIN_STEPS=14")
    assert other.returncode == 1
    assert f"other data settings ({setting}: " in other.stderr


def test_a_teacher_of_another_width(workspace, trained, tmp_path):
  flags = _flags(
    workspace,
    trained,
    "--gin.TEACHER=narrow",
    f"--gin.CACHE_DIR={tmp_path / 'cache'}",
    f"--gin.MODEL_DIR={tmp_path / 'run'}",
  )
  teach = ("teach", *flags, f"--teacher={trained}", "--width=16")
  done = workspace.run(*teach)
  assert done.returncode == 1
  message = "needs the first 32 coordinates of the teacher, which has only 16"
  assert message in done.stderr
  assert not (tmp_path / "cache").exists()  # said before anything is embedded
  _ok(workspace.run(*teach, "--gin.EmbeddingMatching.widths=(16,)"))
  vectors = VectorStore(tmp_path / "cache" / "teachers" / "narrow")
  rows = np.arange(len(vectors))
  norms = np.linalg.norm(vectors.gather(rows).astype(np.float32), axis=1)
  np.testing.assert_allclose(norms, 1, atol=2e-3)


@pytest.mark.parametrize(
  ("command", "flags", "message"),
  [
    ("teach", ("--gin.TEACHER=x", "--teacher=nowhere"), "no such directory"),
    ("teach", ("--gin.TEACHER=../x", "--teacher=nowhere"), "a name of letters"),
    ("teach", ("--gin.TEACHER=None", "--teacher=nowhere"), "--gin.TEACHER=NAME"),
    ("mine", ("--gin.TEACHER=x", "--searcher=nowhere"), "no such directory"),
    (
      "mine",
      ("--gin.TEACHER=x", "--searcher=bm25", "--gin.MiningOptions.depth=0"),
      "depth",
    ),
  ],
)
def test_bad_flags(workspace, trained, tmp_path, command, flags, message):
  more = (f"--output={tmp_path / 'out'}",) if command == "mine" else ()
  done = workspace.run(command, *_flags(workspace, trained), *flags, *more)
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert done.stderr.count("embgemma: error: ") == 1
  assert message in done.stderr
