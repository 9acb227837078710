"""The directory that mining writes: whole files, and the work that a killed run left.

OUTPUT/TASK.jsonl.gz, tasks.gin, report.json    all there when the run is done
OUTPUT/.work/run.json                           says what run is unfinished
OUTPUT/.work/finished/                          files of finished tasks
OUTPUT/.work/tasks/, .work/vectors-…            pieces, by what they depend on
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from embgemma.errors import DataError
from embgemma.outputs import locked, new_file

_REPORT = "report.json"
_FINISHED = "finished"


def _read(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object that we wrote; empty if there is none."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes an object, whole or not at all."""
  with new_file(path) as file:
    file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


class Workspace:
  """An output directory in the making; see `open_workspace`.

  Attributes:
    output: As given.
    work: Its `.work`.
    finished: The report of this very run, if it is done already.
  """

  def __init__(self, output: pathlib.Path, finished: dict[str, Any] | None):
    self.output = output
    self.work = output / ".work"
    self.finished = finished

  def staged(self, name: str) -> pathlib.Path:
    """Where a file waits for the end of the run."""
    return self.work / _FINISHED / name

  def publish(
    self, files: Mapping[str, pathlib.Path], report: Mapping[str, Any]
  ) -> None:
    """Moves finished files to the output and writes the report, which comes last.

    Args:
      files: Name in the output to where the file was staged.
      report: Must have the run's "fingerprint".
    """
    for old in _read(self.output / _REPORT).get("files", []):
      if old not in files:
        (self.output / old).unlink(missing_ok=True)
    (self.output / _REPORT).unlink(missing_ok=True)
    for name, staged in files.items():
      if staged.exists():  # or a killed run moved it
        os.replace(staged, self.output / name)
    write_json(self.output / _REPORT, {**report, "files": list(files)})
    shutil.rmtree(self.work / _FINISHED, ignore_errors=True)

  def clear(self) -> None:
    """Removes all work."""
    shutil.rmtree(self.work, ignore_errors=True)


@contextlib.contextmanager
def open_workspace(
  output: pathlib.Path, fingerprint: str, overwrite: bool
) -> Iterator[Workspace]:
  """The output directory of a run, locked against others.

  Args:
    output: Free, empty, or of a run.
    fingerprint: Of the run.
    overwrite: Whether another run's results may be replaced, at the end. Pieces of its
      unfinished work that hold for this run are used.

  Raises:
    DataError: something else is there, or another process is at work.
  """
  report, run = _read(output / _REPORT), _read(output / ".work" / "run.json")
  done = report.get("fingerprint") == fingerprint and all(
    (output / name).is_file() for name in report["files"]
  )
  if not done and run.get("fingerprint") != fingerprint:
    _check(output, bool(report), bool(run), overwrite)
  work = output / ".work"
  try:
    work.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise DataError(f"{output}: cannot be written: {error.strerror}") from error

  def busy() -> None:
    raise DataError(
      f"{output}: another process is mining into it; wait for it, or choose another "
      "--output"
    )

  with locked(work / "lock", busy):
    if not done and run.get("fingerprint") != fingerprint:
      # Files of another run, of which some may have been moved already.
      shutil.rmtree(work / _FINISHED, ignore_errors=True)
      write_json(work / "run.json", {"fingerprint": fingerprint})
    yield Workspace(output, report if done else None)


def _check(output: pathlib.Path, report: bool, run: bool, overwrite: bool) -> None:
  if output.exists() and not output.is_dir():
    raise DataError(f"{output}: is a file; choose another --output")
  if not output.exists() or not (set(os.listdir(output)) - {".work"} or run):
    return
  if not report and not run:
    raise DataError(
      f"{output}: holds something else than mined files; choose another --output"
    )
  if not overwrite:
    what = "an unfinished run of" if run else "the results of"
    raise DataError(
      f"{output}: holds {what} other settings or inputs; choose another --output, or "
      "replace it with --overwrite"
    )
