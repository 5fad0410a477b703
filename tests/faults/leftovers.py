"""What is there, on this host and in a guest, that a round may have left behind.

Rule: what is counted is what the kernel says, not what byre says of itself.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from .world import children, name_of

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
    """This process's descriptors, threads, children, tasks and files, against those of the beginning."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> set[str]:
        found = {f"descriptor {fd}: {_target(fd)}" for fd in os.listdir("/proc/self/fd") if _target(fd)}
        found |= {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}
        found |= {f"child {pid}: {name_of(pid)}" for pid in children()}
        found |= {f"task {task.get_coro()!r}" for task in asyncio.all_tasks()}
        for root in (tempfile.gettempdir(), os.environ["XDG_RUNTIME_DIR"]):
            found |= {f"file {path}" for path in Path(root).rglob("*")}
        return found

    async def more(self) -> set[str]:
        """What there is more than at the beginning, after it has had time to go."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while more := self._now() - self._before:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        return more


async def guest(vm: Any) -> list[str]:
    """What there is in a guest.  Raises what `run` raises."""
    done = await vm.run(["sh", "-c", _LOOK], capture_output=True, text=True, timeout=60)
    return sorted(line for line in done.stdout.splitlines() if not line.endswith("/machine-id"))


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
