"""Every error of byre has one root, a code, data and a next step.

The code is a class attribute: raising the class *is* choosing the answer on the wire, and the receiving side
raises the same class again (`from_wire`).  An error also derives from the builtin that fits, so that
``except TimeoutError`` and ``except FileNotFoundError`` mean what a reader expects.  Errors of which only the
host knows (a VM that did not boot, a missing tool) live in ``byre.errors`` and derive from the same root.

Rule: a message from the peer is data.  It is shown escaped (`printable`), and never formatted again.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not typing.TYPE_CHECKING: the guest pays for each import
if TYPE_CHECKING:
    from typing import Any, ClassVar

#: Longest message and hint taken from a peer, in characters; the rest is cut.
MAX_MESSAGE = 4096


def printable(text: str) -> str:
    """`text` with every control character but newline and tab escaped: safe for a terminal and a log."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


class ByreError(Exception):
    """Root of all errors.  ``message`` says what happened, ``hint`` what to do next, ``data`` has the evidence."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str = "", *, hint: str = "", **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequest(ByreError, ValueError):
    """The request's fields are not what its method takes (B45)."""

    code = "invalid-request"


class NotSupported(ByreError, NotImplementedError):
    """The peer, the machine or the host cannot do this (B46, B28)."""

    code = "not-supported"


class RequestTooLarge(ByreError, ValueError):
    """The encoded message is over its limit; nothing was sent (B45)."""

    code = "too-large"


class Cancelled(ByreError):
    """The call was cancelled at the peer and had no effect (B15)."""

    code = "cancelled"


class DeadlineExceeded(ByreError, TimeoutError):
    """The deadline passed first (B44).  ``data["ran"]`` says whether a command had started."""

    code = "deadline-exceeded"


class ResourceExhausted(ByreError):
    """A named limit is reached: streams, processes, kept exits (B62)."""

    code = "resource-exhausted"


class PermissionRefused(ByreError, PermissionError):
    """The peer may not do this."""

    code = "permission-denied"


class ProgramNotFound(ByreError, FileNotFoundError):
    """The program does not exist where the process would run (B14).  Exit status 127 of a shell."""

    code = "program-not-found"


class ProgramNotExecutable(ByreError, PermissionError):
    """The program exists and cannot be executed (B14).  Exit status 126 of a shell."""

    code = "program-not-executable"


class WorkingDirectoryNotFound(ByreError, FileNotFoundError):
    """The working directory does not exist or cannot be entered (B14)."""

    code = "cwd-not-found"


class UserNotFound(ByreError, LookupError):
    """The user or group is not in the password or group file of where the process would run (B14)."""

    code = "user-not-found"


class ProcessNotFound(ByreError, ProcessLookupError):
    """No process has this id."""

    code = "process-not-found"


class NotATerminal(ByreError):
    """The process has no terminal to resize (B11)."""

    code = "not-a-terminal"


class StartFailed(ByreError):
    """The process could not be started for a reason that has no class of its own; nothing ran (B14)."""

    code = "start-failed"


class ContainerExists(ByreError, FileExistsError):
    """A container with this id exists (B22)."""

    code = "container-exists"


class ContainerNotFound(ByreError, LookupError):
    """No container has this id (B22)."""

    code = "container-not-found"


class ContainerNotReady(ByreError):
    """The container is still being created (B22), or is in a state that does not allow this."""

    code = "container-not-ready"


class PodExists(ByreError, FileExistsError):
    """A pod with this name exists."""

    code = "pod-exists"


class PodNotFound(ByreError, LookupError):
    """No pod has this name."""

    code = "pod-not-found"


class PodNotReady(ByreError):
    """The pod is still being created, or is being deleted."""

    code = "pod-not-ready"


class RuntimeFailed(ByreError):
    """The OCI runtime refused; its own words are in the message."""

    code = "runtime-failed"


class DiskInUse(ByreError):
    """A mounted layer or an overlay uses the disk (B61)."""

    code = "disk-in-use"


class VolumeInUse(DiskInUse):
    """A VM has the volume; ``data`` has its ``volume``, and of who has it ``vm`` and ``pid``."""

    code = "volume-in-use"


class VolumeNotFound(ByreError, FileNotFoundError):
    """There is no volume of this name."""

    code = "volume-not-found"


class MountInUse(ByreError):
    """A mount cannot be removed: a process in the container has something of it open (B61)."""

    code = "mount-in-use"


class StorageFailed(ByreError, OSError):
    """A mount, a disk or a layer in the guest failed."""

    code = "storage-failed"


class FileFailed(ByreError, OSError):
    """A file operation failed; ``data["path"]`` has the path, ``data["errno"]`` the kernel's number."""

    code = "file-failed"


class PathNotFound(FileFailed, FileNotFoundError):
    """The path, or a directory on the way to it, does not exist."""

    code = "path-not-found"


class PathExists(FileFailed, FileExistsError):
    """The path exists, and was not to."""

    code = "path-exists"


class PathIsDirectory(FileFailed, IsADirectoryError):
    """The path is a directory where a file was expected."""

    code = "path-is-directory"


class PathNotDirectory(FileFailed, NotADirectoryError):
    """The path, or something on the way to it, is not a directory."""

    code = "path-not-directory"


class PathRefused(FileFailed):
    """A path, or an entry of what is copied, that leads out of where it belongs, or cannot be held there (B65)."""

    code = "path-refused"


class NoSpace(FileFailed):
    """The file system is full, or its owner's quota is; what was being written is gone again (B64)."""

    code = "no-space"


class ReadOnlyFiles(FileFailed):
    """The file system is read-only."""

    code = "read-only"


class SocketFailed(ByreError, OSError):
    """A socket could not be made, bound or connected; ``data["errno"]`` has the kernel's number."""

    code = "socket-failed"


class AddressInUse(SocketFailed):
    """Somebody else listens at this address, or something else has this path."""

    code = "address-in-use"


class ConnectionRefused(SocketFailed, ConnectionRefusedError):
    """Nobody listens at this address."""

    code = "connection-refused"


def _table() -> dict[str, type[ByreError]]:
    found: dict[str, type[ByreError]] = {}
    todo: list[type[ByreError]] = [ByreError]
    while todo:
        cls = todo.pop()
        if cls.__module__ == __name__:
            found[cls.code] = cls
            todo.extend(cls.__subclasses__())
    return found


#: The wire's error codes, made from the classes above; an unknown code becomes a plain ByreError.
BY_CODE = _table()


def to_wire(error: ByreError) -> tuple[str, str, str, dict[str, Any]]:
    """`(code, message, hint, data)` of an error, as an ERROR frame carries it."""
    return error.code, printable(error.message)[:MAX_MESSAGE], printable(error.hint)[:MAX_MESSAGE], error.data


def from_wire(code: str, message: str, hint: str, data: dict[str, Any]) -> ByreError:
    """The error that a peer sent, as the class that its code names, with its texts made printable.

    The values of `data` are the peer's: show them by `repr` or `printable` only.
    """
    cls = BY_CODE.get(code, ByreError)
    error = cls(printable(message)[:MAX_MESSAGE], hint=printable(hint)[:MAX_MESSAGE])
    error.data = {printable(str(key)): value for key, value in data.items()}
    if cls.code != code:
        error.data["code"] = printable(code)[:80]  # from a newer peer
    return error
