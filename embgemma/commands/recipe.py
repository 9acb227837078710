"""The command that runs a recipe: stages are other commands, each in a process."""

import argparse
import contextlib
import io
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from embgemma import flags
from embgemma.commands.configuration import configure
from embgemma.commands.messages import said_errors
from embgemma.errors import ConfigError


def run_recipe(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Runs the stages that are not complete, or prints their commands."""
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.recipe.config import Recipe
  from embgemma.recipe.plan import plan
  from embgemma.recipe.runner import run
  from embgemma.recipe.view import View

  if options.jobs < 1:
    raise ConfigError(f"--jobs={options.jobs}: write 1 or more")
  configure(options, bindings)
  if not gin_config.is_bound("Recipe.stages"):
    raise ConfigError(
      "gin: no recipe in what was given (a run is for `embgemma train`); give a "
      "--gin_file with Recipe.stages, such as gin/recipes/tiny.gin"
    )
  gin_config.check_required()
  recipe: Recipe = gin_config.resolve("Recipe")
  names = options.stages.split(",") if options.stages else list(recipe.stages)
  arms = recipe.closure(names)
  stages = plan(recipe, reader(options.gin_search_paths), options.gin_search_paths)
  for stage in stages:
    _check_flags(stage)
  wanted = {stage.name: stage for stage in stages if stage.arm in arms}
  if options.dry_run:
    print(_script(list(wanted.values())))
    return
  root = pathlib.Path(recipe.directory)
  with said_errors(str(root)):
    run(stages, wanted.keys(), root, options.jobs, View(Console()))


def reader(search_paths: str) -> Any:
  """What reads a stage's gin files; gin holds those of the last stage then."""
  from embgemma import gin_config
  from embgemma.recipe.plan import FREE_MACROS, Configuration

  paths = [path for path in search_paths.split(",") if path]

  def read(
    files: Sequence[str], bindings: Sequence[str], complete: bool
  ) -> Configuration:
    gin_config.parse(files, bindings, paths)
    if complete:
      gin_config.check_required(allowed=("MODEL_DIR", "SEARCH_DIR"))
    lines = gin_config.config(without=FREE_MACROS)
    data = gin_config.declared_data()
    return Configuration(lines, data["tasks"], data["modules"])

  return read


def _check_flags(stage: Any) -> None:
  """Refuses what the stage's command would: now, and not when its turn comes.

  Raises:
    ConfigError: naming the stage.
  """
  kept, _ = flags.split_gin_overrides(stage.arguments)
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      flags.parser().parse_args(kept)
  except SystemExit:
    message = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    raise ConfigError(
      f"stage {stage.name!r}: `embgemma {stage.stage.command}`: {message}"
    ) from None


def _script(stages: Sequence[Any]) -> str:
  """A shell script of a recipe's commands, with what each needs."""
  lines = ["#!/bin/sh -e"]
  for stage in stages:
    seconds = stage.seconds()
    notes = [f"after {', '.join(stage.needs)}" if stage.needs else "first"]
    notes += [
      f"{name} {value}"
      for name, value in stage.stage.all_macros.items()
      if re.fullmatch(r"TRAIN_STEPS|BATCH_SIZE|PROPOSED_TRIALS", name)
    ]
    if stage.stage.resources:
      notes.append(stage.stage.resources)
    line = shlex.join([*stage.stage.launcher, "embgemma", *stage.arguments])
    if seconds is not None:
      notes.append(f"complete ({seconds:.0f} s)")
      line = f"# {line}"
    lines += ["", f"# {stage.name}: {'; '.join(notes)}", line]
  return "\n".join(lines)
