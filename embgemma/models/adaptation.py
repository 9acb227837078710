"""From pretrained stacks to another model: where each of its parameters comes from.

A decoder-only checkpoint becomes an encoder-decoder (T5Gemma, arXiv 2504.06225; T5Gemma
2, arXiv 2512.14856): the encoder takes all of its weights and only the mask changes,
and the decoder takes them too. An embedder takes that encoder, or the decoder-only
stack itself: two rows of Table 2 of EmbeddingGemma (arXiv 2509.20354). It is all a
choice of references; no weight is copied.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import traverse_util

from embgemma.errors import CheckpointError
from embgemma.models import embedder, encoder_decoder, extraction, lora
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.typing import Array, Leaf, Params

# Settings that shape parameters, or say which layer is which: they must agree.
_SHAPING = (
  "vocab_size",
  "num_layers",
  "width",
  "mlp_width",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "attention_pattern",
  "query_key_norm",
)
# Settings that adaptation changes, or that weights know nothing of. All others are
# noted where they differ.
_FREE = (
  "mask",
  "window",
  "max_length",
  "dtype",
  "remat",
  "attention",
  "dropout_rate",
  "initial_branch_gain",
)
# Sublayers of cross-attention, and those of self-attention that stand in for them.
_CROSS = {
  "cross_attention": "attention",
  "pre_cross_attention_norm": "pre_attention_norm",
  "post_cross_attention_norm": "post_attention_norm",
}
_TABLE = ("embedder", "table")
RANDOM = "random"
REPORT_FILE = "adaptation.json"  # beside a checkpoint's model.json
_MAX_LISTED = 10

_PARTS = {
  "embedder": "token table",
  "cross_attention": "cross-attention",
  "mlp": "feed-forward",
}
_LAYER = re.compile(r"layer_\d+/")

_Path = tuple[str, ...]
_Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint to take parameters from.

  Attributes:
    name: What reports and errors call it, such as its path.
    config: Of its model.
    params: Of its model, without axis boxes; arrays, or their shapes.
  """

  name: str
  config: BackboneConfig | EmbedderConfig
  params: Params


class Origin(NamedTuple):
  """A parameter of a source: the source's name, and the parameter's path there."""

  checkpoint: str
  path: str


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A model made of the parameters of others.

  Attributes:
    params: Without axis boxes. Leaves are the sources' own, and one may stand in
      several places, such as encoder and decoder: who places them on devices must not
      donate one buffer twice.
    sources: Path of every parameter to where it comes from; None is drawn at random.
    unused: Parameters of the sources that have no place here, to their sizes.
    notes: Settings that the weights were trained with and that differ here.
  """

  params: Params
  sources: Mapping[str, Origin | None]
  unused: Mapping[Origin, int]
  notes: tuple[str, ...]


def adapt(
  target: BackboneConfig | EmbedderConfig,
  key: Array,
  source: Source,
  decoder_source: Source | None = None,
) -> Adapted:
  """The target's parameters, each from a source where one fits.

  An encoder is the source's encoder, or else its decoder; a decoder is its decoder, or
  else its encoder. Cross-attention of its own ("separate") is the source's, or else
  stands in for self-attention: kernels, norms of queries and keys (arXiv 2504.06225),
  and the norms before and after it, of which the paper says nothing. Where one of
  these has another shape, because the encoder has another width, all of
  cross-attention is random. An embedder's pooler and heads are those of an embedder of
  the same shape, or else random; adapters always are.

  Masks and windows are the target's: no weight depends on them, and nothing is
  converted.

  Args:
    target: What to make.
    key: Of what is drawn at random.
    source: Of the encoder and, without `decoder_source`, of the decoder. Adapters of
      an embedder are merged into its kernels.
    decoder_source: Of the decoder, where it is another checkpoint.

  Raises:
    CheckpointError: a stack differs in shape from its source, or the source lacks
      parameters; the message names them.
  """
  sources = (source,) if decoder_source is None else (source, decoder_source)
  trees = [_tree(source) for source in sources]
  stacks = {
    side: _stack(config, side, trees[0] if side == "encoder" else trees[-1])
    for side, config in _sides(target).items()
  }
  shapes = _shapes(target)
  places = _places(shapes, stacks, trees[0])
  problems = [*_differences(stacks), *_missing(shapes, places, stacks)]
  if problems:
    names = " and ".join(tree.name for tree in trees)
    listed = "\n  ".join(problems)
    raise CheckpointError(
      f"{names}: cannot become this model:\n  {listed}\nGive the model the shape of "
      "its checkpoint, or take another checkpoint."
    )
  leaves = {path: place.leaf for path, place in places.items() if place}
  missing = [path for path in shapes if path not in leaves]
  leaves |= _fresh(target, key, missing, _abstract(source.params))
  origins = {"/".join(path): place and place.origin for path, place in places.items()}
  return Adapted(
    params=traverse_util.unflatten_dict(leaves),
    sources=origins,
    unused=_unused(trees, origins.values()),
    notes=(*_notes(stacks), *_table_notes(stacks, shapes, places)),
  )


def warm_up_patterns(sources: Mapping[str, Origin | None]) -> tuple[str, ...]:
  """Patterns that find the random parameters, and no other, in their paths.

  They are what to train alone at first: arXiv 2504.06225 does so for 1,000 steps
  where cross-attention is random. Where nothing is random there are none.
  """
  random = [path for path, origin in sources.items() if origin is None]
  taken = [path for path, origin in sources.items() if origin is not None]

  def pattern(path: str) -> str:
    # The same in every layer, if that finds nothing else.
    short = f"(^|/){re.escape(_LAYER.split(path)[-1])}$"
    found = any(re.search(short, other) for other in taken)
    return f"(^|/){re.escape(path)}$" if found else short

  return tuple(dict.fromkeys(map(pattern, random)))


def report(adapted: Adapted) -> dict[str, Any]:
  """Where a model's parameters come from, as a JSON object.

  `parts` sums them by part of the model and by where it comes from, and `parameters`
  is the sum of that; `unused` sums what has no place; `sources` has every single one.
  """
  leaves = traverse_util.flatten_dict(adapted.params, sep="/")
  parts: Counter[tuple[str, str]] = Counter()
  for path, origin in adapted.sources.items():
    parts[_part(path), _described(origin)] += math.prod(leaves[path].shape)
  unused: Counter[str] = Counter()
  for origin, size in adapted.unused.items():
    unused[_described(origin)] += size
  return {
    "parameters": sum(parts.values()),
    "parts": [
      {"part": part, "from": origin, "parameters": size}
      for (part, origin), size in parts.items()
    ],
    "unused": dict(unused),
    "notes": list(adapted.notes),
    "sources": {
      path: origin._asdict() if origin else RANDOM
      for path, origin in adapted.sources.items()
    },
  }


def report_text(report: Mapping[str, Any]) -> str:
  """The parts of a `report` as a table, with what is unused and the notes below it."""
  rows = [(x["part"], f"{x['parameters']:,}", x["from"]) for x in report["parts"]]
  rows = [("part", "parameters", "from"), *rows]
  rows.append(("all", f"{report['parameters']:,}", ""))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    f"{part:<{widths[0]}}  {size:>{widths[1]}}  {origin}".rstrip()
    for part, size, origin in rows
  ]
  lines += [f"not used: {part}, {size:,}" for part, size in report["unused"].items()]
  return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _described(origin: Origin | None) -> str:
  return RANDOM if origin is None else f"{origin.checkpoint}, {_part(origin.path)}"


def _part(path: str) -> str:
  """What a parameter belongs to, such as "encoder attention"."""
  root, *keys = _LAYER.sub("", path).split("/")
  kind = next((key for key in keys if key not in ("groups", "remainder")), "")
  if root not in ("encoder", "decoder"):
    return root
  if kind.endswith("_norm"):
    kind = "cross-attention norms" if kind in _CROSS else "norms"
  return f"{root} {_PARTS.get(kind, kind)}"


class _Tree(NamedTuple):
  """A source: its stacks by the name of their root, and its leaves by path."""

  name: str
  stacks: Mapping[str, TransformerConfig]
  leaves: Mapping[_Path, Leaf]


class _Place(NamedTuple):
  """A path in a source."""

  tree: _Tree
  path: _Path

  @property
  def origin(self) -> Origin:
    return Origin(self.tree.name, "/".join(self.path))

  @property
  def leaf(self) -> Leaf:
    """None where there is nothing."""
    return self.tree.leaves.get(self.path)


class _Stack(NamedTuple):
  """A stack of the target, and that of a source which it is made of."""

  config: TransformerConfig
  tree: _Tree
  root: str

  def __str__(self) -> str:
    return f"the {self.root} of {self.tree.name}"


def _sides(config: BackboneConfig | EmbedderConfig) -> dict[str, TransformerConfig]:
  """The stacks of a model by the name of their root in its tree."""
  if isinstance(config, EmbedderConfig):
    return {"encoder": config.transformer}
  stacks = {"encoder": config.encoder, "decoder": config.decoder}
  return {side: stack for side, stack in stacks.items() if stack is not None}


def _tree(source: Source) -> _Tree:
  params, config = source.params, source.config
  if isinstance(config, EmbedderConfig):
    params, config = _merged(params, config)
  return _Tree(source.name, _sides(config), traverse_util.flatten_dict(params))


def _merged(params: Params, config: EmbedderConfig) -> tuple[Params, EmbedderConfig]:
  """`lora.merge`, of shapes too."""
  plain = dataclasses.replace(config, lora=None)
  if not _abstract(params):
    return lora.merge(params, config)
  return jax.eval_shape(lambda tree: lora.merge(tree, config)[0], params), plain


def _abstract(params: Params) -> bool:
  leaves = jax.tree.leaves(params)
  return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _stack(config: TransformerConfig, side: str, tree: _Tree) -> _Stack:
  """The same side of the source, or the only one it has."""
  return _Stack(config, tree, side if side in tree.stacks else next(iter(tree.stacks)))


def abstract_params(config: BackboneConfig | EmbedderConfig) -> Params:
  """Shapes and dtypes of a model's parameters, without axis boxes."""
  module = embedder if isinstance(config, EmbedderConfig) else encoder_decoder
  return module.abstract_params(config)


def _shapes(config: BackboneConfig | EmbedderConfig) -> dict[_Path, _Shape]:
  """Shape of every parameter, by path."""
  flat = traverse_util.flatten_dict(abstract_params(config))
  return {path: leaf.shape for path, leaf in flat.items()}


def _places(
  shapes: Mapping[_Path, _Shape], stacks: Mapping[str, _Stack], first: _Tree
) -> dict[_Path, _Place | None]:
  """Where each parameter comes from; None is nowhere."""

  def place(path: _Path, shape: _Shape) -> _Place | None:
    side, *inner = path
    found = (
      _candidates(stacks[side], tuple(inner))
      if side in stacks
      else [_Place(first, path)]
    )
    return next(
      (x for x in found if x.leaf is not None and x.leaf.shape == shape), None
    )

  places = {path: place(path, shape) for path, shape in shapes.items()}
  adapters = {path for path in shapes if path[-1] in (lora.A, lora.B)}
  heads = [path for path in shapes if path[0] not in stacks and path not in adapters]
  cross = [path for path in shapes if _is_cross(path)]
  for together in (heads, cross):
    if not all(places[path] for path in together):
      places |= dict.fromkeys(together)
  return places


def _candidates(stack: _Stack, inner: _Path) -> list[_Place]:
  """Where a parameter of a stack may come from, best first."""
  paths = [(stack.root, *inner)]
  if inner == _TABLE:  # which a decoder may share with its encoder
    paths.append(("encoder", *_TABLE))
  if _is_cross(inner):
    paths.append((stack.root, *(_CROSS.get(key, key) for key in inner)))
  return [_Place(stack.tree, path) for path in paths]


def _is_cross(path: _Path) -> bool:
  return any(key in _CROSS for key in path)


def _differences(stacks: Mapping[str, _Stack]) -> Iterator[str]:
  """Settings that must agree and do not."""
  for side, stack in stacks.items():
    theirs = stack.tree.stacks[stack.root]
    for field in _SHAPING:
      there, here = getattr(theirs, field), getattr(stack.config, field)
      if there != here:
        yield f"{side}: {field} is {there} in {stack}, {here} here"


def _missing(
  shapes: Mapping[_Path, _Shape],
  places: Mapping[_Path, _Place | None],
  stacks: Mapping[str, _Stack],
) -> list[str]:
  """Parameters that need a source and have none: all but cross-attention and heads."""
  found = []
  for path, place in places.items():
    if (
      place or path[0] not in stacks or _is_cross(path) or path[-1] in (lora.A, lora.B)
    ):
      continue
    stack = stacks[path[0]]
    leaf = next(
      (x.leaf for x in _candidates(stack, path[1:]) if x.leaf is not None), None
    )
    there = "missing" if leaf is None else leaf.shape
    found.append(f"{'/'.join(path)}: {there} in {stack}, {shapes[path]} here")
  more = len(found) - _MAX_LISTED
  return found if more <= 0 else [*found[:_MAX_LISTED], f"… and {more} more"]


def _fresh(
  target: BackboneConfig | EmbedderConfig,
  key: Array,
  paths: Sequence[_Path],
  abstract: bool,
) -> dict[_Path, Leaf]:
  """Parameters as a new model has them, or their shapes.

  The compiler leaves out all others.
  """
  if not paths:
    return {}
  module = embedder if isinstance(target, EmbedderConfig) else encoder_decoder

  def drawn(key: Array) -> list[Array]:
    flat = traverse_util.flatten_dict(nn.unbox(module.init_params(target, key)))
    return [flat[path] for path in paths]

  if abstract:
    values = jax.eval_shape(drawn, key)
  else:
    values = jax.device_get(jax.jit(drawn)(key))
  return dict(zip(paths, values, strict=True))


def _unused(
  trees: Sequence[_Tree], origins: Iterable[Origin | None]
) -> dict[Origin, int]:
  used = set(origins)
  own = {
    _Place(tree, path).origin: leaf
    for tree in trees
    for path, leaf in tree.leaves.items()
  }
  return {
    origin: math.prod(leaf.shape) for origin, leaf in own.items() if origin not in used
  }


def _notes(stacks: Mapping[str, _Stack]) -> Iterator[str]:
  """Settings of which no shape tells, and that training would have to mend."""
  for side, stack in stacks.items():
    config, theirs = stack.config, stack.tree.stacks[stack.root]
    here, there = _behaviour(config), _behaviour(theirs)
    if config.mask == theirs.mask:
      here["window"], there["window"] = config.window, theirs.window
    for field in here:
      if here[field] != there[field]:
        yield f"{side}: {field} is {there[field]} in {stack}, {here[field]} here"
    yield from _window_notes(side, config, theirs)
    one_sided = (config.window[0] == 0) != (config.window[1] == 0)
    if config.mask == "bidirectional" and one_sided and "local" in config.layer_kinds:
      yield f"{side}: its window {config.window} is one-sided, as of a causal stack"


def _window_notes(
  side: str, config: TransformerConfig, theirs: TransformerConfig
) -> Iterator[str]:
  """Whether a causal stack's window became another than half of it on each side."""
  if (theirs.mask, config.mask) != ("causal", "bidirectional"):
    return
  half = extraction.bidirectional(theirs).window
  differs = abs(sum(config.window) - sum(theirs.window)) > 1  # half may round up
  if "local" in config.layer_kinds and differs:
    yield (
      f"{side}: its window is {config.window}; half of {theirs.window}, with which it "
      f"was trained, is {half}"
    )


def _behaviour(config: TransformerConfig) -> dict[str, Any]:
  """What a stack does with its parameters, but for mask and window."""
  values = {**vars(config), "query_scalar": config.query_scalar or config.head_dim}
  return {k: v for k, v in values.items() if k not in (*_SHAPING, *_FREE)}


def _table_notes(
  stacks: Mapping[str, _Stack],
  shapes: Mapping[_Path, _Shape],
  places: Mapping[_Path, _Place | None],
) -> Iterator[str]:
  """Whether a decoder that shares its encoder's table was trained with that one."""
  if "decoder" not in stacks or ("decoder", *_TABLE) in shapes:
    return
  candidates = _candidates(stacks["decoder"], _TABLE)
  own = next((place for place in candidates if place.leaf is not None), None)
  shared = places["encoder", *_TABLE]
  if own and shared and own.origin != shared.origin:
    yield (
      f"decoder: it shares {shared.origin.path} of {shared.tree.name}, and was trained "
      f"with {own.origin.path} of {own.tree.name}"
    )
