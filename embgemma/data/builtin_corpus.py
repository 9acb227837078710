"""Training data out of the Python standard library, so that nothing is downloaded.

For smoke runs, tutorials and tests of the whole pipeline on a machine without data:
some twenty thousand pairs of real prose and code, in five tasks; and, for what trains
on plain text, the modules themselves and the language reference.
"""

import ast
import contextlib
import dataclasses
import errno
import functools
import hashlib
import http
import json
import os
import re
import sys
import sysconfig
import textwrap
import tokenize
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embgemma import outputs
from embgemma.data.cache_dirs import default_cache_dir
from embgemma.errors import ConfigError, DataError

_VERSION = 1  # Raise it when the same standard library would give other pairs.

TASKS: Mapping[str, str] = types.MappingProxyType(
  {
    "stdlib_docs": "search",
    "stdlib_code": "code",
    "stdlib_names": "similarity",
    "stdlib_comments": "code",
    "stdlib_topics": "search",
  }
)
"""The kind of each task, a key of `prompts.TASK_PROMPTS`."""

TEXT_TASKS = ("stdlib_modules", "stdlib_reference")
"""Tasks of documents."""

SPLITS = ("train", "validation")

_MAX_CHARACTERS = 2000
_SKIPPED = re.compile(
  r"(?:site|dist)-packages|tests?|idle_test|lib2to3|turtledemo|__phello__|pydoc_data"
  r"|__pycache__|config-.*|_sysconfigdata.*"
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")
_LEGAL = re.compile(r"copyright|licen[sc]e|-\*-|https?://", re.IGNORECASE)

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Pairs = Iterator[dict[str, str]]


def fingerprint() -> str:
  """Returns a hash that changes with the pairs: our version and Python's."""
  content = f"{_VERSION}\n{sys.version}\n{sys.platform}"
  return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def examples(task: str, split: str) -> Iterator[dict[str, str]]:
  """Returns the records of a task, in the schema and the order of a JSONL file.

  Each has `query`, `positive`, `task` (the kind), `language` and `source` (file and
  line), some a `title`; texts have at most 2,000 characters. A top-level module or
  package belongs to one split, about a tenth of the pairs to "validation", and no
  text of "validation" is also one of "train". Within a task no query and no positive
  occurs twice. Records depend on the Python installation only.

  Raises:
    ConfigError: there is no such task or split.
    DataError: this Python has no source files.
  """
  _check_names(task, split, tuple(TASKS))
  return (dict(record) for record in _corpus()[task, split])


def documents(task: str, split: str) -> Iterator[dict[str, str]]:
  """Returns the documents of a task of `TEXT_TASKS`, in the order of a JSONL file.

  Each has `text`: a module's source, or a topic of the language reference. What
  `examples` has in one split, this has in the same.

  Raises:
    ConfigError: there is no such task or split.
    DataError: this Python has no source files.
  """
  _check_names(task, split, TEXT_TASKS)
  draw = {"stdlib_modules": _module_texts, "stdlib_reference": _topic_texts}[task]
  return (
    {"text": text} for group, text in draw() if text.strip() and _split(group) == split
  )


def _check_names(task: str, split: str, tasks: Sequence[str]) -> None:
  if task not in tasks:
    raise ConfigError(f"no built-in task {task!r}; there are: {', '.join(tasks)}")
  if split not in SPLITS:
    raise ConfigError(f"no split {split!r} of {task}; there are: {', '.join(SPLITS)}")


def _module_texts() -> Iterator[tuple[str, str]]:
  """Yields (group, text)."""
  return ((module.group, "\n".join(module.lines)) for module in _modules())


def _topic_texts() -> Iterator[tuple[str, str]]:
  """Yields (topic, text)."""
  from pydoc_data.topics import topics  # 700 kB, only when asked for.

  return ((topic, text.strip()) for topic, text in sorted(topics.items()))


@functools.cache
def _corpus() -> Mapping[tuple[str, str], list[dict[str, str]]]:
  """The records of (task, split): from the file that an earlier process left, or drawn.

  Drawing parses the whole library, some five seconds of each process of a recipe.
  """
  kept = _kept()
  with contextlib.suppress(OSError, ValueError, TypeError):
    return {(t, s): records for t, s, records in json.loads(kept.read_bytes())}
  drawn = _drawn()
  with contextlib.suppress(DataError), outputs.new_file(kept) as file:
    rows = [(*key, records) for key, records in drawn.items()]
    file.write(json.dumps(rows).encode())
  return drawn


def _kept() -> Path:
  """The file of these pairs: of this installation, drawn by this very module."""
  parts = [fingerprint(), sysconfig.get_paths()["stdlib"], Path(__file__).read_text()]
  digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
  return Path(default_cache_dir(), "builtin", f"{digest}.json")


def _drawn() -> Mapping[tuple[str, str], list[dict[str, str]]]:
  drawn: dict[tuple[str, str], list[dict[str, str]]]
  drawn = {(task, split): [] for split in SPLITS for task in TASKS}
  for task, group, pair in _draw():
    drawn[task, _split(group)].append({**pair, "task": TASKS[task], "language": "en"})
  train = {task: list(_distinct(drawn[task, "train"], ())) for task in TASKS}
  records = (record for task in TASKS for record in train[task])
  trained = {_normalise(r[side]) for r in records for side in ("query", "positive")}
  for task in TASKS:
    drawn[task, "train"] = train[task]
    drawn[task, "validation"] = list(_distinct(drawn[task, "validation"], trained))
  return drawn


def _draw() -> Iterator[tuple[str, str, dict[str, str]]]:
  """Yields every candidate pair, with its task and what must not be split."""
  draws = {"docs": _docs, "code": _code, "names": _names, "comments": _comments}
  for module in _modules():
    for task, draw in draws.items():
      for pair in draw(module):
        yield f"stdlib_{task}", module.group, pair
  for topic, pair in _topics():
    yield "stdlib_topics", topic, pair


def _split(group: str) -> str:
  digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
  return "validation" if int.from_bytes(digest) % 10 == 0 else "train"


def _distinct(records: Iterable[dict[str, str]], taken: Iterable[str]) -> _Pairs:
  """Yields what is long enough, gives nothing away and was not seen before."""
  queries, positives = set(taken), set(taken)
  for record in records:
    query, positive = _normalise(record["query"]), _normalise(record["positive"])
    if len(query) < 12 or len(re.findall(r"\w+", query)) < 3 or len(positive) < 20:
      continue
    if query in positive or query in queries or positive in positives:
      continue
    queries.add(query)
    positives.add(positive)
    yield record


def _normalise(text: str) -> str:
  return " ".join(text.casefold().split())


@dataclasses.dataclass(frozen=True)
class _Module:
  path: str  # Relative to the standard library, with "/".
  lines: list[str]
  tree: ast.Module

  @property
  def group(self) -> str:
    return self.path.split("/")[0].removesuffix(".py")

  @property
  def name(self) -> str:
    dotted = self.path.removesuffix(".py").replace("/", ".")
    return dotted.removesuffix(".__init__")

  @functools.cached_property
  def definitions(self) -> list[tuple[str, _Definition]]:
    return list(_definitions(self.tree, self.name))

  def pair(self, line: int, query: str, positive: str, **more: str) -> dict[str, str]:
    source = {"source": f"{self.path}:{line}"}
    return {"query": _cap(query), "positive": _cap(positive), **more, **source}


def _modules() -> Iterator[_Module]:
  root = Path(sysconfig.get_paths()["stdlib"])
  paths = [path for path in root.rglob("*.py") if _is_wanted(path.relative_to(root))]
  if not paths:
    raise DataError(
      f"the built-in corpus needs the standard library's source, and {root} has no"
      " .py files; use a Python that has them or give JSONL files"
    )
  for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
    try:
      with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escapes are not ours to mend.
        source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError):
      continue  # A dangling link or a file broken on purpose.
    relative = path.relative_to(root).as_posix()
    yield _Module(relative, source.split("\n"), tree)


def _is_wanted(path: Path) -> bool:
  return not any(_SKIPPED.fullmatch(part.split(".")[0]) for part in path.parts)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Definition]]:
  for child in ast.iter_child_nodes(node):
    if isinstance(child, _Definition):
      name = f"{prefix}.{child.name}"
      yield name, child
      yield from _definitions(child, name)
    elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
      yield from _definitions(child, prefix)


def _summary_and_rest(node: Any) -> tuple[str, str]:
  """Returns a docstring's first paragraph, or else first sentence, and what follows."""
  text = (ast.get_docstring(node) or "").strip()
  summary, _, rest = text.partition("\n\n")
  if not rest:
    summary, *after = _SENTENCE_END.split(text, maxsplit=1)
    rest = "".join(after)
  return " ".join(summary.split()), rest.strip("\n")


def _docs(module: _Module) -> _Pairs:
  for name, node in [(module.name, module.tree), *module.definitions]:
    summary, rest = _summary_and_rest(node)
    yield module.pair(getattr(node, "lineno", 1), summary, rest, title=name)


def _code(module: _Module) -> _Pairs:
  for _, node in module.definitions:
    summary, _ = _summary_and_rest(node)
    docstring, *body = node.body
    if not (summary and body) or docstring.lineno == node.lineno:
      continue
    if all(isinstance(statement, ast.Pass) for statement in body):
      continue
    # What shares the docstring's last line goes with it.
    kept = module.lines[node.lineno - 1 : docstring.lineno - 1]
    kept += module.lines[docstring.end_lineno : node.end_lineno]
    yield module.pair(node.lineno, summary, textwrap.dedent("\n".join(kept)))


def _names(module: _Module) -> _Pairs:
  for name, node in module.definitions:
    words = " ".join(_WORD.findall(name))
    if not isinstance(node, ast.ClassDef):
      words += f" ({ast.unparse(node.args)})"
    yield module.pair(node.lineno, words, _summary_and_rest(node)[0])


def _comments(module: _Module) -> _Pairs:
  """A block of comment lines and the code that follows at its depth or deeper."""
  lines, quoted = module.lines, _lines_in_strings(module.tree)
  i = 0
  while i < len(lines):
    start, indent = i, len(lines[i]) - len(lines[i].lstrip())
    mark = " " * indent + "#"
    while i < len(lines) and lines[i].startswith(mark) and i + 1 not in quoted:
      i += 1
    if i == start:
      i += 1
      continue
    comment = " ".join(line.strip().lstrip("#").strip() for line in lines[start:i])
    end = i
    while end < len(lines) and lines[end].startswith(" " * indent):
      if not lines[end].strip() or lines[end].startswith(mark):
        break
      end += 1
    if _is_prose(comment):
      code = textwrap.dedent("\n".join(lines[i:end]))
      yield module.pair(start + 1, comment, code)


def _lines_in_strings(tree: ast.Module) -> set[int]:
  inside: set[int] = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant | ast.JoinedStr):
      last = node.end_lineno or node.lineno
      inside.update(range(node.lineno, last + 1) if last > node.lineno else ())
  return inside


def _is_prose(comment: str) -> bool:
  if len(re.findall("[a-z]{2,}", comment)) < 4 or _LEGAL.search(comment):
    return False
  try:
    ast.parse(comment)
  except (SyntaxError, ValueError):
    return True
  return False  # Code that was commented out.


def _topics() -> Iterator[tuple[str, dict[str, str]]]:
  """Yields (topic, pair): the reference's sections, HTTP statuses, error numbers."""
  for topic, text in _topic_texts():
    heading, *blocks = re.split(r"\n\s*\n", text)
    title = heading.split("\n")[0].replace('"', "")
    for block in blocks:
      if not re.match(r"(?:   )?(?:[*•] +)?[A-Z]", block):
        continue  # Code or a table.
      block = block.strip(" *•")
      query, *rest = _SENTENCE_END.split(block, maxsplit=1)
      pair = {"query": _cap(" ".join(query.split())), "positive": _cap("".join(rest))}
      yield topic, {**pair, "title": title, "source": f"pydoc_data.topics:{topic}"}
  for status in http.HTTPStatus:
    query = f"HTTP status {status.value} {status.phrase}"
    pair = {"query": query, "positive": status.description}
    yield query, {**pair, "source": "http.HTTPStatus"}
  for number, name in sorted(errno.errorcode.items()):
    pair = {"query": f"system error {name}", "positive": os.strerror(number)}
    yield name, {**pair, "source": "errno"}


def _cap(text: str) -> str:
  """Returns the text, cut at white space to the corpus's longest length."""
  text = text.strip()
  if len(text) <= _MAX_CHARACTERS:
    return text
  return text[: _MAX_CHARACTERS + 1].rsplit(None, 1)[0][:_MAX_CHARACTERS]
