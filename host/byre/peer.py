"""The process at the other end of a UNIX socket: which one it is, and when it has ended.

Rule: a process is known by a descriptor, never by a number that may be another one's by now.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct

from .errors import PermissionRefused

_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7)


def process_id(sock: socket.socket) -> int:
    """Its pid; 0 where it is not of our pid namespace.  Raises `PermissionRefused` unless it is this user's."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise PermissionRefused(f"the process at the other end belongs to the user {uid}, not to you")
    return int(pid)


def open_process(sock: socket.socket) -> int:
    """A pidfd of it, the caller's to close.  Raises OSError when it has ended or is not known here."""
    return os.pidfd_open(process_id(sock))


async def ended(pidfd: int) -> None:
    """Wait for its end."""
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    loop.add_reader(pidfd, heard.set)
    try:
        await heard.wait()
    finally:
        loop.remove_reader(pidfd)
