"""Google's client against a server of this machine that answers as the API does."""

import contextlib
import dataclasses
import email.utils
import hashlib
import http.server
import json
import logging
import pathlib
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embgemma.data import prompts
from embgemma.data.vector_store import VectorStore
from embgemma.errors import ConfigError, DataError
from embgemma.teaching import gemini
from embgemma.teaching.embedding import embed_missing
from embgemma.teaching.gemini import GeminiTeacher
from embgemma.teaching.teach import teach
from embgemma.teaching.teachers import ApiLimits, Input, open_teacher

_KEY = "AIza-secret-of-this-test"
_MODEL = "gemini-embedding-001"
_FAST = ApiLimits(texts_per_minute=1e9, tokens_per_minute=1e12, attempts=3)

# Takes the body of a request; returns status, headers and body of the answer.
Answer = tuple[int, dict[str, str], bytes]


def _vector(text: str, task: str | None, width: int) -> np.ndarray:
  """Not of unit norm."""
  seed = int.from_bytes(hashlib.sha256(f"{task}/{text}".encode()).digest()[:8], "big")
  return np.random.default_rng(seed).standard_normal(width)


def _answered(request: dict) -> dict:
  (part,) = request["content"]["parts"]
  width = request["outputDimensionality"]
  vector = _vector(part["text"], request.get("taskType"), width)
  return {"values": vector.tolist()}


def _sound(body: dict) -> Answer:
  embeddings = [_answered(request) for request in body["requests"]]
  return 200, {}, json.dumps({"embeddings": embeddings}).encode()


def _fault(
  code: int, status: str, message: str, details: list | None = None, **headers: str
) -> Callable[[dict], Answer]:
  error = {"code": code, "status": status, "message": message, "details": details or []}
  answer = json.dumps({"error": error}).encode()
  return lambda body: (
    code,
    {k.replace("_", "-"): v for k, v in headers.items()},
    answer,
  )


def _changed(change: Callable[[list], list]) -> Callable[[dict], Answer]:
  """A sound answer whose vectors were changed."""

  def answer(body: dict) -> Answer:
    embeddings = change(json.loads(_sound(body)[2])["embeddings"])
    return 200, {}, json.dumps({"embeddings": embeddings}).encode()

  return answer


class Api:
  """The server.

  Attributes:
    bodies: Of all requests.
    answers: Of the next requests, before all are sound.
  """

  def __init__(self):
    self.bodies: list[dict] = []
    self.keys: set[str | None] = set()
    self.paths: set[str] = set()
    self.answers: list[Callable[[dict], Answer]] = []


@contextlib.contextmanager
def _serve(api: Api) -> Iterator[str]:
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      api.bodies.append(body)
      api.keys.add(self.headers["x-goog-api-key"])
      api.paths.add(self.path)
      if len(body["requests"]) > 100:
        fault = _fault(400, "INVALID_ARGUMENT", "at most 100 requests in one batch")
        status, headers, answer = fault(body)
      else:
        status, headers, answer = (api.answers.pop(0) if api.answers else _sound)(body)
      if status == 0:
        return  # the connection is closed without an answer
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(answer)))
      self.end_headers()
      self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
      del format, args

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def api(monkeypatch) -> Iterator[Api]:
  made = Api()
  with _serve(made) as url:
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GEMINI_API_KEY", _KEY)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    # A user of Vertex AI has these; the key is for the other API.
    monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "true")
    yield made


@pytest.fixture
def waits() -> list[float]:
  return []


@pytest.fixture
def teacher(api, waits) -> GeminiTeacher:
  return GeminiTeacher(_MODEL, 8, _FAST, waits.append)


def _unit(vectors) -> np.ndarray:
  vectors = np.asarray(vectors)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_are_those_of_their_texts(api, teacher):
  inputs = [
    Input(f"text {i}", ("RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT")[i % 3 == 0])
    for i in range(250)
  ]
  vectors = teacher.encode(inputs)
  assert vectors.dtype == np.float32
  expected = [_vector(each.text, each.task, 8) for each in inputs]
  np.testing.assert_allclose(vectors, _unit(expected), atol=1e-6)
  assert [len(body["requests"]) for body in api.bodies] == [84, 100, 66]
  for body in api.bodies:
    assert len({request["taskType"] for request in body["requests"]}) == 1
  (path,) = api.paths
  assert path.endswith(f"/models/{_MODEL}:batchEmbedContents")
  assert api.keys == {_KEY}


def test_later_models_read_the_task_from_the_text(api):
  teacher = open_teacher("gemini:gemini-embedding-2", None, _FAST)
  assert teacher.width == 3072
  inputs = [teacher.query("a", "code"), teacher.document("b", "t", None)]
  vectors = teacher.encode(inputs)
  texts = ["task: code retrieval | query: a", "title: t | text: b"]
  # One vector for each, and not one for both.
  expected = [_vector(text, None, 3072) for text in texts]
  np.testing.assert_allclose(vectors, _unit(expected), atol=1e-6)
  assert "taskType" not in api.bodies[0]["requests"][0]


def test_task_types(teacher):
  assert set(gemini.TASK_TYPES) == set(prompts.TASK_PROMPTS)
  for kind, (query, document) in gemini.TASK_TYPES.items():
    assert teacher.query("a", kind) == Input("a", query)
    assert teacher.document("b", None, kind) == Input("b", document)
  assert teacher.query("a", None).task == "RETRIEVAL_QUERY"
  assert teacher.document("b", "t", None) == Input("t\nb", "RETRIEVAL_DOCUMENT")
  with pytest.raises(ConfigError, match="no task type for the kind 'STS/STS'"):
    teacher.query("a", "STS/STS")


def _retry_info(seconds: str) -> dict:
  return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": seconds}


def _day() -> dict:
  violation = {"quotaId": "EmbedContentRequestsPerDayPerProjectPerModel"}
  kind = "type.googleapis.com/google.rpc.QuotaFailure"
  return {"@type": kind, "violations": [violation]}


_BUSY = "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
  ("faults", "least"),
  [
    ([_fault(500, "INTERNAL", "oops"), _fault(503, "UNAVAILABLE", "busy")], [0.5, 1]),
    ([_fault(429, _BUSY, "slow down", [_retry_info("7.5s")])], [7.5]),
    ([_fault(429, _BUSY, "slow down", Retry_After="9")], [9]),
    ([lambda body: (502, {}, b"<html>no JSON</html>")], [0.5]),
    ([lambda body: (200, {}, b'{"embeddings": [')], [0.5]),
    ([lambda body: (0, {}, b"")], [0.5]),
  ],
  ids=["500 and 503", "RetryInfo", "Retry-After", "no JSON", "cut", "closed"],
)
def test_failures_that_pass(api, teacher, waits, faults, least):
  api.answers += faults
  vectors = teacher.encode([Input("a", "CLUSTERING")])
  np.testing.assert_allclose(vectors, _unit([_vector("a", "CLUSTERING", 8)]), atol=1e-6)
  assert len(api.bodies) == len(faults) + 1
  assert len(waits) == len(least)
  for waited, asked in zip(waits, least, strict=True):
    assert asked <= waited <= 2 * asked


def test_a_date_to_wait_for(api, teacher, waits):
  date = email.utils.formatdate(time.time() + 30, usegmt=True)
  api.answers.append(_fault(429, _BUSY, "slow down", Retry_After=date))
  teacher.encode([Input("a")])
  assert 25 <= waits[0] <= 30


def test_timeouts(api, waits):
  def late(body: dict) -> Answer:
    time.sleep(0.5)
    return _sound(body)

  api.answers.append(late)
  limits = dataclasses.replace(_FAST, timeout=0.1)
  GeminiTeacher(_MODEL, 8, limits, waits.append).encode([Input("a")])
  assert len(waits) == 1


@pytest.mark.parametrize(
  ("faults", "message", "requests"),
  [
    (
      [_fault(500, "INTERNAL", "oops")] * 3,
      "gave no answer in 3 attempts; the last: 500 INTERNAL: oops",
      3,
    ),
    ([_fault(429, _BUSY, "no more", [_day()])], "quota exhausted .*no more", 1),
    ([_fault(429, _BUSY, "no more", [_retry_info("7200s")])], "quota exhausted", 1),
    (
      [_fault(503, "UNAVAILABLE", "closed", Retry_After="7200")],
      r"asks to wait 7,200 seconds \(503 UNAVAILABLE: closed\)",
      1,
    ),
    (
      [_fault(400, "INVALID_ARGUMENT", f"{_KEY} is no key")] * 4,
      r"refused \(400 INVALID_ARGUMENT: … is no key\) the text that begins 'text 16'",
      4,  # of 8, 4, 2 and 1 texts
    ),
    ([_fault(403, "PERMISSION_DENIED", "not you")], "refused .*not you", 1),
    (
      [_changed(lambda made: made[:-1])],
      "gave 7 vectors for 8 texts, the first of which begins 'text 16'",
      1,
    ),
    (
      [_changed(lambda made: [*made[:3], {"values": [1.0] * 7}, *made[4:]])],
      "gave width 7, asked for 8, to text 3 of a window, which begins 'text 19'",
      1,
    ),
    (
      [_changed(lambda made: [*made[:3], {}, *made[4:]])],
      "gave width 0, asked for 8, to text 3",
      1,
    ),
    (
      [_changed(lambda made: [*made[:3], {"values": [float("nan")] * 8}, *made[4:]])],
      "the vector of text 19, which begins 'text 19', holds NaN",
      1,
    ),
    (
      [_changed(lambda made: [*made[:3], {"values": [0.0] * 8}, *made[4:]])],
      "the vector of text 19, which begins 'text 19', is zero",
      1,
    ),
  ],
)
def test_failures_that_do_not_pass(
  api, teacher, monkeypatch, tmp_path, faults, message, requests
):
  """What was paid for before stays, and the next call goes on."""
  # Of an answer with one bad vector the others stay, too.
  kept, left = (23, [7]) if "vector of text 19" in message else (16, [8, 6])
  monkeypatch.setattr(GeminiTeacher, "window", 8)
  api.answers += [_sound, _sound, *faults]
  inputs = [Input(f"text {i}") for i in range(30)]
  store = VectorStore.create_or_open(tmp_path, 8, "float32", teacher.fingerprint)
  with pytest.raises(DataError, match=message) as raised:
    embed_missing(store, teacher, inputs, _quiet)
  kept_ones = f"{kept} texts embedded before are kept: the same command goes on"
  assert kept_ones in str(raised.value)
  assert _KEY not in str(raised.value)
  assert raised.value.__cause__ is None or _KEY not in repr(raised.value.__cause__)
  assert len(api.bodies) == 2 + requests
  assert len(store) == kept
  embed_missing(store, teacher, inputs, _quiet)
  sent = [len(body["requests"]) for body in api.bodies[2 + requests :]]
  assert sent == left
  rows = store.locate(np.array([each.key() for each in inputs], np.uint64))
  expected = _unit([_vector(each.text, None, 8) for each in inputs])
  np.testing.assert_allclose(store.gather(rows), expected, atol=1e-6)


def test_a_request_that_fails_keeps_those_before_it(api, teacher, tmp_path):
  """Of the same window: they are paid for."""
  api.answers += [_sound, _fault(403, "PERMISSION_DENIED", "not you")]
  inputs = [Input(f"text {i}") for i in range(250)]
  store = VectorStore.create_or_open(tmp_path, 8, "float32", teacher.fingerprint)
  with pytest.raises(DataError, match="not you.* The 100 texts embedded before"):
    embed_missing(store, teacher, inputs, _quiet)
  assert len(store) == 100
  embed_missing(store, teacher, inputs, _quiet)
  assert [len(body["requests"]) for body in api.bodies] == [100, 100, 100, 50]
  rows = store.locate(np.array([each.key() for each in inputs], np.uint64))
  expected = _unit([_vector(each.text, None, 8) for each in inputs])
  np.testing.assert_allclose(store.gather(rows), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [0, 37, 99])
def test_a_refused_text_is_found(api, teacher, tmp_path, bad):
  """The others of its batch before it are kept, and never sent again."""
  refused = _fault(400, "INVALID_ARGUMENT", "bad text")
  paid: list[str] = []

  def judged(body: dict) -> Answer:
    texts = [request["content"]["parts"][0]["text"] for request in body["requests"]]
    if f"text {100 + bad}" in texts:
      return refused(body)
    paid.extend(texts)
    return _sound(body)

  api.answers += [judged] * 100
  inputs = [Input(f"text {i}") for i in range(250)]
  store = VectorStore.create_or_open(tmp_path, 8, "float32", teacher.fingerprint)
  kept = f"The {100 + bad} texts embedded before are kept"
  for _ in range(2):
    with pytest.raises(
      DataError, match=f"bad text.* the text that begins 'text {100 + bad}'.*"
    ) as raised:
      embed_missing(store, teacher, inputs, _quiet)
    assert kept in str(raised.value)
    kept = "The 0 texts"
  assert len(store) == len(paid) == len(set(paid)) == 100 + bad
  api.answers.clear()
  embed_missing(store, teacher, inputs, _quiet)
  assert len(store) == 250


def _quiet(line: str) -> None:
  del line


def test_the_account_s_rates_are_kept(api, monkeypatch):
  """100 texts of 40 bytes, 10 tokens each, three times."""
  now = 0.0

  def sleep(seconds: float) -> None:
    nonlocal now
    now += seconds

  clock = types.SimpleNamespace(monotonic=lambda: now)
  monkeypatch.setattr(gemini, "time", clock)
  for limits, minute in (
    (ApiLimits(texts_per_minute=50.0, tokens_per_minute=1e9), 2.0),
    (ApiLimits(texts_per_minute=1e9, tokens_per_minute=250.0), 4.0),
  ):
    began = now
    teacher = GeminiTeacher(_MODEL, 8, limits, sleep)
    teacher.encode([Input(f"{i:040d}") for i in range(300)])
    # The last request waits for those before it.
    assert now - began == pytest.approx(2 * 60 * minute)


def test_long_texts(api, teacher):
  texts = ["ä" * 200_000, *["b" * 131_072] * 70]
  teacher.encode([Input(text) for text in texts])
  sent = [[r["content"]["parts"][0]["text"] for r in b["requests"]] for b in api.bodies]
  assert [len(batch) for batch in sent] == [63, 8]
  assert sent[0][0] == "ä" * 131_072


def test_the_key_shows_nowhere(pairs, api, teacher, caplog, capfd):
  caplog.set_level(logging.DEBUG)
  lines: list[str] = []
  with pytest.raises(ConfigError, match=r"about \$0\.0.* --max_cost=0\.01$") as raised:
    teach(pairs.config, teacher, "paid", "float16", lines.append)
  assert not api.bodies
  api.answers.append(_fault(500, "INTERNAL", f"not for {_KEY}"))
  teach(pairs.config, teacher, "paid", "float16", lines.append, max_cost=0.01)
  assert "(https://ai.google.dev/gemini-api/docs/pricing, " in lines[0]
  shown = [*lines, str(raised.value), caplog.text, *capfd.readouterr(), repr(teacher)]
  assert not any(_KEY in text for text in shown)
  files = [p for p in pathlib.Path(pairs.config.cache_dir).rglob("*") if p.is_file()]
  assert any("segment" in str(path) for path in files)
  assert not any(_KEY.encode() in path.read_bytes() for path in files)


def test_what_is_needed(monkeypatch, api):
  with pytest.raises(ConfigError, match="price of 'new-embedding' .*give --price"):
    GeminiTeacher("new-embedding")
  with pytest.raises(ConfigError, match="width of 'new-embedding' .*give --width"):
    GeminiTeacher("new-embedding", limits=ApiLimits(price=0.5))
  priced = GeminiTeacher("new-embedding", 64, ApiLimits(price=0.5))
  assert (priced.width, priced.price, priced.price_source) == (64, 0.5, "--price")
  with pytest.raises(ConfigError, match=r"width 4000 is not in 1\.\.3072"):
    GeminiTeacher(_MODEL, 4000)
  assert GeminiTeacher(_MODEL, 64).fingerprint != GeminiTeacher(_MODEL, 65).fingerprint
  for name in gemini.KEYS:
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ConfigError, match="needs a key: set GEMINI_API_KEY"):
    GeminiTeacher(_MODEL)
