"""The configuration of a command that --gin_file and --gin flags give."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from embgemma.errors import ConfigError


def configure(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Has gin read what a command is given.

  Raises:
    ConfigError: there is no --gin_file, or one is wrong.
  """
  from embgemma import gin_config

  if not options.gin_file:
    raise ConfigError(
      "no --gin_file; start from gin/stages/prefinetune.gin or gin/recipes/"
    )
  if getattr(options, "on_bad_record", None):
    bindings = [*bindings, f"ON_BAD_RECORD={options.on_bad_record}"]
  gin_config.register()
  gin_config.parse(
    options.gin_file, bindings, [p for p in options.gin_search_paths.split(",") if p]
  )


def arguments_of_data(
  options: argparse.Namespace, bindings: Sequence[str]
) -> dict[str, Any]:
  """The arguments of a stage for a command that needs its data: steps may be missing.

  Raises:
    ConfigError: a binding is missing or wrong.
  """
  from embgemma import gin_config

  configure(options, bindings)
  gin_config.set_missing(TRAIN_STEPS=1, BATCH_SIZE=1, TEACHER=None)
  return gin_config.train_arguments(allowed=("MODEL_DIR",))


def pairs_of(arguments: Mapping[str, Any], command: str) -> Any:
  """What a stage of pairs trains on, its DataConfig.

  Args:
    arguments: Of a stage.
    command: That is for pairs.

  Raises:
    ConfigError: the stage is another.
  """
  from embgemma.data.config import DataConfig

  data = arguments["data"]
  if not isinstance(data, DataConfig):
    raise ConfigError(
      f"`embgemma {command}` is for pairs; give a --gin_file such as "
      "gin/stages/finetune.gin"
    )
  return data
