"""The agent on a UNIX socket, a proxy that cuts, and a host that goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import tempfile
from collections.abc import AsyncIterator

from byre.sockethost import SocketHost

from .proxy import CuttingProxy

#: Runs the agent with another patience for hosts that do not come back.
_PROGRAM = (
    "import sys; from byre_guest import server; server.RESUME_SECONDS = float(sys.argv.pop(1)); "
    "from byre_guest.__main__ import main; main()"
)


@contextlib.asynccontextmanager
async def listening_agent(path: str, resume_seconds: float = 30.0) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent that listens on `path`; told to end afterwards."""
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PROGRAM, str(resume_seconds), "--listen", path), stdout=asyncio.subprocess.DEVNULL
    )
    try:
        while not _listens(path):
            assert agent.returncode is None, "the agent did not start"
            await asyncio.sleep(0.005)
        yield agent
    finally:
        with contextlib.suppress(ProcessLookupError):
            agent.terminate()
        await agent.wait()


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


@contextlib.asynccontextmanager
async def cut_host(
    *, mean: int = 0, seed: int = 1, resume_seconds: float = 30.0
) -> AsyncIterator[tuple[SocketHost, CuttingProxy, asyncio.subprocess.Process]]:
    """A host whose way to its agent is cut every `mean` bytes or so (0: when the test says so)."""
    with tempfile.TemporaryDirectory(prefix="byre-cuts-") as folder:
        async with listening_agent(f"{folder}/agent", resume_seconds) as agent:
            with CuttingProxy(f"{folder}/way", f"{folder}/agent", mean=mean, seed=seed) as proxy:
                async with SocketHost(f"{folder}/way") as host:
                    host.bridge.resume_seconds = resume_seconds
                    yield host, proxy, agent
