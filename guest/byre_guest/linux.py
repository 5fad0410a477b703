"""System calls that Python lacks, most through ctypes: all of the agent's ctypes is in this file.

Rule: one block of constants, one of argument types, then wrappers of a few lines that raise `OSError` with the
file that it was about.  No policy here, and nothing that keeps state.  Source: the man pages of section 2,
`linux/capability.h`, `linux/random.h`, `linux/sched.h`.
"""

from __future__ import annotations

import os
import struct
from fcntl import ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# mount(2), umount2(2)
MS_RDONLY = 1
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# clone(2), setns(2), unshare(2)
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# openat2(2)
AT_FDCWD = -100
RESOLVE_NO_XDEV = 1
RESOLVE_NO_MAGICLINKS = 2
RESOLVE_NO_SYMLINKS = 4
RESOLVE_BENEATH = 8
RESOLVE_IN_ROOT = 16

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

# reboot(2)
RB_AUTOBOOT = 0x01234567
RB_POWER_OFF = 0x4321FEDC

# random(4), signalfd(2)
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
SFD_NONBLOCK = 0o4000
SFD_CLOEXEC = 0o2000000
SIGNALFD_SIGINFO_SIZE = 128

# statfs(2): the structure is smaller everywhere
STATFS_SIZE = 256

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

HOSTNAME = "/proc/sys/kernel/hostname"

_SYS_FINIT_MODULE = 313 if os.uname().machine == "x86_64" else 273
_SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41
_SYS_CLOSE_RANGE = 436
_SYS_OPENAT2 = 437
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = range(428, 433)
_SYS_MOUNT_SETATTR = 442

# open_tree(2), move_mount(2), fsconfig(2), fsmount(2), mount_setattr(2) (`linux/mount.h`)
_OPEN_TREE_CLONE = 1
_AT_EMPTY_PATH = 0x1000
_MOVE_MOUNT_EMPTY_PATHS = 0x04 | 0x40
_FS_CLOEXEC = 1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4
_CAP_VERSION_3 = 0x20080522

#: Names of capabilities(7) in the order of their numbers (`linux/capability.h`).
CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
    *("CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE"),
    *("CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE"),
    *("CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT"),
    *("CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE"),
    *("CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN"),
    *("CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF"),
    "CAP_CHECKPOINT_RESTORE",
)

_loaded: Any = None


def _libc() -> Any:
    """libc with the argument types of what is called below.

    The first call imports ctypes: that takes tens of milliseconds of an emulated boot, and the first process needs
    none of it.
    """
    global _loaded
    if _loaded is None:
        import ctypes
        from ctypes import c_char_p, c_int, c_ulong

        c = ctypes.CDLL(None, use_errno=True)
        c.mount.argtypes = (c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
        c.umount2.argtypes = (c_char_p, c_int)
        c.syncfs.argtypes = (c_int,)
        c.setns.argtypes = (c_int, c_int)
        c.unshare.argtypes = (c_int,)
        c.prctl.argtypes = (c_int, c_ulong, c_ulong, c_ulong, c_ulong)
        c.reboot.argtypes = (c_int,)
        c.signalfd.argtypes = (c_int, c_char_p, c_int)
        c.capset.argtypes = (c_char_p, c_char_p)
        c.capget.argtypes = (c_char_p, c_char_p)
        c.fstatfs.argtypes = (c_int, c_char_p)
        c.syscall.restype = ctypes.c_long
        _loaded = c
    return _loaded


def _syscall(number: int, *arguments: int | bytes) -> int:
    """syscall(2), for what libc has no function for."""
    from ctypes import c_long

    longs = (c_long(value) if isinstance(value, int) else value for value in (number, *arguments))
    result: int = _libc().syscall(*longs)
    return result


def _raise(*names: str | None) -> None:
    from ctypes import get_errno

    number = get_errno()
    raise OSError(number, os.strerror(number), *names)


def keep_freed_memory(size: int) -> None:
    """Let libc keep up to `size` freed bytes, and take blocks of up to that size from them, not from the kernel.

    Otherwise every 64 KiB buffer is mapped, faulted in page by page and unmapped again: more than half of the time
    that carrying it takes, under emulation.  Source: mallopt(3); a libc without it is left as it is.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, size)
        libc.mallopt(M_MMAP_THRESHOLD, size)


def mount(source: str, target: str, filesystem: str, flags: int = 0, data: str = "") -> None:
    """mount(2).  `data` is the file system's options, at most 4 KiB."""
    encode = os.fsencode
    if _libc().mount(encode(source), encode(target), encode(filesystem), flags, encode(data)) < 0:
        _raise(source, None, target)


def open_tree(path: str) -> int:
    """open_tree(2): a detached copy of the mount at `path`, without what is mounted below it."""
    fd = _syscall(_SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if fd < 0:
        _raise(path)
    return fd


def mount_setattr(fd: int, attributes: int) -> None:
    """mount_setattr(2): give a detached mount MOUNT_ATTR_*; nothing that is mounted in it is seen elsewhere."""
    wanted = struct.pack("=QQQQ", attributes, 0, MS_PRIVATE, 0)
    if _syscall(_SYS_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, wanted, len(wanted)) < 0:
        _raise()


def detached_mount(filesystem: str, options: dict[str, str], attributes: int) -> int:
    """fsopen(2) to fsmount(2): a new file system of this kind, mounted nowhere yet."""
    context = _syscall(_SYS_FSOPEN, filesystem.encode(), _FS_CLOEXEC)
    if context < 0:
        _raise(filesystem)
    try:
        for key, value in options.items():
            if _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0) < 0:
                _raise(f"{filesystem}: {key}={value}")
        if _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, 0, 0, 0) < 0:
            _raise(filesystem)
        fd = _syscall(_SYS_FSMOUNT, context, _FS_CLOEXEC, attributes)
        if fd < 0:
            _raise(filesystem)
        return fd
    finally:
        os.close(context)


def move_mount(mount: int, place: int) -> None:
    """move_mount(2): attach a detached mount at the open directory or file `place`, of this mount namespace."""
    if _syscall(_SYS_MOVE_MOUNT, mount, b"", place, b"", _MOVE_MOUNT_EMPTY_PATHS) < 0:
        _raise()


def umount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    if _libc().umount2(os.fsencode(target), flags) < 0:
        _raise(target)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    if _syscall(_SYS_PIVOT_ROOT, os.fsencode(new), os.fsencode(old)) < 0:
        _raise(new)


def syncfs(fd: int) -> None:
    """syncfs(2): of the file system that `fd` is in."""
    if _libc().syncfs(fd) < 0:
        _raise()


def setns(fd: int, kind: int = 0) -> None:
    """Enter the namespace (or those of the pidfd) `fd`; `kind` is CLONE_NEW*."""
    if _libc().setns(fd, kind) < 0:
        _raise()


def unshare(flags: int) -> None:
    """Leave the shared namespaces named by CLONE_NEW*."""
    if _libc().unshare(flags) < 0:
        _raise()


def openat2(path: str, flags: int, resolve: int, *, dir_fd: int = AT_FDCWD, mode: int = 0) -> int:
    """Open with RESOLVE_* rules, e.g. RESOLVE_IN_ROOT below `dir_fd`; the descriptor is close-on-exec."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    fd = _syscall(_SYS_OPENAT2, dir_fd, os.fsencode(path), how, len(how))
    if fd < 0:
        _raise(path)
    return fd


def filesystem_type(fd: int) -> int:
    """f_type of fstatfs(2), a magic number of `linux/magic.h`."""
    from ctypes import create_string_buffer

    buffer = create_string_buffer(STATFS_SIZE)
    if _libc().fstatfs(fd, buffer) < 0:
        _raise()
    found: int = struct.unpack_from("l", buffer)[0]
    return found


def finit_module(fd: int, parameters: str = "") -> None:
    """Load the (uncompressed) kernel module in the open file `fd`."""
    if _syscall(_SYS_FINIT_MODULE, fd, parameters.encode(), 0) < 0:
        _raise()


def close_range(first: int, last: int) -> None:
    """Close the descriptors from `first` to `last`, both included, in one call.  Since Linux 5.9."""
    last = last if last >= 0 else 0xFFFFFFFF
    if _syscall(_SYS_CLOSE_RANGE, first, last, 0) < 0:
        _raise()


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2)."""
    result: int = _libc().prctl(option, arg2, arg3, arg4, arg5)
    if result < 0:
        _raise()
    return result


def capability_mask(names: Iterable[str]) -> int:
    """The bits of capabilities by name, with or without `CAP_`, in any case.  Raises ValueError naming it."""
    mask = 0
    for name in names:
        full = name.upper()
        full = full if full.startswith("CAP_") else f"CAP_{full}"
        mask |= 1 << CAPABILITIES.index(full) if full in CAPABILITIES else _unknown(name)
    return mask


def _unknown(name: str) -> int:
    raise ValueError(name)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling process's capability sets from bit masks."""
    sets = (effective, permitted, inheritable)
    low, high = ([s & 0xFFFFFFFF for s in sets], [s >> 32 for s in sets])
    if _libc().capset(struct.pack("=Ii", _CAP_VERSION_3, 0), struct.pack("=6I", *low, *high)) < 0:
        _raise()


def capget() -> tuple[int, int, int]:
    """`(effective, permitted, inheritable)` of the calling process as bit masks."""
    from ctypes import create_string_buffer

    data = create_string_buffer(24)
    if _libc().capget(struct.pack("=Ii", _CAP_VERSION_3, 0), data) < 0:
        _raise()
    words = struct.unpack("=6I", data.raw)
    return words[0] | words[3] << 32, words[1] | words[4] << 32, words[2] | words[5] << 32


def last_capability() -> int:
    """The number of the highest capability that this kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
        return int(file.read())


def signalfd(signals: Iterable[int]) -> int:
    """A non-blocking descriptor that reports these (blocked) signals, SIGNALFD_SIGINFO_SIZE bytes each."""
    mask = sum(1 << (number - 1) for number in signals)
    fd: int = _libc().signalfd(-1, struct.pack("=Q", mask) + bytes(120), SFD_NONBLOCK | SFD_CLOEXEC)
    if fd < 0:
        _raise()
    return fd


def sethostname(name: str) -> None:
    """Set the host name of the UTS namespace.  By its file, which needs no ctypes."""
    fd = os.open(HOSTNAME, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, name.encode())
    finally:
        os.close(fd)


def reboot(command: int) -> None:
    """RB_AUTOBOOT or RB_POWER_OFF.  Does not sync."""
    if _libc().reboot(command) < 0:
        _raise()


def add_entropy(data: bytes) -> None:
    """Credit `data` to the kernel's random pool and make its generator start anew from it at once."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        ioctl(fd, RNDADDENTROPY, struct.pack("=ii", len(data) * 8, len(data)) + data)
        ioctl(fd, RNDRESEEDCRNG)
    finally:
        os.close(fd)
