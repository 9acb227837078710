"""The mean of checkpoints against numpy in float64, and what has no mean."""

import dataclasses
import functools
import itertools
import json
import pathlib
import signal
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from embgemma import checkpoints, cli, soup
from embgemma.checkpoints import CheckpointPolicy, CheckpointStore, Description
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import conversion, weights
from embgemma.models import embedder, encoder_decoder
from embgemma.models.config import (
  BackboneConfig,
  EmbedderConfig,
  LoraConfig,
  TransformerConfig,
)

_ROWS = 420
_STACK = TransformerConfig(
  vocab_size=_ROWS,
  num_layers=3,
  width=8,
  mlp_width=12,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  attention_pattern=("local", "global"),
  window=(3, 3),
)
_EMBEDDER = EmbedderConfig(
  _STACK, hidden_width=10, embedding_width=6, matryoshka_widths=(6, 3)
)
_ADAPTED = dataclasses.replace(_EMBEDDER, lora=LoraConfig(rank=2, alpha=6.0))
_BACKBONE = BackboneConfig(_STACK, dataclasses.replace(_STACK, mask="causal"))
_PROMPTS = {"query": "find: ", "document": "text: "}
_LENGTHS = {"query": 16, "positive": 32}


def within_rounding(found: Any, trees: list[Any], scale: float = 1.0) -> None:
  """Compares a soup with the float64 mean, by the bound that `mean` states."""

  def check(found: np.ndarray, *values: np.ndarray) -> None:
    assert found.dtype == np.float32
    exact = np.mean([value.astype(np.float64) for value in values], axis=0)
    largest = np.max(np.abs(values), axis=0)
    bound = scale * (len(values) / 2 + 5) * 2.0**-24 * largest + 1e-44
    assert (np.abs(found - exact) <= bound).all()

  jax.tree.map(check, found, *trees)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = ["some text to train a vocabulary on, and then some more of it"]
  return train_vocabulary(texts, _ROWS, path, sentinels=4)


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  texts = ["quite another text to train another vocabulary on, of other words"]
  return train_vocabulary(texts, _ROWS, path, sentinels=4)


@functools.cache
def shapes(config: Any) -> dict[str, Any]:
  module = embedder if isinstance(config, EmbedderConfig) else encoder_decoder
  return dict(module.abstract_params(config))


def drawn(config: Any, seed: int) -> Any:
  """Parameters of several magnitudes, as of a checkpoint near others."""
  common, own = np.random.default_rng(0), np.random.default_rng(seed)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    base = common.normal(size=leaf.shape) * 10 ** common.uniform(-4, 1, leaf.shape)
    return (base * (1 + 0.1 * own.normal(size=leaf.shape))).astype(np.float32)

  return jax.tree.map(draw, shapes(config))


Write = Callable[..., pathlib.Path]


@pytest.fixture
def write_run(tmp_path, vocabulary) -> Write:
  """Writes a MODEL_DIR as a run does: steps with parameters and, if given, averages."""

  def write(
    name: str,
    config: Any,
    steps: Mapping[int, Any],
    averages: Mapping[int, Any] | None = None,
    prompts: Mapping[str, str] = _PROMPTS,
    own_vocabulary: Any = vocabulary,
    lengths: Mapping[str, int] = _LENGTHS,
    lineage: str = "one",
  ) -> pathlib.Path:
    directory = tmp_path / name
    description = Description(config, lengths, prompts, lineage)
    checkpoints.write_description(directory, description, own_vocabulary, "")
    store = CheckpointStore(directory, CheckpointPolicy(keep_last=len(steps)))
    for step, params in steps.items():
      average = (averages or {}).get(step)
      store.save(step, params, average, {"step": np.int32(step)}, {}, None)
    store.close()
    return directory

  return write


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs a command of embgemma here: its exit status, stdout and stderr."""
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main sets its own
  handler = signal.getsignal(signal.SIGTERM)

  def run(*arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
      cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()

  yield run
  signal.signal(signal.SIGTERM, handler)


_FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)
_STACKED = arrays.arrays(
  np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=_FLOATS
)


@given(_STACKED)
def test_mean(values):
  trees = [{"a": {"b": row.copy()}, "c": row[:1].copy()} for row in values]
  kept = [{"a": {"b": row}, "c": row[:1]} for row in values]
  within_rounding(soup.mean(iter(trees)), kept)


@given(arrays.arrays(np.float32, 3, elements=_FLOATS), st.integers(1, 9))
def test_mean_of_equals(values, count):
  found = soup.mean({"a": values.copy()} for _ in range(count))
  np.testing.assert_array_equal(found["a"], values)


@given(_STACKED, st.data())
def test_weighted_mean(values, data):
  """Against numpy in float64; shares of any scale."""
  share = st.floats(0.01, 100)
  shares = data.draw(st.lists(share, min_size=len(values), max_size=len(values)))
  found = soup.mean(({"a": row.copy()} for row in values), shares)["a"]
  exact = np.average(values.astype(np.float64), axis=0, weights=shares)
  bound = (2 * len(values) + 5) * 2.0**-23 * np.max(np.abs(values), axis=0) + 1e-44
  assert (np.abs(found - exact) <= bound).all()


def test_one_tree_beside_the_mean_is_in_memory():
  class Leaf(np.ndarray):
    """An array that can be watched."""

  made: list[weakref.ref] = []
  alive: list[int] = []

  def read(number: int) -> dict[str, np.ndarray]:
    leaf = np.full(4, number, np.float32).view(Leaf)
    made.append(weakref.ref(leaf))
    alive.append(sum(reference() is not None for reference in made))
    return {"a": leaf}

  found = soup.mean(read(number) for number in range(6))
  assert alive == [1, 2, 2, 2, 2, 2]
  assert found["a"].tolist() == [2.5] * 4


def test_last_steps_of_a_run(write_run, command, tmp_path):
  """From the command to vectors; averaged parameters where they were kept."""
  steps = {step: drawn(_EMBEDDER, step) for step in (10, 20, 30, 40)}
  averages = {step: drawn(_EMBEDDER, step + 1) for step in (30, 40)}
  run = write_run("run", _EMBEDDER, steps, averages)
  output = tmp_path / "soup"
  code, printed, notes = command("soup", f"--output={output}", "--last=3", run)
  assert code == 0, notes
  assert [line.strip() for line in printed.splitlines()[1:]] == [
    f"{run}, step {step}" for step in (20, 30, 40)
  ]
  assert json.loads((output / "ingredients.json").read_text()) == [
    {"path": str(run), "step": step} for step in (20, 30, 40)
  ]
  assert "note:" not in notes

  model = conversion.open_embedder(output)
  assert model.step == 0
  assert model.description == checkpoints.read_description(run)
  assert model.vocabulary.serialized == (run / "tokenizer.model").read_bytes()
  within_rounding(model.params, [steps[20], averages[30], averages[40]])
  vectors = CheckpointEmbedder(output).encode(
    ["some text", "more of it, and then some"]
  )
  assert vectors.shape == (2, 6)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)

  # Once more: only over a model, and never over what is read.
  code, _, error = command("soup", f"--output={output}", "--last=2", run)
  assert code == 1
  assert "--overwrite" in error
  code, _, _ = command("soup", f"--output={output}", "--last=2", "--overwrite", run)
  assert code == 0
  within_rounding(conversion.open_embedder(output).params, list(averages.values()))
  code, _, error = command("soup", f"--output={run}", "--overwrite", run, output)
  assert code == 1
  assert "holds what is read" in error
  assert CheckpointStore(run).steps() == [10, 20, 30, 40]


def test_checkpoints_of_several_runs(write_run):
  """The newest step, or the one that is named; lengths are the longest."""
  one = {step: drawn(_EMBEDDER, step) for step in (1, 2)}
  two = {5: drawn(_EMBEDDER, 5)}
  computed = {"dtype": "bfloat16", "remat": "full", "attention": "reference"}
  stack = dataclasses.replace(_STACK, **computed, dropout_rate=0.1)
  config = dataclasses.replace(_EMBEDDER, transformer=stack)
  first = write_run("one", _EMBEDDER, one)
  second = write_run("two", config, two, lengths={"query": 8, "negatives": 64})
  paths = [str(first), f"{first}/checkpoints/1", str(second)]
  ingredients = soup.choose(paths)
  assert [(i.path, i.directory, i.step) for i in ingredients] == [
    (paths[0], first, 2),
    (paths[1], first, 1),
    (paths[2], second, 5),
  ]
  model = soup.average(ingredients)
  within_rounding(model.params, [one[2], one[1], two[5]])
  assert model.description.config == _EMBEDDER
  assert model.description.lengths == {"query": 16, "positive": 32, "negatives": 64}
  assert soup.average(ingredients[::-1]).description.config == config


def test_pretrained_stacks(write_run, tmp_path):
  steps = {step: drawn(_BACKBONE, step) for step in (1, 2, 3, 4, 5)}
  run = write_run("run", _BACKBONE, steps)
  ingredients = soup.choose([str(run)], last=5)
  model, output = soup.average(ingredients), tmp_path / "soup"
  soup.write(model, [each.to_json() for each in ingredients], output)
  assert checkpoints.read_description(output).config == _BACKBONE
  within_rounding(weights.read(output, 0, _BACKBONE), list(steps.values()))


def merged(params: Any, lora: LoraConfig | None) -> Any:
  """Kernels with the product of their factors, in float64; written out once more."""
  if "kernel" in params:
    kernel = params["kernel"].astype(np.float64)
    if lora is not None and "lora_a" in params:
      a, b = (params[name].astype(np.float64) for name in ("lora_a", "lora_b"))
      kernel = kernel + lora.alpha / lora.rank * np.einsum("...ir,...ro->...io", a, b)
    return {"kernel": kernel}
  if not isinstance(params, dict):
    return params
  return {
    name: merged(child, lora) if isinstance(child, dict) else child
    for name, child in params.items()
  }


def test_adapters_are_merged_first(write_run, command, tmp_path):
  """Of one model: two steps of a run, one with another rank, one without."""
  wide = dataclasses.replace(_EMBEDDER, lora=LoraConfig(rank=3, alpha=2.0))
  configs = (_ADAPTED, _ADAPTED, wide, _EMBEDDER)
  params = [drawn(config, seed) for seed, config in enumerate(configs)]
  one = write_run("one", _ADAPTED, {0: params[0], 1: params[1]})
  runs = [
    one / "checkpoints" / "0",
    one,
    write_run("wide", wide, {1: params[2]}),
    write_run("none", _EMBEDDER, {1: params[3]}),
  ]
  output = tmp_path / "soup"
  code, _, notes = command("soup", f"--output={output}", *runs)
  assert code == 0, notes
  assert "note: adapters were merged into their kernels before averaging" in notes
  assert checkpoints.read_description(output).config == _EMBEDDER
  model = conversion.open_embedder(output)
  whole = [
    merged(tree, config.lora) for tree, config in zip(params, configs, strict=True)
  ]

  def check(found: np.ndarray, *values: np.ndarray) -> None:
    largest = max(np.abs(value).max() for value in values)
    np.testing.assert_allclose(found, np.mean(values, axis=0), atol=2e-6 * largest)

  jax.tree.map(check, model.params, *whole)


def _with(**changes: Any) -> EmbedderConfig:
  stack = dataclasses.replace(_STACK, **changes)
  return dataclasses.replace(_EMBEDDER, transformer=stack)


_OTHERS = {
  "setting": ({"config": _with(window=(4, 4))}, "transformer.window is (4, 4), (3, 3)"),
  "shape": ({"config": _with(mlp_width=20)}, "transformer.mlp_width is 20, 12"),
  "widths": (
    {"config": dataclasses.replace(_EMBEDDER, matryoshka_widths=(6,))},
    "matryoshka_widths is (6,), (6, 3)",
  ),
  "kind": ({"config": _BACKBONE}, "holds stacks without heads, an embedder"),
  "prompts": ({"prompts": {"query": "other", "x": ""}}, "prompts (query, document, x)"),
  "vocabulary": ({}, "tokenizer.model is another"),
}


@pytest.mark.parametrize("what", _OTHERS)
def test_other_models(what, write_run, command, tmp_path, other_vocabulary):
  changes, said = _OTHERS[what]
  first = write_run("first", _EMBEDDER, {1: drawn(_EMBEDDER, 1)})
  options = {"config": _EMBEDDER, "prompts": _PROMPTS, **changes}
  if what == "vocabulary":
    options["own_vocabulary"] = other_vocabulary
  second = write_run("second", steps={1: drawn(options["config"], 1)}, **options)
  before = sorted(tmp_path.rglob("*"))
  code, printed, error = command("soup", f"--output={tmp_path}/soup", first, second)
  assert (code, printed) == (1, "")
  assert error.startswith("embgemma: error: these checkpoints are not of one model")
  assert error.count(f"{second}: ") == 1
  assert f"{second}: {said}" in error
  assert f" in {first}" in error
  assert sorted(tmp_path.rglob("*")) == before


def test_differences_are_counted_beyond_some(write_run):
  encoder = dataclasses.replace(_BACKBONE, decoder=None)
  runs = [
    write_run(name, config, {1: drawn(config, 1)})
    for name, config in (("whole", _BACKBONE), ("half", encoder))
  ]
  with pytest.raises(CheckpointError, match=r"half: .*\n  … and \d+ more\n"):
    soup.average(soup.choose([str(run) for run in runs]))


def test_what_is_refused(write_run, command, tmp_path):
  run = write_run("run", _EMBEDDER, {step: drawn(_EMBEDDER, 0) for step in (3, 7)})
  damaged = write_run("damaged", _EMBEDDER, {2: drawn(_EMBEDDER, 0)})
  for file in (damaged / "checkpoints" / "2" / "params").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  (tmp_path / "empty").mkdir()
  before = sorted(tmp_path.rglob("*"))
  cases = [
    ((run,), "--last=K"),
    (("--last=2", run, run), "2 paths"),
    (("--last=1", run), "--last=1: a soup needs two"),
    (("--last=3", run), "keeps 2 steps: [3, 7]; CheckpointPolicy.keep_last decides"),
    (("--last=2", run / "checkpoints" / "3"), "is one step"),
    ((run, run / "checkpoints" / "5"), "no step 5; there are [3, 7]"),
    ((run, tmp_path / "nothing"), "nothing: not a checkpoint directory"),
    (("--last=2", tmp_path / "empty"), "empty: not a checkpoint directory"),
    ((run, damaged), f"{damaged}/checkpoints/2"),
  ]
  for arguments, said in cases:
    code, printed, error = command("soup", f"--output={tmp_path}/soup", *arguments)
    assert (code, printed) == (1, ""), arguments
    assert error.count("embgemma: error: ") == 1
    assert said in error
    assert "Traceback" not in error
  assert sorted(tmp_path.rglob("*")) == before


def test_errors_have_their_types(write_run):
  run = str(write_run("run", _EMBEDDER, {1: drawn(_EMBEDDER, 0)}))
  for error, paths, last in (
    (ConfigError, [run], None),
    (ConfigError, [run, run], 2),
    (ConfigError, [run], 0),
    (CheckpointError, [run], 2),
  ):
    with pytest.raises(error):
      soup.choose(paths, last)


def test_weights(write_run, command, tmp_path):
  trees = [drawn(_EMBEDDER, seed) for seed in (1, 2, 3)]
  runs = [write_run(f"run{n}", _EMBEDDER, {1: tree}) for n, tree in enumerate(trees)]
  output = tmp_path / "soup"
  code, printed, error = command(
    "soup", f"--output={output}", "--weights=1,2,0.5", *runs
  )
  assert code == 0, error
  assert f"2 of {runs[1]}, step 1" in printed
  found = conversion.open_embedder(output)

  def check(found: np.ndarray, *values: np.ndarray) -> None:
    exact = np.average(np.array(values, np.float64), axis=0, weights=[1, 2, 0.5])
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-12)

  jax.tree.map(check, found.params, *trees)
  listed = json.loads((output / "ingredients.json").read_text())
  assert [each["weight"] for each in listed] == [1, 2, 0.5]
  for wrong in ("1,2", "1,2,x", "1,2,0", "1,2,-1", "1,2,inf"):
    code, _, error = command(
      "soup", f"--output={tmp_path}/other", f"--weights={wrong}", *runs
    )
    assert code == 1
    assert f"--weights={wrong}: write a number above 0 for each of the 3" in error


def test_greedy_keeps_what_makes_it_no_worse(write_run):
  """Scores by distance from a target that two of four ingredients surround."""
  target = drawn(_EMBEDDER, 0)
  moves = {"near": 0.10, "other": -0.11, "far": 0.5, "twin": 0.12}

  def moved(move: float) -> Any:
    return jax.tree.map(lambda x: x * np.float32(1 + move), target)

  runs = [
    str(write_run(name, _EMBEDDER, {1: moved(move)})) for name, move in moves.items()
  ]

  def evaluate(model: Any) -> float:
    gaps = jax.tree.map(lambda x, y: float(np.abs(x - y).mean()), model.params, target)
    return -sum(jax.tree.leaves(gaps))

  model, trials = soup.greedy(soup.choose(runs), evaluate)
  names = [pathlib.Path(trial.ingredient.path).name for trial in trials]
  assert names == ["near", "other", "twin", "far"]
  assert [trial.kept for trial in trials] == [True, True, False, False]
  assert trials[1].together > trials[0].together
  within_rounding(model.params, [moved(0.10), moved(-0.11)], scale=2)


def test_greedy_by_held_out_pairs(write_run, command, tmp_path):
  """From the command: scores are those of `embgemma eval`, best first."""
  trees = [drawn(_EMBEDDER, seed) for seed in (1, 2, 3)]
  runs = [write_run(f"run{n}", _EMBEDDER, {1: tree}) for n, tree in enumerate(trees)]
  pairs = tmp_path / "pairs.jsonl"
  words = "some text to train a vocabulary on and then more of it"
  pairs.write_text(
    "".join(
      json.dumps({"query": word, "positive": f"{word} {other}"}) + "\n"
      for word, other in itertools.pairwise(words.split())
    )
  )
  output, scores = tmp_path / "soup", tmp_path / "scores.json"
  code, printed, error = command(
    "soup", f"--output={output}", "--greedy", f"--data=own={pairs}", *runs
  )
  assert code == 0, error
  listed = json.loads((output / "ingredients.json").read_text())
  alone = [each["alone"] for each in listed]
  assert alone == sorted(alone, reverse=True)
  assert listed[0]["kept"]
  assert printed.count(" alone, ") == 3
  for path, expected in (
    (listed[0]["path"], alone[0]),
    (output, max(each["together"] for each in listed if each["kept"])),
  ):
    code, _, error = command(
      "eval", f"--checkpoint={path}", f"--data=own={pairs}", f"--output={scores}"
    )
    assert code == 0, error
    (column,) = json.loads(scores.read_text()).values()
    assert column["own"]["ndcg@10/6"] == pytest.approx(expected, abs=1e-9)
  for flags in (("--greedy",), (f"--data=own={pairs}",)):
    code, _, error = command("soup", f"--output={tmp_path}/other", *flags, *runs)
    assert code == 1
    assert "--greedy and --data=NAME=PATH[:KIND] go together" in error


def test_lineage(write_run, command, tmp_path):
  """Of one kept; others refused, unless they are asked for; unknown ones noted."""
  one, two, other, unknown = (
    write_run(name, _EMBEDDER, {1: drawn(_EMBEDDER, n)}, lineage=lineage)
    for n, (name, lineage) in enumerate(
      (("run1", "a"), ("run2", "a"), ("other", "b"), ("unknown", ""))
    )
  )
  soup.write(soup.average(soup.choose([str(one), str(two)])), [], tmp_path / "same")
  assert checkpoints.read_description(tmp_path / "same").lineage == "a"
  code, _, error = command("soup", f"--output={tmp_path}/mixed", one, other)
  assert code == 1
  assert f"{one}: a\n  {other}: b" in error
  assert "--allow_different_init" in error
  code, _, notes = command(
    "soup", f"--output={tmp_path}/mixed", "--allow_different_init", one, other
  )
  assert code == 0, notes
  assert checkpoints.read_description(tmp_path / "mixed").lineage not in ("a", "b", "")
  code, _, notes = command("soup", f"--output={tmp_path}/noted", one, unknown)
  assert code == 0, notes
  assert f"note: {unknown}: what it was trained from is not known" in notes


def test_weights_of_bfloat16_are_noted(write_run, command, tmp_path):
  fine = drawn(_EMBEDDER, 1)
  coarse = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), drawn(_EMBEDDER, 2)
  )
  runs = [
    write_run(name, _EMBEDDER, {1: tree})
    for name, tree in (("fine", fine), ("coarse", coarse))
  ]
  code, _, notes = command("soup", f"--output={tmp_path}/soup", *runs)
  assert code == 0, notes
  assert f"note: {runs[1]}, step 1: weights of bfloat16" in notes
  assert str(runs[0]) not in notes
