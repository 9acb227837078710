"""DeepMind's Orbax layouts, written here from transformers' weights, read back."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from embgemma import checkpoints
from embgemma.data.prompts import PROMPTS
from embgemma.errors import CheckpointError
from embgemma.interop import gemma, huggingface, layout

_ROWS = 640
_LAYERS = 8  # one group of six and two more
_D, _N, _K, _H, _F = 24, 4, 2, 10, 36


@pytest.fixture(scope="module")
def model() -> Gemma3ForCausalLM:
  """Random weights that bfloat16 holds exactly, norms and all."""
  torch.manual_seed(0)
  config = Gemma3TextConfig(
    vocab_size=_ROWS,
    hidden_size=_D,
    intermediate_size=_F,
    num_hidden_layers=_LAYERS,
    num_attention_heads=_N,
    num_key_value_heads=_K,
    head_dim=_H,
    query_pre_attn_scalar=_H,
    sliding_window=512,
    max_position_embeddings=32768,
    use_cache=False,
    attn_implementation="sdpa",
  )
  model = Gemma3ForCausalLM(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
      parameter.normal_(0.0, scale)
      parameter.copy_(parameter.bfloat16().float())
  return model


def _state(model) -> dict[str, np.ndarray]:
  return {n: p.numpy() for n, p in model.model.state_dict().items()}


def _nested(state: dict[str, np.ndarray]) -> dict:
  """transformers' weights in the shapes of DeepMind's modules."""
  tree = {
    "embedder": {"input_embedding": state["embed_tokens.weight"]},
    "final_norm": {"scale": state["norm.weight"]},
  }
  for i in range(_LAYERS):

    def get(name, i=i):
      return state[f"layers.{i}.{name}.weight"]

    def heads(name, count, get=get):  # [heads H, D] to [heads, D, H]
      return get(f"self_attn.{name}").reshape(count, _H, _D).transpose(0, 2, 1)

    output = get("self_attn.o_proj").reshape(_D, _N, _H).transpose(1, 2, 0)
    tree[f"layer_{i}"] = {
      "attn": {
        "q_einsum": {"w": heads("q_proj", _N)},
        "kv_einsum": {"w": np.stack([heads("k_proj", _K), heads("v_proj", _K)])},
        "attn_vec_einsum": {"w": output},
        "_query_norm": {"scale": get("self_attn.q_norm")},
        "_key_norm": {"scale": get("self_attn.k_norm")},
      },
      "mlp": {
        "gating_einsum": np.stack([get("mlp.gate_proj"), get("mlp.up_proj")]),
        "linear": get("mlp.down_proj").T,
      },
      "pre_attention_norm": {"scale": get("input_layernorm")},
      "post_attention_norm": {"scale": get("post_attention_layernorm")},
      "pre_ffw_norm": {"scale": get("pre_feedforward_layernorm")},
      "post_ffw_norm": {"scale": get("post_feedforward_layernorm")},
    }
  return tree


def _flat(nested: dict, prefix: str = "transformer/") -> dict:
  flat: dict = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(nested)[0]:
    *module, name = [key.key for key in path]
    if module[-1] == "mlp":
      module, name = [*module, name], "w"
    flat.setdefault(prefix + "/".join(module), {})[name] = leaf
  return flat


def _stacked(nested: dict) -> dict:
  groups: dict = {}
  for key, leaves in _flat(nested).items():
    parts = key.split("/")
    if parts[1].startswith("layer_"):
      layer = int(parts[1].removeprefix("layer_"))
      parts[1] = f"stacked_layers/attention_type_{layer % 6}"
      for name, leaf in leaves.items():
        rows = groups.setdefault("/".join(parts), {}).setdefault(name, [])
        assert len(rows) == layer // 6
        rows.append(leaf)
    else:
      groups[key] = leaves
  return jax.tree.map(
    lambda x: np.stack(x) if isinstance(x, list) else x,
    groups,
    is_leaf=lambda x: isinstance(x, list),
  )


_LAYOUTS = {
  "flat": _flat,
  "stacked": _stacked,
  "nested": lambda nested: nested,
  "policy": lambda nested: _flat(nested, "rlx_networks/policy_network/"),
  "kauldron": lambda nested: {
    "params": nested,
    "opt_state": {"mu": nested, "count": np.int32(3)},
    "collections": {},
    "step": 7,
  },
}


def _write(tree: dict, path: pathlib.Path, ocdbt: bool = True, zarr3: bool = False):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  ocp.Checkpointer(handler).save(path, tree)


def _assert_weights(params: dict, config, state: dict[str, np.ndarray]) -> None:
  """Every tensor of ours is transformers', to the last bit."""
  assert list(params) == ["decoder"]
  tensors = huggingface.stack_tensors(config, ("decoder",))
  assert {tensor.name for tensor in tensors} == state.keys()
  for tensor in tensors:
    for part in tensor.parts:
      ours = part.slot.view(params)
      assert ours.dtype == np.float32
      np.testing.assert_array_equal(ours, part.pick(state[tensor.name]), tensor.name)
  leaves = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert leaves == sum(weight.size for weight in state.values())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", _LAYOUTS)
def test_every_layout(form, stored, model, tokenizer, tmp_path):
  state = _state(model)
  nested = jax.tree.map(
    lambda x: np.ascontiguousarray(x, jnp.dtype(stored)), _nested(state)
  )
  _write(_LAYOUTS[form](nested), tmp_path / "checkpoint")
  loaded = gemma.load(tmp_path / "checkpoint", tokenizer)
  config = loaded.description.config.decoder
  assert loaded.description.config.encoder is None
  assert config.dtype == stored
  assert (config.mask, config.window) == ("causal", (511, 0))
  assert config.attention_pattern == ("local",) * 5 + ("global",)
  assert (config.query_scalar, config.max_length) == (None, 32768)
  assert loaded.description.lengths == dict.fromkeys(
    ("query", "positive", "negatives"), 2048
  )
  assert loaded.description.prompts == PROMPTS
  assert loaded.vocabulary.size == _ROWS
  assert any("no released Gemma 3 has its shapes" in note for note in loaded.notes)
  unread = any("beside the parameters" in note for note in loaded.notes)
  assert unread == (form == "kauldron")
  _assert_weights(loaded.params, config, state)


@pytest.fixture
def write(model, tmp_path):
  """Writes a FLAT checkpoint that `change` has changed."""

  def write(change=lambda tree: None, **how) -> pathlib.Path:
    tree = _flat(_nested(_state(model)))
    change(tree)
    _write(tree, tmp_path / "checkpoint", **how)
    return tmp_path / "checkpoint"

  return write


@pytest.mark.parametrize("how", ["standard", "zarr", "zarr3", "ocdbt of zarr3"])
def test_every_storage(how, model, tokenizer, write, tmp_path):
  if how == "standard":
    directory = tmp_path / "standard"
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(directory, _flat(_nested(_state(model))))
  else:
    directory = write(ocdbt="ocdbt" in how, zarr3="zarr3" in how)
  loaded = gemma.load(directory, tokenizer)
  _assert_weights(loaded.params, loaded.description.config.decoder, _state(model))


def test_logits_beyond_the_window(model, tokenizer, write, causal_logits):
  loaded = gemma.load(write(), tokenizer)
  tokens = np.random.default_rng(0).integers(0, _ROWS, (2, 540)).astype(np.int32)
  with torch.no_grad():
    expected = model(torch.from_numpy(tokens).long()).logits.numpy()
  ours = causal_logits(loaded.description.config, loaded.params, tokens)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_command(tokenizer, write, tmp_path):
  source, output = write(), tmp_path / "backbone"
  command = ["import", "--from=gemma", f"--source={source}", f"--output={output}"]
  done = subprocess.run(
    [sys.executable, "-m", "embgemma", *command, f"--tokenizer={tokenizer}"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  loaded = gemma.load(source, tokenizer)
  written = checkpoints.read_description(output)
  assert written.lineage
  assert dataclasses.replace(written, lineage="") == loaded.description
  store = checkpoints.CheckpointStore(output)
  restored = store.restore(0, {"params": loaded.params})["params"]
  jax.tree.map(np.testing.assert_array_equal, restored, loaded.params)


def test_tokenizer_of_the_directory(tokenizer, write):
  directory = write()
  with pytest.raises(CheckpointError, match="neither tokenizer.model nor .*--tokeniz"):
    gemma.load(directory)
  shutil.copy(tokenizer, directory)
  assert gemma.load(directory).vocabulary.size == _ROWS


_RELEASED = {
  "Gemma 3 270M": (18, 640, 4, 1, 256, 2048, 268_098_176),
  "Gemma 3 1B": (26, 1152, 4, 1, 256, 6912, 999_885_952),
}


@pytest.mark.parametrize("name", _RELEASED)
def test_released_models_by_their_shapes(name, monkeypatch, tmp_path):
  layers, d, n, k, h, f, parameters = _RELEASED[name]
  layer = {
    "attn/q_einsum/w": (n, d, h),
    "attn/kv_einsum/w": (2, k, d, h),
    "attn/attn_vec_einsum/w": (n, h, d),
    "attn/_query_norm/scale": (h,),
    "attn/_key_norm/scale": (h,),
    "mlp/gating_einsum": (2, f, d),
    "mlp/linear": (f, d),
    "pre_attention_norm/scale": (d,),
    "post_attention_norm/scale": (d,),
    "pre_ffw_norm/scale": (d,),
    "post_ffw_norm/scale": (d,),
  }
  shapes = {"embedder/input_embedding": (262_144, d), "final_norm/scale": (d,)}
  shapes |= {f"layer_{i}/{key}": s for i in range(layers) for key, s in layer.items()}
  leaves = {
    f"transformer/{path}": (
      tuple(path.split("/")),
      types.SimpleNamespace(shape=shape, dtype=ml_dtypes.bfloat16),
    )
    for path, shape in shapes.items()
  }
  monkeypatch.setattr(gemma.OrbaxCheckpoint, "_leaves", lambda self: leaves)
  source = gemma.OrbaxCheckpoint(tmp_path)
  config, notes = gemma._config(source)
  assert notes == (f"recognised by its shapes: {name}",)
  assert config.dtype == "bfloat16"
  tree = layout.abstract_stack(config)
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters
  layout.check_names(gemma._tensors(config, source), source)


def _drop(key):
  return lambda tree: tree.pop(key)


def _set(key, leaf, value):
  return lambda tree: tree.setdefault(key, {}).update({leaf: value})


def _poison(tree):
  damaged = tree["transformer/layer_3/attn/kv_einsum"]["w"].copy()
  damaged[1, 0, 2, 3] = np.nan
  tree["transformer/layer_3/attn/kv_einsum"]["w"] = damaged


def _only(**layers_and_width):
  layers, width = layers_and_width["layers"], layers_and_width["width"]

  def change(tree):
    tree.clear()
    tree["transformer/embedder"] = {"input_embedding": np.ones((8, width), np.float32)}
    tree["transformer/layer_0/attn/q_einsum"] = {"w": np.ones((2, width, 2), "f")}
    tree["transformer/layer_0/attn/kv_einsum"] = {"w": np.ones((2, 1, width, 2), "f")}
    tree["transformer/layer_0/mlp/linear"] = {"w": np.ones((4, width), "f")}
    tree[f"transformer/layer_{layers - 1}/pre_ffw_norm"] = {"scale": np.ones(2, "f")}

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      _drop("transformer/layer_7/mlp/gating_einsum"),
      r"missing: layer_7/mlp/gating_einsum\n.*incomplete",
    ),
    (
      _set("SigLiPFromPatches_0/embedding", "kernel", np.ones((2, 3), np.float32)),
      r"unknown: SigLiPFromPatches_0/embedding/kernel\n",
    ),
    (
      _set("transformer/layer_9/pre_ffw_norm", "scale", np.ones(_D, np.float32)),
      r"missing: layer_8/attn/q_einsum/w\n(.*\n)*.*… and 11 more",
    ),
    (
      _set("transformer/layer_4/mlp/linear", "w", np.ones((_D, _F), np.float32)),
      r"misshapen: layer_4/mlp/linear is \[24, 36\], .* \[36, 24\]",
    ),
    (_poison, r"layer_3/attn/kv_einsum/w holds NaN or infinity"),
    (
      _set("transformer/final_norm", "scale", np.ones(_D, np.int8)),
      r"1 tensors .* float32 nor bfloat16: final_norm/scale \(int8\); give the",
    ),
    (
      _drop("transformer/embedder"),
      r"not of a Gemma: no embedder/input_embedding among \['transformer/final_norm",
    ),
    (
      _drop("transformer/layer_0/attn/q_einsum"),
      r"layer_0/attn/q_einsum/w is missing, a Gemma 3 has it in 3 dimensions",
    ),
    (
      _set("transformer/layer_0/mlp/linear", "w", np.ones(3, np.float32)),
      r"layer_0/mlp/linear is of shape \[3\], a Gemma 3 has it in 2 dimensions",
    ),
    (_only(layers=34, width=2560), r"Gemma 3 4B; only 270M and 1B are supported"),
    (
      _set("transformer/layer_0/attn/q_einsum", "w", np.ones((4, _D, 9), np.float32)),
      r"no Gemma 3: TransformerConfig.head_dim must be even",
    ),
  ],
)
def test_other_trees_are_refused(change, message, tokenizer, write):
  directory = write(change)
  with pytest.raises(CheckpointError, match=message) as error:
    gemma.load(directory, tokenizer)
  assert str(error.value).startswith(str(directory))


def _missing_chunk(directory: pathlib.Path) -> None:
  (directory / "transformer/layer_3/mlp/linear.w/0.0").unlink()


def test_missing_files_are_no_zeros(tokenizer, write):
  directory = write(ocdbt=False)
  _missing_chunk(directory)
  message = "layer_3/mlp/linear: damaged or incomplete: .*; download it again"
  with pytest.raises(CheckpointError, match=message):
    gemma.load(directory, tokenizer)


def test_one_tensor_at_a_time(model, write):
  """What is wrong with one tensor is not seen by reading another."""
  directory = write(ocdbt=False)
  _missing_chunk(directory)
  read = gemma.OrbaxCheckpoint(directory).read("layer_2/mlp/linear")
  expected = _state(model)["layers.2.mlp.down_proj.weight"].T
  np.testing.assert_array_equal(read, expected)


def _truncate(directory: pathlib.Path) -> None:
  largest = max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def _no_metadata(directory: pathlib.Path) -> None:
  (directory / "_METADATA").unlink()


def _half_metadata(directory: pathlib.Path) -> None:
  path = directory / "_METADATA"
  path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (_truncate, r"damaged or incomplete: .*; download it again"),
    (shutil.rmtree, r"no Orbax checkpoint .*no _METADATA.*gemma3-270m-pt"),
    (_no_metadata, r"no Orbax checkpoint"),
    (_half_metadata, r"damaged or incomplete: .*; download it again"),
  ],
)
def test_damage_is_one_message(damage, message, tokenizer, write):
  directory = write()
  damage(directory)
  with pytest.raises(CheckpointError, match=message) as error:
    gemma.load(directory, tokenizer)
  assert str(error.value).startswith(str(directory))
  assert len(str(error.value)) < 500
