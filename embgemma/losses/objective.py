"""The training objective of the embedding stages: a weighted sum of terms."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, no_type_check, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta

from embgemma.errors import ConfigError
from embgemma.losses import global_batch
from embgemma.losses.contrastive import Rows, nce
from embgemma.losses.distillation import (
  ALIGNMENTS,
  METRICS,
  ROLES,
  check_alignment,
  embedding_matching,
)
from embgemma.losses.matryoshka import check_widths, truncate
from embgemma.losses.spread_out import spread_out
from embgemma.typing import Array, ArrayLike, Bool, Float, Metrics, Params, UInt32

_WIDTHS = (768, 512, 256, 128)


# A pytree node is also rebuilt around shardings and abstract shapes, so its fields
# are not checked at run time; the losses' arguments are.
@no_type_check
@flax.struct.dataclass
class PairBatch:
  """The embeddings of a batch of one task, and what the losses need beside them.

  Inside `jax.shard_map`, those of one shard's examples, as many in each shard.
  Embeddings have unit norm at full width. M may be 0; where `negative_mask` is
  False the negative is missing and its vector may be anything finite. The hashes
  are 64 bits of the text as two words. Teacher vectors are there for distillation
  only, of any float dtype; where a text has none its mask is False, and they may be
  anything finite. Without a mask all have them.
  """

  query: Float[ArrayLike, "B E"]
  positive: Float[ArrayLike, "B E"]
  negative: Float[ArrayLike, "B M E"]
  negative_mask: Bool[ArrayLike, "B M"]
  query_hash: UInt32[ArrayLike, "B 2"]
  positive_hash: UInt32[ArrayLike, "B 2"]
  teacher_query: Float[ArrayLike, "B W"] | None = None
  teacher_positive: Float[ArrayLike, "B W"] | None = None
  teacher_negative: Float[ArrayLike, "B M W"] | None = None
  teacher_query_mask: Bool[ArrayLike, " B"] | None = None
  teacher_positive_mask: Bool[ArrayLike, " B"] | None = None
  teacher_negative_mask: Bool[ArrayLike, "B M"] | None = None


class TermValue(NamedTuple):
  """What a term says of a batch.

  Attributes:
    losses: The shard's share of the unweighted loss at each width.
    diagnostics: Of the whole batch, equal on every shard and without gradient.
  """

  losses: dict[int, Array]
  diagnostics: Metrics


@runtime_checkable
class Term(Protocol):
  """One summand of an `Objective`; `name` heads its metrics and parameters."""

  name: str
  weight: float

  @property
  def needs_teacher(self) -> bool:
    """Whether batches must have teacher vectors."""

  def check(self, embedding_width: int, teacher_width: int | None = None) -> None:
    """Raises ConfigError if the term cannot work at these widths, None being any."""

  def init(self, key: Array, embedding_width: int) -> Params:
    """What the term learns beside the model; empty if nothing."""

  def __call__(
    self, batch: PairBatch, params: Params, axes: Sequence[str] = ()
  ) -> TermValue:
    """The unweighted losses on a batch split over mesh axes; see `global_batch`."""


@dataclasses.dataclass(frozen=True)
class Nce:
  """The contrastive loss at each width: `contrastive.nce` on truncated vectors.

  Widths and `hardness` are those of EmbeddingGemma (arXiv:2509.20354); it gives no
  temperature. The diagnostics are those of the widest width.

  Raises:
    ConfigError: if the temperature is not positive.
  """

  weight: float = 1.0
  widths: Sequence[int] = _WIDTHS
  temperature: float = 0.05
  hardness: float = 5.0
  name: str = "nce"

  needs_teacher = False

  def __post_init__(self) -> None:
    _freeze_widths(self)
    if not self.temperature > 0:
      raise ConfigError(
        f"Term '{self.name}' has temperature {self.temperature}; give a positive one, "
        "such as 0.05."
      )

  def check(self, embedding_width: int, teacher_width: int | None = None) -> None:
    """Raises ConfigError if a width does not fit."""
    check_widths(self.name, self.widths, embedding_width)

  def init(self, key: Array, embedding_width: int) -> Params:
    """Nothing to learn."""
    return {}

  def __call__(
    self, batch: PairBatch, params: Params, axes: Sequence[str] = ()
  ) -> TermValue:
    """The mean loss at each width, float32."""
    rows = Rows(
      query=batch.query,
      positive=batch.positive,
      negative=batch.negative,
      negative_mask=batch.negative_mask,
      query_hash=batch.query_hash,
      positive_hash=batch.positive_hash,
    )
    return TermValue(*nce(rows, self.widths, self.temperature, self.hardness, axes))


@dataclasses.dataclass(frozen=True)
class SpreadOut:
  """The spread-out loss at each width: `spread_out` on truncated vectors."""

  weight: float = 1.0
  widths: Sequence[int] = _WIDTHS
  name: str = "spread_out"

  needs_teacher = False

  def __post_init__(self) -> None:
    _freeze_widths(self)

  def check(self, embedding_width: int, teacher_width: int | None = None) -> None:
    """Raises ConfigError if a width does not fit."""
    check_widths(self.name, self.widths, embedding_width)

  def init(self, key: Array, embedding_width: int) -> Params:
    """Nothing to learn."""
    return {}

  def __call__(
    self, batch: PairBatch, params: Params, axes: Sequence[str] = ()
  ) -> TermValue:
    """The loss over queries plus that over positives at each width, float32."""
    losses = {
      width: spread_out(
        truncate(batch.query, width), truncate(batch.positive, width), axes
      )
      for width in self.widths
    }
    return TermValue(losses, diagnostics={})


@dataclasses.dataclass(frozen=True)
class EmbeddingMatching:
  """Distillation from teacher vectors: `embedding_matching` summed over roles.

  `widths` is the full width only where None, and `roles` are all, as in EmbeddingGemma
  (arXiv:2509.20354). `metric` is one of 'l2', 'squared_l2', 'cosine' and `alignment`
  one of 'straight', 'prefix', 'projection'; the last learns one kernel a width and
  needs `teacher_width`. The mean of a role is over the texts that have a teacher's
  vector, of whose share of all there is a diagnostic `NAME/taught`.

  Raises:
    ConfigError: for another metric, alignment or role, no role, or 'projection'
      without `teacher_width`.
  """

  weight: float = 1.0
  widths: Sequence[int] | None = None
  metric: str = "l2"
  alignment: str = "prefix"
  teacher_width: int | None = None
  roles: Sequence[str] = ROLES
  name: str = "embedding_matching"

  needs_teacher = True

  def __post_init__(self) -> None:
    _freeze_widths(self)
    object.__setattr__(self, "roles", tuple(self.roles))
    for field, value, known in (
      ("metric", self.metric, METRICS),
      ("alignment", self.alignment, ALIGNMENTS),
      *(("role", role, ROLES) for role in self.roles),
    ):
      if value not in known:
        raise ConfigError(
          f"Term '{self.name}' has {field} '{value}'; give one of {', '.join(known)}."
        )
    if not self.roles or len(set(self.roles)) != len(self.roles):
      raise ConfigError(
        f"Term '{self.name}' has roles {list(self.roles)}; give some of "
        f"{', '.join(ROLES)}, each once, or drop the term."
      )
    if self.alignment == "projection" and self.teacher_width is None:
      raise ConfigError(
        f"Term '{self.name}' projects to the teacher's width, which is not given; set "
        "its `teacher_width`."
      )

  def check(self, embedding_width: int, teacher_width: int | None = None) -> None:
    """Raises ConfigError if a width does not fit the embedding or the teacher."""
    widths = self._widths(embedding_width)
    check_widths(self.name, widths, embedding_width)
    if teacher_width is not None:
      self._check_teacher(teacher_width)
    known = self.teacher_width if teacher_width is None else teacher_width
    if known is not None:
      for width in widths:
        check_alignment(self.name, self.alignment, width, known)

  def _check_teacher(self, width: int) -> None:
    if self.teacher_width not in (None, width):
      raise ConfigError(
        f"Term '{self.name}' expects teacher vectors of width {self.teacher_width}, "
        f"but the run's have {width}; set its `teacher_width` to that, or TEACHER to "
        "vectors of the right width (`embgemma teach`)."
      )

  def init(self, key: Array, embedding_width: int) -> Params:
    """For 'projection', a kernel [width, teacher_width] under each width's name."""
    if self.alignment != "projection":
      return {}
    initializer = nn.with_logical_partitioning(
      nn.initializers.lecun_normal(), ("embed", "teacher")
    )
    widths = self._widths(embedding_width)
    keys = jax.random.split(key, len(widths))
    return {
      f"kernel_{width}": initializer(key, (width, self.teacher_width), jnp.float32)
      for key, width in zip(keys, widths, strict=True)
    }

  def __call__(
    self, batch: PairBatch, params: Params, axes: Sequence[str] = ()
  ) -> TermValue:
    """The sum over roles of the mean distance at each width, float32.

    Raises:
      ConfigError: if the batch has no teacher vectors, or their width does not suit.
    """
    roles = list(self._roles(batch))
    losses = {}
    for width in self._widths(batch.query.shape[-1]):
      kernel = self._kernel(params, width)
      losses[width] = sum(
        (
          self._match(truncate(student, width), teacher, mask & taught, kernel, axes)
          for student, teacher, mask, taught in roles
        ),
        start=jnp.zeros(()),
      )
    return TermValue(losses, {f"{self.name}/taught": _taught(roles, axes)})

  def _widths(self, embedding_width: int) -> Sequence[int]:
    return (embedding_width,) if self.widths is None else self.widths

  def _match(
    self,
    student: Float[ArrayLike, "*n K"],
    teacher: Float[ArrayLike, "*n W"],
    mask: Bool[ArrayLike, "*n"],
    kernel: Float[ArrayLike, "K W"] | None,
    axes: Sequence[str],
  ) -> Float[Array, ""]:
    self._check_teacher(teacher.shape[-1])
    check_alignment(self.name, self.alignment, student.shape[-1], teacher.shape[-1])
    return embedding_matching(
      student, teacher, mask, self.metric, self.alignment, kernel, axes
    )

  def _roles(
    self, batch: PairBatch
  ) -> Iterator[tuple[ArrayLike, ArrayLike, Array, Array]]:
    """Of each role: student, teacher, which texts there are, which have a teacher."""
    for role in self.roles:
      student = getattr(batch, role)
      teacher = getattr(batch, f"teacher_{role}")
      if student.size == 0:
        continue
      if teacher is None:
        raise ConfigError(
          f"Term '{self.name}' needs teacher vectors, but the batch has none for role "
          f"'{role}'; make them (`embgemma teach`), or take the term out of the "
          "objective."
        )
      everything = jnp.ones(student.shape[:-1], bool)
      taught = getattr(batch, f"teacher_{role}_mask")
      there = batch.negative_mask if role == "negative" else everything
      yield student, teacher, there, everything if taught is None else taught

  def _kernel(self, params: Params, width: int) -> Array | None:
    if self.alignment != "projection":
      return None
    name = f"kernel_{width}"
    if name not in params:
      raise ConfigError(
        f"Term '{self.name}' has no parameter '{self.name}/{name}'; start from "
        "`Objective.init`, or restore a checkpoint trained with this objective."
      )
    return meta.unbox(params[name])


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weighted sum of terms; a pure function of embeddings.

  EmbeddingGemma (arXiv:2509.20354) adds `Nce`, `SpreadOut` and `EmbeddingMatching`
  and gives no weights between them.

  Raises:
    ConfigError: if there is no term, or two terms have one name.
  """

  terms: Sequence[Term] = ()

  def __post_init__(self) -> None:
    object.__setattr__(self, "terms", tuple(self.terms))
    if not self.terms:
      raise ConfigError(
        "The objective has no terms; bind `Objective.terms` to at least one, such as "
        "`(@Nce(),)`."
      )
    names = [term.name for term in self.terms]
    for name in names:
      if names.count(name) > 1:
        raise ConfigError(
          f"The objective has {names.count(name)} terms named '{name}'; give each its "
          "own `name`."
        )

  @property
  def needs_teacher(self) -> bool:
    """Whether any term needs teacher vectors in the batch."""
    return any(term.needs_teacher for term in self.terms)

  def teacher_width(self, embedding_width: int) -> int | None:
    """The width of teacher vectors as far as the terms say; None if none needs any.

    That is the widest that a term is given, or matches.
    """
    widths = [
      term.teacher_width or max(term.widths or (embedding_width,))
      for term in self.terms
      if isinstance(term, EmbeddingMatching)
    ]
    return max(widths, default=None)

  def check(self, embedding_width: int, teacher_width: int | None = None) -> None:
    """Returns nothing if every term can work at these widths.

    Args:
      embedding_width: E.
      teacher_width: W; None is not known, or no teacher.

    Raises:
      ConfigError: naming the term and the width that cannot.
    """
    for term in self.terms:
      term.check(embedding_width, teacher_width)

  def init(self, key: Array, embedding_width: int) -> dict[str, Params]:
    """The parameters of the terms that learn any, by term name, float32.

    They are boxed with their logical axes, as `nn.Module.init` returns them.

    Raises:
      ConfigError: as `check` does.
    """
    self.check(embedding_width)
    keys = jax.random.split(key, len(self.terms))
    params = {
      term.name: term.init(key, embedding_width)
      for key, term in zip(keys, self.terms, strict=True)
    }
    return {name: values for name, values in params.items() if values}

  def __call__(
    self, batch: PairBatch, params: Params, axes: Sequence[str] = ()
  ) -> tuple[Float[Array, ""], Metrics]:
    """The loss and its metrics, float32 scalars.

    `params` are those of `init`, boxed or not. Inside `jax.shard_map` over mesh axes
    that split the batch, `axes` names them and the loss is the shard's share of it;
    see `global_batch`. The gradient of a share by `params` is the shard's part of
    their gradient.

    The metrics are those of the whole batch, without gradient: `loss`, each term's
    unweighted `NAME/WIDTH`, and the terms' diagnostics, of those with the same that of
    the widest width: `similarity/positive`, `similarity/negative`,
    `similarity/hard_negative`, `accuracy`, and of distillation `NAME/taught`.

    Raises:
      ConfigError: as `check` does, or if a term needs teacher vectors and the batch
        has none.
    """
    values = self._values(batch, params, axes)
    return self._weighted(values), self._metrics(values, axes)

  def gradients(
    self,
    vectors: Float[Array, "T E"],
    params: Params,
    batch: Callable[[Float[Array, "T E"]], PairBatch],
    axes: Sequence[str] = (),
  ) -> tuple[Float[Array, "T E"], Params, Metrics]:
    """Gradients of the loss, or the shard's share, by vectors and parameters.

    Each term is differentiated by itself, which costs the same, so that beside the
    metrics of `__call__` there is `vector_gradient_norm/NAME`: of the weighted term, by
    the vectors of the whole batch.

    Args:
      vectors: Of the shard's texts.
      params: As of `__call__`.
      batch: What the terms take, of the vectors.
      axes: As of `__call__`.

    Raises:
      ConfigError: as `__call__` does.
    """
    of_vectors = jnp.zeros_like(vectors)
    of_params: dict[str, Params] = {}
    values: dict[str, TermValue] = {}
    norms: Metrics = {}
    for term in self.terms:
      alone = Objective((term,))

      def loss(
        vectors: Array, params: Params, alone: "Objective" = alone
      ) -> tuple[Array, dict[str, TermValue]]:
        values = alone._values(batch(vectors), params, axes)
        return alone._weighted(values), values

      own = {name: params[name] for name in (term.name,) if name in params}
      (by_vectors, by_params), value = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        vectors, own
      )
      squares = jnp.sum(jnp.square(by_vectors.astype(jnp.float32)))
      norms[f"vector_gradient_norm/{term.name}"] = jnp.sqrt(
        global_batch.total(squares, axes)
      )
      of_vectors += by_vectors
      of_params |= by_params
      values |= value
    return of_vectors, of_params, self._metrics(values, axes) | norms

  def _values(
    self, batch: PairBatch, params: Params, axes: Sequence[str]
  ) -> dict[str, TermValue]:
    self.check(batch.query.shape[-1])
    return {
      term.name: term(batch, params.get(term.name, {}), axes) for term in self.terms
    }

  def _weighted(self, values: Mapping[str, TermValue]) -> Float[Array, ""]:
    total = jnp.zeros((), jnp.float32)
    for term in self.terms:
      total += term.weight * sum(values[term.name].losses.values())
    return total

  def _metrics(self, values: Mapping[str, TermValue], axes: Sequence[str]) -> Metrics:
    shares: Metrics = {"loss": self._weighted(values)}
    diagnostics: Metrics = {}
    widest: dict[str, int] = {}
    for term, value in values.items():
      shares |= {f"{term}/{width}": x for width, x in value.losses.items()}
      for name, diagnostic in value.diagnostics.items():
        if max(value.losses) > widest.get(name, 0):
          diagnostics[name] = diagnostic
          widest[name] = max(value.losses)
    return global_batch.total(jax.lax.stop_gradient(shares), axes) | diagnostics


def _taught(
  roles: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
  axes: Sequence[str],
) -> Float[Array, ""]:
  """Of the texts of the roles, the share that has a teacher's vector."""
  there = sum((jnp.sum(r[2], dtype=jnp.float32) for r in roles), jnp.zeros(()))
  taught = sum((jnp.sum(r[2] & r[3], dtype=jnp.float32) for r in roles), jnp.zeros(()))
  both = global_batch.total((taught, there), axes)
  return both[0] / jnp.maximum(both[1], 1.0)


def _freeze_widths(term: Any) -> None:
  """Makes widths a tuple: gin may give a list, and terms should be hashable."""
  if term.widths is not None:
    object.__setattr__(term, "widths", tuple(term.widths))
