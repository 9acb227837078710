"""Gemma 3 decoders as DeepMind releases them: Orbax checkpoints of their Flax modules.

    FLAT     {"transformer/layer_0/attn/q_einsum": {"w": …}}, the official releases
    STACKED  {"transformer/stacked_layers/attention_type_0/…"}, layers of equal rank in
             their group of six along a leading axis
    NESTED   {"layer_0": {"attn": {"q_einsum": {"w": …}}}}
    KAULDRON {"params": NESTED, "opt_state": …}

Layouts: google-deepmind/gemma, gemma/gm/ckpts/_checkpoint.py and _compat.py, which
is not needed here. Such a checkpoint has no configuration; shapes tell the model.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop import layout
from embgemma.interop.layout import Part, Tensor, identity
from embgemma.interop.model import (
  BACKBONE_LENGTH,
  Model,
  equal_lengths,
  read_vocabulary,
)
from embgemma.models.config import BackboneConfig, TransformerConfig

_TABLE = "embedder/input_embedding"
_ROOTS = re.compile(
  rf"((?:params/|rlx_networks/policy_network/|transformer/)*){_TABLE}"
)
_MLP = re.compile(r"(/mlp/(?:linear|gating_einsum))/w$")  # FLAT adds the /w
_LAYER = re.compile(r"layer_(\d+)/")
_STACK = "stacked_layers/attention_type_"
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
# (layers, D, N, K, H, F)
_RELEASED = {
  (18, 640, 4, 1, 256, 2048): "Gemma 3 270M",
  (26, 1152, 4, 1, 256, 6912): "Gemma 3 1B",
}
# (layers, D); from 4B on the window is 1,024 and RoPE of global layers is scaled.
_UNSUPPORTED = {(34, 2560): "4B", (48, 3840): "12B", (62, 5376): "27B"}
_WINDOW = 512  # keys that a local layer sees, the token itself included
_CONTEXT = 32_768

_Pick = Callable[[np.ndarray], np.ndarray]


class OrbaxCheckpoint:
  """The tensors of a checkpoint by their names in DeepMind's modules (NESTED).

  Raises:
    CheckpointError: it is no Orbax checkpoint, damaged, holds no Gemma, or a tensor
      is neither float32 nor bfloat16.
  """

  def __init__(self, directory: pathlib.Path):
    self.location = str(directory)
    inner = directory / "default"  # of Kauldron
    self._directory = inner if (inner / "_METADATA").exists() else directory
    leaves = self._leaves()
    root = next((m[1] for m in map(_ROOTS.fullmatch, leaves) if m), None)
    if root is None:
      raise CheckpointError(
        f"{directory}: an Orbax checkpoint, but not of a Gemma: no {_TABLE} among "
        f"{sorted(leaves)[: layout.MAX_LISTED]}; give one of DeepMind's Gemma 3"
      )
    # Beside the parameters of a Kauldron run lies its optimizer's state.
    parameters = "params/" if root.startswith("params/") else ""
    self.unread = [path for path in leaves if not path.startswith(parameters)]
    self._keys: dict[str, tuple[str, ...]] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, np.dtype] = {}
    for path, (keys, leaf) in leaves.items():
      if path in self.unread:
        continue
      name = _MLP.sub(r"\1", path.removeprefix(root))
      self._keys[name] = keys
      # Strings have neither.
      self.shapes[name] = tuple(getattr(leaf, "shape", ()))
      self.dtypes[name] = np.dtype(getattr(leaf, "dtype", object))
    wrong = [f"{n} ({d})" for n, d in self.dtypes.items() if d not in _DTYPES]
    if wrong:
      raise CheckpointError(
        f"{directory}: {len(wrong)} tensors are neither float32 nor bfloat16: "
        f"{', '.join(sorted(wrong)[: layout.MAX_LISTED])}; give the checkpoint as it "
        "was before quantisation"
      )

  def _leaves(self) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Keys and Orbax's metadata of every leaf by its whole path."""
    if not (self._directory / "_METADATA").exists():
      raise CheckpointError(
        f"{self.location}: no Orbax checkpoint (there is no _METADATA); give the "
        "directory of the checkpoint itself, such as gemma3-270m-pt, copied whole"
      )
    try:
      tree = ocp.PyTreeCheckpointHandler().metadata(self._directory.absolute()).tree
    except Exception as error:  # Orbax and tensorstore raise many types
      raise self._damaged(error) from error
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = [
      (tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf)
      for path, leaf in leaves
    ]
    return {"/".join(keys): (keys, leaf) for keys, leaf in named}

  def read(self, name: str) -> np.ndarray:
    """The tensor; float32 or bfloat16.

    Raises:
      CheckpointError: it cannot be read.
    """
    item: Any = 0
    how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(self._keys[name]):
      item, how = {key: item}, {key: how}
    args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
    try:
      with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        tree = checkpointer.restore(self._directory.absolute(), args=args)
    except Exception as error:  # Orbax and tensorstore raise many types
      raise self._damaged(error, name) from error
    return jax.tree.leaves(tree)[0]

  def _damaged(self, error: Exception, name: str = "") -> CheckpointError:
    # Tensorstore's messages go on with a specification of hundreds of characters.
    reason = str(error).partition(" [tensorstore_spec")[0]
    return CheckpointError(
      f"{self.location}{': ' if name else ''}{name}: damaged or incomplete: {reason}; "
      "download it again"
    )


def load(directory: pathlib.Path, tokenizer: pathlib.Path | None = None) -> Model:
  """A decoder-only Gemma 3, 270M or 1B, or of other shapes and else like these.

  Args:
    directory: An Orbax checkpoint, its arrays in OCDBT or not.
    tokenizer: A SentencePiece model; None is tokenizer.model in the directory.

  Raises:
    CheckpointError: it is no such checkpoint, damaged, or of another architecture;
      tensors that do not fit are listed by name.
  """
  source = OrbaxCheckpoint(directory)
  config, notes = _config(source)
  tensors = _tensors(config, source)
  layout.check_names(tensors, source)
  vocabulary, more = read_vocabulary(directory, config.vocab_size, tokenizer)
  params = {"decoder": layout.allocate(layout.abstract_stack(config))}
  layout.fill(params, tensors, source)
  lengths = equal_lengths(BACKBONE_LENGTH)
  description = Description(BackboneConfig(decoder=config), lengths, PROMPTS)
  return Model(description, vocabulary, params, (*notes, *more))


def _config(source: OrbaxCheckpoint) -> tuple[TransformerConfig, tuple[str, ...]]:
  """The configuration that the shapes tell, and notes."""
  vocab_size, width = _dims(source, _TABLE, 2)
  heads, _, head_dim = _layer_dims(source, "attn/q_einsum/w", 3)
  _, kv_heads, _, _ = _layer_dims(source, "attn/kv_einsum/w", 4)
  mlp_width, _ = _layer_dims(source, "mlp/linear", 2)
  layers = _num_layers(source)
  if size := _UNSUPPORTED.get((layers, width)):
    raise CheckpointError(
      f"{source.location}: Gemma 3 {size}; only 270M and 1B are supported: from 4B on "
      "positions are scaled and windows longer"
    )
  shape = (layers, width, heads, kv_heads, head_dim, mlp_width)
  if name := _RELEASED.get(shape):
    notes = [f"recognised by its shapes: {name}"]
  else:
    notes = [
      f"no released Gemma 3 has its shapes (layers, D, N, K, H, F) {shape}; the rest "
      f"is taken as theirs: five local layers, which see {_WINDOW} tokens, to a global "
      "one, RoPE bases 10,000 and 1,000,000, queries scaled by head_dim ** -0.5"
    ]
  if source.unread:
    notes.append(f"{len(source.unread)} arrays beside the parameters were not read")
  everything_bf16 = set(source.dtypes.values()) == {_DTYPES[1]}
  try:
    config = TransformerConfig(
      vocab_size=vocab_size,
      num_layers=layers,
      width=width,
      mlp_width=mlp_width,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      mask="causal",
      window=(_WINDOW - 1, 0),
      max_length=_CONTEXT,
      dtype="bfloat16" if everything_bf16 else "float32",
    )
  except ConfigError as error:
    raise CheckpointError(f"{source.location}: no Gemma 3: {error}") from error
  return config, tuple(notes)


def _dims(source: OrbaxCheckpoint, name: str, rank: int) -> tuple[int, ...]:
  """Shape of a tensor that tells a part of the configuration."""
  shape = source.shapes.get(name)
  if shape is None or len(shape) != rank:
    found = "missing" if shape is None else f"of shape {list(shape)}"
    raise CheckpointError(
      f"{source.location}: {name} is {found}, a Gemma 3 has it in {rank} dimensions; "
      "the checkpoint is incomplete or of another model"
    )
  return shape


def _layer_dims(source: OrbaxCheckpoint, suffix: str, rank: int) -> tuple[int, ...]:
  """Shape of a tensor of the first layer."""
  if _is_stacked(source):
    return _dims(source, f"{_STACK}0/{suffix}", rank + 1)[1:]
  return _dims(source, f"layer_0/{suffix}", rank)


def _is_stacked(source: OrbaxCheckpoint) -> bool:
  return any(name.startswith(_STACK) for name in source.shapes)


def _num_layers(source: OrbaxCheckpoint) -> int:
  if _is_stacked(source):
    norm = re.compile(rf"{_STACK}\d+/pre_attention_norm/scale")
    return sum(s[0] for name, s in source.shapes.items() if norm.fullmatch(name) and s)
  return 1 + max(int(m[1]) for m in map(_LAYER.match, source.shapes) if m)


def _tensors(config: TransformerConfig, source: OrbaxCheckpoint) -> list[Tensor]:
  """Every tensor of the model, as the checkpoint lays it out."""
  slots = layout.stack_slots(config, ("decoder",))
  tensors = [
    Tensor(name, slots[ours].shape, (Part(slots[ours], identity),))
    for name, ours in ((_TABLE, "table"), ("final_norm/scale", "final_norm"))
  ]
  period, layers = len(config.attention_pattern), config.num_layers
  for suffix, (shape, picks) in _layer_tensors(config).items():

    def parts(layer: int, picks: Mapping[str, _Pick] = picks) -> list[Part]:
      return [Part(slots[f"{layer}/{ours}"], pick) for ours, pick in picks.items()]

    if not _is_stacked(source):
      for layer in range(layers):
        tensors.append(Tensor(f"layer_{layer}/{suffix}", shape, parts(layer)))
      continue
    for rank in range(min(period, layers)):
      stacked = [
        Part(part.slot, _of_slice(i, part.pick))
        for i, layer in enumerate(range(rank, layers, period))
        for part in parts(layer)
      ]
      leading = len(range(rank, layers, period))
      tensors.append(Tensor(f"{_STACK}{rank}/{suffix}", (leading, *shape), stacked))
  return tensors


def _of_slice(index: int, pick: _Pick) -> _Pick:
  return lambda array: pick(array[index])


def _layer_tensors(
  config: TransformerConfig,
) -> dict[str, tuple[tuple[int, ...], dict[str, _Pick]]]:
  """Shape of each tensor of a layer, and which of our parameters it holds."""
  width, mlp_width, head_dim = config.width, config.mlp_width, config.head_dim
  heads, kv_heads = config.num_heads, config.num_kv_heads

  def inputs_first(array: np.ndarray) -> np.ndarray:  # [heads, D, H] to [D, heads H]
    return array.swapaxes(0, 1).reshape(width, -1)

  scales = {
    "attn/_query_norm": ("attention/query_norm", head_dim),
    "attn/_key_norm": ("attention/key_norm", head_dim),
    "pre_attention_norm": ("pre_attention_norm", width),
    "post_attention_norm": ("post_attention_norm", width),
    "pre_ffw_norm": ("pre_mlp_norm", width),
    "post_ffw_norm": ("post_mlp_norm", width),
  }
  return {
    "attn/q_einsum/w": (
      (heads, width, head_dim),
      {"attention/query/kernel": inputs_first},
    ),
    "attn/kv_einsum/w": (
      (2, kv_heads, width, head_dim),
      {
        "attention/key/kernel": _of_slice(0, inputs_first),
        "attention/value/kernel": _of_slice(1, inputs_first),
      },
    ),
    "attn/attn_vec_einsum/w": (
      (heads, head_dim, width),
      {"attention/output/kernel": lambda array: array.reshape(-1, width)},
    ),
    "mlp/gating_einsum": (
      (2, mlp_width, width),
      {
        "mlp/gate/kernel": _of_slice(0, np.transpose),
        "mlp/up/kernel": _of_slice(1, np.transpose),
      },
    ),
    "mlp/linear": ((mlp_width, width), {"mlp/down/kernel": identity}),
    **{
      f"{theirs}/scale": ((size,), {f"{ours}/scale": identity})
      for theirs, (ours, size) in scales.items()
    },
  }
