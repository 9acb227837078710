"""Reads what commands left behind: runs, searches, soups, evaluations, recipes."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.errors import DataError
from embgemma.evaluation.suite import TaskResults

_RECIPE, _SEARCH, _MODEL = "recipe.json", "search.json", "model.json"
_EVALUATIONS, _INGREDIENTS = "evaluations.json", "ingredients.json"
_SYSTEM, _GIN, _ADAPTATION = "system.json", "operative.gin", "adaptation.json"
_RESULTS = "results.json"
RECIPE_KEY = re.compile(r"-[0-9a-f]{8}$")  # of a recipe's directories
_STEP = re.compile(r"step \d+")


@dataclasses.dataclass(frozen=True)
class Curve:
  """A scalar of a run.

  Attributes:
    steps: In order.
    values: As many.
  """

  steps: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """A model's directory: a run, or what a command made.

  Attributes:
    name: On the page.
    directory: Its own.
    description: model.json.
    gin: The operative configuration; "" of what was not trained.
    curves: By name, from TensorBoard's files.
    evaluations: By step, of a run.
    ingredients: Of a soup.
    system: Hardware and versions, where the run noted them.
    adaptation: Where its first parameters came from, where they were adapted.
    seconds: From its first point to its last, pauses included.
    complete: Whether nothing is to be done in it; a recipe says so of its stages.
  """

  name: str
  directory: pathlib.Path
  description: Mapping[str, Any]
  gin: str
  curves: Mapping[str, Curve]
  evaluations: Mapping[str, TaskResults]
  ingredients: Sequence[Mapping[str, Any]]
  system: Mapping[str, Any]
  adaptation: Mapping[str, Any]
  seconds: float | None
  complete: bool = True

  @property
  def final(self) -> TaskResults:
    """Results after the last evaluated step; {} if there are none."""
    if not self.evaluations:
      return {}
    return self.evaluations[max(self.evaluations, key=int)]


@dataclasses.dataclass(frozen=True)
class Search:
  """A mixture search: search.json, as `mixture_search.results` writes it."""

  name: str
  directory: pathlib.Path
  content: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A file of `embgemma eval --output`: results by model."""

  name: str
  results: Mapping[str, TaskResults]


@dataclasses.dataclass(frozen=True)
class StageRow:
  """A stage of a recipe, as recipe.json has it."""

  name: str
  state: str
  seconds: float | None
  needs: Sequence[str]
  command: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Records:
  """All that a page shows, in order."""

  stages: Sequence[StageRow]
  runs: Sequence[Run]
  searches: Sequence[Search]
  evaluations: Sequence[Evaluation]


def read(paths: Sequence[str]) -> Records:
  """What lies in directories of recipes, runs, soups and searches, and result files.

  Args:
    paths: In the order of the page.

  Raises:
    DataError: a path holds none of these, or a damaged file.
  """
  stages: list[StageRow] = []
  found: list[Run | Search | Evaluation] = []
  for path in map(pathlib.Path, paths):
    if (path / _RECIPE).exists():
      rows, outputs = _recipe(path, f"{path.resolve().name}/" if len(paths) > 1 else "")
      stages += rows
      found += outputs
      continue
    record = _record(path.name or str(path), path)
    if record is None:
      raise DataError(
        f"{path}: neither a recipe, a run, a search nor a file of results; give a "
        "RECIPE_DIR, MODEL_DIR, SEARCH_DIR, or what `embgemma eval --output` wrote"
      )
    found.append(record)
  return Records(
    stages=stages,
    runs=[each for each in found if isinstance(each, Run)],
    searches=[each for each in found if isinstance(each, Search)],
    evaluations=[each for each in found if isinstance(each, Evaluation)],
  )


def _recipe(path: pathlib.Path, prefix: str) -> tuple[list[StageRow], list[Any]]:
  """Its stages, and what they left, by names that begin with `prefix`."""
  stages, outputs = [], []
  content = _json(path / _RECIPE)
  for name, stage in content["stages"].items():
    fields = ("state", "seconds", "needs", "command")
    stages.append(StageRow(prefix + name, *(stage[field] for field in fields)))
    if stage["directory"] is not None and stage["state"] != "waiting":
      record = _record(prefix + name, path / stage["directory"])
      if isinstance(record, Evaluation):
        record = _named_as(record, prefix, stage["command"])
      if isinstance(record, Run) and stage["state"] != "complete":
        record = dataclasses.replace(record, complete=False)
      outputs += [] if record is None else [record]
  return stages, outputs


def _record(name: str, path: pathlib.Path) -> Run | Search | Evaluation | None:
  """What a path holds; None is nothing that a page shows."""
  if (path / _SEARCH).exists():
    return Search(name, path, _json(path / _SEARCH))
  if (path / _MODEL).exists():
    return _run(name, path)
  for file in (path / _RESULTS, path):
    if file.is_file() and file.suffix == ".json":
      return Evaluation(name, _results(file))
  return None


def _named_as(
  evaluation: Evaluation, prefix: str, command: Sequence[str]
) -> Evaluation:
  """With the name of the stage that it evaluates, where `embgemma eval` has a step."""
  paths = [flag for flag in command if flag.startswith("--checkpoint=")]
  if not paths:
    return evaluation
  stage = prefix + RECIPE_KEY.sub("", pathlib.Path(paths[-1].partition("=")[2]).name)
  results = {
    stage if _STEP.fullmatch(column) else column: of
    for column, of in evaluation.results.items()
  }
  return dataclasses.replace(evaluation, results=results)


def _results(file: pathlib.Path) -> dict[str, TaskResults]:
  """Of `embgemma eval --output`: model, task, metric.

  Raises:
    DataError: the file holds something else.
  """
  content = _json(file)
  try:
    values = [
      v for of in content.values() for task in of.values() for v in task.values()
    ]
  except AttributeError:
    values = [None]
  if not all(isinstance(value, float | int) for value in values):
    raise DataError(f"{file}: not what `embgemma eval --output` writes")
  return content


def _run(name: str, path: pathlib.Path) -> Run:
  curves, seconds = _curves(path / "tensorboard")
  gin = path / _GIN
  return Run(
    name=name,
    directory=path,
    description=_json(path / _MODEL),
    gin=gin.read_text() if gin.exists() else "",
    curves=curves,
    evaluations=_json(path / _EVALUATIONS, {}),
    ingredients=_json(path / _INGREDIENTS, []),
    system=_json(path / _SYSTEM, {}),
    adaptation=_json(path / _ADAPTATION, {}),
    seconds=seconds,
  )


def _json(path: pathlib.Path, default: Any = None) -> Any:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    if default is None:
      raise
    return default
  except ValueError as error:
    raise DataError(f"{path}: damaged ({error}); make it again") from error


def _curves(directory: pathlib.Path) -> tuple[dict[str, Curve], float | None]:
  """Scalars by name, and seconds from the first to the last.

  A step that a resumed run did again counts once, as it was done last.
  """
  points: dict[str, dict[int, float]] = {}
  times: list[float] = []
  for file in sorted(directory.glob("events.out.tfevents.*")):
    for event in _events(file):
      for value in event.summary.value:
        points.setdefault(value.tag, {})[event.step] = value.simple_value
      times.append(event.wall_time)
  curves = {}
  for tag, values in points.items():
    steps = sorted(values)
    curves[tag] = Curve(np.array(steps), np.array([values[step] for step in steps]))
  return curves, max(times) - min(times) if times else None


def _events(file: pathlib.Path) -> Iterator[Any]:
  """Whole records; a run that was killed may have left half of one."""
  # As `metric_writers`: without TensorFlow, where that is installed, too.
  from tensorboard.compat.proto import event_pb2
  from tensorboard.compat.tensorflow_stub import errors
  from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

  reader = PyRecordReader_New(str(file))
  while True:
    try:
      reader.GetNext()
    except (errors.OutOfRangeError, errors.DataLossError):
      return
    yield event_pb2.Event.FromString(reader.record())
