"""A recipe as configuration: stages, which are commands, and what each needs."""

import ast
import dataclasses
import difflib
import graphlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from embgemma.errors import ConfigError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_RESERVED = ("complete", "locks", "logs")  # directories of a recipe's own
_REFERENCE = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")


@dataclasses.dataclass(frozen=True)
class CommandOutput:
  """How a command is told where to write.

  Attributes:
    macro: The gin macro of its directory.
    flag: Or the flag.
    file: What it writes is this file of the directory; None is the directory.
    options: Flags with which it does again what it did in part.
  """

  macro: str | None = None
  flag: str | None = None
  file: str | None = None
  options: tuple[str, ...] = ()


_MODEL = CommandOutput(flag="output", options=("--overwrite",))
# What a stage may run; cache and teach write into CACHE_DIR.
OUTPUTS: Mapping[str, CommandOutput] = {
  "train": CommandOutput(macro="MODEL_DIR"),
  "search": CommandOutput(macro="SEARCH_DIR"),
  "cache": CommandOutput(),
  "teach": CommandOutput(),
  "mine": CommandOutput(flag="output", options=("--overwrite",)),
  "import": _MODEL,
  "export": _MODEL,
  "extract": _MODEL,
  "soup": _MODEL,
  "quantize": _MODEL,
  "eval": CommandOutput(flag="output", file="results.json"),
}
# Those that take gin files.
_RANDOM = ("train", "search")
CONFIGURED = ("train", "search", "cache", "teach", "mine", "eval")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One command of a recipe. `{name}` in any string is the directory of that stage.

  Attributes:
    command: A key of `OUTPUTS`; where it writes is added.
    gin_files: Of --gin_file, in order; a tuple among them is its members.
    macros: Of --gin.NAME=VALUE, where '@ul2()' or '(@Nce(),)' are references; of
      several mappings, later ones over earlier.
    flags: Of --NAME=VALUE; a list repeats the flag, True is a switch, False and None
      are as if not there. Of several mappings likewise.
    inputs: Arguments without a name: the checkpoints of a soup.
    after: Names of stages that must be complete, beside those referred to.
    launcher: Words before the command, such as ("srun", "--nodes=16"), with the switch
      "multiprocess" among the flags.
    shared: Whether there is one for all seeds of a recipe.
    resources: What it needs of a cluster, in words, such as "v5e:16x16"; shown by
      --dry_run.

  Raises:
    ConfigError: an unknown command, or a value that is no literal.
  """

  command: str = "train"
  gin_files: Sequence[str | Sequence[str]] = ()
  macros: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ()
  flags: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ()
  inputs: Sequence[str] = ()
  after: Sequence[str] = ()
  launcher: Sequence[str] = ()
  shared: bool = False
  resources: str = ""

  def __post_init__(self) -> None:
    if self.command not in OUTPUTS:
      raise ConfigError(
        f"Stage.command {self.command!r} is none of a recipe's: {', '.join(OUTPUTS)}"
      )
    output = OUTPUTS[self.command]
    for given, own in ((self.all_macros, output.macro), (self.all_flags, output.flag)):
      if own in given:
        raise ConfigError(
          f"Stage: {own} of `embgemma {self.command}` is set by the recipe; leave out"
        )
    if self.command not in CONFIGURED and (self.all_files or self.all_macros):
      raise ConfigError(
        f"Stage: `embgemma {self.command}` takes no gin files and macros; give flags"
      )
    for name, value in (*self.all_macros.items(), *self.all_flags.items()):
      if not _is_literal(value):
        raise ConfigError(
          f"Stage: {name} is {value!r}; a stage's process reads its own gin: write a "
          "literal, or a reference in quotes, such as '@builtin_tasks()'"
        )

  @property
  def all_files(self) -> tuple[str, ...]:
    """Of --gin_file."""
    return tuple(_strings(self.gin_files))

  @property
  def all_macros(self) -> dict[str, Any]:
    """Of --gin.NAME=VALUE."""
    return _merged(self.macros)

  @property
  def all_flags(self) -> dict[str, Any]:
    """Of --NAME=VALUE."""
    return _merged(self.flags)

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of the stages that must be complete, in order."""
    values = (self.all_files, self.all_macros, self.all_flags, self.inputs)
    found = (_REFERENCE.findall(text) for text in _strings(values))
    referred = (name for names in found for name in names)
    return tuple(dict.fromkeys((*referred, *self.after)))

  def with_references(self, text: Callable[[str], str]) -> "Stage":
    """The stage with what stands for each stage in place of references to it."""

    def replaced(value: Any) -> Any:
      if isinstance(value, str):
        return _REFERENCE.sub(lambda match: text(match[1]), value)
      if isinstance(value, Mapping):
        return {replaced(key): replaced(of) for key, of in value.items()}
      if isinstance(value, list | tuple):
        return tuple(replaced(of) for of in value)
      return value

    names = ("gin_files", "macros", "flags", "inputs")
    return dataclasses.replace(self, **{n: replaced(getattr(self, n)) for n in names})

  @property
  def bindings(self) -> list[str]:
    """NAME=VALUE of each macro, as --gin has it."""
    return [f"{name}={as_gin(value)}" for name, value in self.all_macros.items()]

  @property
  def arguments(self) -> list[str]:
    """Of the command line, but where it writes."""
    flags = []
    for name, value in self.all_flags.items():
      if value is None or value is False:
        continue
      if value is True:
        flags.append(f"--{name}")
        continue
      for each in value if isinstance(value, list | tuple) else (value,):
        flags.append(f"--{name}={each}")
    return [
      *(f"--gin_file={file}" for file in self.all_files),
      *(f"--gin.{binding}" for binding in self.bindings),
      *flags,
      *self.inputs,
    ]


@dataclasses.dataclass(frozen=True)
class SeededStage:
  """A stage for one of a recipe's seeds.

  Attributes:
    stage: Referring to those of the same seed.
    arm: Its name in the recipe.
    seed: Its RANDOM_SEED; None is the stage's own.
  """

  stage: Stage
  arm: str
  seed: int | None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Stages by name, and where they write.

  Attributes:
    directory: RECIPE_DIR.
    stages: In any order.
    seeds: Each stage that is not shared is there once a seed, as NAME_seedN, with that
      as the RANDOM_SEED of what trains; () is once, as NAME.

  Raises:
    ConfigError: a name that is none, a reference to no stage, a circle of them, or a
      shared stage that needs one that is not.
  """

  directory: str
  stages: Mapping[str, Stage]
  seeds: Sequence[int] = ()

  def __post_init__(self) -> None:
    if not self.stages:
      raise ConfigError("Recipe.stages is empty")
    for name, stage in self.stages.items():
      if not _NAME.fullmatch(name):
        raise ConfigError(
          f"stage name {name!r}: use letters, digits and '_', a letter first"
        )
      if name in _RESERVED:
        raise ConfigError(
          f"stage name {name!r}: RECIPE_DIR/{name} is the recipe's own; choose another"
        )
      for needed in stage.needs:
        if needed not in self.stages:
          close = difflib.get_close_matches(needed, self.stages, 1)
          hint = f"; did you mean {{{close[0]}}}?" if close else ""
          raise ConfigError(
            f"stage {name!r} refers to {{{needed}}}, which is none{hint}"
          )
        if stage.shared and not self.stages[needed].shared and self.seeds:
          raise ConfigError(
            f"stage {name!r} is shared by all seeds and needs {needed!r}, which is not"
          )
    try:
      tuple(self.ordered())
    except graphlib.CycleError as error:
      circle = " -> ".join(reversed(error.args[1]))
      raise ConfigError(f"stages need each other in a circle: {circle}") from None

  def ordered(self) -> Iterator[str]:
    """Names, each after those that it needs, else as they are listed."""
    sorter = graphlib.TopologicalSorter(
      {name: stage.needs for name, stage in self.stages.items()}
    )
    sorter.prepare()
    place = {name: number for number, name in enumerate(self.stages)}
    ready = set(sorter.get_ready())
    while ready:
      first = min(ready, key=place.__getitem__)
      ready.remove(first)
      yield first
      sorter.done(first)
      ready.update(sorter.get_ready())

  def seeded(self) -> dict[str, SeededStage]:
    """Every stage of every seed by its name, each after those that it needs."""
    found = {}
    for arm in self.ordered():
      stage = self.stages[arm]
      for seed in (None,) if stage.shared or not self.seeds else self.seeds:
        if seed is None:
          found[arm] = SeededStage(stage, arm, None)
          continue
        found[_seed_name(arm, seed)] = SeededStage(
          self._of_seed(stage, seed), arm, seed
        )
    return found

  def _of_seed(self, stage: Stage, seed: int) -> Stage:
    def own(name: str) -> str:
      return name if self.stages[name].shared else _seed_name(name, seed)

    of_seed = dataclasses.replace(
      stage.with_references(lambda name: f"{{{own(name)}}}"),
      after=tuple(map(own, stage.after)),
    )
    if stage.command not in _RANDOM:
      return of_seed
    return dataclasses.replace(
      of_seed, macros={**of_seed.all_macros, "RANDOM_SEED": seed}
    )

  def closure(self, names: Sequence[str]) -> frozenset[str]:
    """Names of these stages and those that they need, without seeds.

    Raises:
      ConfigError: a name is no stage's.
    """
    unknown = [name for name in names if name not in self.stages]
    if unknown:
      raise ConfigError(
        f"no stage {', '.join(unknown)}; there are {', '.join(self.stages)}"
      )
    wanted: set[str] = set()
    left = list(names)
    while left:
      name = left.pop()
      if name not in wanted:
        wanted.add(name)
        left.extend(self.stages[name].needs)
    return frozenset(wanted)


def _seed_name(arm: str, seed: int) -> str:
  return f"{arm}_seed{seed}"


def _merged(
  several: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  """Later mappings over earlier."""
  each = (several,) if isinstance(several, Mapping) else several
  return {name: value for of in each for name, value in of.items()}


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    yield from _strings(tuple(value.items()))
  elif isinstance(value, list | tuple):
    for of in value:
      yield from _strings(of)


def _is_literal(value: Any) -> bool:
  if isinstance(value, Mapping):
    return all(_is_literal(of) for item in value.items() for of in item)
  if isinstance(value, list | tuple):
    return all(map(_is_literal, value))
  return value is None or isinstance(value, bool | int | float | str)


def as_gin(value: Any) -> str:
  """Of --gin.NAME=VALUE, where what is no literal is a string or a reference."""
  if not isinstance(value, str):
    return repr(value)
  try:
    ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value
  return repr(value)
