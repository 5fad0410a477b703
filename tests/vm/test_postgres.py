"""A database on a volume: what it acknowledged is there after its VM was killed in the midst of writing."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import byre
from tests.conformance.test_process import SOON
from tests.conftest import machine_options
from tests.images import postgres_layout

pytestmark = pytest.mark.vm

#: Rows that must have been acknowledged before the VM is killed, in the midst of the next ones.
ROWS = 100

#: One transaction each; psql prints the number once the server has committed it.
INSERT = b"INSERT INTO acknowledged SELECT max(n) + 1 FROM acknowledged RETURNING n;\n"

PSQL = ["psql", "-qAt", "-v", "ON_ERROR_STOP=1"]


async def database(vm: Any, name: str) -> Any:
    """A container whose PostgreSQL takes connections; its data are on the volume."""
    mounts = [byre.Volume("database", "/var/lib/postgresql")]
    container = await vm.create_container(name, image=f"oci:{postgres_layout()}", mounts=mounts)
    await container.start()
    async with asyncio.timeout(SOON * 3):
        while (await container.run(["pg_isready", "-q"], timeout=SOON)).returncode:
            if container.wait_channel.is_set():
                pytest.fail((await container.log()).decode())
    return container


async def sql(container: Any, statement: str) -> list[str]:
    done = await container.run([*PSQL, "-c", statement], capture_output=True, check=True, timeout=SOON)
    return str(done.stdout.decode()).split()


@pytest.mark.timeout(300)
async def test_committed_rows_survive_a_kill_of_the_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    options = {**machine_options(), "memory_mib": 512}
    async with byre.UtilityVM(**options) as vm:
        container = await database(vm, "first")
        await sql(container, "CREATE TABLE acknowledged (n int PRIMARY KEY); INSERT INTO acknowledged VALUES (0)")
        config = byre.ProcessParameters(args=PSQL, stdin=True, stdout=True)
        writer = await container.create_process(config)
        writer.stdio.stdin.write(INSERT * ROWS * 100)  # far more than it will come to
        last = 0
        while last < ROWS:
            last = int(await asyncio.wait_for(writer.stdio.stdout.readline(), SOON))
        os.kill(vm.machine_pid, signal.SIGKILL)
        await asyncio.wait_for(vm.wait(), SOON)
        try:
            while line := await writer.stdio.stdout.readline():  # what had been said before the end
                last = int(line)
        except (byre.ByreError, ValueError):  # the loss; half a line
            pass
    async with byre.UtilityVM(**options) as vm:
        container = await database(vm, "second")
        rows = [int(row) for row in await sql(container, "SELECT n FROM acknowledged ORDER BY n")]
        assert rows == list(range(len(rows)))
        assert len(rows) > last, "a row that was acknowledged is missing"
        assert b"automatic recovery in progress" in await container.log()
