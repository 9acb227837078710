"""Export, import and finetuning by the commands; sentence-transformers as the judge."""

import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import evaluation

from embgemma.checkpoints import read_description

pytestmark = pytest.mark.slow


def succeeded(done):
  assert done.returncode == 0, done.stderr
  return done


@pytest.fixture(scope="module")
def exported(trained, workspace, tmp_path_factory) -> pathlib.Path:
  output = tmp_path_factory.mktemp("exported") / "hf"
  succeeded(
    workspace.run(
      "export", "--to=hf", f"--checkpoint={trained}", f"--output={output}",
      "--max_length=100",
    )
  )  # fmt: skip
  return output


@pytest.fixture(scope="module")
def imported(exported, workspace) -> pathlib.Path:
  output = exported.parent / "imported"
  succeeded(
    workspace.run("import", "--from=hf", f"--source={exported}", f"--output={output}")
  )
  return output


def judged(directory: pathlib.Path, pairs: pathlib.Path, width: int) -> float:
  """nDCG@10 of sentence-transformers' own evaluator."""
  records = [json.loads(line) for line in pairs.read_text().splitlines()]
  corpus = {record["positive"]: record["positive"] for record in records}
  relevant: dict[str, set[str]] = {}
  for record in records:
    relevant.setdefault(record["query"], set()).add(record["positive"])
  model = SentenceTransformer(str(directory), device="cpu")
  evaluator = evaluation.InformationRetrievalEvaluator(
    {query: query for query in relevant},
    corpus,
    relevant,
    query_prompt_name="query",
    corpus_prompt_name="document",
    truncate_dim=width,
    show_progress_bar=False,
    write_csv=False,
  )
  return evaluator(model)["cosine_ndcg@10"]


@pytest.mark.parametrize("model", ["from_checkpoint", "lora"])
def test_finetuning_an_imported_model(imported, workspace, tmp_path, model):
  pairs = workspace.root / "plain.jsonl"
  model_dir, output = tmp_path / "run", tmp_path / "hf"
  flags = (
    f"--gin_file=gin/models/{model}.gin",
    "--gin_file=gin/stages/finetune.gin",
    f"--gin.INITIAL_CHECKPOINT_PATH={imported}",
    f"--gin.MODEL_DIR={model_dir}",
    "--gin.TASK_FEATURE_LENGTHS={'query': 32, 'positive': 64, 'negatives': 64}",
    f"--gin.JSONL_TASKS={{'plain': '{pairs}'}}",
    f"--gin.EVALUATIONS={{'plain': '{pairs}'}}",
    "--gin.BATCH_SIZE=16",
    "--gin.TRAIN_STEPS=20",
    "--gin.LEARNING_RATE=5e-3",
  )
  succeeded(workspace.run("train", *flags))
  kept = json.loads((model_dir / "evaluations.json").read_text())
  before, after = (kept[step]["plain"]["ndcg@10/32"] for step in ("0", "20"))
  assert after > before + 0.02
  is_lora = model == "lora"
  assert (read_description(model_dir).embedder.lora is not None) == is_lora
  succeeded(
    workspace.run(
      "export", "--to=hf", f"--checkpoint={model_dir}", f"--output={output}"
    )
  )
  for width in (32, 16):
    expected = kept["20"]["plain"][f"ndcg@10/{width}"]
    assert judged(output, pairs, width) == pytest.approx(expected, abs=1e-4)
  card = (output / "README.md").read_text()
  assert "| plain | ndcg@10 | 32 |" in card
  assert "TRAIN_STEPS = 20" in card
  assert "plain.jsonl" in card
  assert str(workspace.root) not in card
  # The run can be resumed; the imported weights alone cannot.
  assert "resuming from step 20" in succeeded(workspace.run("train", *flags)).stdout


def test_embed_and_eval_take_a_hugging_face_directory(
  exported, trained, workspace, tmp_path
):
  (tmp_path / "texts.txt").write_text("river stones\na text about copper\n")
  vectors = []
  for directory in (trained, exported):
    output = tmp_path / "vectors.npy"
    flags = (f"--input={tmp_path / 'texts.txt'}", f"--output={output}")
    succeeded(
      workspace.run("embed", f"--checkpoint={directory}", "--prompt=query", *flags)
    )
    vectors.append(np.load(output))
  np.testing.assert_allclose(*vectors, atol=1e-6)
  plain = workspace.root / "plain.jsonl"
  results = tmp_path / "results.json"
  flags = (f"--data=plain={plain}", f"--output={results}", "--max_length=64")
  succeeded(workspace.run("eval", f"--checkpoint={exported}", *flags))
  (column,) = json.loads(results.read_text()).items()
  kept = json.loads((trained / "evaluations.json").read_text())["30"]["plain"]
  assert column[0] == "hf"
  assert column[1]["plain"]["ndcg@10/32"] == pytest.approx(kept["ndcg@10/32"], abs=1e-4)


def test_gguf(trained, exported, workspace, tmp_path):
  files = []
  for name, checkpoint in (("run", trained), ("hf", exported)):
    output = tmp_path / f"{name}.gguf"
    flags = (f"--checkpoint={checkpoint}", f"--output={output}", "--dtype=bfloat16")
    succeeded(workspace.run("export", "--to=gguf", *flags))
    files.append(gguf.GGUFReader(output))
  one, other = ({t.name: t.data for t in file.tensors} for file in files)
  assert one.keys() == other.keys()
  assert all(np.array_equal(one[name], other[name]) for name in one)
  assert {"token_embd.weight", "dense_2.weight", "dense_3.weight"} < one.keys()


def _flags(command: str, **paths) -> list[str]:
  return [command, *(f"--{name}={value}" for name, value in paths.items())]


@pytest.fixture(scope="module")
def cases(trained, exported, imported, tmp_path_factory) -> dict[str, tuple]:
  """Commands that must fail, and what their message says."""
  new = tmp_path_factory.mktemp("new") / "output"
  taken = {"output": imported}
  hf = {"from": "hf", "source": exported, "output": new}
  out = {"checkpoint": trained, "output": new}
  return {
    "import over a model": (_flags("import", **hf | taken), "--overwrite"),
    "export over a model": (_flags("export", to="hf", **out | taken), "--overwrite"),
    "import of nothing": (_flags("import", **hf | {"source": "none"}), "no directory"),
    "import of a run": (_flags("import", **hf | {"source": trained}), "config.json"),
    "gemma from hf": (_flags("import", **hf | {"from": "gemma"}), "Orbax"),
    "t5gemma2 from hf": (_flags("import", **hf | {"from": "t5gemma2"}), "gemma3_text"),
    "no such tokenizer": (_flags("import", **hf, tokenizer="x.model"), "x.model"),
    "float16 gguf": (_flags("export", to="gguf", dtype="float16", **out), "65,504"),
    "float16 hf": (_flags("export", to="hf", dtype="float16", **out), "65,504"),
    "q8_0 hf": (_flags("export", to="hf", dtype="q8_0", **out), "are of other formats"),
    "length of gguf": (_flags("export", to="gguf", max_length=9, **out), "context's"),
    "too long": (_flags("export", to="hf", max_length=99999, **out), "99999"),
  }  # fmt: skip


@pytest.mark.parametrize(
  "name",
  [
    "import over a model",
    "export over a model",
    "import of nothing",
    "import of a run",
    "gemma from hf",
    "t5gemma2 from hf",
    "no such tokenizer",
    "float16 gguf",
    "float16 hf",
    "q8_0 hf",
    "length of gguf",
    "too long",
  ],
)
def test_what_is_refused(cases, workspace, name):
  command, said = cases[name]
  output = pathlib.Path(next(f for f in command if "--output=" in f).split("=")[1])
  before = sorted(output.parent.rglob("*"))
  done = workspace.run(*command)
  assert done.returncode == 1, done.stderr
  assert done.stderr.startswith("embgemma: error: ")
  assert said in done.stderr
  assert "Traceback" not in done.stderr
  assert sorted(output.parent.rglob("*")) == before


def test_overwrite_replaces(exported, workspace, tmp_path):
  output = tmp_path / "model"
  flags = ("import", "--from=hf", f"--source={exported}", f"--output={output}")
  succeeded(workspace.run(*flags))
  (output / "stale").write_text("old")
  succeeded(workspace.run(*flags, "--overwrite"))
  assert not (output / "stale").exists()
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _from_checkpoint(workspace, imported, model_dir, *more):
  tasks = {"plain": str(workspace.root / "plain.jsonl")}
  return (
    "--gin_file=gin/models/from_checkpoint.gin",
    "--gin_file=gin/stages/prefinetune.gin",
    f"--gin.INITIAL_CHECKPOINT_PATH={imported}",
    f"--gin.MODEL_DIR={model_dir}",
    "--gin.TASK_FEATURE_LENGTHS={'query': 32, 'positive': 64, 'negatives': 64}",
    f"--gin.JSONL_TASKS={tasks}",
    "--gin.BATCH_SIZE=16",
    *more,
  )


def test_imported_weights_are_no_run(imported, workspace):
  flags = _from_checkpoint(workspace, imported, imported, "--gin.TRAIN_STEPS=1")
  done = workspace.run("train", *flags)
  assert done.returncode == 1
  assert "holds imported weights, not a run" in done.stderr


def test_widths_of_losses_and_evaluations_are_one(imported, workspace, tmp_path):
  flags = ("--gin.MATRYOSHKA_WIDTHS=(32, 8)", "--gin.TRAIN_STEPS=1")
  flags = _from_checkpoint(workspace, imported, tmp_path / "run", *flags)
  succeeded(workspace.run("train", *flags))
  assert read_description(tmp_path / "run").embedder.matryoshka_widths == (32, 8)
  # Another remat is no other model.
  flags = (*flags, "--gin.checkpoint_model.remat=none", "--gin.TRAIN_STEPS=2")
  assert "resuming from step 1" in succeeded(workspace.run("train", *flags)).stdout


def test_a_step_that_is_not_there(imported, workspace, tmp_path):
  flags = _from_checkpoint(
    workspace, f"{imported}/checkpoints/31", tmp_path / "run", "--gin.TRAIN_STEPS=1"
  )
  done = workspace.run("train", *flags)
  assert done.returncode == 1
  assert "no step 31; there are [0]" in done.stderr
  assert not (tmp_path / "run").exists()


def test_a_model_from_no_checkpoint(workspace, tmp_path):
  flags = ("--gin_file=gin/models/from_checkpoint.gin",)
  flags += ("--gin_file=gin/stages/finetune.gin", f"--gin.MODEL_DIR={tmp_path}")
  flags += ("--gin.TRAIN_STEPS=1", "--gin.BATCH_SIZE=4")
  done = workspace.run("train", *flags)
  assert done.returncode == 1
  assert "--gin.INITIAL_CHECKPOINT_PATH" in done.stderr
