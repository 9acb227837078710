"""Each command from end to end on a run of seconds."""

import gzip
import json
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from embgemma import cli, vector_formats
from embgemma.checkpoints import CheckpointStore, read_description
from embgemma.interop import conversion, weights

pytestmark = pytest.mark.slow


def test_train_writes_a_model_directory(trained):
  names = {path.name for path in trained.iterdir()}
  assert names == {
    "checkpoints",
    "model.json",
    "evaluations.json",
    "operative.gin",
    "system.json",
    "tensorboard",
    "tokenizer.model",
  }
  # The evaluated last step is also the best.
  assert CheckpointStore(trained).steps() == [20, 30]
  assert any((trained / "tensorboard").glob("events.out.tfevents.*"))
  assert "TRAIN_STEPS = 30" in (trained / "operative.gin").read_text()
  description = read_description(trained)
  assert description.config.matryoshka_widths == (32, 16)
  assert description.lengths == {"query": 32, "positive": 64, "negatives": 64}


def test_training_helps_on_its_own_pairs(trained):
  kept = json.loads((trained / "evaluations.json").read_text())
  assert kept.keys() == {"0", "30"}
  for width in (32, 16):
    key = f"ndcg@10/{width}"
    assert kept["30"]["plain"][key] > kept["0"]["plain"][key] + 0.1


def test_a_finished_run_is_left_as_it_is(trained, workspace):
  before = {p: p.stat().st_mtime_ns for p in (trained / "checkpoints").rglob("*")}
  plain = workspace.root / "plain.jsonl"
  done = workspace.train(trained, f"--gin.EVALUATIONS={{'plain': '{plain}'}}")
  assert done.returncode == 0, done.stderr
  assert "resuming from step 30" in done.stdout
  assert "ndcg@10" in done.stdout
  after = {p: p.stat().st_mtime_ns for p in (trained / "checkpoints").rglob("*")}
  assert after == before


def test_finetune_starts_from_another_checkpoint(
  trained, workspace, tmp_path, capsys, monkeypatch
):
  """In this process: eight devices, shapes and types checked."""
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main sets its own
  monkeypatch.setenv("EMBGEMMA_CACHE", workspace.environment["EMBGEMMA_CACHE"])
  arguments = workspace.flags(
    "--gin.TASK_FEATURE_LENGTHS={'query': 32, 'positive': 64, 'negatives': 64}",
    f"--gin.INITIAL_CHECKPOINT_PATH={trained}",
    f"--gin.EVALUATIONS={{'plain': '{workspace.root / 'plain.jsonl'}'}}",
    "--gin.LEARNING_RATE=1e-3",
    "--gin.EMA_DECAY=0.5",
    "--gin.EVAL_STEPS=1",
    f"--gin.MODEL_DIR={tmp_path / 'run'}",
    stage="finetune",
    steps=2,
  )
  cli.main(["train", *arguments])
  assert "trained to step 2" in capsys.readouterr().out
  kept = json.loads((tmp_path / "run" / "evaluations.json").read_text())
  source = json.loads((trained / "evaluations.json").read_text())
  assert kept.keys() == {"0", "1", "2"}
  key = "ndcg@10/32"
  assert kept["0"]["plain"][key] == pytest.approx(source["30"]["plain"][key], abs=1e-6)
  store = CheckpointStore(tmp_path / "run")
  assert store.shipped_item(store.resolve_step(None)) == "ema"


def test_curves_in_weights_and_biases(workspace, tmp_path):
  pytest.importorskip("wandb", reason="of the extra wandb")
  flags = ("--gin.WANDB_PROJECT=project", "--gin.train.baselines=False")
  done = workspace.train(tmp_path / "run", *flags, steps=2)
  assert done.returncode == 0, done.stderr
  (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
  assert b"tokens_per_second" in kept.read_bytes()
  assert b"TRAIN_STEPS = 2" in kept.read_bytes(), "its configuration"


def test_soup_of_a_run(trained, workspace, tmp_path):
  """The mean of its steps, which evaluates about as well as they do."""
  flags = (str(trained), f"--output={tmp_path / 'soup'}")
  done = workspace.run("soup", *flags, "--last=3")
  assert done.returncode == 1
  assert "keeps 2 steps: [20, 30]" in done.stderr
  assert list(tmp_path.iterdir()) == []
  done = workspace.run("soup", *flags, "--last=2")
  assert done.returncode == 0, done.stderr
  config = read_description(trained).embedder
  one, other = (weights.read(trained, step, config) for step in (20, 30))
  jax.tree.map(
    lambda found, a, b: np.testing.assert_allclose(
      found, np.mean([a, b], axis=0, dtype=np.float64), rtol=1e-6, atol=1e-9
    ),
    conversion.open_embedder(tmp_path / "soup").params,
    one,
    other,
  )
  plain, results = workspace.root / "plain.jsonl", tmp_path / "results.json"
  done = workspace.run(
    "eval",
    f"--checkpoint={tmp_path / 'soup'}",
    f"--data=plain={plain}",
    f"--output={results}",
  )
  assert done.returncode == 0, done.stderr
  kept = json.loads((trained / "evaluations.json").read_text())["30"]["plain"]
  found = json.loads(results.read_text())["step 0"]["plain"]
  assert found["ndcg@10/32"] == pytest.approx(kept["ndcg@10/32"], abs=0.1)


def embed(workspace, *flags: str) -> subprocess.CompletedProcess[str]:
  done = workspace.run("embed", *flags)
  assert done.returncode == 0, done.stderr
  return done


@pytest.fixture
def texts(workspace, tmp_path):
  lines = (workspace.root / "plain.jsonl").read_text().splitlines()[:20]
  found = [json.loads(line)["query"] for line in lines]
  (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in found))
  return found


def test_embed_formats_agree(trained, workspace, texts, tmp_path):
  with gzip.open(tmp_path / "texts.txt.gz", "wt") as file:
    file.write((tmp_path / "texts.txt").read_text())
  with open(tmp_path / "texts.jsonl", "w") as file:
    file.writelines(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
  outputs = {
    "texts.txt": "text.npy",
    "texts.txt.gz": "gz.npy",
    "texts.jsonl": "jsonl.parquet",
  }
  for source, output in outputs.items():
    done = embed(
      workspace,
      f"--checkpoint={trained}",
      f"--input={tmp_path / source}",
      f"--output={tmp_path / output}",
    )
    assert "20 vectors of width 32" in done.stderr
  vectors = np.load(tmp_path / "text.npy")
  assert vectors.dtype == np.float32
  assert vectors.shape == (20, 32)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_array_equal(np.load(tmp_path / "gz.npy"), vectors)
  table = pq.read_table(tmp_path / "jsonl.parquet")
  np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), vectors)
  assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_embed_prompt_width_step_and_field(trained, workspace, texts, tmp_path):
  with open(tmp_path / "prompted.txt", "w") as file:
    file.writelines(f"task: search result | query: {text}\n" for text in texts)
  flags = f"--checkpoint={trained / 'checkpoints' / '20'}"
  embed(
    workspace,
    flags,
    f"--input={workspace.root / 'plain.jsonl'}",
    "--field=query",
    "--prompt=query",
    "--dim=16",
    f"--output={tmp_path / 'narrow.npy'}",
  )
  embed(
    workspace,
    flags,
    f"--input={tmp_path / 'prompted.txt'}",
    f"--output={tmp_path / 'wide.npy'}",
  )
  narrow, wide = np.load(tmp_path / "narrow.npy"), np.load(tmp_path / "wide.npy")
  assert narrow.shape == (160, 16)
  cut = wide[:, :16] / np.linalg.norm(wide[:, :16], axis=1, keepdims=True)
  np.testing.assert_allclose(narrow[:20], cut, atol=1e-5)


def test_embed_skips_and_lists_bad_records(trained, workspace, tmp_path):
  source = tmp_path / "texts.jsonl"
  source.write_bytes(b'{"text": "good"}\n\n{"text": 5}\n\xff\n{"text": "fine"}\n')
  done = embed(
    workspace,
    f"--checkpoint={trained}",
    f"--input={source}",
    f"--output={tmp_path / 'out.npy'}",
    "--on_bad_record=skip",
  )
  assert np.load(tmp_path / "out.npy").shape == (2, 32)
  assert "skipped 3 records" in done.stderr
  for line in (2, 3, 4):
    assert f"texts.jsonl:{line}: " in done.stderr


def test_eval(trained, workspace, tmp_path):
  plain = workspace.root / "plain.jsonl"
  done = workspace.run(
    "eval",
    f"--checkpoint={trained}",
    f"--data=mine={plain}",
    f"--data=code={plain}:code",
    "--widths=16",
    "--bm25",
    f"--output={tmp_path / 'results.json'}",
  )
  assert done.returncode == 0, done.stderr
  assert "ndcg@10" in done.stdout
  results = json.loads((tmp_path / "results.json").read_text())
  assert results.keys() == {"step 30", "BM25"}
  kept = json.loads((trained / "evaluations.json").read_text())
  mine = results["step 30"]["mine"]["ndcg@10/16"]
  assert mine == pytest.approx(kept["30"]["plain"]["ndcg@10/16"])
  assert results["step 30"]["code"]["ndcg@10/16"] != mine


def test_two_checkpoints_example_by_example(trained, workspace):
  """A checkpoint gains nothing over itself; an earlier step is another's results."""
  data = f"--data=own={workspace.root / 'plain.jsonl'}"
  step = trained / "checkpoints" / "20"
  done = workspace.run(
    "eval", f"--checkpoint={step}", f"--against={trained}", data, "--widths=16"
  )
  assert done.returncode == 0, done.stderr
  kept = json.loads((trained / "evaluations.json").read_text())["30"]["plain"]
  (row,) = [line for line in done.stdout.splitlines() if "[" in line]
  cells = [cell.split() for cell in row.strip("│").split("│")]
  assert [cells[0], cells[1]] == [["own"], ["ndcg@10"]]
  before, after, gain = (float(cell[0]) for cell in cells[3:6])
  assert after == pytest.approx(100 * kept["ndcg@10/16"], abs=0.01)
  assert gain == pytest.approx(after - before, abs=0.011)
  same = workspace.run(
    "eval", f"--checkpoint={trained}", data, "--intervals", "--widths=16"
  )
  assert same.returncode == 0, same.stderr
  (row,) = [line for line in same.stdout.splitlines() if "[" in line]
  assert row.split("│")[4].strip().startswith(f"{after:.2f} [")
  refused = workspace.run(
    "eval", f"--checkpoint={trained}", "--tasks=STS12", "--intervals"
  )
  assert refused.returncode == 1
  assert "--intervals: not for --benchmark, --tasks" in refused.stderr


def test_explain(trained, workspace):
  done = workspace.run("explain", *workspace.flags())
  assert done.returncode == 0, done.stderr
  parameters = sum(
    int(line.split("│")[2].replace(",", ""))
    for line in done.stdout.splitlines()
    if "parameters: total" in line
  )
  # table, 2 layers of attention and feed-forward with norms, last norm, heads
  layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 4 * 32 + 2 * 16
  assert parameters == 800 * 32 + 2 * layer + 32 + 32 * 48 + 48 * 32
  assert "mesh" in done.stdout
  # Sizes of the tasks are known since the run cached them.
  assert " 160 " in done.stdout
  assert " 140 " in done.stdout


def test_a_skipping_run_counts_and_lists(workspace, tmp_path):
  data = tmp_path / "pairs.jsonl"
  data.write_bytes(
    (workspace.root / "plain.jsonl").read_bytes()
    + b'{"query": "no positive"}\n{"query": \n'
  )
  done = workspace.run(
    "cache",
    *workspace.flags(f"--gin.JSONL_TASKS={{'pairs': '{data}'}}"),
    "--on_bad_record=skip",
  )
  assert done.returncode == 0, done.stderr
  assert "cached pairs: 160 examples" in done.stderr
  assert "skipped 2 bad records of pairs" in done.stderr
  assert "pairs.jsonl:161: " in done.stderr
  assert "pairs.jsonl:162: malformed JSON" in done.stderr


def test_module_and_script_are_the_same():
  module, script = (
    subprocess.run([sys.executable, *start], capture_output=True, text=True)
    for start in (
      ("-m", "embgemma", "--version"),
      ("-c", "from embgemma.cli import main; main(['--version'])"),
    )
  )
  assert module.returncode == script.returncode == 0
  assert module.stdout == script.stdout


def test_vectors_in_fewer_bytes(trained, workspace, texts, tmp_path):
  model = (f"--checkpoint={trained}", f"--input={tmp_path / 'texts.txt'}")
  embed(workspace, *model, f"--output={tmp_path / 'plain.npy'}")
  plain = np.load(tmp_path / "plain.npy")
  for name, columns in (("float16", 32), ("int8", 32), ("ubinary", 4)):
    done = embed(
      workspace, *model, f"--output={tmp_path / name}.npy", f"--vectors={name}"
    )
    assert f"20 vectors of width 32, {name}, " in done.stderr
    codes = np.load(tmp_path / f"{name}.npy")
    expected = vector_formats.calibrated(name, plain).codes(plain)
    assert codes.shape == (20, columns)
    np.testing.assert_array_equal(codes, expected)
  ranges = f"--ranges={tmp_path / 'int8.ranges.npy'}"
  again = tmp_path / "again.parquet"
  embed(workspace, *model, f"--output={again}", "--vectors=int8", ranges)
  assert not (tmp_path / "again.ranges.npy").exists()
  column = pq.read_table(again)["embedding"]
  assert column.type.value_type == "int8"
  np.testing.assert_array_equal(column.to_pylist(), np.load(tmp_path / "int8.npy"))
  for flags, message in (
    (("--vectors=binary", ranges), "--ranges is for int8 and uint8, not binary"),
    (("--vectors=int8", ranges, "--dim=16"), "vectors of width 16 need (2, 16)"),
    (("--vectors=int8", f"--ranges={tmp_path / 'no.npy'}"), "cannot be read"),
  ):
    refused = workspace.run("embed", *model, f"--output={tmp_path / 'x.npy'}", *flags)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert not (tmp_path / "x.npy").exists()


def test_evaluation_of_vectors_in_fewer_bytes(trained, workspace):
  done = workspace.run(
    "eval",
    f"--checkpoint={trained}",
    f"--data=own={workspace.root / 'plain.jsonl'}",
    "--vectors=float32,int8,binary",
    "--widths=32",
  )
  assert done.returncode == 0, done.stderr
  for name in ("ndcg@10 (int8)", "ndcg@10 (binary)"):
    assert name in done.stdout
  refused = workspace.run(
    "eval", f"--checkpoint={trained}", "--data=a=b", "--vectors=x"
  )
  assert "--vectors=x: there are float32" in refused.stderr
