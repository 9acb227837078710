"""The command that runs a recipe: stages are other commands, each in a process."""

import argparse
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

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
  gin_config.check_required()
  try:
    recipe: Recipe = gin_config.resolve("Recipe")
  except ConfigError as error:
    if "'directory'" in str(error) or "'stages'" in str(error):
      raise ConfigError(
        "gin: no recipe; give a --gin_file of gin/recipes/ with stages"
      ) from error
    raise
  names = options.stages.split(",") if options.stages else list(recipe.stages)
  arms = recipe.closure(names)
  stages = plan(recipe, _reader(options.gin_search_paths), options.gin_search_paths)
  wanted = {stage.name: stage for stage in stages if stage.arm in arms}
  if options.dry_run:
    print(_script(list(wanted.values())))
    return
  root = pathlib.Path(recipe.directory)
  with said_errors(str(root)):
    run(stages, wanted.keys(), root, options.jobs, View(Console()))


def _reader(search_paths: str) -> Any:
  """What reads a stage's gin files; gin holds those of the last stage then."""
  from embgemma import gin_config
  from embgemma.recipe.plan import Configuration

  paths = [path for path in search_paths.split(",") if path]

  def read(files: Sequence[str], bindings: Sequence[str]) -> Configuration:
    gin_config.parse(files, bindings, paths)
    lines = gin_config.config().splitlines()
    said = [line for line in lines if line and not line.startswith("#")]
    return Configuration(said, **gin_config.declared_data())

  return read


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
    line = shlex.join(["embgemma", *stage.arguments])
    if seconds is not None:
      notes.append(f"complete ({seconds:.0f} s)")
      line = f"# {line}"
    lines += ["", f"# {stage.name}: {'; '.join(notes)}", line]
  return "\n".join(lines)
