"""A VM's channel that is cut again and again, in the midst of a stream: it goes on, or ends with an error; no hang.

On vsock the session goes on.  A virtio-serial port has no connections, and QEMU's end of it stays open: there the
session ends, and the next one finds the port as good as new.  When QEMU's own end is cut, the VM cannot be reached
any more, and says so.
"""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import pytest

from byre import ProcessParameters
from byre.boot import _open
from byre.bridge import Bridge
from byre.errors import ConnectionLost
from byre.process import start_process

pytestmark = [pytest.mark.vm, pytest.mark.not_on("serial")]

SOON = 60.0
CUTS = 200


async def test_a_channel_that_is_cut_two_hundred_times(fresh_vm: Any) -> None:
    machine = fresh_vm._owner.machine
    if machine.redialled:
        await goes_on(fresh_vm.bridge)
    else:
        await begins_anew(fresh_vm.bridge, machine)


async def goes_on(bridge: Bridge) -> None:
    chance = random.Random(3)
    process = await start_process(bridge, ProcessParameters(args=["cat"], stdin=True, stdout=True))
    stdin, stdout = process.stdio.stdin, process.stdio.stdout
    assert stdin is not None and stdout is not None
    cuts = 0
    while cuts < CUTS:
        data = chance.randbytes(chance.randrange(1, 100_000))
        stdin.write(data)
        reading = asyncio.create_task(stdout.readexactly(len(data)))
        await asyncio.wait([reading], timeout=chance.random() / 100)
        if bridge._channel is not None:
            bridge._channel.transport.abort()
            cuts += 1
        assert await asyncio.wait_for(reading, SOON) == data
    stdin.close()
    assert (await asyncio.wait_for(process.wait(), SOON)).code == 0
    await process.close()


async def begins_anew(bridge: Bridge, machine: Any) -> None:
    for _ in range(CUTS):
        bridge.explain = None  # the machine will have nothing to say
        process = await start_process(bridge, ProcessParameters(args=["cat", "/dev/zero"], stdout=True))
        assert process.stdio.stdout is not None and bridge._channel is not None
        await asyncio.wait_for(process.stdio.stdout.readexactly(100_000), SOON)
        bridge._channel.transport.abort()
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(process.wait(), SOON)
        await process.close()
        await bridge.close()
        bridge = await _open(machine, SOON)
    listed = (await bridge.call("process.list", timeout=SOON))["processes"]
    assert len(listed) <= CUTS
    waiting = asyncio.create_task(bridge.call("process.wait", timeout=None, process=listed[-1]["process"]))
    machine._transport._host.shutdown(socket.SHUT_RDWR)  # QEMU's own end: nobody can have it again
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(waiting, SOON)
    await bridge.close()
