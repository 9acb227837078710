"""What each stage of a recipe would run, where, and whether it has.

A stage's key is a digest of its command, its configuration, the files of its data and
the keys of the stages that it reads. Its output is in RECIPE_DIR/NAME-KEY: a stage that
changed, or reads one that did, has another directory, and what was made before stays.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import embgemma
from embgemma import outputs
from embgemma.data import files
from embgemma.data.fingerprints import module_fingerprint
from embgemma.data.tasks import Task
from embgemma.errors import ConfigError, DataError
from embgemma.recipe.config import CONFIGURED, OUTPUTS, Recipe, Stage

RECIPE_FILE = "recipe.json"
_UPSTREAM = "<stage "
# Macros that change no result.
_FREE = ("CACHE_DIR", "PROFILE_STEPS", "SEARCH_STORAGE")


@dataclasses.dataclass(frozen=True)
class Configuration:
  """What a stage's gin files and macros say.

  Attributes:
    lines: All of it, in gin's words.
    tasks: That it declares.
    modules: Python modules that register others.
    evaluations: Its EVALUATIONS.
  """

  lines: Sequence[str]
  tasks: Sequence[Task]
  modules: Sequence[str]
  evaluations: Mapping[str, Any]


ReadConfiguration = Callable[[Sequence[str], Sequence[str]], Configuration]
"""Gin files and NAME=VALUE to what they say."""


@dataclasses.dataclass(frozen=True)
class PlannedStage:
  """A stage with all that it needs to run.

  Attributes:
    name: Of the stage.
    arm: Its name without a seed.
    seed: If it is one of several.
    key: 8 hexadecimal digits.
    needs: Names of the stages that come before.
    stage: Without references.
    root: RECIPE_DIR.
    search_paths: Of --gin_search_paths.
  """

  name: str
  arm: str
  seed: int | None
  key: str
  needs: tuple[str, ...]
  stage: Stage
  root: pathlib.Path
  search_paths: str = ""

  @property
  def directory(self) -> pathlib.Path:
    """What it writes."""
    return self.root / f"{self.name}-{self.key}"

  @property
  def log(self) -> pathlib.Path:
    """What it prints."""
    return self.root / "logs" / f"{self.name}-{self.key}.log"

  @property
  def lock(self) -> pathlib.Path:
    """Held by the process that runs it."""
    return self.root / "locks" / f"{self.name}-{self.key}"

  @property
  def record(self) -> pathlib.Path:
    """Written when it has ended well."""
    return self.root / "complete" / f"{self.name}-{self.key}.json"

  @property
  def writes(self) -> bool:
    """Whether it has a directory; others write into CACHE_DIR."""
    output = OUTPUTS[self.stage.command]
    return bool(output.macro or output.flag)

  @property
  def arguments(self) -> list[str]:
    """Of `embgemma`."""
    output = OUTPUTS[self.stage.command]
    where = self.directory / output.file if output.file else self.directory
    own = []
    if output.macro:
      own.append(f"--gin.{output.macro}={where}")
    elif output.flag:
      own.append(f"--{output.flag}={where}")
    if self.search_paths and self.stage.command in CONFIGURED:
      own.append(f"--gin_search_paths={self.search_paths}")
    return [self.stage.command, *self.stage.arguments, *own, *output.options]

  @property
  def command(self) -> list[str]:
    """Of a process on this machine."""
    return [sys.executable, "-m", "embgemma", *self.arguments]

  def seconds(self) -> float | None:
    """What it took, if it is complete.

    Raises:
      DataError: its record is damaged.
    """
    if self.writes and not self.directory.exists():
      return None
    try:
      return float(json.loads(self.record.read_text())["seconds"])
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f"{self.record}: damaged; delete it, and the stage runs again"
      ) from error

  def write_record(self, seconds: float) -> None:
    """Notes that it is complete."""
    values = {"stage": self.name, "arguments": self.arguments, "seconds": seconds}
    with outputs.new_file(self.record) as file:
      file.write(json.dumps(values, indent=1).encode() + b"\n")


def plan(
  recipe: Recipe, read: ReadConfiguration, search_paths: str = ""
) -> list[PlannedStage]:
  """The stages of a recipe in an order in which they can run.

  Args:
    recipe: With its directory.
    read: Reads what a stage's process would.
    search_paths: Of --gin_search_paths.

  Raises:
    ConfigError: a stage's gin files or macros are wrong; its name is in the message.
    DataError: the files of its data cannot be found.
  """
  root = pathlib.Path(recipe.directory)
  planned: dict[str, PlannedStage] = {}
  for name, seeded in recipe.seeded().items():
    stage = seeded.stage
    try:
      content = _content(stage, planned, read)
    except (ConfigError, DataError) as error:
      raise type(error)(f"stage {name!r}: {error}") from error
    encoded = json.dumps(content, sort_keys=True, default=str).encode()
    key = hashlib.blake2b(encoded, digest_size=4).hexdigest()
    made = stage.with_references(lambda of: str(planned[of].directory))
    planned[name] = PlannedStage(
      name, seeded.arm, seeded.seed, key, stage.needs, made, root, search_paths
    )
  return list(planned.values())


def _content(
  stage: Stage, planned: Mapping[str, PlannedStage], read: ReadConfiguration
) -> list[Any]:
  """All that a stage's results depend on, as JSON."""
  named = stage.with_references(lambda of: f"{_UPSTREAM}{planned[of].key}>")
  before = [planned[name].key for name in stage.after]
  own: list[Any] = [embgemma.__version__, stage.command, named.all_flags, named.inputs]
  own.append(before)
  macros = [path for path in _paths(named.all_macros) if _holds_model(path)]
  paths = [*macros, *_paths(named.all_flags), *named.inputs]
  if stage.command in CONFIGURED:
    # Files that another stage makes are known by its key.
    made = [file for file in named.all_files if _UPSTREAM in file]
    given = [file for file in named.all_files if _UPSTREAM not in file]
    configuration = read(given, named.bindings)
    tasks = [t for t in configuration.tasks if _UPSTREAM not in repr(t.source)]
    own += [
      made,
      _free_of(configuration.lines),
      [task.fingerprint() for task in tasks],
      [module_fingerprint(module) for module in configuration.modules],
    ]
    paths += _paths(configuration.evaluations)
  return [own, [_stamps(path) for path in paths]]


def _free_of(lines: Sequence[str]) -> list[str]:
  """Lines of a configuration that change results."""
  free = tuple(f"{name} = " for name in _FREE)
  return [line for line in lines if not line.startswith(free)]


def _paths(values: Mapping[str, Any]) -> list[str]:
  """Of files and directories, in evaluations and flags."""
  found = []
  for value in values.values():
    for entry in value if isinstance(value, list | tuple) else (value,):
      text = entry.get("path") if isinstance(entry, Mapping) else entry
      if isinstance(text, str):
        # --data=NAME=PATH:KIND
        found.append(text.rpartition("=")[2].partition(":")[0])
  return found


def _holds_model(path: str) -> bool:
  return os.path.exists(os.path.join(path, "model.json"))


def _stamps(path: str) -> list[Any]:
  """Of the files under a path, sizes and times; of a MODEL_DIR, its steps.

  [] of what is no path.
  """
  if not path or files.is_remote(path) or _UPSTREAM in path:
    return []
  if _holds_model(path):
    return sorted(os.listdir(os.path.join(path, "checkpoints")))
  below = glob.glob(f"{glob.escape(path)}/**", recursive=True)
  found = sorted({path, *below})
  return [files.fingerprint(file) for file in found if os.path.isfile(file)]
