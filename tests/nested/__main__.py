"""`python -m tests.nested [PYTEST ARGUMENTS]`: run the VM tests on KVM over vsock, inside an emulated machine.

Proof that it was no fallback: before the KVM module is loaded byre must refuse `accelerator="kvm"` (the negative
control), and after the run the kernel's own count of KVM exits must have grown.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import byre

from ..conftest import RESULTS
from .exclusions import EXCLUDED
from .userland import outer_image

#: What the outer machine has: QEMU, pytest and a whole guest live in it.
MEMORY_MIB = 4096
CPUS = 2

#: Seconds after which the run is given up.
LIMIT = 3000

#: Where the userland has the source tree, and the environment of everything that runs there.
TREE = "/srv/byre"
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": f"{TREE}/host:{TREE}/guest:{TREE}/bridge_proto:{TREE}/images:{TREE}/site-packages",
    "PYTHONDONTWRITEBYTECODE": "1",
    "XDG_CACHE_HOME": "/srv/cache",
    "BYRE_TEST_VEHICLES": "kvm",
    "BYRE_TEST_SOON": "120",
    "BYRE_TEST_RESULTS": "/tmp/results",
}

CONTROL = """
import asyncio, byre
async def main():
    try:
        async with byre.UtilityVM(accelerator="kvm"):
            print("booted")
    except byre.errors.AcceleratorUnavailable as error:
        print("refused:", error)
asyncio.run(main())
"""


async def main(arguments: list[str]) -> int:
    image = await asyncio.to_thread(outer_image, say)
    async with byre.UtilityVM(memory_mib=MEMORY_MIB, cpus=CPUS, accelerator="tcg") as outer:
        say("the outer machine is up")
        options = {"image": image, "args": ["sleep", "infinity"], "privileged": True, "env": ENVIRONMENT}
        async with await outer.create_container("nested", scratch_bytes=1 << 30, **options) as container:
            await container.start()
            await expect_refusal(container)
            await load_kvm(outer)
            status = await run_tests(container, outer, arguments)
            await fetch_results(container)
    return status


async def expect_refusal(container: Any) -> None:
    """The negative control: without the module there is no KVM, and byre must not pretend."""
    result = await container.run(["python3", "-c", CONTROL], capture_output=True, timeout=300)
    text = (result.stdout + result.stderr).decode()
    say(f"negative control, KVM not loaded: {text.strip().splitlines()[-1]}")
    if "refused:" not in text:
        raise SystemExit("nested: byre did not refuse KVM where there is none")


async def load_kvm(outer: Any) -> None:
    for module in ("kvm_amd", "vhost_vsock"):
        await outer.run(["modprobe", module], check=True)
    await outer.run(["sh", "-c", "mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; chmod 666 /dev/kvm"])


async def kvm_exits(outer: Any) -> int:
    """How often virtual CPUs of all machines left KVM since their start; 0 when none runs."""
    result = await outer.run(["cat", "/sys/kernel/debug/kvm/exits"], capture_output=True, check=True)
    return int(result.stdout)


async def run_tests(container: Any, outer: Any, arguments: list[str]) -> int:
    command = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "--timeout=600", "-m", "vm", *arguments]
    command += ["tests/conformance", "tests/vm"]
    for start in EXCLUDED:
        command += ["--deselect", start]
    config = byre.ProcessParameters(args=command, cwd=TREE, env=ENVIRONMENT, stdout=True)
    started = time.monotonic()
    most = 0
    async with asyncio.timeout(LIMIT), await container.create_process(config) as process:
        watching = asyncio.ensure_future(watch(outer, lambda: kvm_exits(outer)))
        async for line in process.stdio.stdout:
            print("  |", line.decode(errors="backslashreplace").rstrip(), flush=True)
        status: int = (await process.wait()).code
        watching.cancel()
        most = max(await asyncio.gather(watching, return_exceptions=False) or [0])
    say(f"{time.monotonic() - started:.0f} s; KVM exits of one moment's machines: {most}")
    if most == 0:
        raise SystemExit("nested: the kernel counted no KVM exit: that was a fallback")
    return status


async def watch(outer: Any, count: Callable[[], Awaitable[int]]) -> list[int]:
    """The count, every few seconds, until cancelled."""
    seen = []
    try:
        while True:
            seen.append(await count())
            await asyncio.sleep(5)
    except asyncio.CancelledError:
        return seen


async def fetch_results(container: Any) -> None:
    """What the inner run recorded, beside the host's own."""
    script = "cd /tmp/results && tar -cf - ."
    result = await container.run(
        ["sh", "-c", "cat /tmp/results/behaviours-kvm.json"], capture_output=True, check=True
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    json.loads(result.stdout)
    (RESULTS / "behaviours-kvm.json").write_bytes(result.stdout)
    await container.run(["sh", "-c", script], capture_output=True)


def say(text: str) -> None:
    print(f"nested: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
