"""The form in which every benchmark reports."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from byre.machines.accelerators import choose_accelerator


@dataclasses.dataclass(kw_only=True)
class Report:
    """`ratio` is ours over the yardstick of the same run; None where a benchmark only reports figures."""

    name: str
    runs: int
    ratio: float | None = None
    target: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_json(self) -> str:
        fields: dict[str, Any] = dataclasses.asdict(self)
        fields["ratio"] = None if self.ratio is None else round(self.ratio, 3)
        fields["figures"] = {key: round(value, 4) for key, value in self.figures.items()}
        return json.dumps({**fields, "host": host()})


def host() -> dict[str, Any]:
    """On what machine the figures were taken."""
    model = ""
    with open("/proc/cpuinfo") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpus": os.cpu_count(),
        "cpu": model,
        "kernel": platform.release(),
        "accelerator": choose_accelerator("auto").name,
    }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
