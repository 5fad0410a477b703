"""Namespaces of its own for a program that what a guest says may break out of: an emulator (`MACHINE`), or what
stands between a guest and this host's networks (`PROXY`).  What of this host such a program cannot reach, though it
runs as its user:

    users      no capability that counts anywhere, root's included; no process of this user's can be traced
    network    a loopback of its own: neither this host's networks nor its abstract sockets (not a proxy's)
    IPC, UTS   no shared memory, semaphore or message queue of this host's

util-linux makes them, in 2 ms; the program that is started stays one process, with the id that was spawned.  Not
among them: mounts (a private copy would keep what the host unmounts later, and hides no file) and processes (they
take a second process for each machine).

Rule: where the host refuses any of them there are none, and `problem` says why; nothing else changes.
Source: user_namespaces(7), network_namespaces(7), unshare(1), setpriv(1).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from typing import NamedTuple

from byre_proto.errors import printable


class Apart(NamedTuple):
    """How a program is set apart."""

    #: The command before setpriv; one user inside, root, is the one who asks.
    before: tuple[str, ...]
    #: setpriv's options.
    powers: tuple[str, ...]


#: Of the capabilities that the first process of a user namespace has there, none is left.
MACHINE = Apart(
    ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--uts", "--"),
    ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
)

#: It has them, there, to shut itself in a root of its own, and drops them then.
PROXY = Apart(("unshare", "--user", "--map-root-user", "--ipc", "--uts", "--"), ("--no-new-privs",))

#: What refuses user namespaces, and where it says so.
HINT = (
    "user namespaces are not permitted here: see the sysctls user.max_user_namespaces (not 0), "
    "kernel.unprivileged_userns_clone (1) and kernel.apparmor_restrict_unprivileged_userns (0); "
    "in a container of docker or podman: --privileged"
)

#: It takes 3 ms.
_TIMEOUT = 10.0


def problem() -> str | None:
    """Why a machine cannot have namespaces of its own here; None if it can.  Blocks for some ms, once."""
    for tool in (MACHINE.before[0], "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return _refusal(*MACHINE.before, "setpriv", *MACHINE.powers, "--", "true")


def mounts_problem() -> str | None:
    """Why a program that has its user's namespaces cannot have mounts of its own here; None if it can.  Blocks, as
    `problem`."""
    return _refusal("unshare", "--mount", "--", "true")


@functools.cache
def _refusal(*command: str) -> str | None:
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return printable(str(error))
    if done.returncode == 0:
        return None
    return printable(done.stderr.decode(errors="replace").strip() or f"unshare ended with {done.returncode}")
