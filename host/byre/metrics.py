"""The containers of a VM for Prometheus, through its client library (``pip install byre[metrics]``).

    collector = ContainerCollector(vm)
    registry.register(collector)
    ...
    await collector.refresh()                  # then: generate_latest(registry)

Rule: `collect` only gives what the last `refresh` saw, so it may be called in any thread, also in one that the VM's
event loop waits for.  Counters are the kernel's; rates are Prometheus' to make.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from .stats import ContainerStats
    from .vm import UtilityVM

_COUNTERS = {
    "cpu_seconds": "Processor time used",
    "throttled_seconds": "Time for which the processor limit made it wait",
    "read_bytes": "Read from disks",
    "written_bytes": "Written to disks",
    "oom_kills": "Processes killed for want of memory",
    "refused_forks": "Forks refused for want of pids",
}
_GAUGES = {
    "memory_bytes": "Memory used",
    "memory_limit": "Memory limit in bytes; none where there is none",
    "pids": "Processes and threads",
    "pids_limit": "Limit of processes and threads; none where there is none",
}


class ContainerCollector(Collector):
    """``byre_container_*``, with the labels ``vm`` and ``container``."""

    def __init__(self, vm: UtilityVM) -> None:
        self._vm = vm
        self._seen: list[ContainerStats] = []

    async def refresh(self) -> None:
        """Look at every container.  Raises what `UtilityVM.stats` raises."""
        self._seen = await self._vm.stats()

    def collect(self) -> Iterator[Metric]:
        """What the last `refresh` saw."""
        for kinds, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, text in kinds.items():
                metric = family(f"byre_container_{name}", text, labels=["vm", "container"])
                for seen in self._seen:
                    value = getattr(seen, name)
                    if value is not None:
                        metric.add_metric([self._vm.name or self._vm.id, seen.container], value)
                yield metric
