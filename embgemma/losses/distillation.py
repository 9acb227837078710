"""Embedding matching: the student's vectors should be where the teacher's are."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from embgemma.errors import ConfigError
from embgemma.losses import global_batch
from embgemma.losses.matryoshka import normalize, truncate
from embgemma.typing import Array, ArrayLike, Bool, Float

METRICS = ("l2", "squared_l2", "cosine")
ALIGNMENTS = ("straight", "prefix", "projection")
ROLES = ("query", "positive", "negative")


def distance(
  student: Float[ArrayLike, "*n W"],
  teacher: Float[ArrayLike, "*n W"],
  metric: str = "l2",
) -> Float[Array, "*n"]:
  """Distances between paired vectors, float32.

  `l2` is the Euclidean distance, as in EmbedDistill (arXiv:2301.12005) equations
  7-8, with zero gradient at zero distance; `squared_l2` its square, summed and not
  averaged over columns; `cosine` is one minus the cosine.
  """
  student = jnp.asarray(student, jnp.float32)
  teacher = jnp.asarray(teacher, jnp.float32)
  if metric == "cosine":
    # Half the squared distance of unit vectors: 1 - x.y would lose small distances.
    return 0.5 * jnp.sum((normalize(student) - normalize(teacher)) ** 2, axis=-1)
  if metric == "squared_l2":
    return jnp.sum((student - teacher) ** 2, axis=-1)
  return optax.safe_norm(student - teacher, 0.0, axis=-1)


def align(
  student: Float[ArrayLike, "*n K"],
  teacher: Float[ArrayLike, "*n W"],
  alignment: str = "prefix",
  kernel: Float[ArrayLike, "K W"] | None = None,
) -> tuple[Float[Array, "*n V"], Float[Array, "*n V"]]:
  """Student and teacher at one width, float32.

  `straight` leaves both as they are, `prefix` cuts the teacher to the student's
  width and normalizes it again (for a teacher that was itself trained at nested
  widths), `projection` maps the student by `kernel` to the teacher's width without
  normalizing the result, as EmbedDistill does.
  """
  student = jnp.asarray(student, jnp.float32)
  teacher = jnp.asarray(teacher, jnp.float32)
  if alignment == "prefix":
    teacher = truncate(teacher, student.shape[-1])
  if alignment == "projection":
    kernel = jnp.asarray(kernel, jnp.float32)
    student = jnp.matmul(student, kernel, precision=jax.lax.Precision.HIGHEST)
  return student, teacher


def embedding_matching(
  student: Float[ArrayLike, "*n K"],
  teacher: Float[ArrayLike, "*n W"],
  mask: Bool[ArrayLike, "*n"] | None = None,
  metric: str = "l2",
  alignment: str = "prefix",
  kernel: Float[ArrayLike, "K W"] | None = None,
  axes: Sequence[str] = (),
) -> Float[Array, ""]:
  """The shard's share of the mean distance of student to teacher, float32.

  The mean is over the vectors of one role, in a batch split over the mesh axes `axes`
  (see `global_batch`), whose `mask` is True (all without one), and 0 over none.
  EmbeddingGemma (arXiv:2509.20354) section 2.2 adds up the roles query, positive
  and hard negative with equal weights; it gives neither metric nor alignment.
  """
  distances = distance(*align(student, teacher, alignment, kernel), metric)
  if mask is None:
    return jnp.sum(distances) / (distances.size * global_batch.shards(axes))
  count = global_batch.total(jnp.sum(mask, dtype=jnp.float32), axes)
  return jnp.sum(distances, where=mask) / jnp.maximum(count, 1.0)


def check_alignment(term: str, alignment: str, width: int, teacher_width: int) -> None:
  """Returns nothing if student and teacher widths suit the alignment.

  Raises:
    ConfigError: naming the term, both widths and an alignment that would do.
  """
  if alignment == "straight" and width != teacher_width:
    raise ConfigError(
      f"Term '{term}' matches student vectors of width {width} straight to teacher "
      f"vectors of width {teacher_width}; set its `alignment` to 'prefix' (a wider "
      "teacher with nested widths) or 'projection'."
    )
  if alignment == "prefix" and width > teacher_width:
    raise ConfigError(
      f"Term '{term}' needs the first {width} coordinates of the teacher, which has "
      f"only {teacher_width}; set its `alignment` to 'projection', or its `widths` to "
      f"at most {teacher_width}."
    )
