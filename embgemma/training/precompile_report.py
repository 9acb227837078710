"""What `embgemma precompile` prints."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from embgemma.training.roofline import ASSUMPTIONS, StepCosts, weak_scaling
from embgemma.training.step_plan import row_name

_GIB = 2**30
_COMPARED = (
  "topology",
  "batch",
  "a chip",
  "micro-\nbatches",
  "memory\nGiB",
  "fits",
  "compute\nms",
  "HBM\nms",
  "network\nms",
  "step\nms",
  "bound",
  "examples\n/ s",
  "MFU",
  "weak\nscaling",
)
_COMPARED_WIDTH = 140


def print_step(cost: StepCosts, lengths: str, console: Console) -> None:
  """Prints one step in full.

  Args:
    cost: Of the step.
    lengths: Where its lengths come from.
    console: Where to.
  """
  table = Table(title=f"{cost.topology}, batch {cost.batch_size:,}", show_header=False)
  for name, value in _step_rows(cost, lengths):
    table.add_row(name, value)
  console.print(table)
  if cost.compiled:
    console.print(_exchange_table(cost))
  if cost.chip is not None:
    console.print(ASSUMPTIONS, highlight=False)


def _step_rows(cost: StepCosts, lengths: str) -> list[tuple[str, str]]:
  mesh = " x ".join(f"{axis} {size}" for axis, size in cost.mesh.items())
  groups = "; ".join(
    f"{g.microbatches} x {g.rows} rows of {row_name(g)}" for g in cost.groups
  )
  rows = [
    ("mesh", mesh),
    ("texts", lengths),
    ("microbatches of a shard", groups),
    ("tokens", f"{cost.tokens:,} in {cost.slots:,} slots"),
    *_memory_rows(cost),
  ]
  if not cost.compiled:
    return rows
  rows += [
    ("FLOPs, all chips", f"{cost.flops:.4g} ({cost.model_flops:.4g} model FLOPs)"),
    ("bytes moved by a chip", f"{cost.hbm_bytes / 1e9:,.2f} GB"),
    *_time_rows(cost),
    ("compiling took", f"{cost.compile_seconds:,.0f} s"),
  ]
  if cost.unknown_loops:
    rows.append(("loops counted once", f"{cost.unknown_loops}, of unknown length"))
  return rows


def _memory_rows(cost: StepCosts) -> list[tuple[str, str]]:
  memory = cost.memory
  rows = []
  if cost.compiled:
    rows = [
      ("memory: arguments", _gib(memory.arguments)),
      ("memory: outputs not in place", _gib(memory.outputs - memory.aliased)),
      ("memory: temporaries", _gib(memory.temporaries)),
      ("memory: program", _gib(memory.code)),
    ]
  peak = _gib(memory.peak) if cost.compiled else f"at least {_gib(memory.peak)}"
  if memory.capacity is not None:
    verdict = "fits" if memory.fits else "does not fit"
    peak += f" of {_gib(memory.capacity)}: {verdict}"
  return [*rows, ("memory of a chip: peak", peak)]


def _time_rows(cost: StepCosts) -> list[tuple[str, str]]:
  times, seconds, overlapped = cost.times, cost.seconds, cost.overlapped_seconds
  if times is None or seconds is None or overlapped is None or cost.mfu is None:
    return []
  return [
    *((f"time: {name}", _milliseconds(value)) for name, value in times.items()),
    ("time: step", f"{_milliseconds(seconds)}, bound by {cost.bound}"),
    ("time: step, overlapped", _milliseconds(overlapped)),
    ("examples a second", f"{cost.batch_size / seconds:,.0f}"),
    ("real tokens a second", f"{cost.tokens / seconds:,.0f}"),
    ("MFU", f"{cost.mfu:.1%}"),
  ]


def _exchange_table(cost: StepCosts) -> Table:
  table = Table(title="collectives")
  for column in ("kind", "axes"):
    table.add_column(column)
  for column in ("devices", "count", "MB", "MB sent by a chip", "time"):
    table.add_column(column, justify="right")
  for e in sorted(cost.exchanges, key=lambda e: -e.sent_bytes):
    table.add_row(
      e.kind,
      e.axes,
      f"{e.devices}",
      f"{e.count:,}",
      f"{e.full_bytes / 1e6:,.2f}",
      f"{e.sent_bytes / 1e6:,.2f}",
      "–" if e.seconds is None else _milliseconds(e.seconds),
    )
  return table


def print_comparison(
  costs: Sequence[StepCosts], lengths: str, console: Console
) -> None:
  """Prints one line a step, with weak-scaling efficiency."""
  table = Table(title=f"steps ({lengths})", box=box.SIMPLE_HEAD)
  for column in _COMPARED:
    table.add_column(column, justify="left" if column == "topology" else "right")
  for cost, efficiency in zip(costs, weak_scaling(costs), strict=True):
    table.add_row(
      *_comparison_cells(cost), "–" if efficiency is None else f"{efficiency:.1%}"
    )
  # Wider than a narrow terminal, which wraps it: cut cells cannot be read at all.
  console.width = max(console.width, _COMPARED_WIDTH)
  console.print(table)
  if any(cost.chip is not None for cost in costs):
    console.print(ASSUMPTIONS, highlight=False)


def _comparison_cells(cost: StepCosts) -> list[str]:
  fits = {True: "yes", False: "no", None: "–"}[cost.memory.fits]
  cells = [
    cost.topology,
    f"{cost.batch_size:,}",
    f"{cost.batch_size / cost.devices:,g}",
    " + ".join(str(group.microbatches) for group in cost.groups),
    f"{cost.memory.peak / _GIB:,.2f}",
    fits,
  ]
  times, seconds, mfu = cost.times, cost.seconds, cost.mfu
  if times is None or seconds is None or mfu is None:
    return [*cells, *["–"] * 7]
  return [
    *cells,
    *(f"{value * 1e3:,.1f}" for value in (*times.values(), seconds)),
    str(cost.bound),
    f"{cost.batch_size / seconds:,.0f}",
    f"{mfu:.1%}",
  ]


def _gib(size: int) -> str:
  return f"{size / _GIB:,.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _milliseconds(seconds: float) -> str:
  return f"{seconds * 1e3:,.2f} ms"
