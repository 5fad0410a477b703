"""virtio-vsock, handled by the host's kernel: the guest dials a port on which the host listens.

Rule: any guest on this host, and any process, can dial that port.  So only the machine's own context id (CID) is
let in, and a secret that is new for each machine, which only root in the guest can read, proves the rest; it goes
through fw_cfg from a memfd, so it is in no command line and no file.

The CID is taken here rather than by QEMU: a number that is in use shows before anything is spawned, and QEMU
needs no right to open /dev/vhost-vsock.  Source: vsock(7), Linux include/uapi/linux/vhost.h.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import secrets
import socket
import struct
from pathlib import Path

from byre.errors import TransportUnavailable
from byre.transports.base import Transport, Wiring

logger = logging.getLogger(__name__)

DEVICE = Path("/dev/vhost-vsock")
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60

#: 0 to 2 have meanings, and people give small numbers by hand; the last 32-bit ones have meanings again.
_CIDS = range(1024, 2**31)
_CID_ATTEMPTS = 16
_BACKLOG = 8
SECRET_SIZE = 32
#: Where the guest finds it: /sys/firmware/qemu_fw_cfg/by_name/opt/byre/secret/raw
SECRET_NAME = "opt/byre/secret"
#: Where the host listens, CID:PORT.  A clone's kernel has its template's arguments, so it reads it here, too; the
#: guest's driver learns the length only once, hence the zeros.
ADDRESS_NAME = "opt/byre/vsock"
ADDRESS_FORMAT = "{:010}:{:010}"


class Vsock(Transport):
    """See the module."""

    name = "vsock"
    redialled = True  # by the guest

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(SECRET_SIZE)
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cid = 0

    @classmethod
    def unavailable(cls) -> str | None:
        try:
            os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            hint = "; load the module vhost_vsock" if error.errno == errno.ENOENT else ""
            return f"{DEVICE}: {error.strerror}{hint}"
        try:
            _listen().close()
        except OSError as error:
            return f"cannot listen on AF_VSOCK: {error.strerror}"
        return None

    @property
    def secret(self) -> bytes:
        return self._secret

    def open(self, bus: str, *, had_host: bool = False) -> Wiring:
        handed: list[int] = []
        try:
            self._listener = _listen()
            self._cid, vhost = _take_cid()
            handed.append(vhost)
            handed.append(_sealed_file(self._secret))
        except OSError as error:
            for fd in handed:
                os.close(fd)
            self.close()
            raise TransportUnavailable(f"vsock: {error.strerror}", hint="see: byre doctor") from error
        port = self._listener.getsockname()[1]
        return Wiring(
            arguments=(
                *("-device", f"vhost-vsock-{bus},guest-cid={self._cid},vhostfd={handed[0]}"),
                *("-fw_cfg", f"name={SECRET_NAME},file=/proc/self/fd/{handed[1]}"),
                *("-fw_cfg", f"name={ADDRESS_NAME},string={ADDRESS_FORMAT.format(socket.VMADDR_CID_HOST, port)}"),
            ),
            kernel_argument=f"byre.channel=vsock:{socket.VMADDR_CID_HOST}:{port}",
            handed=tuple(handed),
        )

    async def connect(self) -> socket.socket:
        if self._listener is None:
            raise TransportUnavailable("the vsock port is closed")
        self._loop = asyncio.get_running_loop()
        return await accept_from(self._listener, self._cid)

    def hang_up(self) -> None:
        """Nothing: a clone's kernel resets what connection there is, and the agent dials anew."""

    def close(self) -> None:
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None


async def accept_from(listener: socket.socket, expected: object) -> socket.socket:
    """The next connection whose peer address begins with `expected`; the others are closed at once."""
    loop = asyncio.get_running_loop()
    while True:
        connection, address = await loop.sock_accept(listener)
        if address[0] == expected:
            connection.setblocking(False)
            return connection
        logger.warning("! refused a connection from %r to the channel of %r", address, expected)
        connection.close()


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _take_cid() -> tuple[int, int]:
    """A free context id, and the vhost descriptor that holds it."""
    vhost = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_CID_ATTEMPTS):
            cid = secrets.choice(_CIDS)
            try:
                fcntl.ioctl(vhost, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return cid, vhost
        raise OSError(errno.EADDRINUSE, f"no free context id in {_CID_ATTEMPTS} attempts")
    except BaseException:
        os.close(vhost)
        raise


def _sealed_file(content: bytes) -> int:
    fd = os.memfd_create("byre-secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd
