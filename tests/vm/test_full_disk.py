"""The host's disk is full while a guest writes: an error inside, an event here, and no VM that stands still."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.test_process import SOON
from tests.conftest import machine_options
from tests.namespaces import OWN_MOUNTS, needs_own_mounts

pytestmark = [pytest.mark.vm, needs_own_mounts]

#: Run in a mount namespace of its own, in which the volumes are on a small file system.
PROGRAM = """
import asyncio, json, sys
import byre, byre.events

async def main(image, options):
    async with byre.UtilityVM(**options) as vm:

        async def failure():
            async for event in vm.events():
                if isinstance(event, byre.events.DiskEvent) and event.action == "failed":
                    return event.path, event.reason

        telling = asyncio.create_task(failure())

        async def container(*commands):
            mounts = [byre.Volume("data", "/data")]
            async with await vm.create_container(image=image, args=["sleep", "infinity"], mounts=mounts) as made:
                await made.start()
                return [(await made.run(["sh", "-c", each], capture_output=True, timeout=60)) for each in commands]

        first = await container(
            "echo first > /data/first; sync",
            "dd if=/dev/urandom of=/data/large bs=1M count=32 conv=fsync",
            "echo the rest works > /tmp/file; cat /tmp/file",
        )
        alive = await vm.run(["echo", "alive"], capture_output=True, timeout=60)
        again = await container("cat /data/first")
        told = await asyncio.wait_for(telling, 20)
    shown = [[each.returncode, each.stdout.decode()] for each in (*first, alive, *again)]
    print(json.dumps({"shown": shown, "told": told}))

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
"""


@pytest.mark.behaviour("B64")
def test_a_full_host_is_an_error_inside_and_told_and_the_vm_goes_on(busybox: str, tmp_path: Path) -> None:
    namespace = ["unshare", *OWN_MOUNTS]
    mount = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
    program = [sys.executable, "-c", PROGRAM, busybox, json.dumps(machine_options())]
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*namespace, "sh", "-c", mount, str(tmp_path), *program],
        env=environment,
        capture_output=True,
        timeout=SOON * 6,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    wrote, large, rest, alive, again = found["shown"]
    assert wrote[0] == 0
    assert large[0] != 0, "fsync must not say that it is on the disk"
    assert rest == [0, "the rest works\n"]
    assert alive == [0, "alive\n"]
    assert again == [0, "first\n"], "what was on the disk before is there"
    path, reason = found["told"]
    assert path.endswith("data.disk") and "No space left" in reason
