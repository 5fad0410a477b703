"""`python -m benchmarks NAME [--runs N] [--json]`"""

from __future__ import annotations

import argparse
import asyncio
import sys

from . import (
    boot,
    clone,
    container,
    density,
    execs,
    growth,
    layers,
    peers,
    ping,
    pool,
    serial,
    shares,
    snapshot,
    stdio,
)

BENCHMARKS = {
    "boot": boot.run,
    "clone": clone.run,
    "echo": clone.run_echo,
    "cli": clone.run_command,
    "density": density.run,
    "exec": execs.run,
    "exec-container": execs.run_in_container,
    "container": container.run,
    "stdio": stdio.run,
    "growth": growth.run,
    "layers": layers.run,
    "peers": peers.run,
    "ping": ping.run,
    "pool": pool.run,
    "serial": serial.run,
    "shares": shares.run,
    "snapshot": snapshot.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure byre on this machine.")
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--runs", type=int, default=5, help="how often each thing is measured (default: 5)")
    parser.add_argument("--vms", type=int, default=200, help="how many the benchmark density starts (default: 200)")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    count = options.vms if options.name == "density" else options.runs
    report = asyncio.run(BENCHMARKS[options.name](count))
    if not options.json:
        for key, value in report.figures.items():
            print(f"{key:<36}{value:12.3f}")
        if report.ratio is not None:
            print(f"{'ratio':<36}{report.ratio:12.3f}   target {report.target}")
    print(report.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
