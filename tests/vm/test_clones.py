"""Clones of a template: what is their own (B52), what they share and leave whole (B30a), and how one is made."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import byre
from byre import templates
from byre.template_files import digest
from tests.conformance.test_process import SOON
from tests.conftest import machine_options

pytestmark = pytest.mark.vm

#: Clones whose random numbers are compared; where Python itself is emulated, fewer.
CLONES = 50 if os.environ.get("BYRE_TEST_SOON") is None else 5

#: Takes random numbers in each way that programs have; the first thing that a clone does.  ssh-keygen is not in the
#: guest's image: it asks getrandom(2), as Python does.
FIRST_INSTANT = """
head -c 16 /dev/urandom | od -An -tx1
head -c 16 /dev/random | od -An -tx1
cat /proc/sys/kernel/random/uuid
cat /proc/sys/kernel/random/boot_id
cat /etc/machine-id
"""
PYTHON = """
python3 -I -S -c 'import os; print(os.getrandom(16).hex()); print(hash("seeded by getrandom as well"))'
"""
#: Python takes most of a second to start, so one clone in so many starts it.
PYTHON_EVERY = 5


async def lines_of(vm: Any, script: str) -> list[str]:
    text: str = (await vm.run(["sh", "-c", script], capture_output=True, check=True)).stdout.decode()
    return text.splitlines()


async def template_of(vm: Any) -> str:
    text: str = (await vm.info())["machine"]["template"]
    return text


@pytest.mark.behaviour("B52")
async def test_what_must_differ_differs_in_every_clone_at_its_first_instant() -> None:
    seen: set[str] = set()
    keys = set()
    for number in range(CLONES):
        async with byre.UtilityVM(**machine_options()) as vm:
            script = FIRST_INSTANT if number % PYTHON_EVERY else PYTHON + FIRST_INSTANT
            lines = await lines_of(vm, script)
            keys.add((await template_of(vm)).partition(":")[0])
        assert len(lines) == (5 if number % PYTHON_EVERY else 7)
        assert seen.isdisjoint(lines), f"clone {number} has what another one had"
        seen.update(lines)
    assert len(keys) == 1, "they are not clones of the same template"


@pytest.mark.behaviour("B52")
async def test_a_clones_clock_and_names_are_its_own() -> None:
    async with byre.UtilityVM(**machine_options(), name="first") as one:
        assert "none" not in await template_of(one)
        async with byre.UtilityVM(**machine_options(), name="second") as two:
            for vm in (one, two):
                name, now = await lines_of(vm, "hostname; date +%s")
                assert name == vm.name
                assert abs(float(now) - time.time()) < 2


@pytest.mark.behaviour("B52")
async def test_a_clones_clock_goes_on_at_the_right_rate(fresh_vm: Any) -> None:
    async def both() -> tuple[float, float]:
        return (await fresh_vm.info())["guest"]["uptime_s"], time.monotonic()

    guest, host = await both()
    await asyncio.sleep(5)
    guest_later, host_later = await both()
    assert abs((guest_later - guest) - (host_later - host)) < SOON / 10


@pytest.mark.behaviour("B30a")
async def test_what_clones_do_leaves_the_template_as_it_was(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    async with byre.UtilityVM(**machine_options()) as vm:
        key = (await template_of(vm)).partition(":")[0]
        await vm.attach_disk(disk)
        fill = "dd if=/dev/urandom of=/tmp/fill bs=1M count=48 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches"
        await vm.run(["sh", "-c", f"{fill}; rm /tmp/fill; echo 1 >/proc/sys/vm/compact_memory"], check=True)
    store = templates.Store()
    (template,) = (each for each in store.templates() if each.key == key)
    store.verify(template)


async def test_off_boots_and_says_so() -> None:
    async with byre.UtilityVM(**machine_options(), template="off") as vm:
        assert await template_of(vm) == "none: it was not wanted"
        assert (await vm.run(["true"])).returncode == 0


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the images of the user's, and no templates."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byre"
    own = tmp_path / "cache" / "byre"
    own.mkdir(parents=True)
    for entry in cache.iterdir():
        if entry.name != "templates":
            (own / entry.name).symlink_to(entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.parent))
    return own / "templates"


def only(store: templates.Store) -> templates.Template:
    (template,) = store.templates()
    return template


async def test_a_damaged_template_is_made_anew(own_cache: Path) -> None:
    async def start() -> str:
        async with byre.UtilityVM(**machine_options()) as vm:
            assert (await vm.run(["echo", "on"], capture_output=True)).stdout == b"on\n"
            return await template_of(vm)

    assert "made for this" in await start()
    assert "it was there" in await start()
    store = templates.Store()
    with only(store).memory.open("r+b") as file:
        file.seek(16 << 20)
        file.write(b"poison")
    assert "made for this" in await start()
    # One that looks right, and that QEMU does not take.
    template = only(store)
    template.state.write_bytes(template.state.read_bytes()[:1000])
    manifest = {**template.manifest, "state": {"sha256": digest(template.state)}}
    (template.directory / "manifest.json").write_text(json.dumps(manifest))
    assert "made for this" in await start()


START = """
import asyncio, sys, byre
async def main():
    async with byre.UtilityVM(**%r) as vm:
        result = await vm.run(["echo", "on"], capture_output=True)
        print(result.stdout, (await vm.info())["machine"]["template"], flush=True)
asyncio.run(main())
"""


async def starter() -> asyncio.subprocess.Process:
    script = START % machine_options()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script), stdout=asyncio.subprocess.PIPE, env=environment
    )


async def test_two_processes_at_once_make_one(own_cache: Path) -> None:
    both = [await starter(), await starter()]
    answers = [(await process.communicate())[0].decode() for process in both]
    assert all(answer.startswith("b'on\\n'") for answer in answers), answers
    assert sorted("made for this" in answer for answer in answers) == [False, True]
    only(templates.Store())


@pytest.mark.parametrize("found", ["*.new/memory", "*.new/state"])
async def test_a_maker_that_is_killed_leaves_nothing_that_confuses(own_cache: Path, found: str) -> None:
    killed = await starter()
    async with asyncio.timeout(100):
        while not list(own_cache.glob(found)):
            assert killed.returncode is None
            await asyncio.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    await killed.communicate()
    async with byre.UtilityVM(**machine_options()) as vm:
        assert (await vm.run(["true"], timeout=SOON)).returncode == 0
        await template_of(vm)
    only(templates.Store())
    assert [entry for entry in os.listdir(own_cache) if "." in entry] == []
