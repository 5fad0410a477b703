"""Namespaces of its own for an emulator: what of this host a program in it cannot reach, though it runs as its
user.

    users      no capability that counts anywhere, root's included; no process of this user's can be traced
    network    a loopback of its own: neither this host's networks nor its abstract sockets
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

from byre_proto.errors import printable

#: Before a command; one user inside, root, is the one who asks.
APART = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--uts", "--")

#: setpriv's: of the capabilities that the first process of a user namespace has there, none is left.
POWERLESS = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")

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
    for tool in (APART[0], "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return _refusal()


@functools.cache
def _refusal() -> str | None:
    command = [*APART, "setpriv", *POWERLESS, "--", "true"]
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return printable(str(error))
    if done.returncode == 0:
        return None
    return printable(done.stderr.decode(errors="replace").strip() or f"unshare ended with {done.returncode}")
