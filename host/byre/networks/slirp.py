"""`Slirp`: slirp4netns, in a process of its own, with one end of a cable.

It takes Ethernet frames from a socket and speaks TCP, UDP and ping for their sender, from this host; it answers for
a gateway and a name server.  It sees nothing of the VM, and shuts itself under a seccomp filter; where this host
permits them, in an empty root and in a user namespace of its own, without a right of its user's.

Rule: what it gets is the guest's, less what `filter` keeps back.  It dies with this process (`machines.spawn`), and
is killed, not asked.  Source: slirp4netns(1).
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile

from byre.errors import NetworkFailed, ToolMissing
from byre.helper import Helper
from byre.machines import namespaces
from byre.machines.spawn import in_thread

#: The program.
SLIRP = "slirp4netns"

#: For it to be there, in seconds: a fiftieth of one when all is well; and between two looks.
START_TIMEOUT = 30.0
PAUSE = 0.005


class Slirp(Helper):
    """See the module.  `sock` is the other end of its cable, a frame to each message; it is the caller's."""

    def __init__(self, mtu: int) -> None:
        """`mtu` in bytes.  Raises `ToolMissing`."""
        program = found()
        self._directory = tempfile.mkdtemp(prefix="byre-net-")
        self._path = f"{self._directory}/cable"
        apart = None if namespaces.problem() else namespaces.PROXY
        super().__init__(
            [
                *(program, "--target-type=bess", f"--mtu={mtu}", "--disable-host-loopback"),
                *(["--enable-sandbox"] if apart or not namespaces.mounts_problem() else []),
                *("--enable-seccomp", self._path),
            ],
            apart=apart,
        )
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)

    async def begin(self) -> None:
        """Start it, and connect.

        Raises `NetworkFailed`; after an error, or a cancellation, nothing is left of it.
        """
        self.start()
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._connect()
        except TimeoutError:
            await self._give_up()
            raise NetworkFailed(f"{SLIRP} did not start in {START_TIMEOUT:g} s{self.last_words}") from None
        except BaseException:
            await self._give_up()
            raise
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _connect(self) -> None:
        while True:
            try:
                self.sock.connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            except OSError as error:
                raise NetworkFailed(f"{SLIRP} cannot be reached: {error.strerror}") from error
            else:
                return
            if self.ended:
                raise NetworkFailed(f"{SLIRP} {await self.wait()}", hint="see: byre doctor")
            await asyncio.sleep(PAUSE)

    async def _give_up(self) -> None:
        self.sock.close()
        self.kill()
        await self.wait()


async def started(mtu: int) -> Slirp:
    """One that runs.  Raises as `Slirp` and its `begin`; looking at this host takes some ms, once."""
    await in_thread(lambda: namespaces.problem() and namespaces.mounts_problem())
    slirp = Slirp(mtu)
    await slirp.begin()
    return slirp


def found() -> str:
    """The program.  Raises `ToolMissing`."""
    path = shutil.which(SLIRP)
    if path is None:
        raise ToolMissing(f"there is no {SLIRP} to reach a network with", hint=f"apt install {SLIRP}", tool=SLIRP)
    return path
