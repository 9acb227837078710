"""gin: what it may name, and reading files and overrides as t5x does.

The library never imports gin; constructors and `train` are registered here.
"""

import ast
import contextlib
import functools
import inspect
import logging
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin

from embgemma.errors import ConfigError, EmbgemmaError

_PACKAGE = pathlib.Path(__file__).parent
# gin/ lies beside the package in a checkout and inside it in a wheel.
_SEARCH_PATHS = ("", str(_PACKAGE.parent), str(_PACKAGE))
_MACRO = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


@functools.cache
def register() -> None:
  """Makes the configurable names known to gin, once."""
  from embgemma import checkpoints
  from embgemma.data import config as data_config
  from embgemma.data import (
    decontamination,
    denoisers,
    duplicates,
    filters,
    public_sets,
    sources,
    tasks,
  )
  from embgemma.losses import denoising, objective
  from embgemma.mining import bm25, vectors
  from embgemma.mining import filters as mining_filters
  from embgemma.mixture_search import config as search_config
  from embgemma.models import config, quantization
  from embgemma.recipe import config as recipe_config
  from embgemma.training import initial_checkpoint, loop, optimizers, partitioning

  for module, names in (
    (
      config,
      (
        "TransformerConfig",
        "EmbedderConfig",
        "BackboneConfig",
        "LoraConfig",
        "QuantizationConfig",
      ),
    ),
    (quantization, ("int8_block32", "int4_block32", "mixed_channel")),
    (denoising, ("Denoising",)),
    (
      denoisers,
      ("Denoiser", "Sentinels", "ul2", "t5gemma2", "prefix_lm", "causal_lm"),
    ),
    (objective, ("Objective", "Nce", "SpreadOut", "EmbeddingMatching")),
    (
      sources,
      (
        "BeirSource",
        "BuiltinSource",
        "JsonlSource",
        "ParquetSource",
        "TextFileSource",
        "TfdsSource",
        "TfrecordSource",
      ),
    ),
    (mining_filters, ("MiningOptions",)),
    (bm25, ("Bm25Searcher",)),
    (search_config, ("MixtureSearch",)),
    (recipe_config, ("Recipe", "Stage")),
    (vectors, ("VectorSearcher",)),
    (public_sets, ("public_tasks", "public_tfds_tasks")),
    (filters, ("LengthFilter", "LanguageFilter")),
    (duplicates, ("ExactDuplicates", "NearDuplicates")),
    (decontamination, ("Decontamination",)),
    (
      tasks,
      (
        "Task",
        "builtin_tasks",
        "builtin_text_tasks",
        "jsonl_tasks",
        "text_tasks",
      ),
    ),
    (data_config, ("DataConfig", "TextDataConfig")),
    (optimizers, ("Schedule", "OptimizerConfig")),
    (partitioning, ("Partitioner",)),
    (checkpoints, ("CheckpointPolicy",)),
    (loop, ("Intervals",)),
    (
      initial_checkpoint,
      (
        "checkpoint_model",
        "checkpoint_encoder_decoder",
        "checkpoint_vocabulary",
        "checkpoint_widths",
      ),
    ),
  ):
    for name in names:
      constructor = _type_checked(name, getattr(module, name))
      gin.external_configurable(constructor, name, module="embgemma")

  # Commands other than `train` read its arguments too: gin resolves, they call.
  @functools.wraps(loop.train)
  def train(**arguments):
    return arguments

  gin.external_configurable(_type_checked("train", train), "train", module="embgemma")

  def declared_data(
    tasks: Sequence[tasks.Task] = (),
    modules: Sequence[str] = (),
    evaluations: Mapping[str, Any] = types.MappingProxyType({}),
  ) -> dict[str, Any]:
    return {"tasks": tasks, "modules": modules, "evaluations": evaluations}

  checked = _type_checked("", declared_data)
  gin.external_configurable(checked, "declared_data", module="embgemma")


def _type_checked(name: str, constructor: Callable[..., Any]) -> Callable[..., Any]:
  """The constructor, refusing arguments that are not of their annotated types.

  A value in a gin file may be anything; deep in a run the error would name no binding.
  """
  hints = typing.get_type_hints(constructor)

  @functools.wraps(constructor, updated=())
  def checked(*args, **arguments):
    for parameter, value in arguments.items():
      if not _is_of(value, hints.get(parameter, Any)):
        wanted = hints[parameter]
        shown = wanted.__name__ if isinstance(wanted, type) else str(wanted)
        shown = re.sub(r"[a-z_]+\.", "", shown)  # modules
        raise ConfigError(f"{name}.{parameter} must be {shown}, got {value!r}")
    return constructor(*args, **arguments)

  # Where gin looks for defaults, which it writes into the operative configuration.
  checked.__signature__ = inspect.signature(constructor)  # type: ignore[attr-defined]
  return checked


def _is_of(value: Any, hint: Any) -> bool:
  """Whether a value fits an annotation; an int is a float, a list a tuple."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    return any(_is_of(value, argument) for argument in arguments)
  if hint is Any:
    return True
  if isinstance(value, bool):
    return hint is bool
  if hint is float:
    return isinstance(value, int | float)
  if origin is tuple or origin is Sequence:
    every = arguments[0] if origin is Sequence or Ellipsis in arguments else Any
    return isinstance(value, list | tuple) and all(_is_of(v, every) for v in value)
  if origin is Mapping:
    return isinstance(value, Mapping) and all(
      _is_of(v, arguments[1]) for v in value.values()
    )
  return not isinstance(hint, type) or isinstance(value, hint)


def _quoted(binding: str) -> str:
  """A binding whose value, unless gin can read it, is a string.

  A shell strips the quotes of --gin.MODEL_DIR="/tmp/run".
  """
  name, _, value = binding.partition("=")
  value = value.strip()
  if not value.startswith(("@", "%")):
    try:
      ast.literal_eval(value)
    except (ValueError, SyntaxError):
      # A container may hold references, which gin reads and Python does not.
      if not value.startswith(("[", "(", "{")):
        value = repr(value)
  return f"{name.strip()} = {value}"


def _check_macros(bindings: Sequence[str]) -> None:
  """Refuses an override of a macro that no file defines: most likely a misspelling."""
  for binding in bindings:
    name = binding.partition("=")[0].strip()
    if not _MACRO.match(name):
      continue
    try:
      gin.query_parameter(f"{name}/gin.macro.value")
    except ValueError as error:
      raise ConfigError(
        f"--gin.{name}: no gin file given defines the macro {name}; check its "
        "spelling, or give the --gin_file that has it"
      ) from error


def parse(
  files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
  """Reads gin files, then overrides.

  Args:
    files: As in --gin_file.
    bindings: NAME=VALUE, as in --gin.NAME=VALUE.
    search_paths: Directories in which files and includes are looked for.

  Raises:
    ConfigError: a missing file, a syntax error, an unknown name or parameter.
  """
  gin.clear_config()
  # gin logs an error for every search path that does not have a file.
  logging.getLogger().addFilter(lambda r: not str(r.msg).startswith("Path not found"))
  for path in (*reversed(_SEARCH_PATHS), *search_paths):
    gin.add_config_file_search_path(path)
  try:
    for file in files:
      gin.parse_config_file(file)
    _check_macros(bindings)
    for binding in bindings:
      gin.parse_config(_quoted(binding))
  except EmbgemmaError:
    raise
  except Exception as error:
    raise ConfigError(f"gin: {_first_lines(error)}") from error


def _first_lines(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return re.sub(r" \(<.*?>\)", "", "; ".join(lines))


def check_required(allowed: Sequence[str] = ()) -> None:
  """Refuses macros still at %gin.REQUIRED.

  Args:
    allowed: Macros that the command does without.

  Raises:
    ConfigError: naming those that must be given.
  """
  missing = re.findall(r"^(\w+) = %gin.REQUIRED$", gin.config_str(), re.MULTILINE)
  missing = sorted(set(missing) - set(allowed))
  if missing:
    flags = " ".join(f"--gin.{name}=…" for name in missing)
    raise ConfigError(f"these must be given: {flags}")


def set_missing(**values: Any) -> None:
  """Gives macros still at %gin.REQUIRED a value."""
  for name, value in values.items():
    if re.search(rf"^{name} = %gin.REQUIRED$", gin.config_str(), re.MULTILINE):
      gin.parse_config(f"{name} = {value!r}")


def set_missing_data() -> bool:
  """Lets a run without tasks or vocabulary resolve, where nothing of them is read.

  Returns:
    Whether it has no tasks.
  """

  def macro(name: str) -> Any:
    try:
      return gin.query_parameter(f"{name}/gin.macro.value")
    except ValueError:
      return None

  if not macro("VOCABULARY") and not macro("VOCABULARY_SIZE"):
    gin.parse_config("VOCABULARY_SIZE = 1")
  files = {"jsonl_tasks": "JSONL_TASKS", "text_tasks": "TEXT_TASKS"}
  tasks = re.sub(r"\W", "", str(macro("TASKS")))
  if tasks not in files or macro(files[tasks]) or macro("MODULES"):
    return False
  builtin = "builtin_text_tasks" if tasks == "text_tasks" else "builtin_tasks"
  gin.parse_config(f"TASKS = @{builtin}()")
  return True


def resolve(name: str, **arguments: Any) -> Any:
  """What the configurable of that name returns under the configuration read.

  Args:
    name: "train" gives the arguments bound to `loop.train`; any other name, such as
      "DataConfig", the object.
    **arguments: In place of those of the configuration.

  Raises:
    ConfigError: a binding is missing or of the wrong kind.
  """
  try:
    return gin.get_configurable(f"embgemma.{name}")(**arguments)
  except EmbgemmaError as error:
    # gin raises a subclass of its own, which names the configurable.
    raise type(error).__mro__[1](_first_lines(error)) from error
  except (TypeError, ValueError, RuntimeError, AttributeError) as error:
    if "configurable" not in str(error):
      raise
    raise ConfigError(f"gin: {_first_lines(error)}") from error


def declared_data() -> dict[str, Any]:
  """What the macros TASKS, MODULES and EVALUATIONS of the configuration stand for.

  The rest of a stage, such as a vocabulary that another stage makes, may be missing.

  Raises:
    ConfigError: a task is wrong.
  """
  found: dict[str, Any] = {"tasks": (), "modules": (), "evaluations": {}}
  for name in found:
    with contextlib.suppress(ValueError):
      gin.query_parameter(f"{name.upper()}/gin.macro.value")
      gin.parse_config(f"declared_data.{name} = %{name.upper()}")
  return found | resolve("declared_data")


def config(without: Sequence[str] = ()) -> list[str]:
  """All that was read, in gin's words: lines, without comments.

  Args:
    without: Macros to leave out.
  """
  lines: list[str] = []
  left_out = False
  for line in gin.config_str().splitlines():
    if not line or line.startswith("#"):
      continue
    if not line.startswith(" "):  # else the value of the line before goes on
      left_out = line.partition(" = ")[0] in without
    if not left_out:
      lines.append(line)
  return lines


def is_bound(parameter: str) -> bool:
  """Whether what was read binds a parameter, such as "Recipe.stages"."""
  try:
    gin.query_parameter(parameter)
  except ValueError:
    return False
  return True


def operative_config() -> str:
  """The parameters that were used so far, in gin's words."""
  return gin.operative_config_str()


def train_arguments(allowed: Sequence[str] = ()) -> dict[str, Any]:
  """The arguments of `loop.train` under the configuration read.

  Args:
    allowed: Macros that may be missing; they are "" then.

  Raises:
    ConfigError: a binding is missing or of the wrong kind.
  """
  check_required(allowed)
  set_missing(**dict.fromkeys(allowed, ""))
  _check_model()
  arguments = resolve("train")
  parameters = inspect.signature(loop_train()).parameters.values()
  missing = [
    p.name for p in parameters if p.default is p.empty and p.name not in arguments
  ]
  if missing:
    raise ConfigError(
      f"gin: train has no {', '.join(missing)}; give a --gin_file of a stage, such as "
      "gin/stages/prefinetune.gin"
    )
  return arguments


def _check_model() -> None:
  try:
    gin.query_parameter("MODEL/gin.macro.value")
  except ValueError as error:
    raise ConfigError(
      "gin: no model; give a --gin_file of gin/models/ before the stage's"
    ) from error


def loop_train() -> Callable[..., Any]:
  """`loop.train`, imported when first needed."""
  from embgemma.training import loop

  return loop.train
