"""Teachers: what gives texts the vectors that a model is to learn.

A spec names one: a directory that `embgemma embed --checkpoint` takes,
"sentence_transformers:DIR", or "gemini:MODEL".
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore
from embgemma.data import prompts
from embgemma.data.prompts import TaskPrompts
from embgemma.data.records import content_hash
from embgemma.errors import ConfigError, DataError
from embgemma.inference.embedder import WINDOW, CheckpointEmbedder
from embgemma.typing import Float

_SENTENCE_TRANSFORMERS = "sentence_transformers:"
_GEMINI = "gemini:"
# Kinds whose sides differ in what they are, whatever EmbeddingGemma's prompts say.
RETRIEVAL_KINDS = frozenset({"search", "qa", "fact_checking", "code", "reranking"})
BYTES_PER_TOKEN = 4  # of UTF-8, to estimate what is billed; any script, roughly


@dataclasses.dataclass(frozen=True)
class Input:
  """What a teacher embeds.

  Attributes:
    text: With its prompt, where that is part of the text.
    task: What else the vector depends on: an API's task type, or a prompt that the
      teacher is given apart from the text.
  """

  text: str
  task: str = ""

  def key(self) -> int:
    """A 64-bit hash of both, never 0."""
    return content_hash(f"{self.task}\0{self.text}" if self.task else self.text) or 1


class PartlyEncodedError(DataError):
  """A teacher failed when it had embedded some of the inputs.

  Args:
    reason: As of a DataError.
    places: Of the inputs that it had embedded.
    vectors: Of these.
  """

  def __init__(
    self, reason: str, places: Sequence[int], vectors: Float[np.ndarray, "n W"]
  ):
    super().__init__(reason)
    self.places = list(places)
    self.vectors = vectors


@runtime_checkable
class Teacher(Protocol):
  """Gives vectors to texts.

  Attributes:
    name: For messages.
    fingerprint: Of all that its vectors depend on beside the inputs.
    width: W.
    window: Inputs that are embedded before their vectors are kept.
  """

  name: str
  fingerprint: str
  width: int
  window: int

  def query(self, text: str, kind: str | None) -> Input:
    """A query as the teacher takes it.

    Args:
      text: Without prompt.
      kind: See `prompts.task_prompts`; None is "search".
    """
    ...

  def document(self, text: str, title: str | None, kind: str | None) -> Input:
    """A positive or negative as the teacher takes it."""
    ...

  def encode(self, inputs: Sequence[Input]) -> Float[np.ndarray, "N W"]:
    """Unit vectors, float32, in the order of the inputs.

    Raises:
      DataError: it could not embed them; a PartlyEncodedError has the vectors of some.
    """
    ...


@runtime_checkable
class Metered(Protocol):
  """A teacher that costs money.

  Attributes:
    price: USD a million tokens.
    price_source: Who says so, and when.
  """

  price: float
  price_source: str


@dataclasses.dataclass(frozen=True)
class ApiLimits:
  """How an API is used; the defaults are those of a paid project's first tier.

  Attributes:
    texts_per_minute: Most texts sent; Gemini counts each text of a batch as a request.
    tokens_per_minute: Most tokens sent, as estimated from the texts.
    attempts: At each request, the first included.
    timeout: Seconds that an answer may take.
    price: USD a million tokens, in place of the price known here.
  """

  texts_per_minute: float = 3000.0
  tokens_per_minute: float = 1e6
  attempts: int = 8
  timeout: float = 120.0
  price: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and not value > 0:
        raise ConfigError(f"{field.name} {value!r} must be above 0")


def open_teacher(
  spec: str, width: int | None, limits: ApiLimits | None = None
) -> Teacher:
  """The teacher of a spec.

  Args:
    spec: See the module.
    width: Components kept of each vector, brought back to unit norm; None is all.
    limits: Of an API; None are its defaults.

  Raises:
    ConfigError: no such teacher, a width that it does not have, a missing extra or key.
    CheckpointError: a checkpoint that cannot be read.
  """
  if width is not None and width < 1:
    raise ConfigError(f"width {width} must be at least 1")
  if spec.startswith(_SENTENCE_TRANSFORMERS):
    return SentenceTransformersTeacher(
      pathlib.Path(spec.removeprefix(_SENTENCE_TRANSFORMERS)), width
    )
  if spec.startswith(_GEMINI):
    from embgemma.teaching.gemini import GeminiTeacher

    return GeminiTeacher(spec.removeprefix(_GEMINI), width, limits or ApiLimits())
  if not pathlib.Path(spec).is_dir():
    raise ConfigError(
      f"teacher {spec!r}: no such directory; give a checkpoint's, "
      f"{_SENTENCE_TRANSFORMERS}DIR or {_GEMINI}MODEL"
    )
  return CheckpointTeacher(pathlib.Path(spec), width)


class CheckpointTeacher:
  """An embgemma checkpoint, or a directory of an EmbeddingGemma-like model.

  Its prompts are those of its own table for each kind. See `Teacher` for the methods.

  Args:
    directory: See `CheckpointEmbedder`.
    width: Components kept; None is all.

  Raises:
    CheckpointError: neither of them, or a damaged one.
    ConfigError: it is not so wide.
  """

  window = WINDOW

  def __init__(self, directory: pathlib.Path, width: int | None = None):
    self._embedder = CheckpointEmbedder(directory)
    self.name = str(directory)
    self.width = self._embedder.check_width(width)
    table = dict(self._embedder.description.prompts)
    if table.get("query") == prompts.OFFICIAL_PROMPTS["query"]:
      # What is released names 14 prompts; its model card has two more.
      table = {**prompts.MODEL_CARD_PROMPTS, **table}
    self._table = table
    length = self._embedder.description.max_length
    self.fingerprint = _digest(
      ["checkpoint", _model_files(directory), table, length, self.width]
    )

  def query(self, text: str, kind: str | None) -> Input:
    return Input(self._prompts(kind).format_query(text))

  def document(self, text: str, title: str | None, kind: str | None) -> Input:
    return Input(self._prompts(kind).format_document(text, title))

  def encode(self, inputs: Sequence[Input]) -> Float[np.ndarray, "N W"]:
    texts = (each.text for each in inputs)
    parts = list(self._embedder.stream(texts, self.width))
    return np.concatenate(parts or [np.zeros((0, self.width), np.float32)])

  def _prompts(self, kind: str | None) -> TaskPrompts:
    try:
      return prompts.task_prompts(kind or "search", self._table)
    except ConfigError as error:
      raise ConfigError(
        f"teacher {self.name}: {error}; a model of its own prompts is a "
        f"{_SENTENCE_TRANSFORMERS}DIR"
      ) from None


class SentenceTransformersTeacher:
  """A model that sentence-transformers runs, with the prompts that it names.

  Of a task the prompt of its MTEB type is taken where the model has it, as MTEB takes
  it; else, where the sides differ, the prompts of queries and documents; else the
  model's default, or none. See `Teacher` for the methods.

  Args:
    directory: Of the model.
    width: Components kept; None is all.

  Raises:
    ConfigError: sentence-transformers is missing, or the model is not so wide.
    DataError: it cannot read the directory.
  """

  window = WINDOW

  def __init__(self, directory: pathlib.Path, width: int | None = None):
    if not directory.is_dir():
      raise ConfigError(f"{directory}: no such directory of a sentence-transformer")
    try:
      from sentence_transformers import SentenceTransformer
    except ImportError as error:
      raise missing_extra(f"teacher {_SENTENCE_TRANSFORMERS}…", "teach") from error
    self.name = f"{_SENTENCE_TRANSFORMERS}{directory}"
    try:
      self._model = SentenceTransformer(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise DataError(
        f"{directory}: sentence-transformers cannot read it: {error}"
      ) from error
    # A model may hide its width; then one text shows it.
    full = self._model.get_embedding_dimension() or len(self._model.encode("text"))
    if width is not None and width > full:
      raise ConfigError(f"width {width} is not in 1..{full}, the width of {self.name}")
    self.width = width or full
    self._prompts = {k: v for k, v in self._model.prompts.items() if v is not None}
    files = _directory_files(directory)
    length = self._model.max_seq_length
    self.fingerprint = _digest(["sentence_transformers", files, length, self.width])

  def query(self, text: str, kind: str | None) -> Input:
    return Input(text, self._prompt(kind, 0, ("query",)))

  def document(self, text: str, title: str | None, kind: str | None) -> Input:
    prompt = self._prompt(kind, 1, ("document", "passage", "corpus"))
    if title and prompts.has_title(prompt):
      return Input(prompts.document(text, title, prompt))
    return Input(f"{title} {text}" if title else text, prompt)

  def _prompt(self, kind: str | None, side: int, sides: Sequence[str]) -> str:
    """The prompt of a kind on one side, 0 for queries; `sides` name it in general."""
    kind = kind or "search"
    chosen = prompts.TASK_PROMPTS.get(kind)
    if chosen is None:
      query, _, document = kind.partition("/")
      names: tuple[str, ...] = ((query, document)[side],)
    else:
      names = ((chosen.query, chosen.document)[side],)
    if kind in RETRIEVAL_KINDS:
      names += tuple(sides)
    for name in (*names, self._model.default_prompt_name):
      if name in self._prompts:
        return self._prompts[name]
    return ""

  def encode(self, inputs: Sequence[Input]) -> Float[np.ndarray, "N W"]:
    out = np.empty((len(inputs), self.width), np.float32)
    by_prompt: dict[str, list[int]] = {}
    for index, each in enumerate(inputs):
      by_prompt.setdefault(each.task, []).append(index)
    for prompt, indices in by_prompt.items():
      # Apart from the text: a model may leave its prompt out of the mean.
      vectors = self._model.encode(
        [inputs[i].text for i in indices], prompt=prompt, show_progress_bar=False
      )
      out[indices] = unit_prefix(vectors.astype(np.float32), self.width)
    return out


def unit_prefix(
  vectors: Float[np.ndarray, "N _"], width: int
) -> Float[np.ndarray, "N W"]:
  """The first components of vectors, brought back to unit norm; zeros stay zeros.

  Matryoshka representations (arXiv 2205.13147), as sentence-transformers cuts them.
  """
  cut = vectors[:, :width]
  norms = np.linalg.norm(cut, axis=1, keepdims=True)
  with np.errstate(invalid="ignore"):  # of infinities: who keeps vectors finds NaN
    return cut / np.where(norms == 0, 1, norms)


def missing_extra(what: str, extra: str) -> ConfigError:
  """The error of a package that is not installed."""
  return ConfigError(f"{what} needs embgemma[{extra}]: pip install 'embgemma[{extra}]'")


def _digest(value: Any) -> str:
  encoded = json.dumps(value, sort_keys=True).encode()
  return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _model_files(directory: pathlib.Path) -> dict[str, str]:
  """Digests of the files that a checkpoint's vectors depend on, by name."""
  model_dir, step = checkpoints.locate(directory)
  if not checkpoints.is_checkpoint(model_dir):
    return _directory_files(directory)
  store = CheckpointStore(model_dir)
  step = store.resolve_step(step)
  weights = model_dir / "checkpoints" / str(step) / store.shipped_item(step)
  own = [model_dir / "model.json", model_dir / "tokenizer.model"]
  return _files({path.name: path for path in own}) | _directory_files(weights)


def _directory_files(directory: pathlib.Path) -> dict[str, str]:
  """Digests of all files but documentation, by path."""
  paths = (path for path in directory.rglob("*") if path.is_file())
  names = {path.relative_to(directory): path for path in paths}
  return _files(
    {
      name.as_posix(): path
      for name, path in names.items()
      if name.suffix != ".md" and not any(part.startswith(".") for part in name.parts)
    }
  )


def _files(paths: Mapping[str, pathlib.Path]) -> dict[str, str]:
  # Whole: a second a gigabyte, where teaching takes hours.
  digests = {}
  for name, path in sorted(paths.items()):
    with open(path, "rb") as file:
      digests[name] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
  return digests
