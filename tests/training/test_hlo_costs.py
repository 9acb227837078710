"""Costs of programs that XLA makes here, for eight virtual devices, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embgemma.errors import EmbgemmaError
from embgemma.training.hlo_costs import Collective, hlo_costs
from embgemma.training.hlo_text import Program

MESH = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
F32 = 4


def costs_of(function, *arguments, donate=()):
  compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
  return hlo_costs(compiled.as_text(), 8)


def array(*shape, spec=None, dtype=jnp.float32):
  sharding = None if spec is None else NamedSharding(MESH, spec)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def on_shards(function, in_specs, out_specs):
  return jax.shard_map(
    function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def by_kind(costs):
  return {(c.kind, len(c.group)): c for c in costs.collectives}


def test_one_collective_of_each_kind():
  def function(x):
    whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
    part = jax.lax.psum_scatter(
      jnp.sin(whole), ("data", "fsdp"), scatter_dimension=0, tiled=True
    )
    return jax.lax.psum(jnp.cos(part), "data")

  costs = costs_of(
    on_shards(function, P("fsdp"), P(("data", "fsdp"))), array(64, 128, spec=P("fsdp"))
  )
  whole = 64 * 128 * F32
  assert costs.collectives == (
    Collective("all-gather", (0, 1), 1, whole),
    Collective("all-reduce", (0, 2, 4, 6), 1, whole // 8),
    Collective("reduce-scatter", tuple(range(8)), 1, whole),
  )
  sent = {c.kind: c.sent_bytes for c in costs.collectives}
  assert sent == {
    "all-gather": whole / 2,
    "all-reduce": 2 * 3 / 4 * whole / 8,
    "reduce-scatter": 7 / 8 * whole,
  }


def test_all_to_all_and_permute():
  def function(x):
    x = jax.lax.all_to_all(x, "data", split_axis=0, concat_axis=1, tiled=True)
    pairs = [(i, (i + 1) % 4) for i in range(4)]
    return jax.lax.ppermute(x, "data", pairs)

  found = by_kind(
    costs_of(on_shards(function, P("data"), P("data")), array(64, 8, spec=P("data")))
  )
  size = 16 * 8 * F32
  assert found["all-to-all", 4].sent_bytes == 3 / 4 * size
  assert found["collective-permute", 2].sent_bytes == size


def test_collectives_in_nested_loops_count_every_turn():
  def function(x):
    def inner(x, _):
      return jnp.sin(jax.lax.psum(x, "data")), None

    def outer(x, _):
      return jax.lax.scan(inner, jnp.cos(jax.lax.pmax(x, "fsdp")), None, length=5)

    return jax.lax.scan(outer, x, None, length=3)[0]

  costs = costs_of(on_shards(function, P(), P()), array(32, 32))
  size = 32 * 32 * F32
  found = by_kind(costs)
  assert costs.unknown_loops == 0
  assert (found["all-reduce", 4].count, found["all-reduce", 4].full_bytes) == (
    15,
    15 * size,
  )
  assert (found["all-reduce", 2].count, found["all-reduce", 2].full_bytes) == (
    3,
    3 * size,
  )


def test_bytes_of_a_product():
  costs = costs_of(jnp.matmul, array(256, 512), array(512, 128))
  assert costs.hbm_bytes == F32 * (256 * 512 + 512 * 128 + 256 * 128)


def test_a_scan_moves_its_slices_and_not_its_stacks():
  """Each turn reads one matrix of the stack and writes one row of the results."""
  turns, width = 50, 64

  def function(weights, x):
    def body(x, w):
      x = jnp.tanh(x @ w)
      return x, x

    return jax.lax.scan(body, x, weights)

  costs = costs_of(function, array(turns, width, width), array(8, width))
  stack = turns * width * width * F32
  # The stack once, twice more where its slice is copied; never turns times.
  assert stack <= costs.hbm_bytes <= 4 * stack
  assert costs.unknown_loops == 0


def test_a_lookup_moves_its_rows_and_not_the_table():
  table, rows, width = 100_000, 32, 64

  def function(table, ids):
    return jnp.take(table, ids, axis=0, mode="clip")

  costs = costs_of(function, array(table, width), array(rows, dtype=jnp.int32))
  moved = rows * width * F32
  assert 2 * moved <= costs.hbm_bytes <= 4 * moved


def test_an_update_in_place_moves_the_update():
  def function(whole, part, index):
    return jax.lax.dynamic_update_slice(whole, jnp.sin(part), (index, 0))

  costs = costs_of(
    function,
    array(4096, 64),
    array(8, 64),
    jax.ShapeDtypeStruct((), jnp.int32),
    donate=0,
  )
  part = 8 * 64 * F32
  assert 2 * part <= costs.hbm_bytes <= 4 * part


def test_loops_of_unknown_length_are_reported():
  def function(x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

  assert costs_of(function, array(64, 64)).unknown_loops == 1


def test_a_conditional_counts_its_dearest_branch():
  def function(flag, x):
    return jax.lax.cond(flag, lambda x: x @ x @ x @ x, lambda x: x, x)

  costs = costs_of(function, jax.ShapeDtypeStruct((), jnp.bool_), array(64, 64))
  assert costs.hbm_bytes >= 3 * 3 * 64 * 64 * F32


# What TPU programs write, and CPU programs do not: asynchronous halves, on-chip
# memory, groups in closed form, loops whose length is only in their condition.
TPU_TEXT = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %two = s32[] get-tuple-element(%state), index=2
  %v = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %next = s32[]{:T(128)} add(%i, %two)
  %start = ((f32[8,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}) all-reduce-start(%v), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %done = f32[8,128]{1,0:T(8,128)} all-reduce-done(%start)
  ROOT %result = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%next, %done, %two)
}

%condition (state.1: (s32[], f32[8,128], s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(9)
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(1)
  %counter = s32[]{:T(128)} copy(%zero)
  %step = s32[] constant(2)
  %fetch = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %double = f32[8,128]{1,0:T(8,128)} add(%near, %near)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%counter, %double, /*index=2*/%step)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_tpu_notations():
  costs = hlo_costs(TPU_TEXT, 8)
  size = 8 * 128 * F32
  # From 1 by 2 to 9: four turns.
  assert costs.collectives == (Collective("all-reduce", (0, 2, 4, 6), 4, 4 * size),)
  assert costs.unknown_loops == 0
  # The copy reads main memory and writes on-chip memory, the sum the other way; every
  # turn reads and writes the vector and adds two counters into a third. The counter's
  # copy is read and written once.
  assert costs.hbm_bytes == size + size + 4 * (2 * size + 3 * 4) + 2 * 4


# A collective that runs beside another fusion: in the one that starts it, in that one,
# and in the one that ends it.
ASYNC_TEXT = """HloModule step, is_scheduled=true

%start (a: f32[16,128]) -> (f32[16,128], f32[64,128], u32[]) {
  %a = f32[16,128]{1,0} parameter(0)
  %g.1 = f32[64,128]{1,0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (f32[16,128]{1,0}, f32[64,128]{1,0}, u32[]{:S(2)}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (b: f32[16,128], c: f32[64,128], d: u32[], e: f32[8,128]) -> (f32[8,128], f32[16,128], f32[64,128], f32[64,128], u32[]) {
  %b = f32[16,128]{1,0} parameter(0)
  %c = f32[64,128]{1,0} parameter(1)
  %d = u32[]{:S(2)} parameter(2)
  %e = f32[8,128]{1,0} parameter(3)
  %n = f32[8,128]{1,0} negate(%e)
  %g.2 = f32[64,128]{1,0} all-gather(%b), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[8,128]{1,0}, f32[16,128]{1,0}, f32[64,128]{1,0}, f32[64,128]{1,0}, u32[]{:S(2)}) tuple(%n, %b, %c, %g.2, %d)
}

%end (f: f32[16,128], h: f32[64,128], i: f32[64,128], j: u32[]) -> f32[64,128] {
  %f = f32[16,128]{1,0} parameter(0)
  %h = f32[64,128]{1,0} parameter(1)
  %i = f32[64,128]{1,0} parameter(2)
  %j = u32[]{:S(2)} parameter(3)
  %g.3 = f32[64,128]{1,0} all-gather(%f), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d.1 = f32[64,128]{1,0} custom-call(%f, %h, %g.3, %j), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[16,128], q: f32[8,128]) -> (f32[64,128], f32[8,128]) {
  %p = f32[16,128]{1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %f1 = (f32[16,128]{1,0}, f32[64,128]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %x0 = f32[16,128]{1,0} get-tuple-element(%f1), index=0
  %x1 = f32[64,128]{1,0} get-tuple-element(%f1), index=1
  %x2 = u32[]{:S(2)} get-tuple-element(%f1), index=2
  %f2 = (f32[8,128]{1,0}, f32[16,128]{1,0}, f32[64,128]{1,0}, f32[64,128]{1,0}, u32[]{:S(2)}) fusion(%x0, %x1, %x2, %q), kind=kOutput, calls=%beside
  %y0 = f32[8,128]{1,0} get-tuple-element(%f2), index=0
  %y1 = f32[16,128]{1,0} get-tuple-element(%f2), index=1
  %y2 = f32[64,128]{1,0} get-tuple-element(%f2), index=2
  %y3 = f32[64,128]{1,0} get-tuple-element(%f2), index=3
  %y4 = u32[]{:S(2)} get-tuple-element(%f2), index=4
  %f3 = f32[64,128]{1,0} fusion(%y1, %y2, %y3, %y4), kind=kCustom, calls=%end
  ROOT %r = (f32[64,128]{1,0}, f32[8,128]{1,0}) tuple(%f3, %y0)
}
"""  # noqa: E501


def test_a_collective_in_several_fusions_counts_once():
  costs = hlo_costs(ASYNC_TEXT, 8)
  part, whole, beside = (rows * 128 * F32 for rows in (16, 64, 8))
  assert costs.collectives == (Collective("all-gather", (0, 1, 2, 3), 1, whole),)
  # What the start hands on is its own part: read, and counted as written with it.
  assert costs.hbm_bytes == 2 * part + whole + 2 * beside


def test_other_text_is_refused():
  with pytest.raises(EmbgemmaError, match="cannot be read as HLO"):
    Program.parse("module @jit_f {}")
