"""Records of the layouts in which pairs come, as our examples.

A format takes a file's records one by one and gives 0 to n examples for each. Texts
stay as they are, white space included.
"""

import abc
import itertools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embgemma.data.bad_records import SkipLog
from embgemma.data.jsonl import check_object, string_field
from embgemma.errors import DataError, EmptyTextError

# Characters of sentence pairs held to be grouped: all of MultiNLI, some 200 MB.
_NLI_CHARACTERS = 1 << 27
_NLI_OVERHEAD = 100  # of a pair, in characters
# Numbers as TFDS and the Parquet conversions have them.
_NLI_LABELS = {0: "entailment", 1: "neutral", 2: "contradiction", -1: "-"}
_PARAGRAPH = re.compile(r"\n\s*\n")
_QUOTE = re.compile(r"""[ \t]*[rRuU]?("{3}|'{3}|"|')\s*\Z""")

Example = dict[str, Any]


class RecordFormat(abc.ABC):
  """Makes examples of the records of one file."""

  @abc.abstractmethod
  def add(self, record: Any, where: str) -> list[Example]:
    """The examples that one more record completes.

    Args:
      record: A parsed line or row.
      where: File and line, for messages.

    Raises:
      DataError: a field is missing, empty or not of its type.
    """

  def finish(self) -> list[Example]:
    """The examples that are left at the end of the file."""
    return []


class Each(RecordFormat):
  """The format of records that give their examples each by itself."""

  def __init__(self, examples: Callable[[Any, str], list[Example]]):
    self._examples = examples

  def add(self, record: Any, where: str) -> list[Example]:
    return self._examples(record, where)


def _text(
  record: Mapping[str, Any],
  key: str,
  where: str,
  needs: str = '"query" and "positive"',
) -> str:
  if record.get(key) is None:
    raise DataError(
      f'{where}: no "{key}"; a record needs {needs}, has {sorted(record)}'
    )
  value = string_field(record, key, where)
  if not value.strip():
    raise EmptyTextError(f'{where}: "{key}" is empty; give it text or drop the record')
  return value


def _texts(value: Any, name: str, where: str) -> list[str]:
  """A list of texts; `name` is its key."""
  if not isinstance(value, list | tuple):
    raise DataError(
      f'{where}: "{name}" must be a list of strings, got {type(value).__name__}'
    )
  indexed = {f"{name}[{i}]": text for i, text in enumerate(value)}
  return [_text(indexed, key, where, needs="a text") for key in indexed]


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> str:
  """The first of the keys that has a value; if none has, the first."""
  return next((k for k in keys if record.get(k) not in (None, "", [])), keys[0])


def example(
  query: str,
  positive: str,
  negatives: Sequence[str] = (),
  title: str = "",
  negative_titles: Sequence[str] = (),
) -> Example:
  """A pair with the features that every task has.

  Titles of negatives, as many as these, are a feature only where there is one.
  """
  made = {
    "query": query,
    "positive": positive,
    "negatives": list(negatives),
    "title": title,
    "task": "",
    "label": "",
  }
  if any(negative_titles):
    made["negative_titles"] = list(negative_titles)
  return made


def passage_example(
  query: str, positive: tuple[str, str], negatives: Sequence[tuple[str, str]]
) -> Example:
  """A query with passages, each a title (or "") and a text; see the module's text."""
  titles, texts = ([passage[i] for passage in (positive, *negatives)] for i in (0, 1))
  return example(query, texts[0], texts[1:], titles[0], titles[1:])


def _negatives(value: Any, where: str) -> tuple[list[str], list[str]]:
  """Texts and titles of negatives: strings, or objects with "text" and "title"."""
  if not isinstance(value, list | tuple):
    raise DataError(
      f'{where}: "negatives" must be a list of strings, got {type(value).__name__}'
    )
  texts, titles = [], []
  for i, item in enumerate(value):
    key, title = f"negatives[{i}]", ""
    if isinstance(item, dict):
      title = string_field(item, "title", f"{where}: {key}", default="")
      texts.append(_text(item, "text", f"{where}: {key}", needs='"text"'))
    else:
      texts.append(_text({key: item}, key, where, needs="a text"))
    titles.append(title)
  return texts, titles


def pair_example(record: Mapping[str, Any], where: str) -> Example:
  """One record as the features that every task has.

  Args:
    record: {"query", "positive", "negatives"? (or "negative", one of them),
      "title"?, "task"?, "label"?}; other keys are ignored. A negative is a string, or
      {"text", "title"?}; titles may also be a list, "negative_titles".
    where: File and line, for messages.

  Returns:
    query, positive, title, task, label: str ("" where absent); negatives: list[str],
    and as many negative_titles where one has any.

  Raises:
    DataError: a field is missing, empty or not of its type.
  """
  negatives = record.get("negatives")
  if negatives is None:
    single = record.get("negative")
    negatives = [] if single is None else [single]
  optional = {
    key: _text(record, key, where) if record.get(key) not in (None, "") else ""
    for key in ("title", "task", "label")
  }
  query, positive = (_text(record, key, where) for key in ("query", "positive"))
  texts, titles = _negatives(negatives, where)
  if given := record.get("negative_titles"):
    if not isinstance(given, list | tuple) or len(given) != len(texts):
      raise DataError(f'{where}: "negative_titles" must be as many as the negatives')
    titles = [string_field({"title": t}, "title", where, default="") for t in given]
  return example(query, positive, texts, "", titles) | optional


def text_example(record: Mapping[str, Any], where: str) -> Example:
  """One record as the feature that every task of documents has.

  Args:
    record: {"text"}; other keys are ignored.
    where: File and line, for messages.

  Returns:
    text: str.

  Raises:
    DataError: the text is missing, empty or no string.
  """
  return {"text": _text(record, "text", where, needs='"text"')}


def _pairs(record: Any, where: str) -> list[Example]:
  return [pair_example(check_object(record, where), where)]


class _Nli(RecordFormat):
  """Sentence pairs of SNLI (Bowman et al. 2015) and MultiNLI (Williams et al. 2018).

  {"sentence1", "sentence2", "gold_label"}. The pairs of a premise become one example
  for each entailed hypothesis: its negatives are the contradicting hypotheses of the
  premise, or the neutral ones where none contradicts (as sentence-transformers'
  AllNLI). The lines of a premise may lie apart, as MultiNLI's do: premises are held up
  to `_NLI_CHARACTERS`, and come out in the order of their first lines.
  """

  def __init__(self, skipped: SkipLog):
    self._skipped = skipped
    self._premises: dict[str, dict[str, list[str]]] = {}
    self._held = 0

  def add(self, record: Any, where: str) -> list[Example]:
    like = '{"sentence1": "…", "sentence2": "…", "gold_label": "neutral"}'
    record = check_object(record, where, like)
    given = label = record.get("gold_label")
    label = _NLI_LABELS.get(label) if type(label) is int else label
    if label == "-":
      self._skipped.add_unused("sentence pairs without a gold label")
      return []
    if label not in list(_NLI_LABELS.values()):
      raise DataError(
        f'{where}: "gold_label" is {given!r}; it must be entailment, neutral, '
        'contradiction or "-"'
      )
    needs = '"sentence1", "sentence2" and "gold_label"'
    premise, hypothesis = (
      _text(record, key, where, needs) for key in ("sentence1", "sentence2")
    )
    self._premises.setdefault(premise, {}).setdefault(label, []).append(hypothesis)
    self._held += len(premise) + len(hypothesis) + _NLI_OVERHEAD
    return self.finish() if self._held > _NLI_CHARACTERS else []

  def finish(self) -> list[Example]:
    found = []
    for premise, hypotheses in self._premises.items():
      entailed = dict.fromkeys(hypotheses.get("entailment", ()))
      if not entailed:
        self._skipped.add_unused("premises without an entailed sentence")
      others = hypotheses.get("contradiction") or hypotheses.get("neutral", [])
      # Annotators disagree: what one premise entails is no negative of it.
      negatives = [text for text in dict.fromkeys(others) if text not in entailed]
      found += [example(premise, text, negatives) for text in entailed]
    self._premises, self._held = {}, 0
    return found


def _passages(record: Mapping[str, Any], key: str, where: str) -> list[tuple[str, str]]:
  """Titles and texts of a list of passages."""
  value = record.get(key)
  if not isinstance(value, list):
    raise DataError(
      f'{where}: "{key}" must be a list of {{"title"?, "text"}}, got '
      f"{type(value).__name__}"
    )
  found = []
  for i, passage in enumerate(value):
    own = check_object(passage, f"{where}: {key}[{i}]", '{"title": "…", "text": "…"}')
    at = f"{where}: {key}[{i}]"
    title = string_field(own, "title", at, default="").strip()
    found.append((title, _text(own, "text", at, needs='"text"')))
  return found


class _Tevatron(RecordFormat):
  """Queries with judged passages: MIRACL, Mr.TyDi and others that Tevatron trains on.

  {"query", "positive_passages": [{"docid", "title", "text"}, …], "negative_passages":
  [the same]?}: one example for each positive, with all negatives.
  """

  def __init__(self, skipped: SkipLog):
    self._skipped = skipped

  def add(self, record: Any, where: str) -> list[Example]:
    like = '{"query": "…", "positive_passages": […], "negative_passages": […]}'
    record = check_object(record, where, like)
    query = _text(record, "query", where, needs='"query" and "positive_passages"')
    negatives = []
    if record.get("negative_passages") is not None:
      negatives = _passages(record, "negative_passages", where)
    positives = _passages(record, "positive_passages", where)
    if not positives:
      self._skipped.add_unused("queries without a positive passage")
    return [passage_example(query, positive, negatives) for positive in positives]


def _code_search_net(record: Any, where: str) -> list[Example]:
  """A function and its documentation: CodeSearchNet (Husain et al. 2019).

  {"docstring" (or "docstring_tokens"), "code" (or "original_string", "function")}, or
  the same under the Hub's names ("func_documentation_string", "func_code_string", …).
  The query is the documentation's first paragraph, as in the paper; the positive is the
  code, without the documentation where it stands in it as a string (Python).
  """
  record = check_object(record, where, '{"docstring": "…", "code": "…"}')
  needs = '"docstring" and "code"'
  key = _first(record, ("docstring", "func_documentation_string"))
  if record.get(key) in (None, ""):
    tokens = _first(record, ("docstring_tokens", "func_documentation_tokens"))
    record = {**record, key: " ".join(_texts(record.get(tokens) or [], tokens, where))}
  documentation = _text(record, key, where, needs).strip()
  names = ("code", "func_code_string", "original_string", "whole_func_string")
  name = _first(record, (*names, "function"))
  code = _without(_text(record, name, where, needs), documentation)
  if not code.strip():
    raise DataError(f'{where}: "{name}" is nothing but documentation; drop the record')
  query = " ".join(_PARAGRAPH.split(documentation)[0].split())
  return [example(query, code)]


def _without(code: str, documentation: str) -> str:
  """The code without the string literal that is its documentation, if it is there."""
  before, found, after = code.partition(documentation)
  opening = _QUOTE.search(before)
  if not found or opening is None:
    return code
  closing = re.match(rf"\s*{opening[1]}[ \t]*\n?", after)
  if closing is None:
    return code
  return before[: opening.start()] + after[closing.end() :]


def _embedding_training_data(record: Any, where: str) -> list[Example]:
  """The layouts of sentence-transformers' embedding-training-data and its kin.

  [a, b] or [a, b, negative, …], also under "texts" (the Stack Exchange files); {"set":
  [a, b, …]}: each member with the next; {"query", "pos": […], "neg"?: […]}: one
  example for each of "pos".
  """
  if isinstance(record, dict) and "texts" in record:
    record = record["texts"]
  if isinstance(record, list):
    texts = _texts(record, "texts", where)
    if len(texts) < 2:
      raise DataError(f"{where}: {len(texts)} texts; a pair has two")
    return [example(texts[0], texts[1], texts[2:])]
  like = '["…", "…"], {"set": […]} or {"query": "…", "pos": […], "neg": […]}'
  record = check_object(record, where, like)
  if "set" in record:
    texts = _texts(record["set"], "set", where)
    if len(texts) < 2:
      raise DataError(f'{where}: "set" has {len(texts)} texts; it needs two')
    return [example(*pair) for pair in itertools.pairwise(texts)]
  query = _text(record, "query", where, needs='a list, "set", or "query" and "pos"')
  positives = _texts(record.get("pos"), "pos", where)
  if not positives:
    raise DataError(f'{where}: "pos" is empty; it needs a text')
  negatives = _texts(record.get("neg") or [], "neg", where)
  return [example(query, positive, negatives) for positive in positives]


def _title_body(record: Any, where: str) -> list[Example]:
  """{"title", "text" or "body"}: the title is the query."""
  record = check_object(record, where, '{"title": "…", "text": "…"}')
  needs, key = '"title" and "text" or "body"', _first(record, ("text", "body"))
  return [
    example(_text(record, "title", where, needs), _text(record, key, where, needs))
  ]


FORMATS: Mapping[str, Callable[[SkipLog], RecordFormat]] = types.MappingProxyType(
  {
    "pairs": lambda skipped: Each(_pairs),
    "nli": _Nli,
    "tevatron": _Tevatron,
    "code_search_net": lambda skipped: Each(_code_search_net),
    "embedding_training_data": lambda skipped: Each(_embedding_training_data),
    "title_body": lambda skipped: Each(_title_body),
  }
)
"""The formats by name, each to be made anew for every file."""
