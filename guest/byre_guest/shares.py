"""Directories of the host, as 9P file systems whose server is at the other end of two streams.

    /run/byre/s/N   one share

    open -> mounting -> mounted -> removing -> gone
                           lost: its server has ended; what is asked of it fails (EIO), and it is unmounted as usual

The kernel speaks 9P on one end of a socket pair, and the other end is a connection of the host's like any other
(`connections`).  So mount(2) waits for answers that come through this agent: it is for a helper child, as is
umount(2) (B47).  The agent itself never touches a path below a share, nor a pipe that may be locked by somebody who
waits for one (`detours`).

Rule: a share that a container was made with goes with the container; any other by `share.unmount`.  The host's side
ends when the kernel has let go of its socket, and by nothing that the agent says.
Source: linux/Documentation/filesystems/9p.rst.
"""

from __future__ import annotations

import _socket
import errno
import os

from byre_proto.errors import ByreError, InvalidRequest, ResourceExhausted, StartFailed, StorageFailed

from . import children, detours, linux, storage
from .connections import Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .server import Call, Server

BASE = "/run/byre/s"

#: Shares at once: two streams, a socket and a server on the host each.
MAX_SHARES = 256

#: For a mount, an attach of a few messages, or an unmount, which may have to write back what is dirty, in seconds.
TIMEOUT = 30.0

MODULES = ("9p", "9pnet_fd")

#: Bytes of one message: diod takes no more.
MSIZE = 65536

#: Each user attaches, so that a new file is his; the first attach is by name, and the server knows but one.
OPTIONS = "version=9p2000.L,access=user,uname=root,aname=/"

#: How much the guest keeps of it.  mmap: pages that are mapped, and nothing else, so that what the host changes is
#: seen; loose: everything, for ever: for what does not change while it is mounted.
CACHES = ("mmap", "loose")


class Share:
    """One of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"{BASE}/{name}"
        self.state = "open"
        self.container = ""  # that it belongs to
        self.socket: _socket.socket | None = None  # the kernel's end, until it has it
        self.connection: Connection | None = None
        self.waiting: list[Call] = []

    def close_socket(self) -> None:
        """The kernel has it, or will not get it."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def tell(self) -> None:
        """Those who wait for its end: it has come."""
        waiting, self.waiting = self.waiting, []
        for call in waiting:
            call.reply({"lost": self.state == "lost"})


class Shares:
    """The shares of one machine, and the handlers of `share.*`."""

    def __init__(self, server: Server, on_first: Callable[[], object]) -> None:
        self._server = server
        self._on_first = on_first  # called before there is one, while there is none
        self._shares: dict[str, Share] = {}
        self._last = 0

    # -- of containers -------------------------------------------------------------------------------------

    def use(self, names: list[str], container: str) -> None:
        """From now on they are the container's.  Raises `InvalidRequest`."""
        for name in names:
            share = self._shares.get(name)
            if share is None or share.state != "mounted" or share.container:
                raise InvalidRequest(f"there is no free share {name[:80]!r}", hint="share.mount makes one")
        for name in names:
            self._shares[name].container = container

    def path(self, name: str) -> str:
        """Where one that is in use is mounted."""
        return self._shares[name].path

    def ending(self, container: str) -> Callable[[], None]:
        """What unmounts a container's shares, in the helper child that removes its root; `release` follows."""
        leaving = [one for one in self._shares.values() if one.container == container]
        for share in leaving:
            share.state = "removing"

        def unmount() -> None:
            for share in leaving:
                _unmount(share.path, linux.UMOUNT_NOFOLLOW | linux.MNT_DETACH)

        return unmount

    def release(self, container: str) -> None:
        """The container is gone, or was not made; and with it its shares."""
        for share in [one for one in self._shares.values() if one.container == container]:
            if share.state == "removing":
                self._forget(share)
            else:
                self._remove(share, None)

    # -- mount ---------------------------------------------------------------------------------------------

    def open(self, call: Call, arguments: dict[str, Any]) -> None:
        """`share.open`: from now on what the kernel asks goes out, for its server to answer."""
        pumps = self._server.processes.pumps
        if len(self._shares) >= MAX_SHARES:
            raise ResourceExhausted(f"{MAX_SHARES} directories are shared", hint="end some of the shares")
        assert pumps is not None, "a call comes in a session"
        if not detours.needed:
            self._detour()
        self._last += 1
        share = Share(str(self._last))
        try:
            ours, share.socket = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        except OSError as error:
            raise ResourceExhausted(f"no share: {error.strerror}", errno=error.errno) from error
        try:
            stdin, stdout = arguments["stdin"], arguments["stdout"]
            share.connection = Connection(pumps, ours, stdin, stdout, lambda _: self._ended(share))
        except BaseException:
            ours.close()
            share.socket.close()
            raise
        self._shares[share.name] = share
        detours.needed = True
        call.reply({"share": share.name, "path": share.path})

    def _detour(self) -> None:
        """No pipe that the agent reads or writes may wait for a share.  Raises `ResourceExhausted`."""
        try:
            self._on_first()
        except OSError as error:
            raise ResourceExhausted(f"no share: {error.strerror}", errno=error.errno) from error

    def mount(self, call: Call, arguments: dict[str, Any]) -> None:
        """`share.mount`; after an error nothing of it is left."""
        share = self._shares.get(arguments["share"])
        if share is None or share.socket is None:
            raise InvalidRequest("there is no such share to be mounted", field="share")
        if arguments["cache"] not in CACHES:
            raise InvalidRequest("cache is " + " or ".join(CACHES), field="cache")
        read_only, cache = arguments["read_only"], arguments["cache"]
        fd = share.socket.fileno()
        child = children.run(
            self._server.loop,
            self._server.reaper,
            lambda: _mount(share.path, fd, read_only, cache),
            TIMEOUT,
            lambda _result, error: self._mounted(share, call, error),
            keep=[fd],
        )
        share.state = "mounting"
        share.close_socket()

        def give_up(error: ByreError) -> None:
            child.cancel()
            call.fail(error)

        call.on_cancel = give_up

    def _mounted(self, share: Share, call: Call, error: ByreError | None) -> None:
        if error is None and share.connection is None:
            error = StorageFailed("the share's server has ended")
        if error is None and not call.answered:
            share.state = "mounted"
            call.reply({})
        else:
            self._remove(share, None)
            call.fail(error or StorageFailed("nobody waits for the share any more"))

    def _ended(self, share: Share) -> None:
        """Its connection has: the kernel let go of it, or its server is gone."""
        share.connection = None
        if share.state == "open":
            share.close_socket()
            self._forget(share)
        elif share.state == "mounted":
            share.state = "lost"
            self._server.logs.log(40, f"the server of the share {share.path} has ended; there is only EIO now")
            share.tell()

    def _forget(self, share: Share) -> None:
        self._shares.pop(share.name, None)
        share.tell()
        detours.needed = bool(self._shares)

    def wait(self, call: Call, arguments: dict[str, Any]) -> None:
        """`share.wait`: now or later."""
        share = self._shares.get(arguments["share"])
        if share is None or share.state == "lost":
            call.reply({"lost": share is not None})
        else:
            call.wait_among(share.waiting)

    # -- unmount -------------------------------------------------------------------------------------------

    def unmount(self, call: Call, arguments: dict[str, Any]) -> None:
        """`share.unmount`.  Harmless when it is gone."""
        share = self._shares.get(arguments["share"])
        if share is None:
            call.reply({})
        elif share.container:
            raise StorageFailed(
                f"the share {share.path} belongs to the container {share.container}", hint="delete that one first"
            )
        elif share.state in ("open", "mounting", "removing"):
            raise StorageFailed(f"the share {share.path} is being made or removed")
        else:
            self._remove(share, call)

    def _remove(self, share: Share, call: Call | None) -> None:
        """Without a call it goes even while something is open there: when that is closed."""
        before, share.state = share.state, "removing"
        loop, reaper = self._server.loop, self._server.reaper
        flags = linux.UMOUNT_NOFOLLOW | (linux.MNT_DETACH if call is None else 0)

        def remove() -> None:
            children.run(loop, reaper, lambda: _unmount(share.path, flags), TIMEOUT, removed)

        def removed(_result: object, error: ByreError | None) -> None:
            if isinstance(error, StartFailed) and call is None:  # nobody else will try it again
                loop.call_later(children.AGAIN_SECONDS, remove)
                return
            if error is None:
                self._forget(share)
                if share.connection is not None and before != "mounted":
                    share.connection.abort()
            else:
                share.state = before
                self._server.logs.log(30, f"the share {share.path}: {error}")
            if call is not None and error is not None:
                call.fail(error)
            elif call is not None:
                call.reply({})

        remove()


# -- in helper children ------------------------------------------------------------------------------------


def _mount(path: str, fd: int, read_only: bool, cache: str) -> None:
    """Mount what the socket's other end serves.  Raises `StorageFailed`."""
    storage.need(*MODULES)
    options = f"trans=fd,rfdno={fd},wfdno={fd},{OPTIONS},msize={MSIZE},cache={cache}"
    flags = linux.MS_NODEV | (linux.MS_RDONLY if read_only else 0)
    try:
        os.makedirs(path, exist_ok=True)
        linux.mount("share", path, "9p", flags, options)
    except OSError as error:
        raise StorageFailed(f"the share could not be mounted: {error.strerror}", errno=error.errno) from error


def _unmount(path: str, flags: int) -> None:
    """What is not there is no error.  Raises `StorageFailed`."""
    try:
        linux.umount(path, flags)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted, never made
            hint = "close what is open there" if error.errno == errno.EBUSY else ""
            raise StorageFailed(f"{path}: {error.strerror}", hint=hint, errno=error.errno) from error
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
