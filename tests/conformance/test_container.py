"""B20 to B31: what every container shows, on every vehicle that is a machine."""

from __future__ import annotations

import asyncio
import dataclasses
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from byre import ProcessParameters, Resources, UpdateResources, errors
from byre.oci.layout import open_image
from byre.oci.store import LayerStore
from examples.busybox_image import Layer, busybox_layer, write_layout

from .test_process import SOON, ended, read_all, read_until, shell

pytestmark = pytest.mark.vm


async def make(vm: Any, image: str, *args: str, **options: Any) -> Any:
    return await vm.create_container(image=image, args=list(args) or ["sleep", "infinity"], **options)


async def output(container: Any, *args: str) -> str:
    result = await container.run(list(args), capture_output=True, timeout=SOON)
    return str((result.stdout + result.stderr).decode())


@pytest.mark.behaviour("B20")
async def test_init_is_there_before_its_code_runs(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, "sh", "-c", "echo early; read x; echo got:$x; exit 3") as container:
        init = await container.create_process(None)
        assert await container.create_process(None) is init, "asked for again it is the same object"
        assert init.pid > 0
        assert not container.wait_channel.is_set()
        await container.start()
        assert await read_until(init, b"early\n") == b"early\n"
        init.stdio.stdin.write(b"word\n")
        assert await read_all(init) == b"got:word\n"
        assert await ended(init) == 3
        assert (await asyncio.wait_for(container.wait(), SOON)).code == 3


@pytest.mark.behaviour("B20")
async def test_an_init_that_nobody_asked_for_logs(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, "sh", "-c", "readlink /proc/self/fd/0; cat; echo to the log") as container:
        await container.start()
        assert (await asyncio.wait_for(container.wait(), SOON)).code == 0
        assert await container.log() == b"/dev/null\nto the log\n"


@pytest.mark.behaviour("B21")
async def test_exec_takes_parameters_and_an_oci_process(container: Any) -> None:
    assert container.is_oci
    assert container.os == "linux"
    spec = {
        "args": ["sh", "-c", "echo $GREETING; pwd; id -u"],
        "cwd": "/tmp",
        "env": ["PATH=/usr/bin:/bin", "GREETING=hello"],
        "user": {"uid": 12, "gid": 34},
    }
    async with await container.create_process({**spec, "terminal": False}) as process:
        assert await read_all(process) == b"hello\n/tmp\n12\n"
        assert await ended(process) == 0


@pytest.mark.behaviour("B22")
async def test_ids(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, id="twice") as first:
        with pytest.raises(errors.ContainerExists, match="twice"):
            await make(vm, busybox, id="twice")
        assert first.id == "twice"
        with pytest.raises(errors.ContainerNotFound, match="nowhere"):
            await vm.open_container("nowhere")
    async with await make(vm, busybox, id="twice"):
        pass
    for bad in ("../x", "a/b", "", "x" * 200, "-x"):
        with pytest.raises(errors.InvalidRequest):
            await vm._bridge.call("container.create", container=bad, spec={})


@pytest.mark.behaviour("B22")
async def test_a_failed_create_leaves_nothing(vm: Any, busybox: str) -> None:
    before = (await vm.run(["cat", "/proc/mounts"], capture_output=True)).stdout
    for options, error in (({"user": "nosuchuser"}, errors.UserNotFound), ({"cwd": "/bin/sh"}, errors.ByreError)):
        with pytest.raises(error):
            async with await make(vm, busybox, id="fails", **options) as container:
                await container.start()
    with pytest.raises(errors.ProgramNotFound):
        async with await make(vm, busybox, "no-such-program", id="fails") as container:
            await container.start()
    async with await make(vm, busybox, id="fails"):
        pass
    after = (await vm.run(["cat", "/proc/mounts"], capture_output=True)).stdout
    assert [line for line in after.splitlines() if b"overlay" in line] == [
        line for line in before.splitlines() if b"overlay" in line
    ]


@pytest.mark.behaviour("B23")
async def test_shutdown_sends_the_stop_signal_and_terminate_kills(vm: Any, busybox: str) -> None:
    script = "trap 'exit 44' TERM; echo ready; while :; do sleep 0.1; done"
    async with await make(vm, busybox, "sh", "-c", script) as container:
        init = await container.create_process(None)
        await container.start()
        await read_until(init, b"ready\n")
        await container.shutdown()
        assert (await asyncio.wait_for(container.wait(), SOON)).code == 44
        await container.shutdown()
        await container.terminate()
    async with await make(vm, busybox) as container:
        await container.start()
        await container.terminate()
        assert (await asyncio.wait_for(container.wait(), SOON)).code == 137
        await container.terminate()


@pytest.mark.behaviour("B23")
async def test_terminating_what_never_started_ends_its_wait(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox) as container:
        waiting = asyncio.ensure_future(container.wait())
        await container.terminate()
        assert (await asyncio.wait_for(waiting, SOON)).code == 137


@pytest.mark.behaviour("B24")
async def test_the_end_of_init_is_the_end_of_all(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, "sh", "-c", "read x; exit 8") as container:
        init = await container.create_process(None)
        await container.start()
        other = await shell(container, "echo on; setsid sleep 1000", stdout=True)
        await read_until(other, b"on\n")
        order: list[str] = []
        waits = [
            asyncio.ensure_future(_noted(order, "other", other.wait())),
            asyncio.ensure_future(_noted(order, "container", container.wait())),
        ]
        await init.close_stdin()
        statuses = await asyncio.wait_for(asyncio.gather(*waits), SOON)
        assert [status.code for status in statuses] == [137, 8]
        assert order == ["other", "container"], "first every process is gone, then the exit is reported"
        await other.close()


async def _noted(order: list[str], name: str, waiting: Any) -> Any:
    result = await waiting
    order.append(name)
    return result


@pytest.mark.behaviour("B25")
async def test_wait_channel_and_wait_error_agree_with_wait(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, "true") as container:
        with pytest.raises(errors.ByreError):
            container.wait_error()
        await container.start()
        await asyncio.wait_for(container.wait_channel.wait(), SOON)
        assert container.wait_error() is None
        assert (await container.wait()).code == 0


@pytest.mark.behaviour("B25", "B26")
async def test_close_releases_and_the_container_goes_on(vm: Any, busybox: str) -> None:
    container = await make(vm, busybox, id="goes-on")
    await container.start()
    waiting = asyncio.ensure_future(container.wait())
    await asyncio.sleep(0)
    await container.close()
    await container.close()
    with pytest.raises(errors.ContainerClosed):
        await asyncio.wait_for(waiting, SOON)
    assert isinstance(container.wait_error(), errors.ContainerClosed)
    async with await vm.open_container("goes-on") as again:
        assert "sleep" in await output(again, "ps")
    with pytest.raises(errors.ContainerNotFound):
        await vm.open_container("goes-on")


@pytest.mark.behaviour("B25", "B42")
async def test_wait_ends_with_connection_lost_when_the_machine_dies(fresh_vm: Any, busybox: str) -> None:
    container = await make(fresh_vm, busybox)
    await container.start()
    process = await container.create_process(ProcessParameters(args=["cat"], stdin=True, stdout=True))
    waits = [asyncio.ensure_future(w) for w in (container.wait(), process.wait(), process.stdio.stdout.read())]
    await asyncio.sleep(0)
    await fresh_vm.terminate()
    done, pending = await asyncio.wait(waits, timeout=SOON)
    assert not pending
    assert all(isinstance(task.exception(), errors.ConnectionLost) for task in done)
    assert isinstance(container.wait_error(), errors.ConnectionLost)
    with pytest.raises(errors.ConnectionLost):
        process.exit_code()  # B9: never an invented number
    with pytest.raises(errors.ConnectionLost):
        await container.run(["true"])
    await process.close()
    await container.close()


@pytest.mark.behaviour("B27")
@pytest.mark.parametrize("started", [True, False])
async def test_properties(vm: Any, busybox: str, started: bool) -> None:
    async with await make(vm, busybox) as container:
        if started:
            await container.start()
        v1 = await container.properties("Statistics", "ProcessList")
        assert v1["Id"] == container.id
        assert v1["Statistics"]["Memory"]["MemoryUsageCommitBytes"] >= 0
        v2 = await container.properties_v2("Statistics", "ProcessList")
        metrics = v2["LCOWMetrics"]
        assert metrics["memory"]["usage"]["usage"] >= 0
        assert metrics["pids"]["limit"] > 0
        assert metrics["cpu"]["usage"]["total"] >= 0
        if started:
            assert metrics["pids"]["current"] >= 1
            assert any(entry["ProcessId"] > 0 for entry in v1["ProcessList"])


@pytest.mark.behaviour("B27")
async def test_statistics_without_limits(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, resources=Resources(memory_bytes=-1, pids=-1)) as container:
        await container.start()
        metrics = (await container.properties_v2("Statistics"))["LCOWMetrics"]
        assert metrics["pids"]["limit"] == 0, "0 is how cgroup v1 metrics say: no limit"
        assert metrics["memory"]["usage"]["limit"] == (1 << 63) - 4096, "as cgroup v1 says it"


@pytest.mark.behaviour("B28")
async def test_limits_change_live(container: Any) -> None:
    await container.modify(UpdateResources(resources=Resources(memory_bytes=64 << 20, cpus=0.5, pids=33)))
    shown = await output(container, "cat", *(f"/sys/fs/cgroup/{n}" for n in ("memory.max", "cpu.max", "pids.max")))
    assert shown.split() == ["67108864", "50000", "100000", "33"]
    await container.modify(UpdateResources(resources=Resources(memory_bytes=-1, cpus=-1, pids=-1)))
    shown = await output(container, "cat", *(f"/sys/fs/cgroup/{n}" for n in ("memory.max", "cpu.max", "pids.max")))
    assert shown.split() == ["max", "max", "100000", "max"]


@pytest.mark.behaviour("B28")
async def test_what_cannot_be_modified_changes_nothing(container: Any) -> None:
    @dataclasses.dataclass
    class AddGPU:
        index: int = 0

    with pytest.raises(errors.NotSupported):
        await container.modify(AddGPU())
    before = await output(container, "cat", "/sys/fs/cgroup/pids.max")
    with pytest.raises(errors.NotSupported):
        await container._bridge.call(
            "container.update", container=container.id, resources={"pids": 5, "hugepages": 3}
        )
    assert await output(container, "cat", "/sys/fs/cgroup/pids.max") == before


#: Fills memory until something stops it.
HOG = "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done"


@pytest.mark.behaviour("B29")
async def test_out_of_memory_kills_inside_only(vm: Any, busybox: str) -> None:
    limits = Resources(memory_bytes=24 << 20)
    async with await make(vm, busybox) as bystander, await make(vm, busybox, resources=limits) as container:
        await bystander.start()
        await container.start()
        async with await shell(container, HOG) as hog:
            status = await asyncio.wait_for(hog.wait(), SOON * 3)
            assert (status.code, status.oom) == (137, True)
        assert await output(bystander, "echo", "alive") == "alive\n"
        assert not bystander.wait_channel.is_set()
    async with await make(vm, busybox, "sh", "-c", HOG, resources=limits) as container:
        await container.start()
        status = await asyncio.wait_for(container.wait(), SOON * 3)
        assert (status.code, status.oom) == (137, True)


class TestIsolation:
    """B30: what root in an unprivileged container cannot do."""

    pytestmark = pytest.mark.behaviour("B30")

    async def test_it_does_not_see_the_agent(self, container: Any) -> None:
        listing = await output(container, "ps")
        assert "byre" not in listing
        assert "python" not in listing

    async def test_it_has_no_devices_of_the_machine(self, container: Any) -> None:
        devices = (await output(container, "ls", "/dev")).split()
        assert not [d for d in devices if d.startswith(("vd", "sd", "vport", "mem", "kmsg", "vsock", "port"))]
        out = await output(container, "sh", "-c", "mknod /tmp/vda b 254 0 && cat /tmp/vda; echo rc=$?")
        assert "rc=0" not in out
        out = await output(container, "sh", "-c", "mknod /tmp/mem c 1 1 && cat /tmp/mem; echo rc=$?")
        assert "rc=0" not in out

    async def test_it_cannot_mount_or_load_modules(self, container: Any) -> None:
        for script in (
            "mount -t tmpfs x /tmp",
            "mount -t proc x /tmp",
            "mount -o remount,rw /sys",
            "echo 1 > /proc/sys/kernel/panic",
            "echo c > /proc/sysrq-trigger",
            "echo 1 > /sys/fs/cgroup/cgroup.kill",
            "rmmod overlay",
            "insmod /bin/busybox",
            "dmesg",
            "chroot /proc/1/root/../.. ls /usr/lib/byre",
        ):
            assert "rc=0" not in await output(container, "sh", "-c", f"{script}; echo rc=$?"), script

    async def test_its_namespaces_and_privileges_are_its_own(self, vm: Any, container: Any) -> None:
        command = ["sh", "-c", "for n in pid mnt net ipc uts cgroup; do readlink /proc/self/ns/$n; done"]
        inside = (await output(container, *command)).split()
        outside = (await vm.run(command, capture_output=True)).stdout.decode().split()
        assert len(inside) == 6
        assert not set(inside) & set(outside)
        status = await output(container, "cat", "/proc/self/status")
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        assert "CapEff:\t00000000a80425fb" in status or "CapEff:\t00000000800405fb" in status

    async def test_it_sees_only_its_own_network(self, container: Any) -> None:
        assert "lo" in await output(container, "ip", "-o", "link")
        assert "eth" not in await output(container, "ip", "-o", "link")


@pytest.mark.behaviour("B30", "B30a")
async def test_vsock_is_denied_by_seccomp(vm: Any, debian: str) -> None:
    code = "import socket\ntry:\n socket.socket(40, 1)\nexcept OSError as e:\n print('refused', e.errno)"
    async with await make(vm, debian) as container:
        await container.start()
        assert "refused" in await output(container, "python3", "-c", code)


@pytest.mark.behaviour("B30a")
async def test_a_privileged_container_has_the_machine_for_a_boundary(vm: Any, busybox: str) -> None:
    """Its root writes to every disk of the machine; the image and the layers on the host stay as they were."""
    import byre_images

    image, layers = byre_images.ensure(), layers_of(busybox)
    before = [sha256(path.read_bytes()).digest() for path in layers]
    script = (
        "for d in /sys/class/block/[vs]d*; do n=${d##*/}; mknod /tmp/$n b $(tr : ' ' <$d/dev); echo found $n;"
        " dd if=/dev/zero of=/tmp/$n bs=4096 count=4 conv=fsync; echo rc=$?; done"
    )
    async with await make(vm, busybox, privileged=True) as container:
        await container.start()
        tried = await output(container, "sh", "-c", script)
    assert {"found vda", "found sda"} <= set(tried.splitlines())
    assert "rc=0" not in tried.splitlines()
    byre_images.verify(image)
    assert [sha256(path.read_bytes()).digest() for path in layers] == before
    async with await make(vm, busybox) as container:
        await container.start()
        assert await output(container, "echo", "fine") == "fine\n"


def layers_of(reference: str) -> list[Path]:
    """The files on the host that are the layers of an image."""
    with open_image(reference) as image:
        return [layer.path for layer in LayerStore().prepare(image)]


@pytest.mark.behaviour("B31")
async def test_a_fork_bomb_meets_its_limit(vm: Any, busybox: str) -> None:
    async with await make(vm, busybox, resources=Resources(pids=40)) as container:
        init = await container.create_process(None)
        await container.start()
        bomb = await shell(container, "b() { b | b & }; b; sleep 1000", stderr=True)
        async with asyncio.timeout(SOON):
            while (await container.properties_v2("Statistics"))["LCOWMetrics"]["pids"]["current"] < 30:
                await asyncio.sleep(0.05)
        async with await make(vm, busybox) as other:
            await other.start()
            assert await output(other, "echo", "usable") == "usable\n"
        assert (await vm.run(["true"], timeout=SOON)).returncode == 0
        assert (await container.properties_v2("Statistics"))["LCOWMetrics"]["pids"]["current"] <= 40
        await container.terminate()
        assert (await asyncio.wait_for(container.wait(), SOON)).code == 137
        await bomb.close()
        await init.close()


@pytest.mark.behaviour("B63")
async def test_a_hostile_layer_harms_nothing(vm: Any, tmp_path: Path) -> None:
    """Names that leave the archive are refused; what links out, and device nodes, are harmless where they are."""

    def image(name: str, layer: Layer) -> str:
        return f"oci:{write_layout(tmp_path / name, [busybox_layer(), layer.data()], {})}"

    for number, name in enumerate(("../owned", "a/../../owned", "/owned")):
        bad = Layer()
        bad.add(name, b"owned")
        with pytest.raises(errors.ImageInvalid, match="owned"):
            await make(vm, image(f"bad{number}", bad))
    odd, target = Layer(), Path("/var/tmp/byre-owned")
    odd.symlink("out", str(target.parent))
    odd.add(f"out/{target.name}", b"owned")
    odd.add("disk", kind=tarfile.BLKTYPE, device=(254, 0), mode=0o666)
    odd.add("memory", kind=tarfile.CHRTYPE, device=(1, 1), mode=0o666)
    async with await make(vm, image("odd", odd)) as container:
        await container.start()
        assert await output(container, "cat", str(target)) == "owned"
        for node in ("/disk", "/memory"):
            assert "rc=0" not in await output(container, "sh", "-c", f"head -c 1 {node}; echo rc=$?")
    assert not target.exists()
