"""Sockets at an address of the VM or of a container: made where they belong, bound, connected.

Rule: a container is met in its own network, and below its own root; what it does with links, names and mounts
meanwhile leads nowhere else.  What may block (a path on any file system) is for a helper child; a TCP socket is
made by a thread that lives for nothing else, so that the agent itself never is in a container's network.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct

from byre_proto.errors import (
    AddressInUse,
    ByreError,
    ConnectionRefused,
    ContainerNotReady,
    InvalidRequest,
    PathNotFound,
    PathRefused,
    PermissionRefused,
    ResourceExhausted,
    SocketFailed,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .processes import Process

#: Connections that the kernel keeps until the host takes them; as many as a host serves at once by default.
BACKLOG = 256

#: recvmsg(2); the _socket module has no name for it.
MSG_CMSG_CLOEXEC = 0x40000000

_FD = struct.Struct("i")

_KIND = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC


class Address:
    """The address of a request.  Raises `InvalidRequest`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.path: str = arguments["path"]
        self.host: str = arguments["host"]
        self.port: int = arguments["port"]
        self.family = _socket.AF_UNIX
        if self.path:
            if not self.path.startswith("/") or "\0" in self.path:
                raise InvalidRequest("the path of a socket is absolute, without NUL characters", field="path")
            return
        self.family = _socket.AF_INET6 if ":" in self.host else _socket.AF_INET
        try:
            _socket.inet_pton(self.family, self.host)  # a name would be looked up, and that blocks
        except (OSError, UnicodeError):
            raise InvalidRequest(f"{self.host[:80]!r} is not an IP address", field="host") from None
        if not 0 <= self.port < 1 << 16:
            raise InvalidRequest(f"{self.port} is not a port", field="port")

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


# -- in the agent ------------------------------------------------------------------------------------------


def make_socket(family: int, init: Process | None) -> _socket.socket:
    """A TCP socket in the network of the container whose first process is `init`, or of the VM.

    A socket is for good in the network of the thread that makes it; that thread ends then.  Raises `SocketFailed`,
    `ResourceExhausted`, `ContainerNotReady`.
    """
    try:
        if init is None:
            return _socket.socket(family, _KIND)
        pidfd = pinned(init)[1]
        try:
            return _in_network(pidfd, lambda: _socket.socket(family, _KIND))
        finally:
            os.close(pidfd)
    except ProcessLookupError as error:
        raise _ended() from error
    except OSError as error:
        raise exhausted(error) from error


def _in_network(pidfd: int, make: Callable[[], _socket.socket]) -> _socket.socket:
    """What `make` makes in the network of a process.  Raises OSError."""
    import _thread

    from . import linux

    made: list[_socket.socket | OSError] = []
    done = _thread.allocate_lock()
    done.acquire()

    def enter() -> None:
        try:
            linux.setns(pidfd, linux.CLONE_NEWNET)
            made.append(make())
        except OSError as error:
            made.append(error)
        finally:
            done.release()

    try:
        _thread.start_new_thread(enter, ())
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
    done.acquire()  # two system calls later
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def connect_error(sock: _socket.socket) -> int:
    """How the connect of a TCP socket went: 0, or the number of its error."""
    number = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
    try:
        if not number and sock.getsockname() == sock.getpeername():
            # Nobody listens there, but the port was free for our end as well, and TCP connects to itself.
            return errno.ECONNREFUSED
    except OSError as error:  # it was reset already
        return error.errno or errno.ECONNRESET
    return number


def listen(address: Address, init: Process | None) -> _socket.socket:
    """A TCP socket that listens.  Raises `AddressInUse`, `PermissionRefused`, `SocketFailed`, ..."""
    sock = make_socket(address.family, init)
    try:
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise failure(error.errno, address) from error
    return sock


def pinned(init: Process | None) -> tuple[int, int]:
    """`(pid, pidfd)` of a container's first process; `(0, -1)` for the VM.  Raises `ContainerNotReady`."""
    if init is None:
        return 0, -1
    if init.exit is not None:
        raise _ended()
    try:
        return init.pid, os.pidfd_open(init.pid)
    except ProcessLookupError:
        raise _ended() from None
    except OSError as error:
        raise exhausted(error) from error


def _ended() -> ByreError:
    return ContainerNotReady("the container has ended")


def passed_socket(channel: _socket.socket) -> _socket.socket:
    """The socket that a child has passed.  Raises `ResourceExhausted` when there is no descriptor for it."""
    return _socket.socket(fileno=passed_descriptor(channel))


def passed_descriptor(channel: _socket.socket) -> int:
    """What a child has passed.  Raises `ResourceExhausted` when there is no descriptor for it."""
    _, rights, _, _ = channel.recvmsg(1, _socket.CMSG_LEN(_FD.size), _socket.MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
    if not rights:
        raise exhausted(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    fd: int = _FD.unpack(rights[0][2])[0]
    return fd


# -- in a helper child -------------------------------------------------------------------------------------


def pass_descriptor(channel: _socket.socket, fd: int) -> None:
    """Give it to the agent."""
    channel.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))])


def root_of(pid: int, pidfd: int) -> int:
    """The root of the container whose first process that is; 0 is the VM.  Raises `ContainerNotReady`."""
    from . import rootfs

    if not pid:
        return rootfs.open_root("/")
    try:
        return rootfs.open_root_of(pid, pidfd)
    except OSError as error:
        raise _ended() from error


def connect_path(root: int, sock: _socket.socket, address: Address) -> None:
    """Connect to a UNIX socket by its path; waits while its listener's queue is full."""
    import stat

    from . import rootfs

    try:
        found = rootfs.find(root, address.path)
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise PathRefused(f"{address}: is not a socket", path=address.path)
        sock.connect(f"/proc/self/fd/{found}")  # that very one, whatever its name means by now
    except OSError as error:
        if isinstance(error, ByreError):
            raise
        raise failure(error.errno, address) from error


def bind_path(root: int, sock: _socket.socket, address: Address, mode: int) -> list[int]:
    """Listen by a path; returns the device and the inode of the name."""
    try:
        directory, name = _parent(root, address)
        os.umask(0o777 & ~mode)  # a mode that is set later, by name, may be something else's
        sock.bind(f"/proc/self/fd/{directory}/{name}")  # the kernel makes the last name, and follows no link there
        sock.listen(BACKLOG)
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        if isinstance(error, ByreError):
            raise
        if error.errno is None:  # Python's own, of what does not fit sockaddr_un
            raise InvalidRequest(f"{address}: {error}", field="path") from error
        raise failure(error.errno, address) from error
    return [status.st_dev, status.st_ino]


def remove_path(root: int, address: Address, identity: Any) -> None:
    """Remove the name that `bind_path` made, unless it is something else's by now."""
    directory, name = _parent(root, address)
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if [status.st_dev, status.st_ino] == identity:
        os.unlink(name, dir_fd=directory)


def _parent(root: int, address: Address) -> tuple[int, str]:
    from .places import Place

    return Place(root).parent(address.path)


# -- errors ------------------------------------------------------------------------------------------------


def failure(number: int | None, address: Address) -> ByreError:
    """The typed error of a bind or a connect."""
    reason = os.strerror(number or 0)
    data: dict[str, Any] = {"errno": number or 0, "address": str(address)}
    if number == errno.ECONNREFUSED:
        return ConnectionRefused(f"{address}: nobody listens there", hint="wait_for_port waits for it", **data)
    if number == errno.EADDRINUSE:
        hint = "remove it first" if address.path else "take another port; 0 is a free one"
        return AddressInUse(f"{address}: is in use", hint=hint, **data)
    if number in (errno.EACCES, errno.EPERM):
        return PermissionRefused(f"{address}: {reason}", **data)
    if number == errno.ENOENT:
        return PathNotFound(f"{address}: {reason}", path=address.path, **data)
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
        return exhausted(OSError(number, reason))
    return SocketFailed(f"{address}: {reason}", **data)


def exhausted(error: OSError) -> ByreError:
    return ResourceExhausted(f"no more sockets: {error.strerror}", hint="close some connections", errno=error.errno)
