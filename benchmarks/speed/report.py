"""What a comparison found: figures of both sides, as a dict, a table and a plot."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

NAMES = {"ours": "embgemma", "theirs": "sentence-transformers"}
_COLORS = {"ours": "#3465a4", "theirs": "#babdb6"}
_ROW, _LEFT, _WIDTH, _RIGHT = 64, 230, 420, 190


def both_sides(
  ours: Callable[..., Any],
  theirs: Callable[..., Any],
  seconds: Mapping[str, Sequence[float]],
  examples: int,
  tokens: int,
) -> dict[str, Any]:
  """Rates and peaks of both sides, and their ratios turn by turn.

  Args:
    ours: Our worker.
    theirs: The other.
    seconds: Of the turns of each side.
    examples: Of one turn.
    tokens: Real ones of one turn.
  """
  sides = {}
  for side, worker in (("ours", ours), ("theirs", theirs)):
    middle = statistics.median(seconds[side])
    sides[side] = {
      "about": worker("about"),
      "seconds": list(seconds[side]),
      "examples_per_second": examples / middle,
      "tokens_per_second": tokens / middle,
      "peak_bytes": worker("peak"),
    }
  turns = zip(seconds["theirs"], seconds["ours"], strict=True)
  ratios = [other / own for other, own in turns]
  return {
    "sides": sides,
    "ratios": ratios,
    "ratio": statistics.median(ratios),
    "memory_ratio": sides["ours"]["peak_bytes"] / sides["theirs"]["peak_bytes"],
  }


def show(found: Mapping[str, Any]) -> None:
  """Prints a report of `both_sides` as a table."""
  print(f"{'':22} {'examples/s':>12} {'tokens/s':>12} {'peak MiB':>10} {'real':>6}")
  for side, values in found["sides"].items():
    share = values.get("real_tokens_per_slot")
    print(
      f"{NAMES[side]:22} {values['examples_per_second']:12.1f} "
      f"{values['tokens_per_second']:12.0f} {values['peak_bytes'] / 2**20:10.0f} "
      + (f"{share:6.1%}" if share else "")
    )
  spread = ", ".join(f"{ratio:.2f}" for ratio in sorted(found["ratios"]))
  print(f"ratio {found['ratio']:.2f} ({spread}); memory {found['memory_ratio']:.2f}")
  if mfu := found.get("mfu"):
    print(
      f"matmul {mfu['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s; MFU "
      f"{mfu['ours']:.1%}, theirs {mfu['theirs']:.1%}"
    )


def svg(reports: Sequence[Mapping[str, Any]]) -> str:
  """A bar chart: examples/s of both sides, each report scaled to its own larger one.

  Dots are the turns; reports without two sides are left out.
  """
  reports = [found for found in reports if "sides" in found]
  height = _ROW * len(reports) + 30
  width = _LEFT + _WIDTH + _RIGHT
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
    f'<rect width="{width}" height="{height}" fill="white"/>',
  ]
  for side, x in (("ours", _LEFT), ("theirs", _LEFT + 190)):
    parts.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{_COLORS[side]}"/>')
    parts.append(f'<text x="{x + 18}" y="17">{NAMES[side]}, examples/s</text>')
  for number, found in enumerate(reports):
    parts += _bars(found, 30 + number * _ROW)
  return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(found: Mapping[str, Any], top: int) -> list[str]:
  rates = {
    side: [
      values["examples_per_second"] * statistics.median(values["seconds"]) / seconds
      for seconds in values["seconds"]
    ]
    for side, values in found["sides"].items()
  }
  scale = _WIDTH / max(max(own) for own in rates.values())
  parts = [
    f'<text x="{_LEFT - 12}" y="{top + 24}" text-anchor="end">{title(found)}</text>',
    f'<text x="{_LEFT - 12}" y="{top + 42}" text-anchor="end" fill="#555">'
    f"{found['ratio']:.2f} times</text>",
  ]
  for line, (side, own) in enumerate(rates.items()):
    rate = found["sides"][side]["examples_per_second"]
    y = top + 8 + line * 24
    parts.append(
      f'<rect x="{_LEFT}" y="{y}" width="{rate * scale:.1f}" height="20" '
      f'fill="{_COLORS[side]}"/>'
    )
    parts += [
      f'<circle cx="{_LEFT + x * scale:.1f}" cy="{y + 10}" r="2.5" fill="black"/>'
      for x in own
    ]
    x = _LEFT + max(own) * scale + 8
    parts.append(f'<text x="{x:.1f}" y="{y + 15}">{rate:,.1f}</text>')
  return parts


def title(found: Mapping[str, Any]) -> str:
  """What a report is about, in a few words."""
  if found["mode"] == "embed":
    words = f"embed {found['texts']}"
  else:
    words = f"train, batch {found['batch']}" + (", cached" if found["cached"] else "")
  return escape(f"{found['preset']}: {words}")
