"""B13, B40 to B52, B60: what every utility VM shows."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import byre
import byre_images
from byre import ProcessParameters, errors
from byre_images.initramfs import Node, cpio
from tests.conformance.test_process import SOON, ended, read_all, read_until, shell, writer
from tests.conftest import machine_options

pytestmark = pytest.mark.vm


def qemus_of(pid: int) -> list[int]:
    """Pids of the QEMU processes below a process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().partition("(")[2].rpartition(")")
            if name.startswith("qemu-system") and int(rest.split()[1]) == pid:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def descriptors() -> set[str]:
    """What this process has open, but for what the interpreter opens by itself."""
    shown = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            shown.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:
            continue
    return {d for d in shown if "/proc/" not in d}


async def until(condition: Any, seconds: float = SOON) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.behaviour("B13")
async def test_a_process_of_the_machine_is_like_any_other(vm: Any) -> None:
    async with await shell(vm, "cat /proc/self/cgroup; read x", terminal=True, stdin=True, stdout=True) as process:
        assert b"containers" not in await read_until(process, b"\n")
        await process.resize_console(70, 20)
        assert await process.signal("STOP")
        assert await process.signal("CONT")
        assert await process.kill()
        assert await ended(process) == 137


async def test_a_program_is_looked_for_again_when_something_was_mounted(vm: Any) -> None:
    mount = """
mount -t tmpfs tmpfs /usr/sbin
printf '#!/bin/sh\\nexit 7\\n' >/usr/sbin/true
chmod 755 /usr/sbin/true"""
    assert (await vm.run(["true"])).returncode == 0
    await vm.run(mount, shell=True, check=True)
    try:
        assert (await vm.run(["true"])).returncode == 7
    finally:
        await vm.run(["umount", "/usr/sbin"], check=True)
    assert (await vm.run(["true"])).returncode == 0


async def test_what_the_agent_starts_is_scheduled_as_everything_is(vm: Any, busybox: str) -> None:
    await vm.info()  # the agent has settled
    show = ["python3", "-c", "import os; print(os.sched_getscheduler(1), os.sched_getscheduler(0))"]
    for options in ({}, {"cwd": "/tmp"}):  # spawned, and forked
        shown = await vm.run(show, capture_output=True, check=True, **options)
        assert shown.stdout.split() == [str(os.SCHED_BATCH).encode(), str(os.SCHED_OTHER).encode()]
    async with await vm.create_container(image=busybox, args=["sleep", "infinity"]) as container:
        await container.start()
        policies = ["cut", "-d", " ", "-f", "41", "/proc/1/stat", "/proc/self/stat"]  # proc(5)
        assert (await container.run(policies, capture_output=True, check=True)).stdout == b"0\n0\n"


@pytest.mark.behaviour("B40")
async def test_a_machine_that_dies_before_its_agent_answers_fails_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(errors.BootFailed) as caught:
        async with byre.UtilityVM(**machine_options(), kernel_arguments=("rdinit=/nowhere", "init=/nowhere")):
            pass
    assert "panic" in caught.value.data["console"].lower()
    assert time.monotonic() - started < 60, "long before the boot deadline"


@pytest.mark.behaviour("B40")
async def test_a_guest_that_never_answers_meets_the_deadline(tmp_path: Path) -> None:
    before = qemus_of(os.getpid())
    image = byre_images.ensure()
    busybox = Path("/bin/busybox").read_bytes()
    script = b"#!/bin/busybox sh\necho it only sleeps >/dev/console\nexec busybox sleep 1000\n"
    nodes = [Node("bin", 0o40755), Node("dev", 0o40755), Node("dev/console", 0o020600, device=(5, 1))]
    nodes += [Node("bin/busybox", 0o100755, busybox), Node("init", 0o100755, script)]
    (tmp_path / "initramfs.cpio").write_bytes(cpio(nodes))
    idle = dataclasses.replace(image, initramfs=tmp_path / "initramfs.cpio")
    with pytest.raises(errors.BootTimeout) as caught:
        async with byre.UtilityVM(**machine_options(), image=idle, boot_timeout=max(15, SOON / 2)):
            pass
    assert "it only sleeps" in caught.value.data["console"]
    await until(lambda: qemus_of(os.getpid()) == before)


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize(
    ("template", "delay"),
    [("off", 0.0), ("off", 0.05), ("off", 0.4), ("off", 1.5), ("auto", 0.0), ("auto", 0.03), ("auto", 0.1)],
)
async def test_cancelling_a_boot_leaves_nothing(template: str, delay: float) -> None:
    before = descriptors(), qemus_of(os.getpid()), set(threading.enumerate()), set(os.listdir("/tmp"))
    vm = byre.UtilityVM(**machine_options(), template=template)
    boot = asyncio.ensure_future(vm.start())
    await asyncio.sleep(delay)
    boot.cancel()
    (outcome,) = await asyncio.wait_for(asyncio.gather(boot, return_exceptions=True), SOON)
    assert isinstance(outcome, asyncio.CancelledError) or (template == "auto" and outcome is None)
    await vm.close()
    await until(lambda: qemus_of(os.getpid()) == before[1])
    await until(lambda: not {t for t in threading.enumerate() if "asyncio_" not in t.name} - before[2])
    assert descriptors() <= before[0]
    assert not {name for name in set(os.listdir("/tmp")) - before[3] if "byre" in name}


@pytest.mark.behaviour("B42", "B9")
async def test_killing_the_machine_ends_every_call(fresh_vm: Any) -> None:
    process = await shell(fresh_vm, "echo up; sleep 1000", stdout=True)
    await read_until(process, b"up\n")
    calls = [
        asyncio.ensure_future(c)
        for c in (process.wait(), read_all(process), fresh_vm.wait(), fresh_vm.run(["sleep", "1000"]))
    ]
    await asyncio.sleep(0.2)
    (qemu,) = (pid for pid in qemus_of(os.getpid()) if pid == fresh_vm.machine_pid)
    os.kill(qemu, signal.SIGKILL)
    done, pending = await asyncio.wait(calls, timeout=1 if vehicle_is_quick() else 5)
    assert not pending
    outcomes = {type(task.exception()) for task in done if task.exception()}
    assert outcomes == {errors.ConnectionLost}
    with pytest.raises(errors.ConnectionLost):
        process.exit_code()
    with pytest.raises(errors.ConnectionLost):
        await fresh_vm.run(["true"])
    await process.close()


def vehicle_is_quick() -> bool:
    """Inside an emulated machine, Python itself takes its time."""
    return os.environ.get("BYRE_TEST_SOON") is None


OWNER = """
    import asyncio, sys, threading, time
    import byre
    vm = byre.UtilityVM(**%r)
    async def boot():
        await vm.start()
        print(vm.machine_pid, flush=True)
        await asyncio.sleep(1000)
    # The thread that spawns is not the main one.
    thread = threading.Thread(target=lambda: asyncio.run(boot()), daemon=True)
    thread.start()
    thread.join()
"""


@pytest.mark.behaviour("B43")
async def test_the_machine_dies_with_its_owner() -> None:
    script = textwrap.dedent(OWNER % machine_options())
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    try:
        async with asyncio.timeout(SOON * 3):
            qemu = int(await owner.stdout.readline())
        assert Path(f"/proc/{qemu}").exists()
    finally:
        owner.kill()
        await owner.wait()
    await until(lambda: not alive(qemu))


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.behaviour("B44")
async def test_a_call_past_its_deadline_fails_alone(vm: Any) -> None:
    async with await vm.create_process(ProcessParameters(args=["sleep", "1000"])) as process:
        with pytest.raises(errors.DeadlineExceeded):
            await vm._bridge.call("process.wait", process=process.id, timeout=0.3)
        assert await process.kill()
        assert await ended(process) == 137
    assert (await vm.run(["echo", "on"], capture_output=True)).stdout == b"on\n"


@pytest.mark.behaviour("B45")
async def test_a_bad_request_fails_alone_at_the_sender(vm: Any) -> None:
    with pytest.raises(errors.RequestTooLarge):
        await vm.create_process(ProcessParameters(args=["true"], env={"BIG": "x" * 2_000_000}))
    with pytest.raises(errors.InvalidRequest):
        await vm._bridge.call("process.signal", process="no number", signal=9)
    assert (await vm.run(["true"])).returncode == 0


@pytest.mark.behaviour("B46")
async def test_an_unknown_request_is_not_supported(vm: Any) -> None:
    with pytest.raises(errors.NotSupported):
        await vm._bridge.call("vm.info")  # a method of the table that the agent itself does not serve


@pytest.mark.behaviour("B47")
async def test_a_slow_handler_delays_no_other(vm: Any, busybox: str) -> None:
    """A FIFO in the place of the container's /etc/passwd blocks whoever opens it for reading."""
    async with await vm.create_container(image=busybox, args=["sleep", "infinity"]) as container:
        await container.start()
        await container.run(["sh", "-c", "rm -f /etc/passwd; mkfifo /etc/passwd"], check=True)
        lookup = asyncio.ensure_future(container.create_process(ProcessParameters(args=["true"], user="somebody")))
        for _ in range(3):
            assert (await vm.run(["echo", "quick"], capture_output=True, timeout=SOON)).stdout == b"quick\n"
        with pytest.raises(errors.ByreError):
            await asyncio.wait_for(lookup, SOON)


@pytest.mark.behaviour("B48")
async def test_a_hung_guest_is_noticed_and_a_paused_one_is_not_called_hung(fresh_vm: Any) -> None:
    assert fresh_vm.health.state == "ok"
    await fresh_vm.pause()
    await asyncio.sleep(fresh_vm.health.deadline + 1)
    assert fresh_vm.health.state != "unresponsive"
    await fresh_vm.resume()
    assert (await fresh_vm.run(["true"], timeout=SOON)).returncode == 0
    os.kill(fresh_vm.machine_pid, signal.SIGSTOP)  # behind the library's back
    try:
        await asyncio.wait_for(fresh_vm.health.wait_for("unresponsive"), fresh_vm.health.deadline + 5)
    finally:
        os.kill(fresh_vm.machine_pid, signal.SIGCONT)
    await asyncio.wait_for(fresh_vm.health.wait_for("ok"), SOON)


@pytest.mark.behaviour("B49")
async def test_stacks_and_console_can_be_had_while_the_agent_hangs(fresh_vm: Any) -> None:
    assert "byre_guest" in await fresh_vm.stacks()
    # The kernel freezes the agent: nothing in user space can answer any more.
    freeze = "read line; echo 1 >/sys/fs/cgroup/agent/cgroup.freeze"
    process = await shell(fresh_vm, freeze, stdin=True)
    writer(process).write(b"\n")
    with pytest.raises(errors.DeadlineExceeded):
        await fresh_vm.bridge.call("process.wait", process=process.id, timeout=SOON / 10)
    text = await asyncio.wait_for(fresh_vm.stacks(), SOON)
    assert "console's last lines" in text
    await process.close()
    assert isinstance(fresh_vm.console_tail(), str)


@pytest.mark.behaviour("B50")
async def test_guest_log_lines_arrive_and_a_flood_does_no_harm(vm: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="byre.guest"):
        await vm.run(["sh", "-c", "echo '<3>hello from the kernel log' > /dev/kmsg"], check=True)
        await until(lambda: any("hello from the kernel log" in r.getMessage() for r in caplog.records))
        record = next(r for r in caplog.records if "hello from the kernel log" in r.getMessage())
        assert vm.id in record.name
        flood = "i=0; while [ $i -lt $1 ]; do echo '<3>flood \033[2J' > /dev/kmsg; i=$((i+1)); done"
        lines = "5000" if vehicle_is_quick() else "300"  # each byte on the console leaves the virtual CPU
        await vm.run(["sh", "-c", flood, "sh", lines], check=True, timeout=SOON * 3)
        assert (await vm.run(["echo", "fine"], capture_output=True, timeout=SOON)).stdout == b"fine\n"
    assert not any("\033" in r.getMessage() for r in caplog.records)


@pytest.mark.behaviour("B51")
async def test_shutting_down_twice_is_harmless(fresh_vm: Any) -> None:
    await asyncio.gather(fresh_vm.shutdown(), fresh_vm.shutdown())
    await fresh_vm.shutdown()
    await fresh_vm.terminate()
    await asyncio.wait_for(fresh_vm.wait(), SOON)


@pytest.mark.behaviour("B52")
async def test_the_clock_is_right_after_boot_and_after_a_pause(vm: Any) -> None:
    async def offset() -> float:
        out = (await vm.run(["date", "+%s"], capture_output=True)).stdout
        return abs(float(out) - time.time())

    assert await offset() < 2
    await vm.pause()
    await asyncio.sleep(3)
    await vm.resume()
    assert await offset() < 2


@pytest.mark.behaviour("B52")
async def test_machines_differ_in_what_must_differ(vm: Any, fresh_vm: Any) -> None:
    script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1"
    one = (await vm.run(["sh", "-c", script], capture_output=True)).stdout.split(b"\n")
    two = (await fresh_vm.run(["sh", "-c", script], capture_output=True)).stdout.split(b"\n")
    assert all(a != b for a, b in zip(one, two, strict=True) if a or b)


@pytest.mark.behaviour("B60")
async def test_a_disk_added_twice_is_attached_once(vm: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"byre" * (1 << 18))

    async def present() -> int:
        out = (await vm.run(["sh", "-c", "cat /sys/block/sd*/size; true"], capture_output=True)).stdout
        return out.split().count(b"2048")

    assert await present() == 0
    first = await vm.attach_disk(disk)
    second = await vm.attach_disk(disk)
    assert (first.target, first.lun) == (second.target, second.lun)
    async with asyncio.timeout(SOON):
        while await present() != 1:
            await asyncio.sleep(0.05)
    await vm.detach_disk(first)
    assert await present() == 1
    await vm.detach_disk(second)
    async with asyncio.timeout(SOON):
        while await present() != 0:
            await asyncio.sleep(0.05)
