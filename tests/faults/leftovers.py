"""What is there, on this host and in a guest, that a round may have left behind.

Rule: what is counted is what the kernel says, not what byre says of itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from .places import descendants, name_of

#: Seconds in which what is ending must be gone.
PATIENCE = 5.0

#: A guest's processes (zombies too), cgroups, mounts and files; not the agent's, and not this look's own.
_LOOK = r"""
for p in /proc/[0-9]*; do
    [ ${p#/proc/} = $$ ] && continue
    { read -r stat <$p/stat; } 2>/dev/null || continue
    set -- ${stat##*) }
    case $2 in 0|2) ;; *) echo "process ${stat%%)*})" $1;; esac
done
read -r own </proc/self/cgroup
cd /sys/fs/cgroup
find containers processes -mindepth 1 -type d ! -name ahead ! -path "${own#0::/}"
cut -d' ' -f2,3 /proc/mounts
find /tmp /run -xdev
"""


class Host:
    """This process's descriptors, threads, tasks and files, and all processes that came of it, against those of the
    beginning."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> Counter[str]:
        """Numbers that the kernel gives at random are left out: another socket for the same purpose is no more."""
        found = [f"descriptor of {target}" for fd in os.listdir("/proc/self/fd") if (target := _target(fd))]
        found += [f"thread {thread.name}" for thread in threading.enumerate()]
        found += [f"process {pid}: {name_of(pid)}" for pid in descendants()]
        found += [f"task {getattr(task.get_coro(), '__qualname__', '')}" for task in asyncio.all_tasks()]
        for root in (tempfile.gettempdir(), os.environ["XDG_RUNTIME_DIR"]):
            found += [f"file {path}" for path in Path(root).rglob("*")]
        return Counter(found)

    async def more(self) -> list[str]:
        """What there is more than at the beginning, after it has had time to go."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while more := self._now() - self._before:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        return sorted(more.elements())


async def guest(vm: Any) -> list[str]:
    """What there is in a guest.  Raises what `run` raises."""
    done = await vm.run(["sh", "-c", _LOOK], capture_output=True, text=True, timeout=60)
    return sorted(line for line in done.stdout.splitlines() if not line.endswith("/machine-id"))


def _target(fd: str) -> str:
    """Without what changes while it is open: a template that is pruned is another file for none of its clones."""
    try:
        return re.sub(
            r"\[\d+\]|/proc/\d+|(?<=/templates/)[0-9a-f]+(\.gone)?(?=/)| \(deleted\)$",
            "",
            os.readlink(f"/proc/self/fd/{fd}"),
        )
    except OSError:
        return ""
