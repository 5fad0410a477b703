"""`python -m tests.nested [PYTEST ARGUMENTS]`: run the VM tests on KVM over vsock, inside an emulated machine.

Proof that it was no fallback: before the KVM module is loaded byre must refuse `accelerator="kvm"` (the negative
control), and during the run the kernel must count exits of virtual CPUs.  Proof that nothing was forgotten: the ids
that belong to the virtio-serial VM, less the exclusions, are those that passed here.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import byre
from tests.conftest import RESULTS

from . import outer, system, userland
from .exclusions import reason

#: Id -> node id, or how it ended.
Tests = dict[str, str]

#: Seconds after which the run is given up.
LIMIT = 3000
#: One test's; a boot is 10 to 30 s there.
TEST_SECONDS = 300
#: Between two looks at KVM's count, which the kernel drops with each machine.
WATCH_SECONDS = 5

CONTROL = """
import asyncio, byre, byre_images
async def main():
    if byre_images.current() is None:  # each test would try to build one, without a network
        raise SystemExit("the disk's guest image is not that of its sources: were they changed while it was made?")
    try:
        async with byre.UtilityVM(accelerator="kvm"):
            print("booted")
    except byre.errors.AcceleratorUnavailable as error:
        print("refused:", error)
asyncio.run(main())
"""


def say(text: str) -> None:
    print(f"nested: {text}", flush=True)


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    wanted, here = collected("vm"), collected("kvm")
    if set(wanted) != set(here):
        say(f"not the same tests on both vehicles: {sorted(set(wanted) ^ set(here))}")
        return 1
    run = {test: node for test, node in here.items() if reason(test) is None}
    with tempfile.TemporaryDirectory(prefix="byre-nested-") as folder:
        disk = Path(folder) / "disk.squashfs"
        say(f"{len(run)} tests to run, {len(wanted) - len(run)} excluded; making the image and the disk")
        image = system.system_image()
        userland.make_disk(disk)
        say(f"image and disk are ready after {time.monotonic() - started:.0f} s")
        exits, ended = asyncio.run(inside(image, disk, list(run.values()), arguments))
    return report(wanted, run, ended, exits, complete=not arguments, seconds=time.monotonic() - started)


def collected(vehicle: str) -> Tests:
    """The tests that belong to a vehicle: id -> node id."""
    with tempfile.NamedTemporaryFile("r") as record:
        environment = {**os.environ, "BYRE_TEST_VEHICLES": vehicle, "BYRE_NESTED_RECORD": record.name}
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.nested.record", "tests"]
        done = subprocess.run(command, cwd=userland.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"nested: the tests cannot be collected:\n{done.stdout[-4000:]}")
        found: Tests = json.loads(record.readline())["collected"]
        return found


async def inside(image: Path, disk: Path, nodes: list[str], arguments: list[str]) -> tuple[int, Tests]:
    """KVM's exits, and how each test ended there."""
    async with asyncio.timeout(LIMIT), outer.outer_host(image, disk) as (vm, container):
        say("the outer machine is up")
        await expect_refusal(container)
        await vm.run(["modprobe", "-a", "kvm_amd", "vhost_vsock"], check=True, timeout=60)
        exits = await run_tests(vm, container, nodes, arguments)
        return exits, await fetch_results(container)


async def expect_refusal(container: Any) -> None:
    """The negative control: without the module there is no KVM, and byre must not pretend."""
    result = await container.run(["python3", "-c", CONTROL], capture_output=True, timeout=120)
    text = (result.stdout + result.stderr).decode(errors="backslashreplace").strip()
    say(f"negative control, KVM not loaded: {text}")
    if not text.startswith("refused:"):
        raise SystemExit("nested: byre did not refuse KVM where there is none")


async def run_tests(vm: Any, container: Any, nodes: list[str], arguments: list[str]) -> int:
    await container.run(["sh", "-c", "cat >/run/nodes"], input="\n".join(nodes).encode(), check=True)
    command = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.nested.record", "--durations=25"]
    command += [f"--timeout={TEST_SECONDS}", *arguments, "@/run/nodes"]
    environment = {**outer.ENVIRONMENT, "BYRE_NESTED_RECORD": "/run/record"}
    config = byre.ProcessParameters(
        args=["sh", "-c", 'exec "$@" 2>&1', "sh", *command], cwd=str(userland.ROOT), env=environment, stdout=True
    )
    async with await container.create_process(config) as process:
        watching = asyncio.create_task(watch(vm, process))
        async for line in process.stdio.stdout:
            print("  |", line.decode(errors="backslashreplace").rstrip(), flush=True)
        await process.wait()
        return await watching


async def watch(vm: Any, process: Any) -> int:
    """The most KVM exits that all living machines together had at one moment of the run."""
    most = 0
    ended = asyncio.create_task(process.wait())
    while not ended.done():
        shown = await vm.run(["cat", "/sys/kernel/debug/kvm/exits"], capture_output=True, check=True, timeout=120)
        most = max(most, int(shown.stdout))
        await asyncio.wait({ended}, timeout=WATCH_SECONDS)
    return most


async def fetch_results(container: Any) -> Tests:
    """Keep what the inner run recorded (behaviours, consoles) beside the host's own; how each test ended."""
    shutil.rmtree(RESULTS / "nested", ignore_errors=True)
    await container.run(["mkdir", "-p", outer.RESULTS], check=True, timeout=60)
    RESULTS.mkdir(exist_ok=True)
    await container.files.copy_out(outer.RESULTS, RESULTS / "nested")
    behaviours = RESULTS / "nested" / "behaviours-kvm.json"
    if behaviours.exists():  # not where no test ran
        behaviours.replace(RESULTS / behaviours.name)
    record = await container.run(["cat", "/run/record"], capture_output=True, check=True, timeout=60)
    ended: Tests = {}
    for line in map(json.loads, record.stdout.splitlines()):
        if "id" in line and ended.get(line["id"]) in (None, "passed"):
            ended[line["id"]] = line["outcome"]
    return ended


def report(wanted: Tests, run: Tests, ended: Tests, exits: int, *, complete: bool, seconds: float) -> int:
    """Say what there was; the exit status."""
    bad = {test: outcome for test, outcome in ended.items() if outcome != "passed"}
    missing = sorted(set(run) - set(ended)) if complete else []
    for test, outcome in sorted(bad.items()):
        say(f"{outcome}: {test}")
    for test in missing:
        say(f"did not run: {test}")
    why: dict[str, int] = {}
    for test in set(wanted) - set(run):
        why[str(reason(test))] = why.get(str(reason(test)), 0) + 1
    for text, count in why.items():
        say(f"{count} excluded: {text}")
    passed = len(ended) - len(bad)
    say(f"of {len(wanted)} tests of the virtio-serial VM {passed} passed on KVM over vsock, "
        f"{len(wanted) - len(run)} excluded, {len(bad)} failed, {len(missing)} did not run")  # fmt: skip
    say(f"KVM counted up to {exits} exits at once; {seconds:.0f} s")
    if exits == 0:
        say("the kernel counted no KVM exit: that was a fallback")
    return 1 if bad or missing or not ended or exits == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
