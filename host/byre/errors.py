"""What the host side raises, beside the errors that cross the wire (`byre_proto.errors`).

Every class derives from `ByreError` and from the builtin that fits.  "Never ran" (`StartFailed` and its like,
from the wire's table) and "outcome unknown" (`ConnectionLost`) are different classes: a caller may repeat the
first and must not blindly repeat the second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from byre_proto.errors import (
    AddressInUse,
    ByreError,
    Cancelled,
    ConnectionRefused,
    ContainerExists,
    ContainerNotFound,
    ContainerNotReady,
    DeadlineExceeded,
    DiskInUse,
    FileFailed,
    InvalidRequest,
    MountInUse,
    NoSpace,
    NotATerminal,
    NotSupported,
    PathExists,
    PathIsDirectory,
    PathNotDirectory,
    PathNotFound,
    PathRefused,
    PermissionRefused,
    PodExists,
    PodNotFound,
    PodNotReady,
    ProcessNotFound,
    ProgramNotExecutable,
    ProgramNotFound,
    ReadOnlyFiles,
    RequestTooLarge,
    ResourceExhausted,
    RuntimeFailed,
    SocketFailed,
    StartFailed,
    StorageFailed,
    UserNotFound,
    VolumeInUse,
    VolumeNotFound,
    WorkingDirectoryNotFound,
)


class ConnectionLost(ByreError, ConnectionError):
    """The VM or the channel to it is gone; the outcome of what was under way is unknown (B9, B25, B42)."""

    code = "connection-lost"


class ContainerClosed(ByreError):
    """The container object was closed here; the container itself may go on (B25, B26)."""

    code = "container-closed"


class StreamReset(ByreError, ConnectionResetError):
    """The guest gave up sending a stream: bytes may be missing."""

    code = "stream-reset"


class ProcessRunning(ByreError):
    """`exit_code` was asked for while the process runs (B9)."""

    code = "process-running"


class CommandFailed(ByreError):
    """`run(check=True)`: the command ended with another status than 0; ``data`` has it and the output."""

    code = "command-failed"


class MachineFailed(ByreError, OSError):
    """The virtual machine could not be started, or did what it must not."""

    code = "machine-failed"


class HostFailed(ByreError, OSError):
    """This host's kernel refuses what is needed: a descriptor, room on a disk, a writable directory, a process."""

    code = "host-failed"


@contextlib.contextmanager
def host_failed(what: str) -> Iterator[None]:
    """In the block an OSError that is none of byre's becomes `HostFailed`; `what` is what could not be done."""
    try:
        yield
    except ByreError:
        raise
    except OSError as error:
        reason = f"{error.strerror or repr(error)}" + (f": {error.filename}" if error.filename else "")
        raise HostFailed(f"{what}: {reason}", errno=error.errno) from error


class AnswerInvalid(ByreError, ValueError):
    """The guest answered with what no agent of ours answers: it is hostile, or of another version."""

    code = "answer-invalid"


@contextlib.contextmanager
def answer_of_guest(what: str) -> Iterator[None]:
    """In the block an answer is read whose insides the wire's table does not check: whatever reading it raises is
    the guest's fault."""
    try:
        yield
    except ByreError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        raise AnswerInvalid(f"the guest's {what} cannot be read", hint="is its agent of this version?") from error


class BootFailed(MachineFailed):
    """The VM ended or the guest panicked before its agent answered (B40); ``data["console"]`` has the tail."""

    code = "boot-failed"


class BootTimeout(BootFailed, TimeoutError):
    """The guest's agent did not answer within the boot deadline; ``data["console"]`` has the tail."""

    code = "boot-timeout"


class AcceleratorUnavailable(MachineFailed):
    """The accelerator that was required cannot run a virtual CPU here; the reason is in the message."""

    code = "accelerator-unavailable"


class TransportUnavailable(MachineFailed):
    """The transport that was required does not exist on this host or machine; the reason is in the message."""

    code = "transport-unavailable"


class ToolMissing(ByreError, FileNotFoundError):
    """A program that byre needs is not installed; the hint names the package."""

    code = "tool-missing"


class ShareFailed(ByreError, OSError):
    """A directory of this host cannot be shared: its server was refused what it needs, or did not start."""

    code = "share-failed"


class NetworkFailed(ByreError, OSError):
    """There is no way out for a VM or a container: the program that makes one did not start."""

    code = "network-failed"


class ShareLost(ByreError, OSError):
    """The server of a shared directory has ended: whatever is asked of the share fails with EIO."""

    code = "share-lost"


class TemplateBroken(ByreError):
    """A saved machine is not what it was when it was made."""

    code = "template-broken"


class ImageNotFound(ByreError, FileNotFoundError):
    """No container image is at this reference, or it has no such tag or platform."""

    code = "image-not-found"


class ImageInvalid(ByreError, ValueError):
    """The image breaks its specification: layout, digest, media type or a layer's contents (B63)."""

    code = "image-invalid"


class RegistryFailed(ByreError, OSError):
    """A registry, or skopeo, which talks to it, did not give an image; nothing of it is kept under its name."""

    code = "registry-failed"


class RegistryUnreachable(RegistryFailed, ConnectionError):
    """The registry could not be reached, or the connection to it ended; what was whole by then is kept."""

    code = "registry-unreachable"


class RegistryRefused(RegistryFailed, PermissionError):
    """The registry wants a login, or this login may not read the image (or there is none: some do not say)."""

    code = "registry-refused"


class PoolClosed(ByreError):
    """The pool was closed, or not yet opened."""

    code = "pool-closed"


class PoolQueueFull(ResourceExhausted):
    """As many wait for a VM of the pool as may."""

    code = "pool-queue-full"


class PoolTimeout(ByreError, TimeoutError):
    """No VM of the pool could be had in time; ``data["lacking"]`` is "memory", "cpus" or "vm"."""

    code = "pool-timeout"


class VolumeExists(ByreError, FileExistsError):
    """There is a volume of this name."""

    code = "volume-exists"


class VMNotFound(ByreError, LookupError):
    """No detached VM has this name."""

    code = "vm-not-found"


class VMExists(ByreError, FileExistsError):
    """A detached VM with this name is up."""

    code = "vm-exists"


__all__ = [
    "AcceleratorUnavailable",
    "AddressInUse",
    "AnswerInvalid",
    "BootFailed",
    "BootTimeout",
    "ByreError",
    "Cancelled",
    "CommandFailed",
    "ConnectionLost",
    "ConnectionRefused",
    "ContainerClosed",
    "ContainerExists",
    "ContainerNotFound",
    "ContainerNotReady",
    "DeadlineExceeded",
    "DiskInUse",
    "FileFailed",
    "HostFailed",
    "ImageInvalid",
    "ImageNotFound",
    "InvalidRequest",
    "MachineFailed",
    "MountInUse",
    "NoSpace",
    "NotATerminal",
    "NotSupported",
    "PathExists",
    "PathIsDirectory",
    "PathNotDirectory",
    "PathNotFound",
    "PathRefused",
    "PermissionRefused",
    "PodExists",
    "PodNotFound",
    "PodNotReady",
    "PoolClosed",
    "PoolQueueFull",
    "PoolTimeout",
    "ProcessNotFound",
    "ProcessRunning",
    "ProgramNotExecutable",
    "ProgramNotFound",
    "ReadOnlyFiles",
    "RegistryFailed",
    "RegistryRefused",
    "RegistryUnreachable",
    "RequestTooLarge",
    "ResourceExhausted",
    "RuntimeFailed",
    "SocketFailed",
    "StartFailed",
    "StorageFailed",
    "StreamReset",
    "TemplateBroken",
    "ToolMissing",
    "TransportUnavailable",
    "UserNotFound",
    "VMExists",
    "VMNotFound",
    "VolumeExists",
    "VolumeInUse",
    "VolumeNotFound",
    "WorkingDirectoryNotFound",
]
