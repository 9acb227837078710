"""The contrastive loss: in-batch negatives and weighted hard negatives."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from embgemma.losses import global_batch
from embgemma.losses.matryoshka import truncate
from embgemma.typing import Array, ArrayLike, Bool, Float, Metrics, UInt32

# Similarities that exist at a time, at each width: 8 MiB. Larger is no faster.
BLOCK_ELEMENTS = 2**21

# Finite, so that a row with nothing to contrast has zero and not NaN gradients.
_MASKED = -1e30
# Two float32 similarities nearer than this are a tie: the positive's is a row-wise
# sum and the others' come from a matrix product, which round differently.
_TIE = 1e-6


# Pytree nodes are also rebuilt around shardings and abstract shapes, so the fields
# of the classes below are not checked at run time; the functions' arguments are.
@no_type_check
@flax.struct.dataclass
class Candidates:
  """The positives of the whole batch, unit norm, and what tells equal texts."""

  positive: Float[ArrayLike, "B K"]
  query_hash: UInt32[ArrayLike, "B 2"]
  positive_hash: UInt32[ArrayLike, "B 2"]


@no_type_check
@flax.struct.dataclass
class Rows:
  """Some rows of the batch; their positives are among the candidates."""

  query: Float[ArrayLike, "R K"]
  positive: Float[ArrayLike, "R K"]
  negative: Float[ArrayLike, "R M K"]
  negative_mask: Bool[ArrayLike, "R M"]
  query_hash: UInt32[ArrayLike, "R 2"]
  positive_hash: UInt32[ArrayLike, "R 2"]


@no_type_check
@flax.struct.dataclass
class RowScores:
  """The loss and the similarities of each row, float32, any leading shape."""

  loss: Float[Array, "*rows"]
  positive: Float[Array, "*rows"]
  in_batch_sum: Float[Array, "*rows"]
  in_batch_count: Float[Array, "*rows"]
  hard_sum: Float[Array, "*rows"]
  hard_count: Float[Array, "*rows"]
  correct: Float[Array, "*rows"]


def score_rows(
  rows: Rows,
  candidates: Candidates,
  temperature: float = 0.05,
  hardness: float = 5.0,
) -> RowScores:
  """The contrastive loss of each row against the positives of the whole batch.

  Rows are independent of each other, so a batch may be scored in blocks of rows,
  and no more than one block's R x B similarities need to exist at a time.

  EmbeddingGemma (arXiv:2509.20354) equations 2-3: the softmax of the row's own
  positive over every example's positive and the row's own hard negatives, each of
  these weighted by exp(hardness * stop_gradient(similarity)). Negatives of other
  rows take no part. An example with the same query or the same positive text is no
  negative. Read literally, that rule also strikes the row's own positive out of the
  denominator; here it stays, as in sentence-transformers'
  `MultipleNegativesRankingLoss`. The paper has at most one hard negative a query;
  with several, their weighted terms add up.
  """
  query = jnp.asarray(rows.query, jnp.float32)
  positive = jnp.sum(query * jnp.asarray(rows.positive, jnp.float32), axis=-1)
  in_batch = _dot("rk,bk->rb", query, candidates.positive)
  in_batch_mask = _is_negative(rows, candidates)
  hard = _dot("rk,rmk->rm", query, rows.negative)
  hard_mask = jnp.asarray(rows.negative_mask)

  hard_logits = hard / temperature + hardness * jax.lax.stop_gradient(hard)
  against = jnp.logaddexp(
    _logsumexp(in_batch / temperature, in_batch_mask),
    _logsumexp(hard_logits, hard_mask),
  )
  best = jnp.maximum(_max(in_batch, in_batch_mask), _max(hard, hard_mask))
  return RowScores(
    # -log(p / (p + n)) as softplus(log n - log p) keeps small losses exact.
    loss=jax.nn.softplus(against - positive / temperature),
    positive=positive,
    in_batch_sum=jnp.sum(in_batch, axis=-1, where=in_batch_mask),
    in_batch_count=jnp.sum(in_batch_mask, axis=-1, dtype=jnp.float32),
    hard_sum=jnp.sum(hard, axis=-1, where=hard_mask),
    hard_count=jnp.sum(hard_mask, axis=-1, dtype=jnp.float32),
    correct=(positive >= best - _TIE).astype(jnp.float32),
  )


def nce(
  rows: Rows,
  widths: Sequence[int],
  temperature: float = 0.05,
  hardness: float = 5.0,
  axes: Sequence[str] = (),
  block_elements: int = BLOCK_ELEMENTS,
) -> tuple[dict[int, Float[Array, ""]], Metrics]:
  """The shard's share of the mean loss at each width, and the batch's diagnostics.

  `rows` are the shard's, at full width, of a batch split over the mesh axes `axes`;
  see `global_batch`. M may be 0. `negative_mask` is False where a hard negative is
  missing; its vector then has no effect. The hashes are of the texts, 64 bits as two
  words.

  Rows are scored in blocks of at most `block_elements` similarities (one row at
  least), and again in the backward pass, so that no more exist at a time.

  The diagnostics are those of `summarize` at the widest width; all is float32.
  """
  gathered = global_batch.gather(
    Candidates(rows.positive, rows.query_hash, rows.positive_hash), axes
  )
  candidates = {
    width: dataclasses.replace(gathered, positive=truncate(gathered.positive, width))
    for width in widths
  }

  # Not `prevent_cse`: of a single block, the second scoring is then the first.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def scores(block: tuple[Rows, Bool[Array, " R"]]) -> dict[int, RowScores]:
    rows, real = block
    of_rows = {
      width: score_rows(_cut(rows, width), candidates[width], temperature, hardness)
      for width in widths
    }
    return jax.tree.map(lambda x: jnp.sum(x, where=real), of_rows)

  batch = len(rows.query) * global_batch.shards(axes)
  sums = jax.lax.map(scores, _blocks(rows, max(block_elements // batch, 1)))
  sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
  widest = jax.lax.stop_gradient(sums[max(widths)])
  shares = {width: value.loss / batch for width, value in sums.items()}
  return shares, summarize(global_batch.total(widest, axes), batch)


def summarize(sums: RowScores, batch: int) -> Metrics:
  """The mean similarities and accuracy of scores summed over the rows of a batch.

  `accuracy` is the share of rows whose positive is at least as similar to the query
  as each of its negatives, in-batch and hard, before any weight. A mean over no
  negatives is 0.
  """
  return {
    "similarity/positive": sums.positive / batch,
    "similarity/negative": sums.in_batch_sum / jnp.maximum(sums.in_batch_count, 1.0),
    "similarity/hard_negative": sums.hard_sum / jnp.maximum(sums.hard_count, 1.0),
    "accuracy": sums.correct / batch,
  }


def _blocks(rows: Rows, size: int) -> tuple[Rows, Bool[Array, "blocks R"]]:
  """Equal blocks of at most `size` rows, and which of their rows are no padding."""
  total = len(rows.query)
  blocks = -(-total // size)
  padding = -total % blocks

  def split(x: ArrayLike) -> Array:
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, len(x) // blocks, *x.shape[1:])

  return jax.tree.map(split, (rows, jnp.ones(total, bool)))


def _cut(rows: Rows, width: int) -> Rows:
  return dataclasses.replace(
    rows,
    query=truncate(rows.query, width),
    positive=truncate(rows.positive, width),
    negative=truncate(rows.negative, width),
  )


def _is_negative(rows: Rows, candidates: Candidates) -> Bool[Array, "R B"]:
  """True where the candidate has another query and another positive.

  So it is False for the row's own positive, which `score_rows` takes row by row.
  """
  same_query = _equal(rows.query_hash, candidates.query_hash)
  same_positive = _equal(rows.positive_hash, candidates.positive_hash)
  return ~(same_query | same_positive)


def _equal(
  a: UInt32[ArrayLike, "R 2"], b: UInt32[ArrayLike, "B 2"]
) -> Bool[Array, "R B"]:
  words = [jnp.equal(a[:, None, word], b[None, :, word]) for word in (0, 1)]
  return words[0] & words[1]


def _dot(equation: str, a: ArrayLike, b: ArrayLike) -> Array:
  b = jnp.asarray(b, jnp.float32)
  return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


def _logsumexp(
  logits: Float[Array, "R C"], mask: Bool[Array, "R C"]
) -> Float[Array, " R"]:
  if logits.shape[1] == 0:
    return jnp.full(logits.shape[:1], _MASKED)
  return jax.nn.logsumexp(jnp.where(mask, logits, _MASKED), axis=-1)


def _max(values: Float[Array, "R C"], mask: Bool[Array, "R C"]) -> Float[Array, " R"]:
  return jnp.max(values, axis=-1, where=mask, initial=_MASKED)
