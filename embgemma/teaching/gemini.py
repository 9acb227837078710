"""Gemini Embedding as a teacher, through Google's client (extra `gemini`).

Models up to gemini-embedding-001 take a task type beside a text; later ones read the
task from the text, in the words of EmbeddingGemma's prompts:
https://ai.google.dev/gemini-api/docs/embeddings.
"""

import datetime
import email.utils
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from embgemma.data import prompts
from embgemma.errors import ConfigError, DataError
from embgemma.teaching.teachers import (
  BYTES_PER_TOKEN,
  ApiLimits,
  Input,
  PartlyEncodedError,
  missing_extra,
  unit_prefix,
)
from embgemma.typing import Float

KEYS = ("GOOGLE_API_KEY", "GEMINI_API_KEY")  # the client's order
PRICE_SOURCE = "https://ai.google.dev/gemini-api/docs/pricing, April 2026"
# USD a million tokens of text.
PRICES: Mapping[str, float] = {
  "gemini-embedding-001": 0.15,
  "gemini-embedding-2": 0.20,
  "gemini-embedding-2-preview": 0.20,
}
FULL_WIDTH = 3072  # of all of them
_TASK_TYPED = ("gemini-embedding-001", "gemini-embedding-exp", "text-embedding")
_BATCH = 100  # texts of a request; the API refuses more
# The models read 2,048 or 8,192 tokens. What is certainly beyond is not sent.
_MOST_CHARACTERS = 1 << 17
_BATCH_BYTES = 1 << 23  # a request may have 20 MB
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_MOST_WAITING = 600.0  # seconds that the API may ask for; a day's quota asks for hours
_BACKOFF = (1.0, 60.0)  # seconds: first, most

# Of queries and documents, by kind.
TASK_TYPES: Mapping[str, tuple[str, str]] = {
  "search": ("RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"),
  "qa": ("QUESTION_ANSWERING", "RETRIEVAL_DOCUMENT"),
  "fact_checking": ("FACT_VERIFICATION", "RETRIEVAL_DOCUMENT"),
  "code": ("CODE_RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"),
  "reranking": ("RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"),
  "similarity": ("SEMANTIC_SIMILARITY", "SEMANTIC_SIMILARITY"),
  "bitext": ("SEMANTIC_SIMILARITY", "SEMANTIC_SIMILARITY"),
  "summarization": ("SEMANTIC_SIMILARITY", "SEMANTIC_SIMILARITY"),
  "classification": ("CLASSIFICATION", "CLASSIFICATION"),
  "clustering": ("CLUSTERING", "CLUSTERING"),
}


class _RefusedError(DataError):
  """The API refused what was sent (400), perhaps because of one text."""


class GeminiTeacher:
  """A model of the Gemini API; see `Teacher` for the methods.

  The key is read from the environment and is in no message.

  Args:
    model: Such as "gemini-embedding-001".
    width: Components that are asked for; None is all.
    limits: Of the account.
    sleep: Waits for seconds.

  Attributes:
    price: USD a million tokens.
    price_source: Who says so, and when.

  Raises:
    ConfigError: the client or a key is missing, or the model's price or width is not
      known and not given.
  """

  window = 1000  # what is paid for is soon kept

  def __init__(
    self,
    model: str,
    width: int | None = None,
    limits: ApiLimits = ApiLimits(),
    sleep: Callable[[float], None] = time.sleep,
  ):
    try:
      from google import genai
      from google.genai import errors, types
    except ImportError as error:
      raise missing_extra(f"teacher gemini:{model}", "gemini") from error
    key = next(filter(None, map(os.environ.get, KEYS)), "").strip()
    if not key:
      raise ConfigError(
        f"teacher gemini:{model} needs a key: set GEMINI_API_KEY in the environment"
      )
    self.name = f"gemini:{model}"
    self.price = _known(limits.price or PRICES.get(model), model, "price", "--price")
    self.price_source = PRICE_SOURCE if limits.price is None else "--price"
    full = FULL_WIDTH if model in PRICES else None
    self.width = _known(width or full, model, "width", "--width")
    if full is not None and self.width > full:
      raise ConfigError(f"width {width} is not in 1..{full}, the width of {self.name}")
    self.fingerprint = f"{self.name}/{self.width}"
    self._model, self._limits, self._key, self._sleep = model, limits, key, sleep
    self._typed = model.startswith(_TASK_TYPED)
    self._types, self._errors = types, errors
    self._pace = _Pace(limits, sleep)
    # One attempt: its own retries do not wait as long as the API asks.
    options = types.HttpOptions(timeout=int(1000 * limits.timeout))
    self._client = genai.Client(vertexai=False, api_key=key, http_options=options)

  def query(self, text: str, kind: str | None) -> Input:
    kind = kind or "search"
    if self._typed:
      return Input(text, self._task_type(kind, 0))
    return Input(prompts.task_prompts(kind).format_query(text))

  def document(self, text: str, title: str | None, kind: str | None) -> Input:
    kind = kind or "search"
    if self._typed:
      # The client has one title for all texts of a request: here it begins the text.
      return Input(f"{title}\n{text}" if title else text, self._task_type(kind, 1))
    return Input(prompts.task_prompts(kind).format_document(text, title))

  def _task_type(self, kind: str, side: int) -> str:
    if kind not in TASK_TYPES:
      raise ConfigError(
        f"{self.name} has no task type for the kind {kind!r}; it has them for "
        f"{sorted(TASK_TYPES)}"
      )
    return TASK_TYPES[kind][side]

  def encode(self, inputs: Sequence[Input]) -> Float[np.ndarray, "N W"]:
    out = np.empty((len(inputs), self.width), np.float32)
    answered: list[int] = []  # what is paid for
    try:
      for batch in _batches(inputs):
        for indices, vectors in self._answers(inputs, batch):
          out[indices] = vectors
          answered += indices
    except DataError as error:
      kept = unit_prefix(out[answered], self.width)
      raise PartlyEncodedError(str(error), answered, kept) from error
    # Prefixes of gemini-embedding-001 are not of unit norm.
    return unit_prefix(out, self.width)

  def _answers(
    self, inputs: Sequence[Input], indices: list[int]
  ) -> Iterator[tuple[list[int], Float[np.ndarray, "n W"]]]:
    """The vectors of a batch: of its parts, where the API refuses one of its texts.

    Raises:
      DataError: the API refused one text alone, or gave no answer.
    """
    waiting = [indices]
    while waiting:
      own = waiting.pop()
      try:
        embeddings = self._request([inputs[i] for i in own])
      except _RefusedError:
        if len(own) == 1:
          raise
        half = len(own) // 2
        waiting += [own[half:], own[:half]]
        continue
      yield own, self._checked(embeddings, inputs, own)

  def _checked(
    self, embeddings: Sequence[Any], inputs: Sequence[Input], indices: list[int]
  ) -> Float[np.ndarray, "n W"]:
    if len(embeddings) != len(indices):
      raise DataError(
        f"{self.name} gave {len(embeddings)} vectors for {len(indices)} texts, the "
        f"first of which begins {inputs[indices[0]].text[:60]!r}"
      )
    out = np.empty((len(indices), self.width), np.float32)
    for row, i, embedding in zip(out, indices, embeddings, strict=True):
      values = embedding.values or []
      if len(values) != self.width:
        raise DataError(
          f"{self.name} gave width {len(values)}, asked for {self.width}, to text "
          f"{i} of a window, which begins {inputs[i].text[:60]!r}"
        )
      row[:] = values
    return out

  def _request(self, batch: Sequence[Input]) -> Sequence[Any]:
    """The embeddings of one batch, after as many attempts as it takes.

    Raises:
      DataError: the quota is exhausted, the API refused, or attempts ran out.
    """
    types = self._types
    # Each text a content of its own: later models make one vector of several strings.
    contents = [
      types.Content(parts=[types.Part(text=each.text[:_MOST_CHARACTERS])])
      for each in batch
    ]
    config = types.EmbedContentConfig(
      task_type=batch[0].task or None, output_dimensionality=self.width
    )
    size = sum(len(each.text[:_MOST_CHARACTERS].encode()) for each in batch)
    for attempt in range(1, self._limits.attempts + 1):
      self._pace.wait(len(batch), size / BYTES_PER_TOKEN)
      try:
        answer = self._client.models.embed_content(
          model=self._model, contents=contents, config=config
        )
        return answer.embeddings or []
      except self._errors.APIError as error:
        failure, asked = self._judged(error, batch)
      except (*_transport_errors(), json.JSONDecodeError) as error:
        failure, asked = f"{type(error).__name__}: {error}", 0.0
      if attempt < self._limits.attempts:
        first, most = _BACKOFF
        backoff = min(most, first * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        self._sleep(max(asked, backoff))
    raise DataError(
      f"{self.name}: gave no answer in {self._limits.attempts} attempts; the last: "
      f"{self._scrubbed(failure)}"
    )

  def _judged(self, error: Any, batch: Sequence[Input]) -> tuple[str, float]:
    """What the API said, and for how many seconds it asks to wait.

    Raises:
      DataError: trying again has no use.
    """
    said = self._scrubbed(f"{error.code} {error.status}: {error.message}")
    asked = _asked_to_wait(error)
    late = asked > _MOST_WAITING
    if error.code == 429 and (late or _quota_of_a_day(error)):
      raise DataError(
        f"{self.name}: quota exhausted ({said}); wait until it is renewed, or raise it"
      ) from None
    if error.code not in _RETRIED:
      what = "the text that" if len(batch) == 1 else "a batch whose first text"
      refused = _RefusedError if error.code == 400 else DataError
      raise refused(
        f"{self.name}: refused ({said}) {what} begins {batch[0].text[:60]!r}"
      ) from None
    if late:
      raise DataError(
        f"{self.name}: asks to wait {asked:,.0f} seconds ({said}); run the same "
        "command then"
      ) from None
    return said, asked

  def _scrubbed(self, message: str) -> str:
    return message.replace(self._key, "…")


class _Pace:
  """Waits as long as the rates of an account ask for.

  Args:
    limits: The rates.
    sleep: Waits for seconds.
  """

  def __init__(self, limits: ApiLimits, sleep: Callable[[float], None]):
    self._limits, self._sleep = limits, sleep
    self._next = time.monotonic()

  def wait(self, texts: int, tokens: float) -> None:
    """Returns when so much may be sent."""
    now = time.monotonic()
    if self._next > now:
      self._sleep(self._next - now)
    minutes = max(
      texts / self._limits.texts_per_minute, tokens / self._limits.tokens_per_minute
    )
    self._next = max(now, self._next) + 60 * minutes


def _known(value: Any, model: str, what: str, flag: str) -> Any:
  if value is None:
    raise ConfigError(
      f"the {what} of {model!r} is not known here; give {flag}. Known models: "
      f"{', '.join(PRICES)}"
    )
  return value


def _batches(inputs: Sequence[Input]) -> Iterator[list[int]]:
  """Indices of inputs that go into one request: of one task, and not too many."""
  by_task: dict[str, list[int]] = {}
  for index, each in enumerate(inputs):
    by_task.setdefault(each.task, []).append(index)
  for indices in by_task.values():
    batch: list[int] = []
    size = 0
    for i in indices:
      own = len(inputs[i].text[:_MOST_CHARACTERS].encode())
      if batch and (len(batch) == _BATCH or size + own > _BATCH_BYTES):
        yield batch
        batch, size = [], 0
      batch.append(i)
      size += own
    yield batch


def _transport_errors() -> tuple[type[Exception], ...]:
  """Failed connections and timeouts of the HTTP library that the client chose."""
  modules = filter(None, (sys.modules.get(name) for name in ("httpx", "httpx2")))
  return tuple(module.TransportError for module in modules)


def _details(error: Any) -> list[Mapping[str, Any]]:
  body = error.details if isinstance(error.details, Mapping) else {}
  inner = body.get("error", body)
  details = inner.get("details") if isinstance(inner, Mapping) else None
  return [each for each in details or () if isinstance(each, Mapping)]


def _asked_to_wait(error: Any) -> float:
  """Seconds: of the header Retry-After, or of google.rpc.RetryInfo in the body."""
  header = getattr(error.response, "headers", {}).get("Retry-After", "")
  if header:
    try:
      return float(header)
    except ValueError:
      pass
    try:
      until = email.utils.parsedate_to_datetime(header)
      return (until - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, TypeError):
      pass
  for each in _details(error):
    delay = str(each.get("retryDelay", ""))
    try:
      return float(delay.removesuffix("s"))
    except ValueError:
      continue
  return 0.0


def _quota_of_a_day(error: Any) -> bool:
  violations = (
    violation for each in _details(error) for violation in each.get("violations") or ()
  )
  return any(
    isinstance(violation, Mapping) and "PerDay" in str(violation.get("quotaId"))
    for violation in violations
  )
