"""Pods: what their containers share and what they do not, limits above limits, life and death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from byre import Resources, errors
from tests.conformance import test_container as alone
from tests.conformance.test_container import HOG, output
from tests.conformance.test_process import SOON, read_until, shell

pytestmark = pytest.mark.vm

NAMESPACES = "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done"


async def started(pod: Any, image: str, id: str = "", *args: str, **options: Any) -> Any:
    container = await pod.create_container(id, image=image, args=list(args) or ["sleep", "infinity"], **options)
    await container.start()
    return container


@pytest.fixture(params=[False, True], ids=["own-processes", "shared-processes"])
async def pod(request: pytest.FixtureRequest, vm: Any) -> AsyncIterator[Any]:
    async with await vm.create_pod("shop", share_pid=request.param) as made:
        yield made


async def test_what_is_shared_and_what_is_not(pod: Any, busybox: str) -> None:
    share_pid = (await pod.info())["share_pid"]
    first, second = await started(pod, busybox, "first"), await started(pod, busybox, "second")
    own, other = [(await output(one, "sh", "-c", NAMESPACES)).split() for one in (first, second)]
    assert [a == b for a, b in zip(own, other, strict=True)] == [True, True, True, share_pid, False, False]
    assert (await pod.info())["containers"] == ["first", "second"]

    assert await output(first, "hostname") == await output(first, "cat", "/etc/hostname") == "shop\n"
    assert await output(first, "sh", "-c", "echo $HOSTNAME") == "shop\n"
    await output(first, "sh", "-c", "echo word > /dev/shm/note; echo mine > /tmp/note")
    assert await output(second, "cat", "/dev/shm/note") == "word\n"
    assert "No such file" in await output(second, "cat", "/tmp/note")

    async with await shell(first, "echo hello > /tmp/index.html; exec httpd -f -p 127.0.0.1:80 -h /tmp"):
        await second.wait_for_port(80)
        assert await output(second, "wget", "-qO-", "http://first/") == "hello\n", "by the name of the other"
    seen = await output(second, "ps", "-o", "pid,args")
    assert ("httpd" in seen or seen.count("sleep infinity") == 2) == share_pid


async def test_names_of_a_container_alone(vm: Any, busybox: str) -> None:
    async with await vm.create_container("alone", image=busybox, args=["sleep", "infinity"], hostname="web") as one:
        await one.start()
        assert await output(one, "cat", "/etc/hostname") == "web\n"
        hosts = await output(one, "cat", "/etc/hosts")
        assert hosts.splitlines()[0].split() == ["127.0.0.1", "localhost"]
        assert hosts.splitlines()[-1].split() == ["127.0.0.1", "web", "alone"]
        assert await output(one, "cat", "/etc/resolv.conf") == ""
        await output(one, "sh", "-c", "echo 127.0.0.9 there >> /etc/hosts")
        assert "127.0.0.9" in await output(one, "ping", "-c1", "there")
    mount = {"destination": "/etc/hosts", "type": "bind", "source": "/etc/passwd", "options": ["bind", "ro"]}
    async with await vm.create_container(
        image=busybox, args=["sleep", "infinity"], read_only=True, mounts=[mount]
    ) as one:
        await one.start()
        assert "root:" in await output(one, "cat", "/etc/hosts"), "the caller's own mount counts"
        assert "Read-only" in await output(one, "sh", "-c", "echo x > /etc/hostname")


@pytest.mark.behaviour("B24")
async def test_a_container_ends_alone(pod: Any, busybox: str) -> None:
    """Its own processes with it, the orphans too; the others, and the pod, go on."""
    ending = await started(pod, busybox, "ending", "sh", "-c", "(sleep 1111 &); sleep infinity")
    staying = await started(pod, busybox, "staying")
    other = await shell(ending, "echo on; setsid sleep 2222", stdout=True)
    await read_until(other, b"on\n")
    await ending.terminate()
    assert (await asyncio.wait_for(ending.wait(), SOON)).code == 137
    assert (await asyncio.wait_for(other.wait(), SOON)).code == 137
    await other.close()
    seen = await output(staying, "ps", "-o", "pid,stat,args")
    assert "sleep infinity" in seen
    assert not [text for text in ("1111", "2222") if text in seen]
    assert " Z" not in seen, "somebody reaps in the pod"
    await ending.delete()
    again = await started(pod, busybox, "ending", "true")
    assert (await asyncio.wait_for(again.wait(), SOON)).code == 0


async def test_leaving_takes_all_down(vm: Any, busybox: str) -> None:
    mounts = await vm.run(["cat", "/proc/mounts"], capture_output=True)
    async with await vm.create_pod("short", share_pid=True) as pod:
        running = await started(pod, busybox, "running")
        created = await pod.create_container("created", image=busybox, args=["true"])
        others = await vm.create_container("others", image=busybox, args=["true"], pod="short")
        with pytest.raises(errors.ContainerNotReady, match="short"):
            await pod.delete(force=False)
        for wrong in (errors.PodExists, errors.InvalidRequest):
            with pytest.raises(wrong):
                await vm.create_pod("short" if wrong is errors.PodExists else "../short")
    for container in (running, created):
        assert isinstance(container.wait_error(), errors.ContainerClosed) or (await container.wait()).code == 137
    assert (await asyncio.wait_for(others.wait(), SOON)).code == 137
    await others.close()
    assert not await vm.pods()
    for gone in ("running", "created", "others"):
        with pytest.raises(errors.ContainerNotFound):
            await vm.open_container(gone)
    with pytest.raises(errors.PodNotFound):
        await vm.create_container(image=busybox, args=["true"], pod="short")
    with pytest.raises(errors.PodNotFound):
        await vm.open_pod("short")
    await pod.delete()
    script = "ls -d /run/byre/p/* /sys/fs/cgroup/containers/@*; ps | grep '[s]leep 2147'"
    assert not (await vm.run(["sh", "-c", script], stdout=-1, stderr=-3)).stdout
    after = await vm.run(["sh", "-c", "grep -v ' /l/' /proc/mounts"], capture_output=True)
    before = b"\n".join(line for line in mounts.stdout.splitlines() if b" /l/" not in line)
    assert after.stdout.strip() == before.strip()


async def test_limits_of_all_above_those_of_each(vm: Any, busybox: str) -> None:
    limits = Resources(memory_bytes=96 << 20, cpus=1.5, pids=40)
    async with await vm.create_pod("tight", resources=limits) as pod:
        small = await started(pod, busybox, "small", resources=Resources(memory_bytes=24 << 20, pids=10))
        large = await started(pod, busybox, "large")
        root = "/sys/fs/cgroup/containers/@tight"
        files = [f"{root}/{name}" for name in ("memory.max", "cpu.max", "pids.max", "small/memory.max")]
        shown = await vm.run(["cat", *files], capture_output=True, text=True)
        assert shown.stdout.split() == ["100663296", "150000", "100000", "40", "25165824"]
        assert await output(small, "cat", "/sys/fs/cgroup/memory.max") == "25165824\n", "it sees its own"
        for container in (small, large):  # the one by its own limit, the other by that of all
            async with await shell(container, HOG) as hog:
                status = await asyncio.wait_for(hog.wait(), SOON * 3)
                assert (status.code, status.oom) == (137, True)
            assert not container.wait_channel.is_set()
        many = "n=0; while (sleep 1000 &) 2>/dev/null && [ $n -lt 60 ]; do n=$((n+1)); done; echo end"
        await large.run(["sh", "-c", many], capture_output=True, timeout=SOON)
        peak = await vm.run(["cat", f"{root}/pids.current"], capture_output=True, text=True)
        assert int(peak.stdout) <= 40
        assert (await vm.run(["true"])).returncode == 0


@pytest.mark.behaviour("B30")
async def test_the_first_process_of_a_pod_gives_nothing_away(vm: Any, busybox: str) -> None:
    """It is nobody's, in an empty root; not even with all capabilities does a way lead from it to the VM."""
    async with await vm.create_pod("seen", share_pid=True) as pod:
        ordinary = await started(pod, busybox, "ordinary")
        status = await output(ordinary, "cat", "/proc/1/status")
        assert "Uid:\t65534" in status
        assert "CapEff:\t0000000000000000" in status
        assert "CapPrm:\t0000000000000000" in status
        for script in ("ls /proc/1/root/", "kill -9 1; sleep 0.1; ls /proc/1/root/etc", "cat /proc/1/environ"):
            assert "rc=0" not in await output(ordinary, "sh", "-c", f"{script}; echo rc=$?")
        assert not ordinary.wait_channel.is_set()
        powerful = await started(pod, busybox, "powerful", cap_add=["SYS_PTRACE", "DAC_OVERRIDE", "SYS_CHROOT"])
        for path in ("/proc/1/root/", "/proc/1/root/..", "/proc/1/root/../..", "/proc/1/cwd/.."):
            assert not [name for name in ("lib", "run") if f"{name}\n" in await output(powerful, "ls", path)], path
        assert (await output(powerful, "sh", "-c", "tr '\\0' ' ' < /proc/1/environ")).strip() == ""
        fds = await output(powerful, "sh", "-c", "for f in /proc/1/fd/*; do readlink $f; done")
        assert set(fds.split()) == {"/dev/null"}


#: Behaviours of a container that sharing could spoil.
BEHAVIOURS = (
    alone.test_init_is_there_before_its_code_runs,
    alone.test_an_init_that_nobody_asked_for_logs,
    alone.test_shutdown_sends_the_stop_signal_and_terminate_kills,
    alone.test_terminating_what_never_started_ends_its_wait,
    alone.test_the_end_of_init_is_the_end_of_all,
    alone.test_wait_channel_and_wait_error_agree_with_wait,
    alone.test_statistics_without_limits,
    alone.test_out_of_memory_kills_inside_only,
)


@pytest.mark.parametrize("behaves", BEHAVIOURS, ids=lambda test: test.__name__.removeprefix("test_"))
async def test_as_a_container_alone(vm: Any, busybox: str, behaves: Any) -> None:
    async with await vm.create_pod("alike", share_pid=True) as pod:
        await behaves(pod, busybox)
