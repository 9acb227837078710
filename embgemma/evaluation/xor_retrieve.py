"""XOR-Retrieve: questions in seven languages, answers in English passages.

Of arXiv 2010.11856, as its evaluation script (AkariAsai/XORQA) scores: recall
of an answer in the first 2,000 and 5,000 tokens of what was retrieved.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from embgemma.data.jsonl import decode_line, read_jsonl
from embgemma.errors import DataError
from embgemma.evaluation.exact_search import search
from embgemma.typing import Float

TOKENS = (2_000, 5_000)
# Enough of 100 words each for the most tokens; the official runs hand in 100, too.
DEPTH = 100
_YES_NO = ("yes", "no")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
Passage = tuple[str, str]  # title, text


@dataclasses.dataclass(frozen=True)
class Question:
  """A line of xor_dev_retrieve_eng_span_v1_1.jsonl.

  Attributes:
    name: Its id.
    language: Such as "ja".
    text: In that language.
    answers: English spans, any of which counts.
  """

  name: str
  language: str
  text: str
  answers: tuple[str, ...]


def read_questions(path: pathlib.Path) -> list[Question]:
  """Questions of the original file; those answered by yes or no do not count.

  Raises:
    DataError: a line is no question, or no question is left.
  """
  found = []
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    name, language, text, answers = (
      record.get(key) for key in ("id", "lang", "question", "answers")
    )
    if not (
      name is not None
      and isinstance(language, str)
      and isinstance(text, str)
      and isinstance(answers, list)
      and all(isinstance(answer, str) for answer in answers)
    ):
      raise DataError(f"{where}: needs id, lang, question and a list of answers")
    spans = tuple(answer for answer in answers if answer not in _YES_NO)
    if spans:
      found.append(Question(str(name), language, text, spans))
  if not found:
    raise DataError(f"{path}: holds no question with an answer")
  return found


def tokens(text: str) -> list[str]:
  """Words and punctuation, by NLTK's `word_tokenize` as the official script counts.

  NLTK finds sentences with a model that it downloads (punkt_tab); without that, they
  end at a full stop, a question or an exclamation mark before a space.
  """
  return _tokenizer()(text)


@functools.cache
def _tokenizer() -> Callable[[str], list[str]]:
  from nltk.tokenize import NLTKWordTokenizer, word_tokenize

  try:
    word_tokenize("Looks for its model. Once.")
    return lambda text: list(word_tokenize(text))
  except LookupError:
    words = NLTKWordTokenizer()

  def tokenize(text: str) -> list[str]:
    sentences = _SENTENCE_END.split(text)
    return [word for sentence in sentences for word in words.tokenize(sentence)]

  return tokenize


def has_answer(
  passages: Iterable[str], answers: Sequence[str], limits: Sequence[int] = TOKENS
) -> list[bool]:
  """Whether an answer is in the first tokens of ranked passages, laid end to end.

  Args:
    passages: From the best.
    answers: Any of which counts, letter by letter.
    limits: Tokens, of one result each.
  """
  read: list[str] = []
  for passage in passages:
    read += tokens(passage)
    if len(read) >= max(limits):
      break
  texts = [" ".join(read[:limit]) for limit in limits]
  return [any(answer in text for answer in answers) for text in texts]


def recalls(
  questions: Sequence[Question], ranked: Mapping[str, Sequence[str]]
) -> dict[str, float]:
  """R@2kt and R@5kt in 0..1, of each language and as means over languages.

  Args:
    questions: Of `read_questions`.
    ranked: Passages of each question by its name, from the best.

  Returns:
    Keys are such as "recall@2kt" and "recall@2kt:ja".
  """
  by_language: dict[str, list[list[bool]]] = {}
  for question in questions:
    found = has_answer(ranked.get(question.name, ()), question.answers)
    by_language.setdefault(question.language, []).append(found)
  scores: dict[str, float] = {}
  for index, limit in enumerate(TOKENS):
    key = f"recall@{limit // 1000}kt"
    means = {
      name: float(np.mean([of[index] for of in found]))
      for name, found in by_language.items()
    }
    scores[key] = float(np.mean(list(means.values())))
    scores |= {f"{key}:{language}": mean for language, mean in sorted(means.items())}
  return scores


def read_passages(path: pathlib.Path) -> Iterator[Passage]:
  """Title and text of a corpus, one after the other.

  It is DPR's TSV (id, text, title, with or without a head), gzipped or not, or JSONL
  with `text` and perhaps `title`.

  Raises:
    DataError: a line is neither.
  """
  from embgemma.data.files import read_lines

  if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
    for number, record in read_jsonl(path):
      text, title = record.get("text"), record.get("title") or ""
      if not isinstance(text, str) or not isinstance(title, str):
        raise DataError(f"{path}:{number}: needs text, and perhaps title")
      yield title, text
    return
  for number, line in read_lines(path):
    fields = decode_line(path, number, line).rstrip("\r\n").split("\t")
    if len(fields) != 3:
      raise DataError(
        f"{path}:{number}: has {len(fields)} fields; DPR's corpus has id, text, title"
      )
    if number == 1 and fields == ["id", "text", "title"]:
      continue
    yield _unquoted(fields[2]), _unquoted(fields[1])


def _unquoted(text: str) -> str:
  """DPR's passages, and titles with a quote, are in quotes of the csv module."""
  if len(text) > 1 and text.startswith('"') and text.endswith('"'):
    return text[1:-1].replace('""', '"')
  return text


class TopPassages:
  """The best passages of each query in a corpus that is read once.

  Exact, with memory of a block and of what is found, whatever the corpus's size.

  Args:
    queries: Unit vectors.
    depth: Passages kept for each query.
  """

  def __init__(self, queries: Float[np.ndarray, "Q E"], depth: int = DEPTH):
    self._queries = queries
    self._depth = depth
    self._scores = np.zeros((len(queries), 0), np.float32)
    self._numbers = np.zeros((len(queries), 0), np.int64)
    self._texts: dict[int, Passage] = {}
    self._seen = 0

  def add(self, vectors: Float[np.ndarray, "N E"], passages: Sequence[Passage]) -> None:
    """Reads a block of the corpus.

    Args:
      vectors: Of unit norm.
      passages: As many.
    """
    scores, columns = search(self._queries, vectors, self._depth)
    scores = np.concatenate([self._scores, scores], axis=1)
    numbers = np.concatenate([self._numbers, self._seen + columns], axis=1)
    # Stable: of equal scores the earlier passage stays first.
    order = np.argsort(-scores, axis=1, kind="stable")[:, : self._depth]
    self._scores = np.take_along_axis(scores, order, axis=1)
    self._numbers = np.take_along_axis(numbers, order, axis=1)
    kept = np.unique(self._numbers).tolist()
    self._texts = {
      number: self._texts[number]
      if number < self._seen
      else passages[number - self._seen]
      for number in kept
    }
    self._seen += len(passages)

  def found(self) -> list[list[Passage]]:
    """Passages of each query, from the best; of equal scores the earlier first."""
    return [[self._texts[number] for number in row] for row in self._numbers.tolist()]
