"""Namespaces that live without a process in them, or, for processes, with one that does nothing: of pods.

    pin(directory, kinds)   new ones, each held by a bind mount on DIRECTORY/KIND
    hold(directory, cgroup) one for processes, held by its first process, which reaps what others leave
    release(directory)      let go of them

Rule: the first process of a pod's processes is looked at, and may be attacked, by every container of the pod.  It
has nothing: an empty root, nobody's user, no capability, no descriptor, no memory of the agent's.  Everything here
may block: for helper children.  Source: namespaces(7), pid_namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import fcntl
import os
import struct

from byre_proto.errors import RuntimeFailed

from . import bundle, cgroups, linux
from .signals import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

#: Kinds as the OCI runtime specification names them -> (flag of unshare(2), name in /proc/PID/ns).
KINDS = {
    "network": (linux.CLONE_NEWNET, "net"),
    "ipc": (linux.CLONE_NEWIPC, "ipc"),
    "uts": (linux.CLONE_NEWUTS, "uts"),
    "pid": (linux.CLONE_NEWPID, "pid"),
}

#: Static, and so all that it needs once its root is gone.
BUSYBOX = "/bin/busybox"

#: In seconds, 68 years: a VM does not live for so long.
FOR_EVER = str((1 << 31) - 1)

#: The user of the first process: nobody's files are this one's, and no container's root may trace it.
NOBODY = 65534

#: netdevice(7): struct ifreq is a name of 16 bytes and a union of 24.
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
_IFREQ = struct.Struct("16sh22x")

#: Of what went wrong in the first process.
MAX_PROBLEM = 1024


def pin(directory: str, kinds: Iterable[str], hostname: str = "") -> None:
    """Put this process in new namespaces, and pin them.  A new network has its loopback up.  Raises OSError."""
    flags = 0
    for kind in kinds:
        flags |= KINDS[kind][0]
    linux.unshare(flags)
    for kind in kinds:
        _bind(f"/proc/self/ns/{KINDS[kind][1]}", f"{directory}/{kind}")
    if flags & linux.CLONE_NEWNET:
        loopback_up()
    if hostname:
        linux.sethostname(hostname)


def loopback_up() -> None:
    """Of the network in which this process is."""
    import _socket

    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        fcntl.ioctl(any_socket.fileno(), SIOCSIFFLAGS, _IFREQ.pack(b"lo", IFF_UP))
    finally:
        any_socket.close()


def hold(directory: str, cgroup: str) -> int:
    """A namespace of processes, pinned; its first process, in `cgroup`.  Raises OSError, `RuntimeFailed`."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    linux.unshare(linux.CLONE_NEWPID)  # for the children of this process
    pid = os.fork()
    if pid == 0:
        _be_first(directory, cgroup, writing)
    os.close(writing)
    problem = os.read(reading, MAX_PROBLEM)  # ends when it has become another program, or has ended
    os.close(reading)
    if problem:
        raise RuntimeFailed(f"the first process of the pod: {problem.decode(errors='replace')}")
    _bind(f"/proc/{pid}/ns/pid", f"{directory}/pid")
    return pid


def _be_first(directory: str, cgroup: str, report: int) -> NoReturn:
    try:
        cgroups.write(f"{cgroup}/cgroup.procs", "0")
        program = os.open(BUSYBOX, os.O_RDONLY | os.O_CLOEXEC)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        os.setsid()
        signals.signal(signals.SIGCHLD, signals.SIG_IGN)  # stays so: the kernel reaps what ends
        _leave_root(directory)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)  # the capabilities go with it
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        os.execve(program, ["sleep", FOR_EVER], {})
    except BaseException as error:
        os.write(report, repr(error).encode()[:MAX_PROBLEM])
    finally:
        os._exit(1)


def _leave_root(directory: str) -> None:
    """An empty root of its own, with nothing around it: /proc/1/root/.. leads nowhere."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("nothing", directory, "tmpfs", linux.MS_RDONLY, "size=4k,nr_inodes=1,mode=0555")
    os.chdir(directory)
    linux.pivot_root(".", ".")  # the old root lies on the new one
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")


def _bind(source: str, target: str) -> None:
    with open(target, "xb"):
        pass
    linux.mount(source, target, "", linux.MS_BIND)


def release(directory: str) -> None:
    """Undo `pin` and `hold`, however far they came; the processes have ended.  Raises OSError."""
    for kind in KINDS:
        path = f"{directory}/{kind}"
        bundle.unmount(path)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
