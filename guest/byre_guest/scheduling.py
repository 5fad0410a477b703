"""Who runs first where the agent and its processes share a processor: the processes do.

A change between two of them costs an emulated machine 100 us and more, for it forgets each time where everything
lies in memory.  So the agent asks not to be preferred when it wakes (SCHED_BATCH): a process may fill its pipe, or
end, before the agent takes a look.  The agent keeps its share: from a process that never rests it gets the
processor at one of the next ticks, a few milliseconds later.

Rule: what the agent starts is scheduled as everything is.  A policy is inherited, so each child has its own set:
that of `os.fork` by a hook, that of `os.posix_spawn` by `of_spawned`.  Source: sched(7).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Arguments of `os.posix_spawn`.
of_spawned: dict[str, Any] = {}


def let_others_first() -> None:
    """From now on, for as long as the agent lives."""
    ordinary = (os.SCHED_OTHER, os.sched_param(0))
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.register_at_fork(after_in_child=lambda: os.sched_setscheduler(0, *ordinary))
    of_spawned["scheduler"] = ordinary
