"""The one byte stream between the agent and its host, whatever it is.

    fd             a socketpair, or stdin and stdout: ends with its EOF
    socket         the host dials a UNIX socket, again after each end
    virtio-serial  the port named PORT_NAME: has no connections; read() == 0 means that no host is there now
    vsock          the agent dials the host, again after each end
    serial         a line that has no connections and loses bytes: `serial_line`

Rule: descriptors are non-blocking and edge-triggered.  A level-triggered epoll on a port without a host wakes up
hundreds of thousands of times a second; so after each edge the channel is read until it has nothing more.
"""

from __future__ import annotations

import errno
import os
import select
from itertools import islice
from time import monotonic, sleep

from byre_proto.deques import deque
from byre_proto.frames import HEADER_SIZE
from byre_proto.limits import MAX_DATA

from .loop import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .loop import Loop

#: Name of the virtio-serial port, given to it on QEMU's command line.
PORT_NAME = "org.byre.bridge"
PORTS = "/sys/class/virtio-ports"

#: Read at once: two of the largest frames, about what a port's queue holds.
FRAME = HEADER_SIZE + MAX_DATA
READ_SIZE = 2 * FRAME

#: Read first where little came the last time: to name 128 pages to the kernel takes longer than to read a few.
FEW = 16 * 1024

#: Taken from the session at once: a control frame waits behind no more than this.
SEND_SIZE = 128 * 1024

#: How long the port may take to appear after its driver was loaded; milliseconds, unless the host is overloaded.
PORT_SECONDS = 10.0

#: Size of the virtio-serial driver's input buffers: one readv(2) over pieces of it empties several.
PAGE = 4096

#: Taken by that driver from one buffer: a writev(2) over pieces of it hands over many.  (splice(2) would spare the
#: copies.  But in Linux 6.1 the driver hands the device more parts than it has filled wherever the pipe holds an
#: empty one, or more than is wanted, and any process can leave an empty part in its own pipe by a failed write(2).)
PORT_WRITE = 32 * 1024

#: Buffers handed to one writev(2).
MAX_BUFFERS = 64

#: What the host gives through the firmware configuration device, where only root can read it: the secret, and where
#: it listens (CID:PORT).  A clone's host gives others, of the same lengths, which the driver read once.
SECRET_FILE = "/sys/firmware/qemu_fw_cfg/by_name/opt/byre/secret/raw"
ADDRESS_FILE = "/sys/firmware/qemu_fw_cfg/by_name/opt/byre/vsock/raw"


class Channel:
    """Bytes in, bytes out; never blocks.  `read_fd` and `write_fd` may be the same.

    `port` is True for a virtio-serial port, on which reading nothing is no end.  `room` is what to take from the
    session at once, `max_data` the largest DATA frame that suits the channel.
    """

    room = SEND_SIZE
    max_data = MAX_DATA
    resumable = False  # another one to the same host can follow it, without a loss

    def __init__(self, read_fd: int, write_fd: int, *, port: bool = False) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.port = port
        self.readable = True
        self.writable = True
        self._ended = False  # the other end has closed it: nothing but the rest is to come, without another edge
        self._room_wanted = port  # of a port, room also means that a host has come
        self._loop: Loop | None = None
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._pieces = [self._buffer[at : at + PAGE] for at in range(0, READ_SIZE, PAGE)]
        self._much = False  # came the last time
        self._out: deque[bytes | memoryview] = deque()
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)

    def watch(self, loop: Loop, callback: Callable[[int], object]) -> None:
        """Call `callback(mask)` when there may be something to read, or room to write after there was none."""

        def ready(mask: int) -> None:
            if mask & ~EPOLLOUT:
                self.readable = True
                self._ended = bool(mask & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) and not self.port
            if mask & EPOLLOUT:
                self.writable = True
                self._want_room(False)
            callback(mask)

        self._loop = loop
        if self.write_fd != self.read_fd:
            loop.add(self.read_fd, EPOLLIN | EPOLLRDHUP | EPOLLET, ready)
        loop.add(self.write_fd, self._mask(), ready)

    def _mask(self) -> int:
        reading = EPOLLIN | EPOLLRDHUP if self.write_fd == self.read_fd else 0
        return EPOLLET | reading | (EPOLLOUT if self._room_wanted else 0)

    def _want_room(self, wanted: bool) -> None:
        """Be told of room only while it is missing: a socket has it anew after each of the peer's reads."""
        if wanted != self._room_wanted and self._loop is not None:
            self._room_wanted = wanted
            self._loop.modify(self.write_fd, self._mask())

    def read(self, lacking: int = 0) -> memoryview | None:
        """Bytes, valid until the next call; empty at the end (of a port: no host); None when there are none now.

        `lacking` bytes end the frame that has begun: what ends where a frame does has not to be copied.
        """
        most = lacking + FRAME if lacking else READ_SIZE
        count, wanted = 0, most if self._much else FEW
        while self.readable and count < most:
            end = min(count + wanted, most)
            got = self._read(count, end)
            if not got:
                if got is None or count:
                    break  # the end of a port, if it is one, is there again next time
                self.readable = False
                return self._buffer[:0]
            count += got
            if count == end:
                wanted = most
            elif self._ended:
                wanted = PAGE  # there will be no edge for the end: it is read next
            elif self.port:
                wanted = PAGE  # its driver stops at the first of its buffers that is not full: mostly the last
            else:
                self.readable = False  # it was empty; what comes later is a new edge
        self._much = count > FEW
        return self._buffer[:count] if count else None

    def _read(self, start: int, end: int) -> int | None:
        """Read once into this part of the buffer; None when there is nothing now, 0 at the end."""
        try:
            return os.readv(self.read_fd, self._cut(start, end))
        except BlockingIOError:
            self.readable = False
            return None
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENODEV, errno.ENOTCONN, errno.EIO):
                raise
            return 0

    def _cut(self, start: int, end: int) -> list[memoryview]:
        if not self.port:
            return [self._buffer[start:end]]
        if start:
            return [self._buffer[at : min(at + PAGE, end)] for at in range(start, end, PAGE)]
        whole, rest = divmod(end, PAGE)
        return [*self._pieces[:whole], self._pieces[whole][:rest]] if rest else self._pieces[:whole]

    @property
    def idle(self) -> bool:
        """Everything given to `write` is gone."""
        return not self._out

    def write(self, buffers: list[bytes] | list[memoryview]) -> None:
        """Take over buffers, until the channel is `idle` again; `flush` them."""
        if self.port and len(buffers) > 1:
            # Each buffer of a writev would become an element of the virtio queue, and an exit to the host.
            buffers = [b"".join(buffers)]
        self._out.extend(buffers)

    def flush(self) -> bool:
        """Write as much as the channel takes; whether that was all.  Raises OSError when it is broken."""
        out = self._out
        while out and self.writable:
            try:
                if self.port and len(out[0]) > PORT_WRITE:
                    whole = memoryview(out[0])
                    pieces = [whole[at : at + PORT_WRITE] for at in range(0, len(whole), PORT_WRITE)]
                    written = os.writev(self.write_fd, pieces[:MAX_BUFFERS])
                elif len(out) == 1 or self.port:
                    written = os.write(self.write_fd, out[0])
                else:
                    written = os.writev(self.write_fd, list(islice(out, MAX_BUFFERS)))
            except BlockingIOError:
                self.writable = False
                self._want_room(True)
                break
            self._written(written)
        return not out

    def _written(self, count: int) -> None:
        out = self._out
        while count:
            first = out.popleft()
            if len(first) > count:
                out.appendleft(memoryview(first)[count:])
                return
            count -= len(first)

    def forget(self) -> None:
        """Drop what was not written: it belongs to a connection that is over."""
        self._out.clear()
        self._want_room(self.port)

    def renew(self) -> bool:
        """After a connection is over: whether another one can begin here at once."""
        return False

    def close(self) -> None:
        """No more of it."""
        for fd in {self.read_fd, self.write_fd}:
            if self._loop is not None:
                self._loop.remove(fd)
            os.close(fd)


def open_port() -> Channel:
    """The virtio-serial port, as soon as the host has told the driver its name.

    Raises FileNotFoundError, with the ports that there are instead, after PORT_SECONDS.
    """
    deadline = monotonic() + PORT_SECONDS
    while True:
        ports = _ports()
        if PORT_NAME in ports:
            fd = os.open(f"/dev/{ports[PORT_NAME]}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            return Channel(fd, fd, port=True)
        if monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, f"no virtio-serial port {PORT_NAME} among {sorted(ports)}")
        sleep(0.001)  # at boot, before there is a loop; the driver's exchange with the device takes about this


def _ports() -> dict[str, str]:
    """Devices of virtio-serial ports by the ports' names."""
    found = {}
    for entry in os.listdir(PORTS) if os.path.isdir(PORTS) else []:
        try:
            with open(f"{PORTS}/{entry}/name", "rb", buffering=0) as file:
                found[file.read().decode("ascii", "replace").strip()] = entry
        except FileNotFoundError:
            pass  # its name comes after it
    return found


def has_host(port_fd: int) -> bool:
    """Whether a host holds the other end of a port open now."""
    poll = select.poll()
    poll.register(port_fd, 0)
    return not poll.poll(0)


def dial(cid: int, port: int) -> Channel:
    """Connect to a vsock address of the host.  Raises OSError when nobody listens there."""
    import _socket

    connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(DIAL_SECONDS)
        connection.connect((cid, port))
    except BaseException:
        connection.close()
        raise
    return redialled(connection.detach())


def redialled(fd: int) -> Channel:
    """A connected socket that can be had again."""
    channel = Channel(fd, fd)
    channel.resumable = True
    return channel


def listen(path: str) -> socket.socket:
    """A UNIX socket that only this user can dial.  Raises OSError."""
    import socket  # here: no other channel needs it

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def accept(listener: socket.socket) -> Channel | None:
    """The next host, None when it has gone already."""
    try:
        return redialled(listener.accept()[0].detach())
    except OSError:
        return None


#: Hosts that wait until the one before them has gone.
BACKLOG = 16

#: The host listens before it starts the VM, so it answers at once or not at all.  The loop has nothing else to do.
DIAL_SECONDS = 2.0


def read_secret() -> bytes | None:
    """The VM's secret, None where the host gave none.  Read for every connection: a clone's is another one."""
    try:
        with open(SECRET_FILE, "rb") as file:
            return file.read() or None
    except FileNotFoundError:
        return None


def vsock_address() -> tuple[int, int] | None:
    """The host's vsock address now, None where it gave none."""
    try:
        with open(ADDRESS_FILE, "rb") as file:
            cid, _, port = file.read().partition(b":")
    except FileNotFoundError:
        return None
    return int(cid), int(port)
