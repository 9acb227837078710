import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embgemma.checkpoints import (
  CheckpointPolicy,
  CheckpointStore,
  Description,
  has_steps,
  locate,
  read_description,
  read_vocabulary,
  write_atomically,
  write_description,
)
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import EmbedderConfig, TransformerConfig

CONFIG = EmbedderConfig(
  transformer=TransformerConfig(
    vocab_size=700,
    num_layers=1,
    width=8,
    mlp_width=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
  ),
  hidden_width=8,
  embedding_width=8,
  matryoshka_widths=(8, 4),
)
DESCRIPTION = Description(
  CONFIG, {"query": 8, "positive": 16, "negatives": 16}, {"query": "task: | query: "}
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
  texts = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
  return train_vocabulary(texts, 600, path)


def some_params(seed: int = 0) -> dict:
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    "encoder": {"kernel": jax.random.normal(keys[0], (8, 4))},
    "scale": jax.random.normal(keys[1], (8,)),
  }


def training(step: int) -> dict:
  moments = jax.tree.map(lambda x: x * 1e-20, some_params(seed=step + 100))
  return {"step": jnp.int32(step), "opt_state": ((), {"mu": moments}), "objective": {}}


def abstract(tree):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def save(store: CheckpointStore, step: int, score: float | None = None, ema=None):
  metrics = None if score is None else {"mean": score, "other": -score}
  store.save(step, some_params(step), ema, training(step), {"next_step": step}, metrics)


def assert_same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_restores_every_bit(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 3, ema=some_params(50))
  store.close()

  reader = CheckpointStore(tmp_path)
  step = reader.resolve_step(None)
  assert step == 3
  assert reader.shipped_item(step) == "ema"
  assert reader.position(step) == {"next_step": 3}
  expected = {"params": some_params(3), "training": training(3), "ema": some_params(50)}
  found = reader.restore(step, abstract(expected))
  assert found.keys() == expected.keys()
  assert_same(found, expected)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  params = some_params(1)
  expected = jax.device_get(params)
  store.save(1, params, None, training(1), {}, None)
  jax.tree.map(lambda x: x.delete(), params)
  store.close()
  found = CheckpointStore(tmp_path).restore(1, {"params": abstract(expected)})
  assert_same(found["params"], expected)


def test_restores_onto_another_mesh(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 1)
  store.close()
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), some_params()
  )
  found = CheckpointStore(tmp_path).restore(1, {"params": target})["params"]
  assert_same(found, some_params(1))
  assert found["scale"].sharding == sharding


def test_keeps_the_last_and_the_best(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy(keep_last=2, keep_best=1))
  for step, score in enumerate([0.1, 0.9, None, 0.3, None, 0.2, None], 1):
    save(store, step, score)
  store.close()
  # The best is step 2; steps without an evaluation are kept only as the last.
  assert CheckpointStore(tmp_path).steps() == [2, 6, 7]


def test_another_metric_chooses_the_best(tmp_path):
  policy = CheckpointPolicy(keep_last=1, keep_best=1, best_metric="other")
  store = CheckpointStore(tmp_path, policy)
  for step, score in enumerate([0.5, 0.1, 0.9, 0.3], 1):
    save(store, step, score)
  store.close()
  assert CheckpointStore(tmp_path).steps() == [2, 4]


@pytest.mark.parametrize(
  ("metric", "best"),
  [
    ("held_out/loss", 3),
    ("held_out/loss/0", 3),
    ("held_out/perplexity", 3),
    ("loss", 2),  # a name of its own: higher is better
    ("loss/accuracy", 2),  # of a task with that name
  ],
)
def test_of_losses_the_lowest_is_the_best(tmp_path, metric, best):
  policy = CheckpointPolicy(keep_last=1, keep_best=1, best_metric=metric)
  store = CheckpointStore(tmp_path, policy)
  store.save(1, some_params(), None, training(1), {}, {"mean": 9.0})
  for step, value in ((2, 0.9), (3, 0.2), (4, 0.5)):
    store.save(step, some_params(), None, training(step), {}, {metric: value})
  store.close()
  assert CheckpointStore(tmp_path).steps() == [best, 4]


def test_the_best_is_kept_over_a_restart(tmp_path):
  policy = CheckpointPolicy(keep_last=1, keep_best=1)
  for first in (1, 3, 5):
    store = CheckpointStore(tmp_path, policy)
    save(store, first, {1: 0.9, 3: 0.2, 5: 0.3}[first])
    save(store, first + 1)
    store.close()
  assert CheckpointStore(tmp_path).steps() == [1, 6]


@pytest.mark.parametrize(
  "changes", [{"every_steps": 0}, {"keep_last": 0}, {"keep_best": -1}]
)
def test_policy_refuses(changes):
  with pytest.raises(ConfigError, match=f"CheckpointPolicy.{next(iter(changes))}"):
    CheckpointPolicy(**changes)


def test_without_checkpoints(tmp_path):
  with pytest.raises(CheckpointError, match="holds no checkpoints yet"):
    CheckpointStore(tmp_path)
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  assert store.steps() == []
  with pytest.raises(CheckpointError, match="no complete checkpoint"):
    store.resolve_step(None)


def test_has_steps(tmp_path):
  assert not has_steps(tmp_path / "missing")
  assert not has_steps(tmp_path)
  (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
  assert not has_steps(tmp_path)
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 1)
  store.close()
  assert has_steps(tmp_path)


def test_a_step_that_is_not_there(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 4)
  store.close()
  with pytest.raises(CheckpointError, match=r"no step 5; there are \[4\]"):
    CheckpointStore(tmp_path).resolve_step(5)


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot be written"):
    CheckpointStore(tmp_path / "file", CheckpointPolicy())


def test_another_architecture_names_the_parameters(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 1)
  store.close()
  other = {"encoder": {"kernel": jnp.zeros((8, 6))}, "added": jnp.zeros(())}
  with pytest.raises(CheckpointError) as caught:
    CheckpointStore(tmp_path).restore(1, {"params": abstract(other)})
  message = str(caught.value)
  assert "added: checkpoint -, model ()" in message
  assert "encoder/kernel: checkpoint (8, 4), model (8, 6)" in message
  assert "scale: checkpoint (8,), model -" in message


def test_of_many_differences_ten_are_shown(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 1)
  store.close()
  other = {f"layer_{i:02}": jnp.zeros((1,)) for i in range(30)}
  with pytest.raises(CheckpointError, match="… and 22 more"):
    CheckpointStore(tmp_path).restore(1, {"params": abstract(other)})


# Tensorstore's threads go on when one has failed and Orbax has left its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lost", ["params", "params/_METADATA", "params/d"])
def test_a_damaged_step(tmp_path, lost):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 1)
  save(store, 2)
  store.close()
  damaged = tmp_path / "checkpoints" / "2" / lost
  if damaged.is_dir():
    shutil.rmtree(damaged)
    if lost == "params/d":
      shutil.rmtree(damaged.parent / "ocdbt.process_0")
  else:
    damaged.unlink()
  reader = CheckpointStore(tmp_path)
  target = {"params": abstract(some_params())}
  with pytest.raises(CheckpointError, match="checkpoints/2.*delete the step"):
    reader.restore(2, target)
  assert_same(reader.restore(1, target)["params"], some_params(1))


def test_a_lost_position(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 2)
  store.close()
  shutil.rmtree(tmp_path / "checkpoints" / "2" / "position")
  with pytest.raises(CheckpointError, match="checkpoints/2: damaged or missing"):
    CheckpointStore(tmp_path).position(2)


def test_metrics_of_another_policy(tmp_path):
  for step, metric in ((1, "mean"), (21, "else")):
    policy = CheckpointPolicy(keep_last=1, keep_best=1, best_metric=metric)
    store = CheckpointStore(tmp_path, policy)
    store.save(step, some_params(), None, training(step), {}, {metric: 0.5})
    save(store, step + 10)
    store.close()
  assert CheckpointStore(tmp_path).steps() == [21, 31]


def test_an_unfinished_step_is_ignored_and_swept_away(tmp_path):
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  save(store, 1)
  store.close()
  directory = tmp_path / "checkpoints"
  unfinished = directory / "2.orbax-checkpoint-tmp"
  shutil.copytree(directory / "1", unfinished)
  reader = CheckpointStore(tmp_path)
  assert reader.steps() == [1]
  assert unfinished.exists()  # reading changes nothing
  store = CheckpointStore(tmp_path, CheckpointPolicy())
  assert store.steps() == [1]
  save(store, 3)
  store.close()
  assert not unfinished.exists()
  assert CheckpointStore(tmp_path).steps() == [1, 3]


def test_description(tmp_path, vocabulary):
  write_description(tmp_path, DESCRIPTION, vocabulary, "train.seed = 1\n")
  assert read_description(tmp_path) == DESCRIPTION
  assert read_vocabulary(tmp_path).serialized == vocabulary.serialized
  assert (tmp_path / "operative.gin").read_text() == "train.seed = 1\n"
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"model.json", "tokenizer.model", "operative.gin"}


def test_description_without_gin(tmp_path, vocabulary):
  write_description(tmp_path, DESCRIPTION, vocabulary, "")
  assert not (tmp_path / "operative.gin").exists()


def test_no_description(tmp_path):
  with pytest.raises(CheckpointError, match="not a checkpoint directory"):
    read_description(tmp_path / "missing")


def with_model(**changes) -> str:
  model = {**CONFIG.to_json(), **changes}
  return json.dumps(
    {"format": 1, "kind": "embedder", "lengths": {}, "prompts": {}, "model": model}
  )


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "damaged"),
    ("", "damaged"),
    ("[]", "damaged"),
    ("null", "damaged"),
    ("\x00\x01", "damaged"),
    ('{"format": 1}', "damaged"),
    ('{"format": "new"}', "damaged"),
    (
      '{"format": 1, "kind": "embedder", "model": null, "lengths": {}, "prompts": {}}',
      "json: ",
    ),
    ('{"format": 1, "kind": "toaster", "model": {}}', "damaged"),
    (with_model(hidden_width=0), "hidden_width"),
    (with_model(wings=2), "another version"),
    (with_model(transformer={"vocab_size": 4}), "another version"),
    ('{"format": 99, "model": {"unknown": 1}}', "newer than this embgemma"),
  ],
)
def test_a_damaged_description(tmp_path, content, message):
  path = tmp_path / "model.json"
  path.write_text(content)
  with pytest.raises(CheckpointError, match=message) as caught:
    read_description(tmp_path)
  assert str(caught.value).startswith(f"{path}: ")


def test_a_description_that_is_not_text(tmp_path):
  (tmp_path / "model.json").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(CheckpointError, match="damaged"):
    read_description(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path):
  path = tmp_path / "file"
  write_atomically(path, b"first")
  path.with_name("taken").mkdir()
  with pytest.raises(CheckpointError, match="cannot be written"):
    write_atomically(path.with_name("taken"), b"second")
  with pytest.raises(CheckpointError, match="cannot be written"):
    write_atomically(path / "below", b"third")
  assert path.read_bytes() == b"first"
  assert {p.name for p in tmp_path.iterdir()} == {"file", "taken"}


@pytest.mark.parametrize(
  ("path", "directory", "step"),
  [
    ("runs/a", "runs/a", None),
    ("runs/a/", "runs/a", None),
    ("runs/a/checkpoints/20", "runs/a", 20),
    ("runs/2024", "runs/2024", None),
    # Of another program.
    ("other/checkpoints/20", "other/checkpoints/20", None),
  ],
)
def test_locate(tmp_path, monkeypatch, path, directory, step):
  monkeypatch.chdir(tmp_path)
  for name in ("runs/a", "runs/2024"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "model.json").write_text("{}")
  found, number = locate(path)
  assert (str(found), number) == (directory, step)
