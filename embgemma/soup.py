"""Soups: the mean of the weights of several checkpoints.

T5Gemma 2 is the mean of the last five checkpoints of its run (arXiv 2512.14856);
EmbeddingGemma that of models finetuned on several mixtures, unweighted (arXiv
2509.20354, after model soups, arXiv 2203.05482). What is averaged must come from the
same weights: means of models that were drawn apart are no models.
"""

import ctypes
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore, Description
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.interop import codes, conversion, weights
from embgemma.interop.layout import NumpyTree
from embgemma.interop.model import Model
from embgemma.models import lora
from embgemma.models.config import BackboneConfig, EmbedderConfig, settings

INGREDIENTS_FILE = "ingredients.json"
_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Ingredient:
  """A checkpoint that a soup is made of.

  Attributes:
    path: As given.
    directory: Its MODEL_DIR.
    step: Of its run.
  """

  path: str
  directory: pathlib.Path
  step: int

  def __str__(self) -> str:
    return f"{self.path}, step {self.step}"

  def to_json(self) -> dict[str, Any]:
    """What ingredients.json says of it."""
    return {"path": self.path, "step": self.step}


def choose(paths: Sequence[str], last: int | None = None) -> list[Ingredient]:
  """The checkpoints at several paths, or the last steps at one.

  Args:
    paths: Each a MODEL_DIR, whose newest step is taken, or MODEL_DIR/checkpoints/STEP.
    last: Steps to take of one MODEL_DIR; None takes one of each path.

  Raises:
    ConfigError: fewer than two checkpoints, or `last` with several paths.
    CheckpointError: there is no such checkpoint, fewer steps than `last`, or one of
      codes.
  """
  if last is not None:
    return _last_steps(paths, last)
  if len(paths) < 2:
    raise ConfigError(
      f"{' '.join(paths)}: a soup needs two checkpoints or more; give more paths, or "
      "--last=K for the last K steps of one run"
    )
  return [_ingredient(path) for path in paths]


def _ingredient(path: str) -> Ingredient:
  directory, wanted = _located(path)
  store = CheckpointStore(directory)
  step = store.resolve_step(wanted)
  if store.shipped_item(step) == codes.ITEM:
    raise CheckpointError(
      f"{path}: holds weights of 4 or 8 bits, rounded already; average the checkpoints "
      "that `embgemma quantize` read, and quantize their mean"
    )
  return Ingredient(path, directory, step)


def _last_steps(paths: Sequence[str], last: int) -> list[Ingredient]:
  if len(paths) != 1:
    raise ConfigError(
      f"--last={last} takes steps of one run, and there are {len(paths)} paths; give "
      "one MODEL_DIR, or leave --last out"
    )
  if last < 2:
    raise ConfigError(f"--last={last}: a soup needs two checkpoints or more")
  (path,) = paths
  directory, step = _located(path)
  if step is not None:
    raise ConfigError(f"{path}: is one step; with --last give its MODEL_DIR")
  steps = CheckpointStore(directory).steps()
  if len(steps) < last:
    raise CheckpointError(
      f"{path}: --last={last}, and the run keeps {len(steps)} steps: {steps}; "
      "CheckpointPolicy.keep_last decides how many a run keeps"
    )
  return [Ingredient(path, directory, step) for step in steps[-last:]]


def _located(path: str) -> tuple[pathlib.Path, int | None]:
  directory, step = checkpoints.locate(path)
  checkpoints.read_description(directory)  # whose message is the better one
  return directory, step


def average(
  ingredients: Sequence[Ingredient],
  weights: Sequence[float] | None = None,
  allow_different_init: bool = False,
) -> Model:
  """The mean of checkpoints of one model.

  Averaged parameters where a run kept them. Adapters are merged into their kernels
  first: the mean of factors is not the mean of their products. How the model is
  computed is the first checkpoint's say, and lengths are the longest of any.

  Args:
    ingredients: One at least. However many they are, two models are in memory, and
      once more the largest array while it is read.
    weights: Of each, of any positive scale; None is all alike.
    allow_different_init: Whether they may have been trained from other parameters.

  Raises:
    CheckpointError: they differ in configuration, vocabulary, prompts or lineage,
      which the message names, or one cannot be read.
  """
  source = _Source.open(ingredients, allow_different_init)
  return source.model(mean(map(source.read, ingredients), weights))


@dataclasses.dataclass(frozen=True)
class Trial:
  """An ingredient that a greedy soup was tried with.

  Attributes:
    ingredient: What was tried.
    alone: Its score by itself.
    together: That of the soup with it.
    kept: Whether it is in the soup.
  """

  ingredient: Ingredient
  alone: float
  together: float
  kept: bool

  def to_json(self) -> dict[str, Any]:
    """What ingredients.json says of it."""
    scores = {"alone": self.alone, "together": self.together, "kept": self.kept}
    return self.ingredient.to_json() | scores

  def __str__(self) -> str:
    verdict = "kept" if self.kept else "left out"
    return (
      f"{self.ingredient}: {100 * self.alone:.2f} alone, "
      f"{100 * self.together:.2f} together, {verdict}"
    )


def greedy(
  ingredients: Sequence[Ingredient],
  evaluate: Callable[[Model], float],
  allow_different_init: bool = False,
) -> tuple[Model, list[Trial]]:
  """The mean of those checkpoints that do not make it worse.

  From the best alone to the worst, one stays where the mean with it scores no less than
  the mean without (model soups, arXiv 2203.05482, recipe 1).

  Args:
    ingredients: One at least. Three models are in memory.
    evaluate: The held-out score of a model; higher is better.
    allow_different_init: As of `average`.

  Returns:
    The model, and what was tried, in that order.

  Raises:
    CheckpointError: as of `average`.
  """
  source = _Source.open(ingredients, allow_different_init)

  def score(params: NumpyTree) -> float:
    return evaluate(source.model(params))

  alone = {each: score(source.read(each)) for each in ingredients}
  best, *others = sorted(ingredients, key=lambda each: -alone[each])
  soup, together = source.read(best), alone[best]
  trials = [Trial(best, together, together, kept=True)]
  for each in others:
    kept = sum(trial.kept for trial in trials)
    with_it = mean([source.read(each), jax.tree.map(np.copy, soup)], [1.0, float(kept)])
    scored = score(with_it)
    trials.append(Trial(each, alone[each], scored, kept=scored >= together))
    if scored >= together:
      soup, together = with_it, scored
  return source.model(soup), trials


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where the weights of a soup come from: directories of one model.

  Attributes:
    models: What each directory says.
    coarse: Ingredients read so far whose weights are those of bfloat16.
  """

  models: "Mapping[pathlib.Path, _Unread]"
  coarse: dict[str, None] = dataclasses.field(default_factory=dict)

  @classmethod
  def open(
    cls, ingredients: Sequence[Ingredient], allow_different_init: bool
  ) -> "_Source":
    models = {
      directory: _Unread(
        checkpoints.read_description(directory), checkpoints.read_vocabulary(directory)
      )
      for directory in dict.fromkeys(i.directory for i in ingredients)
    }
    _check_alike(models)
    if not allow_different_init:
      _check_lineage(models)
    return cls(models)

  def read(self, ingredient: Ingredient) -> NumpyTree:
    """Parameters, adapters merged."""
    _return_freed_memory()
    config = self.models[ingredient.directory].config
    params = weights.read(ingredient.directory, ingredient.step, config)
    if has_bfloat16_precision(params):
      self.coarse[str(ingredient)] = None
    if isinstance(config, EmbedderConfig):
      return dict(lora.merge(params, config)[0])
    return params

  def model(self, params: NumpyTree) -> Model:
    """What parameters are with the rest of the model."""
    descriptions = [model.description for model in self.models.values()]
    first = next(iter(self.models.values()))
    lineages = {description.lineage for description in descriptions}
    description = Description(
      _without_adapters(first.config),
      _longest(self.models.values()),
      first.prompts,
      lineages.pop() if len(lineages) == 1 else "",
    )
    return Model(description, first.vocabulary, params, tuple(self._notes()))

  def _notes(self) -> Iterator[str]:
    models = self.models.values()
    if any(model.config != _without_adapters(model.config) for model in models):
      yield "adapters were merged into their kernels before averaging"
    unknown = [str(d) for d, m in self.models.items() if not m.description.lineage]
    if unknown and len(self.models) > 1:
      yield (
        f"{', '.join(unknown)}: what it was trained from is not known; the mean of "
        "models that were drawn apart is none"
      )
    if self.coarse:
      yield (
        f"{', '.join(self.coarse)}: weights of bfloat16, whose rounding is of the size "
        "of what finetuning changes; average float32 checkpoints"
      )


def _return_freed_memory() -> None:
  """Of the ingredient before; glibc keeps a third of it for Orbax's threads."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
  if trim is not None:
    trim(0)


def mean(
  trees: Iterable[NumpyTree], weights: Sequence[float] | None = None
) -> NumpyTree:
  """The mean of parameter trees, in float32.

  It moves from tree to tree, by (x - mean) / k at the k-th, so that equal values stay
  as they are. It differs from the exact mean of K values by (K / 2 + 5) x 2^-24 of the
  largest of them at most; of five models 5 % apart 74 % of the values are the exact
  mean rounded, and nearly all others one step of float32 beside it.

  Args:
    trees: Of float32 arrays, one at least. Taken one by one, and overwritten: the
      first becomes the mean.
    weights: Of each, above 0; k is then the weights so far by the tree's own. None is
      all alike.
  """
  remaining = iter(trees)
  average = next(remaining)
  shares = iter(weights or itertools.repeat(1.0))
  total = next(shares)
  while (tree := next(remaining, None)) is not None:
    share = next(shares)
    total += share
    jax.tree.map(functools.partial(_move, total / share), average, tree)
    del tree  # before the next is read
  return average


def _move(count: float, average: np.ndarray, values: np.ndarray) -> None:
  values -= average
  values /= count
  average += values


def has_bfloat16_precision(params: NumpyTree) -> bool:
  """Whether all float32 values of a tree are those of bfloat16."""
  return not any(
    (np.ascontiguousarray(leaf).view(np.uint32) & 0xFFFF).any()
    for leaf in jax.tree.leaves(params)
  )


def write(
  model: Model, ingredients: Sequence[Mapping[str, Any]], directory: pathlib.Path
) -> None:
  """Writes a soup as a checkpoint directory, with what it was made of.

  Args:
    model: The soup.
    ingredients: What ingredients.json says of each.
    directory: To make.

  Raises:
    OSError: the directory cannot be written.
  """
  conversion.write_checkpoint(model, directory)
  listed = json.dumps(list(ingredients), indent=1)
  (directory / INGREDIENTS_FILE).write_text(listed + "\n")


class _Unread(NamedTuple):
  """What a directory says of its model."""

  description: Description
  vocabulary: SentencePieceVocabulary

  @property
  def config(self) -> EmbedderConfig | BackboneConfig:
    return self.description.config

  @property
  def prompts(self) -> Mapping[str, str]:
    return self.description.prompts


def _without_adapters(
  config: EmbedderConfig | BackboneConfig,
) -> EmbedderConfig | BackboneConfig:
  if isinstance(config, EmbedderConfig):
    return dataclasses.replace(config, lora=None)
  return config


def _longest(models: Iterable[_Unread]) -> dict[str, int]:
  longest: dict[str, int] = {}
  for model in models:
    for name, length in model.description.lengths.items():
      longest[name] = max(length, longest.get(name, 0))
  return longest


def _check_alike(models: Mapping[pathlib.Path, _Unread]) -> None:
  """Refuses directories of several models."""
  (first, model), *others = models.items()
  found = [
    f"{path}: {difference} in {first}"
    for path, other in others
    for difference in _differences(other, model)
  ]
  if found:
    more = len(found) - _MAX_LISTED
    listed = found if more <= 0 else [*found[:_MAX_LISTED], f"… and {more} more"]
    raise CheckpointError(
      "these checkpoints are not of one model:\n  "
      + "\n  ".join(listed)
      + "\nAverage checkpoints that were trained from the same weights."
    )


def _check_lineage(models: Mapping[pathlib.Path, _Unread]) -> None:
  """Refuses models that were not trained from the same first parameters."""
  known = {d: m.description.lineage for d, m in models.items() if m.description.lineage}
  if len(set(known.values())) < 2:
    return
  listed = "\n  ".join(f"{path}: {lineage}" for path, lineage in known.items())
  raise CheckpointError(
    f"these checkpoints were not trained from the same parameters:\n  {listed}\nThe "
    "mean of models that were drawn apart is none: average runs that start from one "
    "checkpoint, or add --allow_different_init."
  )


def _differences(model: _Unread, first: _Unread) -> Iterator[str]:
  """What keeps weights from being averaged with the first's, as "this here, that"."""
  if type(model.config) is type(first.config):
    own, other = _settings(model.config), _settings(first.config)
    for name in _differing(own, other):
      yield f"{name} is {own.get(name)}, {other.get(name)}"
  else:
    kinds = {EmbedderConfig: "an embedder", BackboneConfig: "stacks without heads"}
    yield f"holds {kinds[type(model.config)]}, {kinds[type(first.config)]}"
  if model.vocabulary.serialized != first.vocabulary.serialized:
    yield "tokenizer.model is another than"
  if names := _differing(model.prompts, first.prompts):
    yield f"prompts ({', '.join(names)}) are others than"


def _differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  names = dict.fromkeys([*other, *own])
  return [name for name in names if own.get(name) != other.get(name)]


def _settings(config: EmbedderConfig | BackboneConfig) -> dict[str, Any]:
  """What of a configuration weights depend on, by name."""
  values = settings(_without_adapters(config))
  return {k: v for k, v in values.items() if k.rpartition(".")[2] != "dtype"}
