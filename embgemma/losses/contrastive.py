"""The contrastive loss: in-batch negatives and weighted hard negatives."""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from embgemma.typing import Array, ArrayLike, Bool, Float, Metrics, UInt32

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


def summarize(scores: RowScores) -> tuple[Float[Array, ""], Metrics]:
  """The mean loss over rows, and the mean similarities and accuracy.

  `accuracy` is the share of rows whose positive is at least as similar to the query
  as each of its negatives, in-batch and hard, before any weight. A mean over no
  negatives is 0.
  """
  metrics = {
    "similarity/positive": jnp.mean(scores.positive),
    "similarity/negative": _ratio(scores.in_batch_sum, scores.in_batch_count),
    "similarity/hard_negative": _ratio(scores.hard_sum, scores.hard_count),
    "accuracy": jnp.mean(scores.correct),
  }
  return jnp.mean(scores.loss), metrics


def nce(
  query: Float[ArrayLike, "B K"],
  positive: Float[ArrayLike, "B K"],
  negative: Float[ArrayLike, "B M K"],
  negative_mask: Bool[ArrayLike, "B M"],
  query_hash: UInt32[ArrayLike, "B 2"],
  positive_hash: UInt32[ArrayLike, "B 2"],
  temperature: float = 0.05,
  hardness: float = 5.0,
) -> tuple[Float[Array, ""], Metrics]:
  """The mean contrastive loss of a batch at one width, and its diagnostics.

  Embeddings have unit norm; M may be 0. `negative_mask` is False where a hard
  negative is missing; its vector then has no effect. The hashes are of the texts,
  64 bits as two words. The loss is `score_rows` over all rows and the diagnostics
  are those of `summarize`, all float32.
  """
  rows = Rows(
    query=query,
    positive=positive,
    negative=negative,
    negative_mask=negative_mask,
    query_hash=query_hash,
    positive_hash=positive_hash,
  )
  candidates = Candidates(positive, query_hash, positive_hash)
  return summarize(score_rows(rows, candidates, temperature, hardness))


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


def _ratio(total: Float[Array, "*n"], count: Float[Array, "*n"]) -> Float[Array, ""]:
  return jnp.sum(total) / jnp.maximum(jnp.sum(count), 1.0)
