"""What both sides of the comparison work on, and how their processes are talked to.

A workload is a folder: spec.json (shapes and settings), model/ (random weights as
sentence-transformers reads them, which both sides load), pairs.npz (token ids, of
which both sides make the same batches) and texts.json (for embedding).
"""

import ast
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.models.config import EmbedderConfig, TransformerConfig

FOLDER = pathlib.Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]


def preset(name: str, **changes: Any) -> EmbedderConfig:
  """The model of gin/models/NAME.gin, with changes to its transformer.

  Read without gin, which GPU machines may lack; those files hold literals, macros of
  their own and one nested configuration.
  """
  macros: dict[str, Any] = {}
  blocks: dict[str, dict[str, Any]] = {}
  for line in (REPOSITORY / "gin" / "models" / f"{name}.gin").read_text().splitlines():
    line = re.sub(r"\s*#.*", "", line)
    if block := re.fullmatch(r"(\w+):", line):
      current = blocks.setdefault(block[1], {})
    elif binding := re.fullmatch(r"(\s*)(\w+) = (.+)", line):
      indent, key, text = binding.groups()
      if text.startswith("%"):
        value = macros[text[1:]]
      else:
        value = None if text.startswith("@") else ast.literal_eval(text)
      (current if indent else macros)[key] = value
  transformer = TransformerConfig(**blocks["TransformerConfig"] | changes)
  return EmbedderConfig(**blocks["EmbedderConfig"] | {"transformer": transformer})


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Token ids of examples, column by column: query, positive, then hard negatives."""

  columns: tuple[Sequence[np.ndarray], ...]

  def save(self, path: pathlib.Path) -> None:
    """Writes an .npz: each column's ids end to end, and its lengths."""
    arrays: dict[str, Any] = {}
    for i, column in enumerate(self.columns):
      arrays[f"tokens_{i}"] = np.concatenate(column).astype(np.int32)
      arrays[f"lengths_{i}"] = np.array([len(text) for text in column], np.int32)
    np.savez(path, **arrays)

  @classmethod
  def load(cls, path: pathlib.Path) -> "Pairs":
    """What `save` wrote."""
    with np.load(path) as arrays:
      columns = []
      for i in range(len(arrays.files) // 2):
        ends = np.cumsum(arrays[f"lengths_{i}"])
        columns.append(np.split(arrays[f"tokens_{i}"], ends[:-1]))
    return cls(tuple(columns))

  def batches(self, size: int) -> list["Pairs"]:
    """The examples in their order, `size` at a time; what is left over is dropped."""
    count = len(self.columns[0]) // size
    return [
      Pairs(tuple(column[i * size : (i + 1) * size] for column in self.columns))
      for i in range(count)
    ]

  @property
  def tokens(self) -> int:
    """Tokens of all texts."""
    return sum(len(text) for column in self.columns for text in column)

  @property
  def squares(self) -> int:
    """Sum of squared lengths: what full attention costs."""
    return sum(len(text) ** 2 for column in self.columns for text in column)

  def describe(self) -> str:
    """Mean and largest length of each column."""
    names = ("query", "positive", *(f"negative {i}" for i in range(1, 9)))
    parts = []
    for name, column in zip(names, self.columns, strict=False):
      lengths = np.array([len(text) for text in column])
      parts.append(f"{name} {lengths.mean():.0f} tokens (largest {lengths.max()})")
    return ", ".join(parts)


def synthetic_pairs(
  vocab_size: int, count: int, ranges: Sequence[tuple[int, int]], seed: int = 0
) -> Pairs:
  """Random ids; the lengths of each column are uniform in its inclusive range."""
  generator = np.random.default_rng(seed)
  return Pairs(
    tuple(
      [
        generator.integers(1, vocab_size, generator.integers(low, high + 1), np.int32)
        for _ in range(count)
      ]
      for low, high in ranges
    )
  )


@dataclasses.dataclass(frozen=True)
class Texts:
  """Texts of examples with their prompts: query, positive, hard negatives."""

  rows: Sequence[tuple[str, ...]]

  @classmethod
  def read(cls, paths: Sequence[str], negatives: int, seed: int = 0) -> "Texts":
    """JSONL pairs in a fixed random order, no text twice.

    Equal texts in a batch are no negatives of each other here and are in
    sentence-transformers, whose sampler therefore keeps them apart.
    """
    from embgemma.data import prompts
    from embgemma.data.jsonl import read_jsonl
    from embgemma.data.record_formats import pair_example

    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for path in paths:
      for number, record in read_jsonl(path):
        example = pair_example(record, f"{path}:{number}")
        own = (example["positive"], *example.get("negatives", ())[:negatives])
        texts = (example["query"], *own)
        if len(texts) != 2 + negatives or seen.intersection(texts):
          continue
        seen.update(texts)
        style = prompts.TASK_PROMPTS.get(example["task"], prompts.TaskPrompts())
        rows.append((style.format_query(texts[0]), *map(style.format_document, own)))
    order = np.random.default_rng(seed).permutation(len(rows))
    return cls([rows[i] for i in order])


def resident_bytes(field: str) -> int:
  """This process's "VmRSS" or "VmHWM" (the largest since `forget_peak`)."""
  status = pathlib.Path("/proc/self/status").read_text()
  found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
  assert found is not None
  return int(found[1]) * 1024


def forget_peak() -> None:
  """Starts VmHWM anew."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def serve(make: Callable[[Mapping[str, Any], pathlib.Path], Any]) -> None:
  """A worker's main: answers requests, a JSON object a line, until input ends.

  A request {"do": NAME, **arguments} calls that method of what `make` returns for
  (spec, folder). Anything a library prints goes to stderr.
  """
  channel = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  folder = pathlib.Path(sys.argv[1])
  side = make(json.loads((folder / "spec.json").read_text()), folder)
  channel.write(json.dumps({"ready": True}) + "\n")
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = {"result": getattr(side, request.pop("do"))(**request)}
    except Exception as error:  # the parent decides what it means
      answer = {"error": f"{type(error).__name__}: {error}"}
    channel.write(json.dumps(answer) + "\n")


class WorkerError(RuntimeError):
  """What a worker could not do."""


class Worker:
  """One side, in a process of its own that lives as long as the comparison."""

  def __init__(self, side: str, folder: pathlib.Path, environment: Mapping[str, str]):
    self.side = side
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    self._process = subprocess.Popen(
      [sys.executable, str(FOLDER / f"{side}.py"), str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "PYTHONPATH": path, **environment},
    )
    self._answer()

  def __call__(self, do: str, **arguments: Any) -> Any:
    """The result of a method of the worker's side.

    Raises:
      WorkerError: it raised, or the process ended.
    """
    assert self._process.stdin is not None
    self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> Any:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      raise WorkerError(f"{self.side} ended with exit code {code}; see its output")
    answer = json.loads(line)
    if "error" in answer:
      raise WorkerError(f"{self.side}: {answer['error']}")
    return answer.get("result")

  def close(self) -> None:
    """Ends the process."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def cycled(values: Sequence[Any], count: int) -> Iterator[Any]:
  """`count` values, from the first again after the last."""
  for i in range(count):
    yield values[i % len(values)]
