"""The token loss of pretraining: cross-entropy over the vocabulary, with z-loss.

Logits are T x V: 8 GiB for 8,192 targets of Gemma's vocabulary. Here tokens are taken
a chunk at a time, and the gradients by hidden states and table are made with the loss,
while the chunk's logits are there: three products of T x V x D in all, none of them
repeated in the backward pass (as Liger kernel's fused linear cross-entropy, arXiv
2410.10989, section 3.2). What this gives is in docs/performance.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from embgemma.errors import ConfigError
from embgemma.typing import Array, ArrayLike, Float, Int, Metrics

# Most logits at once: half a GiB. A chunk reads the table and adds to its gradient,
# which pays from some hundred tokens on; on CPU more than that is no faster.
_LOGITS = 2**27
_CPU_TOKENS = 512


class TokenLosses(NamedTuple):
  """Sums over tokens, float32 scalars; only `loss` has a gradient.

  Attributes:
    loss: Of weight * (cross-entropy + z_loss * log_z ** 2).
    cross_entropy: Of weight * cross-entropy, in nats.
    correct: Of the weights of targets than which no token is likelier.
    weight: Of weights.
  """

  loss: Array
  cross_entropy: Array
  correct: Array
  weight: Array


class _Tokens(NamedTuple):
  """Tokens laid end to end, or in chunks of equal size."""

  hidden: Array
  targets: Array
  weights: Array


class _Gradients(NamedTuple):
  """Of `loss`, by hidden states and table; None where nobody asks."""

  hidden: Array | None
  table: Array | None


def cross_entropy(
  hidden: Float[Array, "*rows D"],
  table: Float[ArrayLike, "V D"],
  targets: Int[ArrayLike, "*rows"],
  weights: Float[ArrayLike, "*rows"],
  z_loss: float = 0.0,
  chunk_tokens: int | None = None,
) -> TokenLosses:
  """The summed losses of predicting each target from its hidden state.

  Logits are hidden @ table.T, without bias and soft-cap as in Gemma 3 and T5Gemma 2,
  a product in the dtype of `hidden`; softmax and sums are float32. log_z is the log of
  the softmax's denominator, and its square keeps logits from drifting (PaLM, arXiv
  2204.02311, section 5; t5x's `losses.cross_entropy_with_logits`).

  The gradient is made in the forward pass: under `jax.checkpoint` it would be made
  twice. A token of weight 0 changes nothing, whatever its hidden state and target.

  Args:
    hidden: The decoder's final hidden states, in the compute dtype.
    table: The token table, to which the output matrix is tied.
    targets: Token ids, < V.
    weights: What each token counts; without gradient.
    z_loss: Weight of log_z ** 2.
    chunk_tokens: Tokens whose logits exist at a time; None is what suits the platform.
  """
  tokens = _Tokens(
    hidden.reshape(-1, hidden.shape[-1]),
    jnp.ravel(targets),
    jnp.ravel(weights).astype(jnp.float32),
  )
  sums = _summed(z_loss, chunk_tokens, tokens, jnp.asarray(table))
  return TokenLosses(sums.loss, *jax.lax.stop_gradient(sums[1:]))


def logits_bytes(vocab_size: int) -> int:
  """Bytes of a chunk's logits and their gradient on an accelerator, float32."""
  return 2 * 4 * max(_LOGITS, vocab_size)


@dataclasses.dataclass(frozen=True)
class Denoising:
  """The objective of pretraining: `cross_entropy` of the targets.

  Attributes:
    z_loss: Weight of log_z ** 2; 1e-4 in t5x's models (examples/t5/t5_1_1).
  """

  z_loss: float = 1e-4

  def __post_init__(self) -> None:
    if not 0 <= self.z_loss < math.inf:
      raise ConfigError(
        f"Denoising.z_loss must be >= 0 and finite, got {self.z_loss!r}"
      )

  def __call__(
    self,
    hidden: Float[Array, "*rows D"],
    table: Float[ArrayLike, "V D"],
    targets: Int[ArrayLike, "*rows"],
    weights: Float[ArrayLike, "*rows"],
  ) -> TokenLosses:
    """`cross_entropy` with this z-loss."""
    return cross_entropy(hidden, table, targets, weights, self.z_loss)

  @staticmethod
  def metrics(sums: TokenLosses) -> Metrics:
    """Means over the targets of a batch, float32; 0 where there is none.

    `loss` is `cross_entropy` (nats) plus `z_loss`; `targets` is their weight.

    Args:
      sums: Over all of the batch's microbatches and shards.
    """
    targets = jnp.where(sums.weight > 0, sums.weight, 1.0)
    return {
      "loss": sums.loss / targets,
      "cross_entropy": sums.cross_entropy / targets,
      "z_loss": (sums.loss - sums.cross_entropy) / targets,
      "accuracy": sums.correct / targets,
      "targets": sums.weight,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
  z_loss: float, chunk_tokens: int | None, tokens: _Tokens, table: Array
) -> TokenLosses:
  return _by_chunks(z_loss, chunk_tokens, tokens, table, (False, False))[0]


def _summed_forward(z_loss, chunk_tokens, tokens, table):
  wanted = tokens.hidden.perturbed, table.perturbed
  values = _Tokens(*(x.value for x in tokens))
  return _by_chunks(z_loss, chunk_tokens, values, table.value, wanted)


def _summed_backward(z_loss, chunk_tokens, gradients, sums):
  del z_loss, chunk_tokens
  if isinstance(sums.loss, SymbolicZero):
    return None, None

  def chained(gradient: Array | None) -> Array | None:
    if gradient is None:
      return None
    return (gradient * sums.loss).astype(gradient.dtype)

  return _Tokens(chained(gradients.hidden), None, None), chained(gradients.table)


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _by_chunks(
  z_loss: float,
  chunk_tokens: int | None,
  tokens: _Tokens,
  table: Array,
  wanted: tuple[bool, bool],
) -> tuple[TokenLosses, _Gradients]:
  """Sums, and the gradients that are wanted: by hidden states, by the table."""
  total, vocab = len(tokens.hidden), len(table)

  def scanned(most: int) -> Callable[..., tuple[TokenLosses, _Gradients]]:
    return functools.partial(_scan, z_loss, most, wanted)

  if chunk_tokens is not None:
    return scanned(chunk_tokens)(tokens, table)
  most = max(_LOGITS // vocab, 1)
  cpu = min(most, _CPU_TOKENS)
  if cpu == most or total <= cpu:  # the same chunks on every platform
    return scanned(cpu)(tokens, table)
  return jax.lax.platform_dependent(
    tokens, table, cpu=scanned(cpu), default=scanned(most)
  )


def _scan(
  z_loss: float, most: int, wanted: tuple[bool, bool], tokens: _Tokens, table: Array
) -> tuple[TokenLosses, _Gradients]:
  """Chunk after chunk of at most `most` tokens; the table's gradient adds up."""
  total = len(tokens.hidden)
  by_hidden, by_table = wanted
  matrix = table.astype(tokens.hidden.dtype)

  def step(carry: Any, chunk: _Tokens) -> tuple[Any, Any]:
    sums, dtable = carry
    chunk_sums, dlogits = _chunk(z_loss, chunk, matrix)
    sums = jax.tree.map(jnp.add, sums, chunk_sums)
    dhidden = None
    if by_table:
      dtable += _product("tv,td->vd", dlogits, chunk.hidden)
    if by_hidden:
      dhidden = _product("tv,vd->td", dlogits, matrix).astype(matrix.dtype)
    return (sums, dtable), dhidden

  zero = jnp.zeros((), jnp.float32)
  start: Any = jnp.zeros(table.shape, jnp.float32) if by_table else None
  (sums, dtable), dhidden = jax.lax.scan(
    step, (TokenLosses(zero, zero, zero, zero), start), _chunks(tokens, most)
  )
  return sums, _Gradients(
    dhidden.reshape(-1, dhidden.shape[-1])[:total] if by_hidden else None,
    dtable.astype(table.dtype) if by_table else None,
  )


def _chunks(tokens: _Tokens, most: int) -> _Tokens:
  """Equal chunks of at most `most` tokens, the last filled up with weight 0."""
  total = max(len(tokens.hidden), 1)
  count = -(-total // most)
  size = -(-total // count)

  def split(x: Array) -> Array:
    padding = [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  # What does not count may hold anything, and 0 * inf would be NaN.
  counts = tokens.weights != 0
  hidden = jnp.where(counts[:, None], tokens.hidden, 0)
  targets = jnp.where(counts, tokens.targets, 0)
  return _Tokens(split(hidden), split(targets), split(tokens.weights))


def _chunk(
  z_loss: float, tokens: _Tokens, matrix: Float[Array, "V D"]
) -> tuple[TokenLosses, Float[Array, "T V"]]:
  """Sums over a chunk, and the gradient of its loss by its logits.

  The compiler leaves out the gradient where nothing uses it.
  """
  logits = _product("td,vd->tv", tokens.hidden, matrix)
  top = jnp.max(logits, axis=-1, keepdims=True)
  log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
  target = tokens.targets[:, None]
  weights = tokens.weights[:, None]
  of_target = jnp.take_along_axis(logits, target, axis=-1)
  entropy = log_z - of_target
  sums = TokenLosses(
    loss=jnp.sum(weights * (entropy + z_loss * log_z**2)),
    cross_entropy=jnp.sum(weights * entropy),
    correct=jnp.sum(weights * (of_target >= top)),
    weight=jnp.sum(weights),
  )
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  softmax = jnp.exp(logits - log_z) * (weights * (1.0 + 2.0 * z_loss * log_z))
  dlogits = softmax - jnp.where(ids == target, weights, 0.0)
  return sums, dlogits.astype(matrix.dtype)


def _product(spec: str, *operands: Array) -> Array:
  return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)
