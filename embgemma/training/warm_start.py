"""Starting a run from the weights of other checkpoints.

An embedder goes on as it is. Pretrained stacks are adapted: which parameter comes from
where is `models.adaptation`'s to say, and stays with the run as adaptation.json.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore
from embgemma.data.fingerprints import digest
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop import codes
from embgemma.models import adaptation, lora
from embgemma.models.adaptation import RANDOM, Adapted, Origin, Source
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.training.optimizers import OptimizerConfig, join
from embgemma.training.train_state import TrainState
from embgemma.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class StartingPoint:
  """Another checkpoint's weights.

  Attributes:
    path: As given.
    directory: Its MODEL_DIR.
    step: Of its run.
    config: Of its model.
    lineage: Of its parameters.
  """

  path: str
  directory: pathlib.Path
  step: int
  config: EmbedderConfig | BackboneConfig
  lineage: str

  def restore(self, abstract: PyTree) -> PyTree:
    """The parameters that it ships, placed like the abstract ones.

    Raises:
      CheckpointError: see `CheckpointStore.restore`.
    """
    store = CheckpointStore(self.directory)
    item = store.shipped_item(self.step)
    if item == codes.ITEM:
      raise CheckpointError(
        f"{self.path}: holds weights of 4 or 8 bits, which do not train on; start from "
        "the checkpoint that `embgemma quantize` read"
      )
    return store.restore(self.step, {item: abstract})[item]


class Start(NamedTuple):
  """What a run starts from.

  Attributes:
    points: The other checkpoints of a new run.
    report: Of the adaptation that it starts or started with, see `adaptation.report`;
      None where there is none.
  """

  points: tuple[StartingPoint, ...]
  report: dict[str, Any] | None


def find_start(
  model_dir: pathlib.Path,
  path: str | None,
  decoder_path: str | None,
  config: EmbedderConfig | BackboneConfig,
  vocabulary: SentencePieceVocabulary,
) -> Start:
  """What a run in this directory starts from; one with steps, from these alone.

  Raises:
    ConfigError, CheckpointError: see `open_starting_points`, `adaptation.adapt`.
  """
  if checkpoints.has_steps(model_dir):
    return Start((), _read_report(model_dir))
  points = open_starting_points(path, decoder_path, config, vocabulary)
  if not is_adapted(points, config):
    return Start(points, None)
  shapes = [adaptation.abstract_params(point.config) for point in points]
  adapted = _adapt(points, config, jax.random.key(0), shapes)
  return Start(points, adaptation.report(adapted))


def lineage(start: Start, config: EmbedderConfig | BackboneConfig, seed: int) -> str:
  """`checkpoints.Description.lineage` of a new run.

  That of the embedder it goes on with; else it follows from what stacks were adapted,
  and from the seed where parameters are random.

  Args:
    start: What the run starts from.
    config: Of its model.
    seed: Of the run.
  """
  theirs = [point.lineage for point in start.points]
  if not all(theirs):
    return ""
  if theirs and start.report is None:
    return theirs[0]
  shapes = traverse_util.flatten_dict(adaptation.abstract_params(config), sep="/")
  drawn = start.report is None or RANDOM in start.report["sources"].values()
  return digest(
    [
      theirs,
      seed if drawn else None,
      sorted((path, list(leaf.shape)) for path, leaf in shapes.items()),
    ]
  )


def open_starting_points(
  path: str | None,
  decoder_path: str | None,
  config: EmbedderConfig | BackboneConfig,
  vocabulary: SentencePieceVocabulary,
) -> tuple[StartingPoint, ...]:
  """What a new run of this model starts from.

  Args:
    path: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP; None is new parameters.
    decoder_path: The same of the decoder, where it is another.
    config: Of the run's model.
    vocabulary: Of the run.

  Raises:
    ConfigError: a decoder's path without an encoder's, or without a decoder.
    CheckpointError: a checkpoint cannot be read, has another vocabulary, or adapters
      that this embedder has not.
  """
  if decoder_path is not None and (
    path is None
    or isinstance(config, EmbedderConfig)
    or None in (config.encoder, config.decoder)
  ):
    raise ConfigError(
      f"INITIAL_DECODER_CHECKPOINT_PATH {decoder_path}: it is for an encoder-decoder "
      "whose encoder starts from INITIAL_CHECKPOINT_PATH; remove it or give both"
    )
  paths = [each for each in (path, decoder_path) if each is not None]
  points = tuple(_starting_point(each, vocabulary) for each in paths)
  for point in points:
    _check_adapters(point, config)
  return points


def _starting_point(path: str, vocabulary: SentencePieceVocabulary) -> StartingPoint:
  directory, step = checkpoints.locate(path)
  description = checkpoints.read_description(directory)
  theirs = checkpoints.read_vocabulary(directory)
  if theirs.serialized != vocabulary.serialized:
    raise CheckpointError(
      f"{directory} has another vocabulary than this run, whose token ids would mean "
      f"other rows of its table; set VOCABULARY = '{directory}/tokenizer.model'"
    )
  store = CheckpointStore(directory)
  step = store.resolve_step(step)
  if store.shipped_item(step) == "codes":
    raise CheckpointError(
      f"{directory}: holds weights of 4 and 8 bits; training starts from float32 ones: "
      "give the checkpoint that they were made of"
    )
  return StartingPoint(path, directory, step, description.config, description.lineage)


def _check_adapters(
  point: StartingPoint, config: EmbedderConfig | BackboneConfig
) -> None:
  if not isinstance(config, EmbedderConfig) or not isinstance(
    point.config, EmbedderConfig
  ):
    return
  theirs = point.config.lora
  if theirs is not None and theirs != config.lora:
    raise CheckpointError(
      f"{point.directory} has adapters {theirs}, this model {config.lora}; set "
      "LoraConfig to the checkpoint's, train its kernels too with "
      "OptimizerConfig.trainable = ['.'], or merge: `embgemma export --to=hf`, then "
      "`embgemma import --from=hf`"
    )


def is_adapted(
  points: Sequence[StartingPoint], config: EmbedderConfig | BackboneConfig
) -> bool:
  """Whether parameters are adapted, rather than those of the same model."""
  embedders = [isinstance(point.config, EmbedderConfig) for point in points]
  return bool(points) and not (all(embedders) and isinstance(config, EmbedderConfig))


def _adapt(
  points: Sequence[StartingPoint],
  config: EmbedderConfig | BackboneConfig,
  key: jax.Array,
  params: Sequence[Params],
) -> Adapted:
  sources = [
    Source(point.path, point.config, tree)
    for point, tree in zip(points, params, strict=True)
  ]
  # The key of a new model's parameters, as learners have it.
  return adaptation.adapt(config, jax.random.split(key)[0], *sources)


def keep_report(model_dir: pathlib.Path, report: Mapping[str, Any] | None) -> None:
  """Writes an adaptation's report beside its run; without one, drops an earlier."""
  path = model_dir / adaptation.REPORT_FILE
  if report is None:
    path.unlink(missing_ok=True)
  else:
    content = json.dumps(report, indent=1).encode() + b"\n"
    checkpoints.write_atomically(path, content)


def _read_report(model_dir: pathlib.Path) -> dict[str, Any] | None:
  """The report of the adaptation that a run started with, if it did.

  Raises:
    CheckpointError: it is damaged.
  """
  path = model_dir / adaptation.REPORT_FILE
  try:
    report = json.loads(path.read_text())
    for origin in report["sources"].values():
      _origin(origin)
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f"{path}: damaged: {error!r}") from error
  return report


def _origin(kept: Any) -> Origin | None:
  """Of a report's `sources`."""
  return None if kept == adaptation.RANDOM else Origin(**kept)


def training_alone(
  optimizer: OptimizerConfig, report: Mapping[str, Any]
) -> OptimizerConfig:
  """The optimizer, by which what an adaptation drew at random trains alone at first.

  Args:
    optimizer: Of the run; patterns of its own it keeps.
    report: Of `adaptation.report`.

  Raises:
    ConfigError: what was drawn at random would never be trained.
  """
  sources = {path: _origin(kept) for path, kept in report["sources"].items()}
  # Fresh adapters change nothing, and are there to be trained.
  drawn = [k for k, v in sources.items() if v is None and not lora.is_adapter(k)]
  adapters = any(lora.is_adapter(path) for path in sources)
  trained = optimizer.trainable or ((lora.PATTERN,) if adapters else ("",))
  still = [k for k in drawn if not any(re.search(p, k) for p in trained)]
  if still:
    raise ConfigError(
      f"{', '.join(still[:4])}: the checkpoint has none, so they are random, and "
      "OptimizerConfig.trainable leaves them as they are; add a pattern of theirs, or "
      "start from an embedder that was trained"
    )
  if optimizer.alone:
    return optimizer
  patterns = adaptation.warm_up_patterns(sources)
  return dataclasses.replace(optimizer, alone=patterns)


def state_from_checkpoints(
  init: Callable[[jax.Array], TrainState],
  key: jax.Array,
  points: Sequence[StartingPoint],
  abstract: TrainState,
  config: EmbedderConfig | BackboneConfig,
) -> TrainState:
  """A fresh state with the parameters of other checkpoints.

  Adapters are fresh where an embedder's checkpoint has none. What checkpoints hold is
  never drawn: a model that just fits has no room for two.

  Args:
    init: Of `abstract_state`.
    key: Of `init`.
    points: Of `open_starting_points`, at least one.
    abstract: Of `abstract_state`.
    config: Of the state's model.

  Raises:
    CheckpointError: see `CheckpointStore.restore` and `adaptation.adapt`.
  """
  adapts = is_adapted(points, config)
  keeps_adapters = adapts or _has_adapters(points[0].config)

  def fresh(state: TrainState) -> TrainState:
    """What the checkpoints do not hold."""
    adapters = {} if keeps_adapters else lora.split(state.params["model"])[1]
    params = {**state.params, "model": adapters}
    return dataclasses.replace(state, params=params, ema=None)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh(abstract))
  state = jax.jit(lambda key: fresh(init(key)), out_shardings=shardings)(key)
  expected = abstract.params["model"]
  if adapts:
    found = _adapted_params(points, config, key, expected)
  else:
    base = expected if keeps_adapters else lora.split(expected)[0]
    found = join(points[0].restore(base), state.params["model"])
  ema = None if abstract.ema is None else jax.tree.map(lambda x: x.copy(), found)
  return dataclasses.replace(state, params={**state.params, "model": found}, ema=ema)


def _has_adapters(config: EmbedderConfig | BackboneConfig) -> bool:
  return isinstance(config, EmbedderConfig) and config.lora is not None


def _adapted_params(
  points: Sequence[StartingPoint],
  config: EmbedderConfig | BackboneConfig,
  key: jax.Array,
  expected: PyTree,
) -> Params:
  """The adapted parameters, each a buffer of its own, placed like the expected ones."""
  wanted = traverse_util.flatten_dict(expected, sep="/")
  shapes = [adaptation.abstract_params(point.config) for point in points]
  places: dict[Origin, Any] = {}
  for path, origin in _adapt(points, config, key, shapes).sources.items():
    if origin is not None:
      places.setdefault(origin, wanted[path].sharding)

  def placed(name: str, path: Any, leaf: Any) -> Any:
    own = Origin(name, jax.tree_util.keystr(path, simple=True, separator="/"))
    if own not in places:  # a decoder that is dropped, say: it stays on the host
      return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[own])

  trees = [
    point.restore(
      jax.tree_util.tree_map_with_path(functools.partial(placed, point.path), tree)
    )
    for point, tree in zip(points, shapes, strict=True)
  ]
  taken: set[int] = set()
  made = {}
  leaves = traverse_util.flatten_dict(
    _adapt(points, config, key, trees).params, sep="/"
  )
  for path, leaf in leaves.items():
    again = id(leaf) in taken
    taken.add(id(leaf))
    # A buffer that appears twice in a state cannot be donated.
    made[path] = jax.device_put(leaf.copy() if again else leaf, wanted[path].sharding)
  return traverse_util.unflatten_dict(made, sep="/")
