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
import re
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
FREE_MACROS = ("CACHE_DIR", "PROFILE_STEPS", "SEARCH_STORAGE", "WANDB_PROJECT")
"""Those that change no result."""
_FREE_FLAGS = (
  *("max_cost", "price", "texts_per_minute", "tokens_per_minute"),
  *("tokens_per_batch", "keep_work", "multiprocess", "workers", "pipeline_options"),
)
_QUOTED = re.compile(r"""'([^'\n]+)'|"([^"\n]+)\"""")


@dataclasses.dataclass(frozen=True)
class Configuration:
  """What a stage's gin files and macros say.

  Attributes:
    lines: All of it that changes results, in gin's words.
    tasks: That it declares.
    modules: Python modules that register others.
  """

  lines: Sequence[str]
  tasks: Sequence[Task]
  modules: Sequence[str]


ReadConfiguration = Callable[[Sequence[str], Sequence[str], bool], Configuration]
"""Gin files, NAME=VALUE, and whether that is all of a run, to what they say."""


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
    return [*self.stage.launcher, sys.executable, "-m", "embgemma", *self.arguments]

  def seconds(self) -> float | None:
    """What it took, if it is complete.

    What writes into CACHE_DIR never is: that may be another by now, and the command
    finds out in a moment.

    Raises:
      DataError: its record is damaged.
    """
    if not self.writes or not self.directory.exists():
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
  flags = {name: of for name, of in named.all_flags.items() if name not in _FREE_FLAGS}
  before = [planned[name].key for name in stage.after]
  own: list[Any] = [embgemma.__version__, stage.command, flags, named.inputs, before]
  texts = [*_texts(list(flags.values())), *named.inputs]
  if stage.command in CONFIGURED:
    # Files that another stage makes are known by its key.
    made = [file for file in named.all_files if _UPSTREAM in file]
    given = [file for file in named.all_files if _UPSTREAM not in file]
    complete = stage.command in ("train", "search") and not made
    configuration = read(given, named.bindings, complete)
    tasks = [t for t in configuration.tasks if _UPSTREAM not in repr(t.source)]
    own += [
      made,
      configuration.lines,
      [task.fingerprint() for task in tasks],
      [module_fingerprint(module) for module in configuration.modules],
    ]
    found = (_QUOTED.findall(line) for line in configuration.lines)
    texts += [one or other for quoted in found for one, other in quoted]
  return [own, [_stamps(path) for path in sorted(set(map(_path, texts)))]]


def _texts(value: Any) -> list[str]:
  """All strings in flags' values."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, list | tuple):
    return [text for of in value for text in _texts(of)]
  return []


def _path(text: str) -> str:
  """The path in what a flag or macro says; "" if it is none.

  NAME=PATH:KIND of --data, sentence_transformers:DIR and the like are known by what is
  there.
  """
  _, _, after = text.partition("=")
  _, _, prefixed = text.partition(":")
  for candidate in (text, after, after.rpartition(":")[0], prefixed):
    # Words without a separator are settings: a file of that name would be chance.
    if re.search(r"[/.]", candidate) and os.path.exists(candidate):
      return candidate
  return ""


def _stamps(path: str) -> list[Any]:
  """Sizes and times of a file, or of those under a directory; [] of no path.

  Of a MODEL_DIR it is its weights and description.
  """
  if not path:
    return []
  below = [path]
  if os.path.isdir(path):
    model = os.path.join(path, "model.json")
    roots = [os.path.join(path, "checkpoints")] if os.path.exists(model) else [path]
    below = [model] if os.path.exists(model) else []
    below += [
      file
      for root in roots
      for file in glob.glob(f"{glob.escape(root)}/**", recursive=True)
    ]
  return [files.fingerprint(file) for file in sorted(below) if os.path.isfile(file)]
