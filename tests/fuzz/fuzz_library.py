"""Frames that are nearly right, against the whole of each side; `fuzz_connection` has only the protocol's core.

    python -m tests.fuzz.fuzz_library host --frames N --seed S     a `UtilityVM` whose guest lies
    python -m tests.fuzz.fuzz_library agent --frames N --seed S    an agent on a socket whose host lies

The host's library works while it is lied to: a command, a container, files.  Contract: whatever it awaits ends,
with a result, with an error of byre's or by its deadline; nothing reaches the event loop's handler for errors that
nobody took; another host in the same process works as before.  The agent takes the next host after each one, and
works for an honest one at the end.  Both hold no more memory than BOUND above what they began with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byre import LocalHost
from byre.errors import ByreError
from byre.sockethost import SocketHost
from byre_proto import frames
from byre_proto.connection import Connection
from tests.cuts.agent import listening_agent
from tests.unit.test_vm_host import MemoryVM, Played

from .grammar import Peer, RandomSource, choice

#: Of resident memory, in bytes: windows and backlogs of one connection.
BOUND = 64 * 1024 * 1024

#: Seconds that a call of the library, and a host's whole visit at the agent, may take.
DEADLINE = 5.0

#: Frames of one guest or host at most, before the next one comes.
VISIT = 40

#: What is sent: every frame type, and what is none.
WHAT = (*(name for name, _ in frames.TYPES.values()), "header", "raw")

#: Requests in which a hostile host only asks for what it may: a process that runs as who fuzzes.
REFUSED = ("process.create", "files.start", "container.create", "system.quiesce")


class Report:
    """What was sent, and what was wrong."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    @property
    def frames(self) -> int:
        return self.sent.total()

    def show(self) -> None:
        print(" ".join(f"{what}={self.sent[what]}" for what in WHAT))
        print("ends: " + " ".join(f"{name}={count}" for name, count in sorted(self.ends.items())))
        for each in self.wrong:
            print(f"wrong: {each}")


def lies(source: Any, peer: Peer, report: Report) -> Iterator[bytes]:
    """So many frames of one visit."""
    for _ in range(source.integer(1, VISIT)):
        what = choice(source, WHAT)
        report.sent[what] += 1
        if what == "raw":
            yield peer.raw()
        elif what == "header":
            yield peer.header(source.integer(1, 16))
        else:
            yield peer.frame(getattr(frames, what))


async def to_host(count: int, seed: int) -> Report:
    """See the module's text."""
    report = Report()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: report.wrong.append(str(context)))
    played = Played()
    async with LocalHost() as beside:
        while report.frames < count:
            source: Any = RandomSource((seed, report.frames))
            begin = resident()
            with contextlib.suppress(ByreError):  # the boot is over before the guest lies; its end need not be
                async with MemoryVM(played) as vm:
                    await lied_to(vm, played, source, report)
            await played.guest.close()
            if resident() - begin > BOUND:
                report.wrong.append(f"memory grew by {resident() - begin} bytes, before frame {report.frames}")
        report.ends["beside"] = (await beside.run(["sh", "-c", "exit 7"])).returncode
    return report


async def lied_to(vm: Any, played: Played, source: Any, report: Report) -> None:
    """Work that goes on while the guest lies."""
    work = [
        vm.run(["echo"], capture_output=True, timeout=DEADLINE),
        vm.bridge.call("container.state", container="c", timeout=DEADLINE),
        vm.files.read("/etc/passwd"),
        vm.containers(),
        vm.bridge.call("process.wait", process=1, timeout=DEADLINE),
    ]
    tasks = [asyncio.create_task(asyncio.wait_for(each, 2 * DEADLINE)) for each in work]
    peer = Peer(source, vm.bridge._connection)
    for lie in lies(source, peer, report):
        channel = played.guest.bridge._channel
        if channel is None or channel.transport.is_closing():
            break
        channel.transport.write(lie)
        await asyncio.sleep(0)
    await vm.machine.kill()  # it has lied enough
    for task in tasks:
        try:
            await task
            report.ends["result"] += 1
        except (ByreError, OSError) as error:
            report.ends[type(error).__name__] += 1
        except Exception as error:
            report.wrong.append(repr(error))


async def to_agent(count: int, seed: int) -> Report:
    """See the module's text."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="byre-fuzz-") as folder:
        async with listening_agent(f"{folder}/agent") as agent:
            begin = resident(agent.pid)
            while report.frames < count and agent.returncode is None:
                await visit(f"{folder}/agent", RandomSource((seed, report.frames)), report)
            if agent.returncode is not None:
                report.wrong.append(f"the agent ended with {agent.returncode}")
                return report
            if resident(agent.pid) - begin > BOUND:
                report.wrong.append(f"the agent's memory grew by {resident(agent.pid) - begin} bytes")
            async with SocketHost(f"{folder}/agent") as host:
                report.ends["honest"] = (await host.run(["sh", "-c", "exit 7"])).returncode
    return report


async def visit(path: str, source: Any, report: Report) -> None:
    """A host that shakes hands, lies, and hangs up; it waits until the agent has read all of it."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, path)
        core = Connection(first=True, name="hostile")
        peer = Peer(source, core)
        with contextlib.suppress(ConnectionError):
            while not core.connected and not core.close_due:
                await loop.sock_sendall(sock, b"".join(core.data_to_send()))
                data = await asyncio.wait_for(loop.sock_recv(sock, 65536), DEADLINE)
                core.receive_data(data) if data else core.receive_eof()
            for lie in lies(source, peer, report):
                if not harmful(lie):
                    await loop.sock_sendall(sock, lie)
            sock.shutdown(socket.SHUT_WR)
            while await asyncio.wait_for(loop.sock_recv(sock, 65536), DEADLINE):
                pass
        report.ends["closed"] += 1


def harmful(lie: bytes) -> bool:
    """Whether it could be a request to run something here, with what this process may do."""
    return any(method.encode() in lie for method in REFUSED)


def resident(pid: int | str = "self") -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.fuzz_library")
    parser.add_argument("side", choices=("host", "agent"))
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = asyncio.run({"host": to_host, "agent": to_agent}[options.side](options.frames, options.seed))
    report.show()
    print(f"frames={report.frames} wrong={len(report.wrong)}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
