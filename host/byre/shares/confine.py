"""Runs a 9P server that sees one directory and nothing else.

    python -I -S confine.py CONTROL SOCKET DIRECTORY ro|rw SERVER...

    CONTROL   a socket to the owner, for the steps below
    SOCKET    what the server speaks 9P on

    here         owner
    map     ->           our user namespace is there: map its users
            <-   go
    loading ->           the server has been started
            <-   go      it has answered a first message: it has loaded all that it needs from this root
    ready   ->           it sees nothing but the directory

At any step "error STEP: REASON" instead, and the end.  The server gets namespaces of its own (users, mounts,
processes, network, IPC, host name), no capability outside of them, few inside, and no way to gain one.  When it has
loaded its libraries, the directory becomes the root of all processes of the namespace, and everything else is
unmounted; no message of a guest comes before that.

Rule: the standard library only, and everything imported before the root goes away.  It ends when the server ends;
the server dies with it, and it with its owner, by the kernel's hand.
Source: user_namespaces(7), capabilities(7), pivot_root(2), mount_setattr(2).
"""

import ctypes
import errno
import os
import signal
import socket
import struct
import sys

# sched.h, linux/prctl.h, linux/mount.h, linux/securebits.h, linux/capability.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_SLAVE, MNT_DETACH = 0x1000, 0x4000, 0x80000, 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 1, 24, 28, 38
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442

#: With it the server keeps its capabilities while it acts as another user: who may do what is the guest's kernel's
#: to decide, which knows the groups; here only the owner of a new file comes of it.
SECBIT_NO_SETUID_FIXUP = 1 << 2

#: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID: what owners and modes take.  Of files whose owners are
#: mapped, and nothing else: none of them counts outside of the user namespace.
KEPT = (0, 1, 3, 4, 6, 7)

# linux/seccomp.h, linux/filter.h, linux/audit.h
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
BPF_LOAD, BPF_EQUAL, BPF_MASKED, BPF_RETURN = 0x20, 0x15, 0x45, 0x06
SECCOMP_ALLOW, SECCOMP_ERRNO, SECCOMP_KILL = 0x7FFF0000, 0x00050000, 0x80000000
AT_NUMBER, AT_ARCHITECTURE, AT_FIRST_ARGUMENT = 0, 4, 16

#: Machine -> its AUDIT_ARCH, and the numbers of: setgroups, clone, clone3, and of what no file server calls and has
#: often been a way into a kernel: add_key, bpf, io_uring_setup, keyctl, mount, open_by_handle_at, perf_event_open,
#: pivot_root, process_vm_readv, process_vm_writev, ptrace, request_key, setns, socket, umount2, unshare,
#: userfaultfd, and the calls of the newer mount API.
SYSCALLS = {
    "x86_64": (
        *(0xC000003E, 116, 56, 435),
        *(248, 321, 425, 250, 165, 304, 298, 155, 310, 311, 101, 249, 308, 41, 166, 272, 323),
        *range(428, 434),
        442,
    ),
    "aarch64": (
        *(0xC00000B7, 159, 220, 435),
        *(217, 280, 425, 219, 40, 265, 241, 41, 270, 271, 117, 218, 268, 198, 39, 97, 282),
        *range(428, 434),
        442,
    ),
}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, step: str) -> None:
    """Raise the error of a system call that failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), step)


def prctl(option: int, argument: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0), f"prctl {option}")


def mount(source: bytes | None, target: bytes, flags: int) -> None:
    check(libc.mount(source, target, None, ctypes.c_ulong(flags), None), "mount")


def unshare() -> None:
    """Namespaces of our own; the next child is the first process there."""
    kinds = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(kinds), "unshare")
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials may have cleared it


def mount_share(directory: bytes, read_only: bool) -> None:
    """Make the directory a mount of this namespace, with all below it, and enter it."""
    mount(None, b"/", MS_REC | MS_SLAVE)  # what is mounted later comes from nowhere but here
    mount(directory, directory, MS_BIND | MS_REC)
    os.chdir(directory)
    wanted = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | (MOUNT_ATTR_RDONLY if read_only else 0)
    attributes = struct.pack("=QQQQ", wanted, 0, 0, 0)
    arguments = (AT_FDCWD, b".", AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    check(libc.syscall(SYS_MOUNT_SETATTR, *arguments), "mount_setattr")


def limit_capabilities() -> None:
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for number in range(last + 1):
        if number not in KEPT:
            prctl(PR_CAPBSET_DROP, number)
    prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def filter_syscalls() -> None:
    """Refuse what the server does not need (seccomp(2)).

    A user namespace with one user refuses setgroups(2), by which the server lets go of groups when it starts: it is
    told that all is well, and keeps those of its owner, as any of the owner's programs.
    """
    architecture, setgroups, clone, clone3, *refused = SYSCALLS[os.uname().machine]
    with open("/proc/self/setgroups", encoding="ascii") as file:
        alone = file.read() == "deny\n"
    program = [
        (BPF_LOAD, 0, 0, AT_ARCHITECTURE),
        (BPF_EQUAL, 1, 0, architecture),
        (BPF_RETURN, 0, 0, SECCOMP_KILL),
        (BPF_LOAD, 0, 0, AT_NUMBER),
    ]
    for number in refused:
        program += [(BPF_EQUAL, 0, 1, number), (BPF_RETURN, 0, 0, SECCOMP_ERRNO | errno.EPERM)]
    if alone:
        program += [(BPF_EQUAL, 0, 1, setgroups), (BPF_RETURN, 0, 0, SECCOMP_ERRNO)]
    program += [
        (BPF_EQUAL, 0, 1, clone3),  # its flags are out of reach; without it libc makes threads by clone
        (BPF_RETURN, 0, 0, SECCOMP_ERRNO | errno.ENOSYS),
        (BPF_EQUAL, 0, 3, clone),
        (BPF_LOAD, 0, 0, AT_FIRST_ARGUMENT),
        (BPF_MASKED, 0, 1, CLONE_NEWUSER),
        (BPF_RETURN, 0, 0, SECCOMP_ERRNO | errno.EPERM),
        (BPF_RETURN, 0, 0, SECCOMP_ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    whole = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, whole, 0, 0), "seccomp")


def start(fd: int, server: list[str]) -> int:
    """The server as a child that dies with us."""
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        limit_capabilities()
        filter_syscalls()
        os.set_inheritable(fd, True)
        os.execv(server[0], server)
    except OSError as error:
        os.write(2, f"{server[0]}: {error.filename}: {error.strerror}\n".encode())
    os._exit(127)


def leave_root() -> None:
    """The share, where we are, becomes the root of all here."""
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount")


def main() -> int:
    control, fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    directory, read_only, server = os.fsencode(sys.argv[3]), sys.argv[4] == "ro", sys.argv[5:]

    def step(name: str) -> None:
        control.sendall(name.encode() + b"\n")
        if not control.recv(1):
            sys.exit(1)  # nobody waits for us any more

    try:
        unshare()
        step("map")
        mount_share(directory, read_only)
        pid = start(fd, server)
        step("loading")
        leave_root()
    except OSError as error:
        control.sendall(f"error {error.filename}: {error.strerror}\n".encode())
        return 1
    control.sendall(b"ready\n")
    control.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
