"""`python -m tests.behaviours`: the table that the test runs gave, behaviour by vehicle.

    ok    shown by passed tests            FAIL  at least one of its tests failed
    -     not shown, with the reason below  ?     nothing was run: an omission, which fails

Exits non-zero when a behaviour failed or was left out without a reason.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

from . import vehicles
from .conftest import RESULTS

NUMBERS = (
    *(f"B{n}" for n in range(1, 16)),
    *("B15a", "B15b", "B15c", "B16"),
    *(f"B{n}" for n in range(20, 31)),
    *("B30a", "B31"),
    *(f"B{n}" for n in range(40, 53)),
    *("B60", "B63", "B64", "B65"),
)


def collect() -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """Number -> vehicle -> outcomes, and the vehicles of all recorded runs.  The last run of a test counts."""
    newest: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    ran: set[str] = set()
    for file in sorted(RESULTS.glob("behaviours-*.json"), key=lambda file: file.stat().st_mtime):
        run = file.stem.removeprefix("behaviours-").split("-")
        ran.update(run)
        for number, by_vehicle in json.loads(file.read_text()).items():
            for vehicle, tests in by_vehicle.items():
                # A test that needs no vehicle (the protocol, say) holds for all that this run had.
                for name in run if vehicle == "any" else [vehicle]:
                    newest[number][name].update(tests)
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for number, by_vehicle in newest.items():
        for vehicle, tests in by_vehicle.items():
            found[number][vehicle].update(tests.values())
    return found, ran


def cell(number: str, vehicle: str, outcomes: set[str]) -> str:
    if "failed" in outcomes:
        return "FAIL"
    if number in vehicles.NOT_SHOWN.get(vehicle, {}):
        return "-"  # whatever a test with fakes says of it
    return "ok" if "passed" in outcomes else "?"


def main() -> int:
    found, ran = collect()
    columns = [name for name in vehicles.ALL if name in ran]
    if not columns:
        print("no test run has left a record; run `make test` first")
        return 1
    print("behaviour  " + "".join(f"{name:>7}" for name in columns))
    bad = []
    for number in NUMBERS:
        cells = [cell(number, name, found[number][name]) for name in columns]
        bad += [f"{number} on {name}" for name, text in zip(columns, cells, strict=True) if text in ("FAIL", "?")]
        print(f"{number:<11}" + "".join(f"{text:>7}" for text in cells))
    print()
    for name in columns:
        reasons: dict[str, list[str]] = defaultdict(list)
        for number, reason in vehicles.NOT_SHOWN.get(name, {}).items():
            if number in NUMBERS:
                reasons[reason].append(number)
        for reason, numbers in reasons.items():
            print(f"not shown on {name}: {', '.join(numbers)}: {reason}")
    missing = [name for name in vehicles.ALL if name not in ran]
    if missing:
        print(f"no run on: {', '.join(missing)} (see tests/README.md)")
    if bad:
        print(f"failed or left out: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
