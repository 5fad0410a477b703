"""`python -m benchmarks.performance RESULT.json`: docs/performance.md and docs/performance.svg from what
`python -m benchmarks peers --json` printed.  What was not measured is named with its reason, in both.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import date
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

DOCS = Path(__file__).parents[1] / "docs"

#: Figure (its key after the peer's name) and what the page calls it.
STEPS = {
    "cold_start": "cold start → first output",
    "warm_start": "warm start → first output",
    "true": "true, warm",
    "output_8m": "8 MiB of output",
    "output_256m": "256 MiB of output",
    "put_8m": "8 MiB file in",
    "get_8m": "8 MiB file out",
}

#: Of the plot, in pixels: a bar's row, the left column of names, the bars, the right column of times.
ROW, NAMES, BARS, TIMES = 18, 130, 420, 90

#: Readable on white and on black.
STYLE = "text{font:12px sans-serif;fill:#767676}.h{font-weight:bold}rect{fill:#8a8a8a}.byre{fill:#d9772b}"


def seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def names(result: dict[str, Any]) -> list[str]:
    """All peers of a result, in the order of their turns, those that are missing last."""
    found = list(result["versions"])
    return found + [name for name in result["missing"] if not any(name.startswith(other) for other in found)]


def table(result: dict[str, Any]) -> str:
    """Rows are peers; a dash is explained below by `reasons`."""
    lines = ["| | " + " | ".join(STEPS.values()) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name in names(result):
        values = [result["figures"].get(f"{name}_{step}_s") for step in STEPS]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else seconds(v) for v in values) + " |")
    return "\n".join(lines)


def reasons(result: dict[str, Any]) -> str:
    """What is missing, and why: one line for each peer and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for key, why in result["missing"].items():
        name = next((name for name in names(result) if key == name or key.startswith(f"{name}_")), key)
        step = STEPS.get(key.removeprefix(f"{name}_"), "all of it" if key == name else key)
        found.setdefault((name, why), []).append(step)
    return "\n".join(f"- {name}: {', '.join(steps)}: {why}" for (name, why), steps in found.items())


def plot(result: dict[str, Any]) -> str:
    """SVG: for each step a group of bars, logarithmic, the shorter the better."""
    figures = result["figures"]
    low, high = math.log10(min(figures.values())) - 0.2, math.log10(max(figures.values()))
    drawn: list[str] = []
    y = 0
    for step, title in STEPS.items():
        y += ROW + ROW // 2
        drawn.append(f'<text class="h" x="0" y="{y}">{title}</text>')
        for name in names(result):
            y += ROW
            value = figures.get(f"{name}_{step}_s")
            drawn.append(f'<text x="{NAMES - 8}" y="{y}" text-anchor="end">{escape(name)}</text>')
            width = 0 if value is None else BARS * (math.log10(value) - low) / (high - low)
            kind = ' class="byre"' if name == "byre" else ""
            drawn.append(f'<rect{kind} x="{NAMES}" y="{y - 11}" width="{width:.1f}" height="13"/>')
            said = "-" if value is None else seconds(value)
            drawn.append(f'<text x="{NAMES + width + 6:.1f}" y="{y}">{said}</text>')
    size = f'width="{NAMES + BARS + TIMES}" height="{y + ROW}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def page(result: dict[str, Any], day: date) -> str:
    host = result["host"]
    versions = "\n".join(f"- {name}: {version}" for name, version in result["versions"].items())
    ratio = "" if result["ratio"] is None else f"It is {result['ratio']:.3f} here (target {result['target']})."
    return f"""# Performance beside others

Made by `make performance`; do not edit by hand. {day.isoformat()}, {host["cpus"]} CPUs ({host["cpu"]}),
kernel {host["kernel"]}, accelerator {host["accelerator"]}. Other work may have been on the machine: what counts is
what is far apart, and a few tens of percent are not.

{table(result)}

![the same as bars, logarithmic; shorter is better](performance.svg)

Medians of {result["runs"]} goes (`true`: ten times as many); what took more than 10 s was done once. Each peer
carried random text of one kind, and all that came back was compared with what was sent. A way into a machine
(qemu-guest-agent, openssh, paramiko) has its cold start on a bare QEMU with byre's kernel and root; a warm start is
one from a state that was saved running. crun has no VM: it shows what a VM costs.

The ratio is byre's quickest start over the quickest of the other peers that bring a machine: that is what one waits
for. {ratio}

## Not measured
{reasons(result)}

## Versions
{versions}
"""


def main(source: str) -> None:
    result = json.loads(Path(source).read_text().splitlines()[-1])
    (DOCS / "performance.svg").write_text(plot(result))
    (DOCS / "performance.md").write_text(page(result, date.today()))


if __name__ == "__main__":
    main(sys.argv[1])
