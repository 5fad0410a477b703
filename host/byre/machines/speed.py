"""How much longer than usual a guest will take to boot here: what a boot deadline is multiplied with.

Rule: measured at the moment of the boot, so that a slow processor and a host that is busy with other things both
count; the accelerator's share is a constant, because measuring it would take a boot.
"""

from __future__ import annotations

import time

#: One round of the work takes this long, in seconds, on the reference: an idle 2.6 GHz EPYC core.
_REFERENCE = 0.011
_ROUNDS = 200_000
#: Booting takes 2.5 to 3 s under emulation on the reference; with KVM such guests boot in 0.4 s.
_EMULATION = 7.0
#: Beyond this a deadline says nothing any more.
_MOST = 60.0


def boot_speed_scale(accelerator: str) -> float:
    """1.0 on an idle reference host with KVM; more on anything slower.  Blocks for about 10 ms."""
    start = time.perf_counter()
    x = 0
    for i in range(_ROUNDS):
        x = (x * 31 + i) & 0xFFFF
    slowness = max(1.0, (time.perf_counter() - start) / _REFERENCE)
    return min(_MOST, slowness * (1.0 if accelerator == "kvm" else _EMULATION))
