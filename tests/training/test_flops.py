import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from embgemma.data.sequence_packing import SequenceShape, abstract_sequences
from embgemma.losses.denoising import cross_entropy
from embgemma.models import encoder_decoder
from embgemma.models.config import BackboneConfig, EmbedderConfig, TransformerConfig
from embgemma.models.embedder import Embedder, abstract_params
from embgemma.training.flops import (
  Flops,
  forward_flops,
  sequence_flops,
  traced_flops,
  visible_pairs,
)
from embgemma.typing import PackedTexts


def flops_of(function, *shapes) -> Flops:
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return traced_flops(jax.jit(function).trace(*arguments).jaxpr)


def test_a_product_and_its_gradient():
  assert flops_of(jnp.matmul, (3, 5), (5, 7)).counted == 2 * 3 * 5 * 7
  batched = flops_of(
    lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)
  )
  assert batched.counted == 4 * 2 * 3 * 5 * 7
  gradient = flops_of(
    jax.grad(lambda a, b: jnp.sin(a @ b).sum(), (0, 1)), (3, 5), (5, 7)
  )
  assert gradient.counted == 3 * 2 * 3 * 5 * 7


def test_scan_counts_every_turn():
  def stack(weights, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0].sum()

  assert flops_of(stack, (6, 4, 4), (3, 4)).counted == 6 * 2 * 3 * 4 * 4
  assert flops_of(jax.grad(stack), (6, 4, 4), (3, 4)).counted == 3 * 6 * 2 * 3 * 4 * 4


def test_rematerialisation_counts_again():
  def layer(w, x):
    return jnp.sin(jnp.sin(x @ w) @ w)

  plain = flops_of(jax.grad(lambda w, x: layer(w, x).sum()), (4, 4), (3, 4))
  remat = flops_of(
    jax.grad(lambda w, x: jax.checkpoint(layer)(w, x).sum()), (4, 4), (3, 4)
  )
  assert remat.counted == plain.counted + 2 * 2 * 3 * 4 * 4


def test_shard_map_counts_every_shard():
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def on_shards(x, w):
    return jax.shard_map(
      jnp.matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False
    )(x, w)

  # Split over a: each row once; the same on both parts of b.
  assert flops_of(on_shards, (8, 5), (5, 7)).counted == 2 * 2 * 8 * 5 * 7


def test_cond_counts_the_dearest_branch_and_while_says_so():
  def branches(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert flops_of(branches, (4, 4)).counted == 2 * 2 * 4**3

  def loop(x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

  assert flops_of(loop, (4, 4)) == Flops(128.0, 128.0, 1)


def test_highest_precision_is_six_passes():
  def product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

  assert flops_of(product, (3, 5), (5, 7)) == Flops(210.0, 6 * 210.0)


def test_pallas_kernels():
  def kernel(x, y, out):
    out[...] = x[...] @ y[...]

  def call(x, y, estimate=None):
    return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((16, 8), jnp.float32),
      grid=(2,),
      in_specs=[
        pl.BlockSpec((8, 8), lambda i: (i, 0)),
        pl.BlockSpec((8, 8), lambda i: (0, 0)),
      ],
      out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
      cost_estimate=estimate,
      interpret=True,
    )(x, y)

  assert flops_of(call, (16, 8), (8, 8)).counted == 2 * 16 * 8 * 8
  estimate = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)
  assert flops_of(lambda x, y: call(x, y, estimate), (16, 8), (8, 8)).counted == 123


TRANSFORMER = TransformerConfig(
  vocab_size=64,
  num_layers=3,
  width=16,
  mlp_width=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  attention_pattern=("local", "global"),
  window=(3, 2),
)


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_visible_pairs(mask, kind):
  config = TransformerConfig(**{**vars(TRANSFORMER), "mask": mask})
  for length in (0, 1, 2, 5, 9):
    i, j = np.mgrid[:length, :length]
    allowed = np.ones_like(i, bool)
    if kind == "local":
      allowed &= (i - j <= 3) & (j - i <= 2)
    if mask == "causal":
      allowed &= j <= i
    assert visible_pairs(config, kind, np.array([length]))[0] == allowed.sum()


def test_forward_flops_by_hand():
  config = EmbedderConfig(
    TRANSFORMER, hidden_width=32, embedding_width=24, matryoshka_widths=(24,)
  )
  # query and output 16 x 16 each, key and value 16 x 8 each, three of 16 x 32; heads
  # 16 x 32 and 32 x 24. One text of 4 tokens: local layers leave out pair (0, 3).
  layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
  pairs = 15 + 16 + 15
  expected = 2 * 3 * layer * 4 + 4 * 2 * 8 * pairs + 2 * (16 * 32 + 32 * 24)
  assert forward_flops(config, np.array([4, 0])) == expected


def test_a_training_pass_is_three_times_the_closed_form():
  """Over full rows of one text each, whose attention sees every pair."""
  transformer = dataclasses.replace(
    TRANSFORMER, attention_pattern=("global",), attention="reference"
  )
  config = EmbedderConfig(
    transformer, hidden_width=32, embedding_width=24, matryoshka_widths=(24,)
  )
  rows, length = 4, 16
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  texts = jax.ShapeDtypeStruct((rows,), jnp.int32)
  packed = PackedTexts(ids, ids, ids, texts, texts)

  def total(params, packed):
    return Embedder(config).embed(params, packed).sum()

  gradient = jax.jit(jax.grad(total)).trace(abstract_params(config), packed)
  expected = 3 * forward_flops(config, np.full(rows, length))
  counted = traced_flops(gradient.jaxpr).counted
  # Pooling and the like: little, and not in the closed form.
  assert expected <= counted <= 1.02 * expected


DECODER = dataclasses.replace(TRANSFORMER, mask="causal", window=(3, 0), num_layers=2)
# Another shape than the encoder's: what is whose cannot be mixed up.
NARROW = dataclasses.replace(
  DECODER, width=12, mlp_width=20, num_heads=6, num_kv_heads=3, head_dim=4
)


def test_sequence_flops_by_hand():
  """One example of 4 inputs and 5 targets beside one without inputs, of 2 targets."""
  sizes = np.array([[4, 5], [0, 2]])
  layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
  # Causal, 4 keys of a local layer: 1 + 2 + 3 + 4 + 4 of five; 1 + 2 of two.
  own = (14 + 3) + (15 + 3)
  alone = 2 * 2 * layer * 7 + 4 * 2 * 8 * own + 2 * 64 * 16 * 7
  assert sequence_flops(BackboneConfig(None, DECODER), sizes) == alone
  encoder = 2 * 3 * layer * 4 + 4 * 2 * 8 * (15 + 16 + 15)
  # In both layers: keys and values of 4 states, 4 x 5 pairs.
  reading = 2 * (2 * (2 * 16 * 8) * 4 + 4 * 2 * 8 * 20)
  merged = BackboneConfig(TRANSFORMER, DECODER)
  assert sequence_flops(merged, sizes) == alone + encoder + reading
  separate = dataclasses.replace(merged, cross_attention="separate")
  queries_and_output = 2 * 2 * (2 * 16 * 16) * 7
  expected = alone + encoder + reading + queries_and_output
  assert sequence_flops(separate, sizes) == expected


@pytest.mark.parametrize("kind", ["alone", "merged", "separate"])
def test_a_training_pass_of_a_decoder_is_three_times_the_closed_form(kind):
  """Over full rows of one example each; masked logits are computed, not counted."""

  def plain(stack):
    return dataclasses.replace(
      stack, attention_pattern=("global",), attention="reference"
    )

  encoder, decoder = plain(TRANSFORMER), plain(DECODER)
  inputs, targets, rows = 24, 16, 4
  if kind == "separate":
    decoder = plain(NARROW)
    config = BackboneConfig(encoder, decoder, "separate", shared_table=False)
  else:
    config = BackboneConfig(None if kind == "alone" else encoder, decoder)
  if config.encoder is None:
    inputs = 0
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
    abstract_sequences(SequenceShape(inputs, targets, 1, rows), 1),
  )

  def loss(params, batch):
    hidden = encoder_decoder.hidden_states(config, params, batch)
    table = encoder_decoder.output_table(config, params)
    return cross_entropy(hidden, table, batch.targets, batch.weights).loss

  params = encoder_decoder.abstract_params(config)
  gradient = jax.jit(jax.grad(loss)).trace(params, batch)
  closed = sequence_flops(config, np.full((rows, 2), (inputs, targets)))
  masked = rows * targets * (targets - 1) // 2
  closed += 4 * decoder.num_layers * decoder.num_heads * decoder.head_dim * masked
  assert traced_flops(gradient.jaxpr).counted == 3 * closed
