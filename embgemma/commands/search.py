"""The command that searches mixtures: trials are runs of `embgemma train`."""

import argparse
import os
import pathlib
from collections.abc import Sequence

from embgemma.commands.configuration import configure
from embgemma.commands.messages import said_errors, say
from embgemma.commands.training import ensure_cached
from embgemma.errors import ConfigError, of_extra

_START = "INITIAL_CHECKPOINT_PATH"
# What workers of one search may give differently.
_OWN = (
  *("SEARCH_DIR", "SEARCH_STORAGE", "CACHE_DIR", "PROPOSED_TRIALS", "EXPERTS"),
  *("PROFILE_STEPS", "WANDB_PROJECT", _START),
)


def run_search(
  options: argparse.Namespace, bindings: Sequence[str], command_line: Sequence[str]
) -> None:
  """Does trials of a search until it has all, then writes what was found."""
  with of_extra("`embgemma search`", "search"):
    from embgemma.mixture_search import results
    from embgemma.mixture_search.study import MixtureStudy
    from embgemma.mixture_search.training import TrainingTrials
    from embgemma.mixture_search.trials import SearchPlan
  from embgemma import gin_config
  from embgemma.data import cache
  from embgemma.mixture_search.config import MixtureSearch
  from embgemma.recipe.config import as_gin
  from embgemma.training import stages

  configure(options, bindings)
  search: MixtureSearch = gin_config.resolve("MixtureSearch")
  proxy = [f"{name}={as_gin(value)}" for name, value in search.proxy.items()]
  configure(options, [*bindings, *proxy])
  arguments = gin_config.train_arguments(allowed=("MODEL_DIR",))
  stages.make_stage(*(arguments[name] for name in ("model", "objective", "data")))
  objectives = search.judged(tuple(arguments["evaluations"]))
  # The same start may be written in several ways.
  start = arguments.get("initial_checkpoint_path")
  lines = [*gin_config.config(without=_OWN), f"{_START} = {start and _real(start)!r}"]
  settings = "\n".join(lines)
  ensure_cached(arguments["data"], command_line)
  manifest = cache.manifest(arguments["data"])
  assert manifest is not None
  tasks = {task.name: task.rate for task in manifest.tasks}
  shares = search.members(tasks)
  plan = SearchPlan(
    groups={g: sum(tasks[task] for task in of) for g, of in shares.items()},
    objectives=tuple(objectives),
    seed_repeats=search.seed_repeats,
    dirichlet_trials=search.dirichlet_trials,
    proposed_trials=search.proposed_trials,
    stop_below=search.stop_below,
    random_seed=search.seed,
  )
  directory = pathlib.Path(search.directory)
  flags = _train_flags(options, [*bindings, *proxy])
  with said_errors(str(directory)):
    directory.mkdir(parents=True, exist_ok=True)
    study = MixtureStudy(search.url, search.study, plan, settings)
    study.work(TrainingTrials(directory, flags, shares, objectives), say)
    result = results.conclude(plan, study.records(), search.experts)
    results.write(result, directory, shares)
  if not result.experts:
    raise ConfigError(
      f"no trial of {search.url} succeeded; see {directory / 'trials'}. Failed trials "
      "are not done again: mend what they say, and delete the study or choose another"
    )
  print(results.markdown(result))


def _real(path: str) -> str:
  return path if "://" in path else os.path.realpath(path)


def _train_flags(options: argparse.Namespace, bindings: Sequence[str]) -> list[str]:
  flags = [f"--gin_file={file}" for file in options.gin_file]
  if options.gin_search_paths:
    flags.append(f"--gin_search_paths={options.gin_search_paths}")
  if options.on_bad_record:
    flags.append(f"--on_bad_record={options.on_bad_record}")
  return [*flags, *(f"--gin.{binding}" for binding in bindings)]
