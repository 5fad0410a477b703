"""The OCI runtime's config.json for a container, from an image's defaults and what the caller asks for.

Rule: the defaults are those that users of podman know (its capabilities, masked paths, mounts and limits); a
container has namespaces of its own for everything but users, and only a loopback network.  Nothing is looked up
here: a user is resolved inside the container's root, by the agent.
Source: OCI runtime-spec 1.0.2 `config.md`, `config-linux.md`; image-spec `conversion.md`; containers.conf(5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from byre.errors import InvalidRequest
from byre.oci.image import ImageConfig
from byre.parameters import signal_number

OCI_VERSION = "1.0.2"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Processes and threads of one container; more than any ordinary service has, and no fork bomb (B31).
DEFAULT_PIDS = 4096
#: SIGTERM: what is sent when the image names no signal.
DEFAULT_STOP_SIGNAL = 15
#: Bytes of /dev/shm and /dev, as podman has them.
SHM_BYTES, DEV_BYTES = 64000 << 10, 65536 << 10
#: Microseconds over which `cpus` is measured out; the kernel's own default.
CPU_PERIOD = 100_000

#: podman's: a container's root without the powers over devices, raw networks and the kernel.
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
#: capabilities(7), up to Linux 6.1.
ALL_CAPABILITIES = (
    *DEFAULT_CAPABILITIES,
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_DAC_READ_SEARCH",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
)
#: Open files as systemd and containerd have them: a soft limit that select(2) can live with.
DEFAULT_RLIMITS: Mapping[str, tuple[int, int]] = {"RLIMIT_NOFILE": (1024, 524288)}

_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_NAMESPACES = ("pid", "ipc", "uts", "mount", "network", "cgroup")
_UNLIMITED = 2**64 - 1  # RLIM_INFINITY


def build_spec(
    *,
    config: ImageConfig | None = None,
    args: Sequence[str] | None = None,
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    terminal: bool = False,
    hostname: str = "",
    memory_bytes: int | None = None,
    cpus: float | None = None,
    pids_limit: int = DEFAULT_PIDS,
    capabilities: Collection[str] | None = None,
    privileged: bool = False,
    no_new_privileges: bool = True,
    read_only: bool = False,
    mounts: Sequence[Mapping[str, Any]] = (),
    rlimits: Mapping[str, tuple[int, int]] | None = None,
    sysctl: Mapping[str, str] | None = None,
    seccomp: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of one container.

    `args` take the place of the image's Cmd, `entrypoint` that of its Entrypoint and Cmd; `env` is added to the
    image's.  `capabilities` None: podman's default, or all where `privileged`, which also unmasks and uses no
    `seccomp`.  An image's volume is a tmpfs that begins with what the image has there; `mounts` are OCI mounts and
    come last.  -1 for a limit is none.  Raises InvalidRequest.

    Root's path and the cgroup are the agent's to set.  The user is root here; `effective_user` goes to the agent,
    which resolves it inside the container.  From one that is not root, execve(2) takes the capabilities.
    """
    config = config or ImageConfig(architecture="amd64", os="linux")
    if capabilities is None:
        capabilities = ALL_CAPABILITIES if privileged else DEFAULT_CAPABILITIES
    process = {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": _command(config, args, entrypoint),
        "env": _environment(config, env, terminal, hostname),
        "cwd": _absolute(cwd or config.working_dir or "/", "the working directory"),
        "capabilities": _capability_sets(capabilities),
        "rlimits": _rlimits(DEFAULT_RLIMITS if rlimits is None else {**DEFAULT_RLIMITS, **rlimits}),
        "noNewPrivileges": no_new_privileges,
    }
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in _NAMESPACES],
        "resources": _resources(memory_bytes, cpus, pids_limit, privileged),
        "sysctl": {"net.ipv4.ping_group_range": "0 0", **(sysctl or {})},
    }
    if not privileged:
        linux |= {"maskedPaths": list(_MASKED), "readonlyPaths": list(_READ_ONLY)}
        if seccomp is not None:
            linux["seccomp"] = dict(seccomp)
    return {
        "ociVersion": OCI_VERSION,
        "root": {"path": "rootfs", "readonly": read_only},
        "hostname": hostname,
        "process": process,
        "mounts": [
            *_mounts(privileged),
            *(_volume(path) for path in config.volumes),
            *(dict(mount) for mount in mounts),
        ],
        "linux": linux,
    }


def effective_user(config: ImageConfig | None, user: str) -> str:
    """What the agent is to resolve: `user`, or the image's, or root's empty name."""
    return user or (config.user if config else "")


def stop_signal(config: ImageConfig | None) -> int:
    """The image's stop signal as a number: it may be a name, a number or SIGRTMIN+N.  Raises InvalidRequest."""
    name = config.stop_signal.upper() if config else ""
    base, plus, offset = name.removeprefix("SIG").partition("+")
    if base == "RTMIN" and plus and offset.isdecimal():
        return signal_number(signal_number("SIGRTMIN") + int(offset[:3]))
    return signal_number(name) if name else DEFAULT_STOP_SIGNAL


def _command(config: ImageConfig, args: Sequence[str] | None, entrypoint: Sequence[str] | None) -> list[str]:
    """Docker's rules: a new entrypoint forgets the image's Cmd, for that was meant for the image's own."""
    first = entrypoint if entrypoint is not None else config.entrypoint
    rest = args if args is not None else (config.cmd if entrypoint is None else None)
    if isinstance(first, str) or isinstance(rest, str):
        raise InvalidRequest("a command is a sequence of strings, not one string")
    command = [*(first or ()), *(rest or ())]
    if not command:
        raise InvalidRequest("there is no command to run: the image has none", hint="give one after the image")
    return _arguments(command)


def _arguments(args: Sequence[str]) -> list[str]:
    if isinstance(args, str) or not args or not args[0]:
        raise InvalidRequest("a command is a sequence of strings, of which the first names the program")
    if any("\0" in arg for arg in args):
        raise InvalidRequest("an argument holds a NUL byte")
    return list(args)


def _environment(config: ImageConfig, env: Mapping[str, str] | None, terminal: bool, hostname: str) -> list[str]:
    """PATH, HOSTNAME and, for a terminal, TERM; over them the image's, over these the caller's.  HOME is the
    agent's to add, who knows the user."""
    merged = {"PATH": DEFAULT_PATH}
    if hostname:
        merged["HOSTNAME"] = hostname
    if terminal:
        merged["TERM"] = "xterm"
    merged.update((name, value) for name, _, value in (pair.partition("=") for pair in config.env))
    merged.update(env or {})
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidRequest(f"{name!r} cannot be in an environment", hint="a name has no '=' and no NUL byte")
    return [f"{name}={value}" for name, value in merged.items()]


def _absolute(path: str, what: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"{what} {path!r} is not an absolute path")
    return path


def _capability_sets(names: Collection[str]) -> dict[str, list[str]]:
    """Bounding, effective and permitted; the others stay empty, as in podman since CVE-2022-27649."""
    full = sorted({name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}" for name in names})
    unknown = [name for name in full if name not in ALL_CAPABILITIES]
    if unknown:
        raise InvalidRequest(f"there is no capability {unknown[0]!r}", hint="capabilities(7) lists them")
    return {"bounding": full, "effective": full, "permitted": full, "inheritable": [], "ambient": []}


def _rlimits(limits: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"type": name, "soft": soft if soft >= 0 else _UNLIMITED, "hard": hard if hard >= 0 else _UNLIMITED}
        for name, (soft, hard) in sorted(limits.items())
    ]


def _resources(memory: int | None, cpus: float | None, pids: int, privileged: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"pids": {"limit": pids}}
    if memory is not None and memory >= 0:
        found["memory"] = {"limit": memory, "swap": memory}  # swap counts both: none beyond the memory
    if cpus is not None and cpus >= 0:
        found["cpu"] = {
            "quota": max(int(cpus * CPU_PERIOD), 1000),
            "period": CPU_PERIOD,
        }  # 1 ms: the kernel's least
    # The runtime adds the harmless devices (null, zero, full, random, urandom, tty, ptmx) by itself.
    found["devices"] = [{"allow": privileged, "access": "rwm"}]
    return found


def _mount(target: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source or kind, "options": list(options)}


def _mounts(privileged: bool) -> list[dict[str, Any]]:
    safe = ("nosuid", "noexec", "nodev")
    mode = "rw" if privileged else "ro"
    return [
        _mount("/proc", "proc", *safe),
        _mount("/dev", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", f"size={DEV_BYTES}"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", *safe, "mode=1777", f"size={SHM_BYTES}", source="shm"),
        _mount("/dev/mqueue", "mqueue", *safe),
        _mount("/sys", "sysfs", *safe, mode),
        _mount("/sys/fs/cgroup", "cgroup", *safe, "relatime", mode),
    ]


def _volume(path: str) -> dict[str, Any]:
    """An image's volume as a tmpfs; `tmpcopyup`: like a new volume it begins with what the image has there."""
    return _mount(path, "tmpfs", "nosuid", "nodev", "mode=755", "tmpcopyup")
