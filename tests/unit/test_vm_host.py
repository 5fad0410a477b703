"""UtilityVM without a machine: boot, layers, containers, health with a played guest."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from byre import Resources, UpdateResources, UtilityVM, boot, creation, disks, errors, health
from byre.creation import ContainerOptions
from byre.machines.memory import MemoryMachine
from byre.oci.files import Lease
from byre.oci.image import ImageConfig
from byre.testing import Command, FakeGuest, FakeProcess, Handler

SOON = 10.0


class Played:
    """A guest for MemoryMachine: a FakeGuest that begins as soon as the loop turns."""

    def __init__(self, handlers: dict[str, Handler] | None = None) -> None:
        self.handlers = handlers or {}
        self.commands: dict[str, Command] = {"echo": echo}
        self.guest: FakeGuest
        self._task: asyncio.Task[None] | None = None

    def __call__(self, sock: socket.socket) -> Callable[[], object]:
        sock.setblocking(False)
        self.guest = FakeGuest(sock, self.commands, self.handlers)
        self._task = asyncio.get_running_loop().create_task(self._open())
        return self._end

    async def _open(self) -> None:
        with contextlib.suppress(errors.ByreError):
            await self.guest.open()

    def _end(self) -> None:
        self.guest.bridge.fail("the machine ended")


async def echo(process: FakeProcess) -> int:
    if process.stdout is not None:
        process.stdout.write(b"echo\n")
    return 0


class MemoryVM(UtilityVM):
    """A UtilityVM on a machine of memory."""

    def __init__(self, guest: Callable[[socket.socket], Callable[[], object]], **options: Any) -> None:
        super().__init__(**options)
        self.machine = MemoryMachine(guest)

    async def _config(self, progress: Any) -> Any:
        return None

    def _make_machine(self, config: Any) -> Any:
        return self.machine


@asynccontextmanager
async def booted(**handlers: Handler) -> AsyncIterator[tuple[MemoryVM, FakeGuest]]:
    played = Played({name.replace("__", "."): handler for name, handler in handlers.items()})
    try:
        async with MemoryVM(played) as vm:
            for handler in handlers.values():
                storage = getattr(handler, "__self__", None)
                if isinstance(storage, Storage):
                    storage.guest = played.guest
            yield vm, played.guest
    finally:
        await played.guest.close()


async def forever(_: FakeProcess) -> int:
    await asyncio.Event().wait()
    return 0


def silent(sock: socket.socket) -> Callable[[], object]:
    """A guest that never answers."""
    return sock.close


# -- boot and end ------------------------------------------------------------------------------------------


@pytest.mark.behaviour("B52")
async def test_a_booted_vm_is_told_who_and_when_it_is() -> None:
    async with booted() as (vm, guest):
        method, told = guest.requests[0]
        assert method == "system.configure"
        assert told["realtime_ns"] > 1_600_000_000 * 10**9
        assert len(told["entropy"]) == 64
        assert len(told["machine_id"]) == 32
        assert (vm.os, vm.is_oci, vm.id) == ("linux", False, vm.machine.id)
        assert (await vm.run(["echo"], capture_output=True)).stdout == b"echo\n"
        with pytest.raises(errors.MachineFailed):
            await vm.start()
    assert vm.machine.exited is not None
    with pytest.raises(errors.ConnectionLost):
        await vm.run(["echo"])


@pytest.mark.behaviour("B40")
async def test_a_machine_that_dies_in_its_boot_fails_it_at_once() -> None:
    vm = MemoryVM(silent)

    async def die() -> None:
        while not vm.machine.running:
            await asyncio.sleep(0)
        vm.machine.write_console("line\nKernel panic - not syncing\n")
        vm.machine.die("guest-reset")

    dying = asyncio.create_task(die())
    with pytest.raises(errors.BootFailed, match="Kernel panic") as caught:
        await asyncio.wait_for(vm.start(), SOON)
    await dying
    assert not isinstance(caught.value, errors.BootTimeout)
    assert "Kernel panic" in caught.value.data["console"]
    assert caught.value.hint


@pytest.mark.behaviour("B40")
async def test_a_guest_that_never_answers_meets_the_deadline() -> None:
    vm = MemoryVM(silent_but_open, boot_timeout=0.05)
    with pytest.raises(errors.BootTimeout) as caught:
        await asyncio.wait_for(vm.start(), SOON)
    assert caught.value.data["console"] == ""
    assert vm.machine.exited is not None


def silent_but_open(sock: socket.socket) -> Callable[[], object]:
    return sock.close


@pytest.mark.behaviour("B40")
async def test_a_channel_that_ends_is_explained_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "LAST_WORDS", 0.05)

    def hang_up(sock: socket.socket) -> Callable[[], object]:
        sock.close()
        return lambda: None

    vm = MemoryVM(hang_up)
    with pytest.raises(errors.BootFailed):
        await asyncio.wait_for(vm.start(), SOON)
    assert vm.machine.exited is not None


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("turns", [0, 1, 3, 6, 10, 20])
async def test_cancelling_a_boot_leaves_no_machine(turns: int) -> None:
    played = Played()
    vm = MemoryVM(played)
    starting = asyncio.create_task(vm.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting], timeout=SOON)
    if not starting.cancelled():  # it was up already
        await vm.close()
    assert vm.machine.exited is not None or not vm.machine.running
    if hasattr(played, "guest"):
        await played.guest.close()


@pytest.mark.behaviour("B41")
async def test_a_boot_that_is_cancelled_as_it_fails_leaves_no_error_that_nobody_takes() -> None:
    unheard: list[dict[str, Any]] = []
    failed = asyncio.get_running_loop().create_future()

    async def connect() -> Any:
        await failed

    vm = MemoryVM(silent)
    starting = asyncio.create_task(vm.start())
    while not vm.machine.running:
        await asyncio.sleep(0)
    vm.machine.connect = connect
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    try:
        while not failed._callbacks:  # somebody awaits it
            await asyncio.sleep(0)
        failed.set_exception(errors.DeadlineExceeded("now"))
        starting.cancel()
        await asyncio.wait({starting})
        assert starting.cancelled()
        del starting  # with what its traceback holds
        gc.collect()
        await asyncio.sleep(0)
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert not unheard


@pytest.mark.behaviour("B41")
async def test_a_guest_that_refuses_its_configuration_is_not_left_running() -> None:
    def refuse(_: Any) -> Any:
        raise errors.StorageFailed("no clock")

    played = Played({"system.configure": refuse})
    vm = MemoryVM(played)
    with pytest.raises(errors.StorageFailed, match="no clock"):
        await vm.start()
    assert vm.machine.exited is not None
    await played.guest.close()


@pytest.mark.behaviour("B51")
async def test_ending_it_twice_and_from_two_tasks_is_harmless() -> None:
    async with booted() as (vm, _):
        await asyncio.gather(vm.shutdown(), vm.shutdown(), vm.terminate())
        await vm.shutdown()
        await vm.close()
        assert "ended" in await asyncio.wait_for(vm.wait(), SOON)
        assert vm.health.state == "lost"
    await UtilityVM().close()  # never started


@pytest.mark.behaviour("B42")
async def test_the_end_of_the_machine_is_the_reason_that_everybody_hears() -> None:
    async with booted() as (vm, guest):
        guest.commands["hang"] = forever
        running = asyncio.create_task(vm.run(["hang"]))
        await vm.bridge.ping(SOON)
        vm.machine.die("failed", signal=11)
        with pytest.raises(errors.ConnectionLost):
            await asyncio.wait_for(running, 1)


# -- layers and containers ---------------------------------------------------------------------------------


class Storage:
    """The guest's side of `disk.*` and `container.*`, as far as the host's rules go."""

    guest: FakeGuest  # set by `booted`

    def __init__(self) -> None:
        self.mounted: set[int] = set()
        self.containers: set[str] = set()
        self.fail = ""

    def handlers(self) -> dict[str, Handler]:
        return {
            "disk__mount": self.mount,
            "disk__unmount": self.unmount,
            "container__create": self.create,
            "container__delete": self.delete,
            "container__terminate": lambda _: {},
            "container__state": self.state,
            "container__stats": lambda _: {"stats": {"timestamp_ns": 1, "pids.current": 2, "pids.max": None}},
            "container__processes": lambda _: {"processes": []},
            "container__update": self.update,
            "container__list": lambda _: {"containers": [{"id": name} for name in sorted(self.containers)]},
        }

    def mount(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.fail == "mount":
            raise errors.StorageFailed("no squashfs")
        self.mounted.add(request["target"])
        return {"layer": f"L{request['target']}"}

    def unmount(self, request: dict[str, Any]) -> dict[str, Any]:
        self.mounted.remove(request["target"])
        return {}

    async def create(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.fail == "create":
            raise errors.UserNotFound("nosuchuser")
        if self.fail == "hang":
            await asyncio.Event().wait()
        if request["container"] in self.containers:
            raise errors.ContainerExists(request["container"])
        self.containers.add(request["container"])
        self.last = request
        return {}

    def delete(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["container"]
        if name in self.containers:
            self.containers.discard(name)
            self.guest.bridge.tell("container.exit", {"container": name, "code": 137, "signal": 9})
        return {}

    def state(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["container"] not in self.containers:
            raise errors.ContainerNotFound(request["container"])
        return {"state": {"id": request["container"], "state": "created"}}

    def update(self, request: dict[str, Any]) -> dict[str, Any]:
        self.updated = request["resources"]
        return {}


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An image of two layers, whatever the reference."""
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        path.write_bytes(bytes(512))
    config = ImageConfig(architecture="amd64", os="linux", cmd=("sh",), user="app")
    monkeypatch.setattr(creation, "_prepare", lambda image, options, check: (config, paths, Lease()))
    return paths


@pytest.mark.behaviour("B20", "B22", "B60")
async def test_layers_are_attached_once_and_stay_for_the_next_container(images: list[Path]) -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, _):
        async with await vm.create_container("one", image="x") as one:
            assert one.id == "one"
            assert storage.last["layers"] == ["L0", "L1"]
            assert storage.last["user"] == "app"
            async with await vm.create_container(image="x") as two:
                assert two.id != "one"
                assert sorted(vm.machine.disks) == [0, 1]
                assert len(await vm.containers()) == 2
        assert (await one.wait()).code == 137
        assert not storage.containers
        assert storage.mounted == {0, 1}, "they wait for the next container"


@pytest.mark.behaviour("B22", "B60")
@pytest.mark.parametrize(
    ("step", "error"), [("mount", errors.StorageFailed), ("create", errors.UserNotFound), ("cancel", None)]
)
async def test_a_create_that_fails_takes_back_what_it_did(
    images: list[Path], step: str, error: type[Exception] | None
) -> None:
    storage = Storage()
    storage.fail = "hang" if step == "cancel" else step
    async with booted(**storage.handlers()) as (vm, guest):
        creating = asyncio.create_task(vm.create_container("one", image="x"))
        if error is None:
            async with asyncio.timeout(SOON):
                while not any(method == "container.create" for method, _ in guest.requests):
                    await vm.bridge.ping(SOON)
            creating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(creating, SOON)
        else:
            with pytest.raises(error):
                await asyncio.wait_for(creating, SOON)
        assert not storage.mounted
        assert not vm.machine.disks
        storage.fail = ""
        await (await vm.create_container("one", image="x")).close()
        assert storage.mounted == {0, 1}


@pytest.mark.behaviour("B22")
async def test_a_failed_create_leaves_the_layers_of_others(images: list[Path]) -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, _):
        await (await vm.create_container("one", image="x")).close()
        with pytest.raises(errors.ContainerExists):
            await vm.create_container("one", image="x")
        assert storage.mounted == {0, 1}
        for name in ("../x", "-x", "x" * 65, "a b"):
            with pytest.raises(errors.InvalidRequest):
                await vm.create_container(name, image="x")


@pytest.mark.behaviour("B62")
async def test_an_idle_layer_makes_room(tmp_path: Path) -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, _):
        paths = [tmp_path / name for name in "abc"]
        for path in paths:
            path.write_bytes(bytes(512))
        attach = vm._owner.attach_disk

        async def two_places(path: Path) -> Any:
            if len(vm.machine.disks) == 2:
                raise errors.ResourceExhausted("no place")
            return await attach(path)

        vm._owner.attach_disk = two_places  # type: ignore[method-assign]
        layers = disks.Layers(vm._owner, vm.bridge)
        await layers.acquire(paths[:2])
        with pytest.raises(errors.ResourceExhausted):
            await layers.acquire(paths[2:])
        layers.keep(paths[:2])
        await layers.release(paths[:1])
        assert len(storage.mounted) == 2
        await layers.acquire(paths[2:])
        assert {disk.path for disk in vm.machine.disks.values()} == set(paths[1:])


@pytest.mark.behaviour("B25", "B26", "B27", "B28")
async def test_a_container_object(images: list[Path]) -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, _):
        container = await vm.create_container("one", image="x")
        with pytest.raises(errors.ContainerNotReady):
            container.wait_error()
        assert (await container.properties("Statistics"))["Id"] == "one"
        assert (await container.properties_v2("Statistics"))["LCOWMetrics"]["pids"] == {"current": 2, "limit": 0}
        with pytest.raises(errors.InvalidRequest):
            await container.properties("Nothing")
        await container.modify(UpdateResources(resources=Resources(pids=5, cpus=-1)))
        assert storage.updated == {"pids": 5, "cpus": -1}
        with pytest.raises(errors.NotSupported):
            await container.modify("more")  # type: ignore[arg-type]
        waiting = asyncio.create_task(container.wait())
        await asyncio.sleep(0)
        await container.close()
        await container.close()
        with pytest.raises(errors.ContainerClosed):
            await asyncio.wait_for(waiting, SOON)
        assert isinstance(container.wait_error(), errors.ContainerClosed)
        assert storage.containers == {"one"}, "it goes on"
        with pytest.raises(errors.ContainerNotFound):
            await vm.open_container("two")


@pytest.mark.behaviour("B25")
async def test_the_three_views_of_an_end_agree(images: list[Path]) -> None:
    storage = Storage()
    async with booted(**storage.handlers()) as (vm, guest):
        first = await vm.create_container("first", image="x")
        second = await vm.create_container("second", image="x")
        guest.bridge.tell("container.exit", {"container": "first", "code": 137, "signal": 9, "oom": True})
        await asyncio.wait_for(first.wait_channel.wait(), SOON)
        assert first.wait_error() is None
        assert await first.wait() == (137, 9, True)
        vm.machine.die("failed")
        with pytest.raises(errors.ConnectionLost):
            await asyncio.wait_for(second.wait(), SOON)
        assert isinstance(second.wait_error(), errors.ConnectionLost)
        assert await first.wait() == (137, 9, True), "what was told stays true"


def test_what_a_container_is_asked_to_be() -> None:
    config = ImageConfig(
        architecture="amd64", os="linux", entrypoint=("/entry",), cmd=("sh",), stop_signal="SIGINT"
    )

    def request(**options: Any) -> Any:
        return creation._request("c1", config, ContainerOptions(seccomp=False, **options), [])

    plain = request()
    assert plain["spec"]["process"]["args"] == ["/entry", "sh"]
    assert plain["spec"]["hostname"] == "c1"
    assert plain["stop_signal"] == 2
    assert plain["spec"]["process"]["noNewPrivileges"] is True
    assert request(args=["x"], stop_signal="TERM")["stop_signal"] == 15
    limits = request(resources=Resources(memory_bytes=1 << 20, cpus=0.5, pids=9))["spec"]["linux"]["resources"]
    assert limits["memory"]["limit"] == 1 << 20
    assert limits["pids"]["limit"] == 9
    mounts = request(tmpfs=["/data:size=1m,mode=700"])["spec"]["mounts"]
    assert mounts[-1]["options"] == ["nosuid", "nodev", "size=1m", "mode=700"]

    def effective(**options: Any) -> set[str]:
        return set(request(**options)["spec"]["process"]["capabilities"]["effective"])

    assert effective(cap_drop=["ALL"], cap_add=["net_admin"]) == {"CAP_NET_ADMIN"}
    assert "CAP_CHOWN" not in effective(cap_drop=["CHOWN"])
    assert "CAP_SYS_ADMIN" in effective(privileged=True)
    wrong: list[dict[str, Any]] = [{"args": "sh"}, {"scratch_bytes": -1}, {"width": -1}]
    for bad in wrong:
        with pytest.raises(errors.InvalidRequest):
            ContainerOptions(**bad)
    with pytest.raises(errors.InvalidRequest):
        request(tmpfs=["data"])


@pytest.mark.behaviour("B60")
async def test_disks_are_counted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    async with booted() as (vm, _):
        first, second = await vm.attach_disk(disk), await vm.attach_disk(disk)
        assert first == second
        await vm.detach_disk(first)
        assert vm.machine.disks
        await vm.detach_disk(second)
        assert not vm.machine.disks


# -- health, pause, evidence -------------------------------------------------------------------------------


@pytest.mark.behaviour("B48")
async def test_a_hung_guest_is_noticed_and_a_paused_one_is_not_called_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "INTERVAL", 0.01)
    monkeypatch.setattr(health, "PATIENCE", 0.05)
    async with booted() as (vm, guest):
        changes = aiter(vm.health)
        assert vm.health.state == "ok"
        transport = guest.bridge._channel.transport  # type: ignore[union-attr]
        await vm.pause()
        transport.pause_reading()
        await asyncio.sleep(0.2)
        assert vm.health.state == "paused"
        transport.resume_reading()
        await vm.resume()
        assert await asyncio.wait_for(vm.health.wait_for("ok"), SOON) == "ok"
        transport.pause_reading()  # it hangs
        await asyncio.wait_for(vm.health.wait_for("unresponsive"), SOON)
        transport.resume_reading()
        await asyncio.wait_for(vm.health.wait_for("ok"), SOON)
        vm.machine.die("failed")
        async with asyncio.timeout(SOON):
            seen = [state async for state in changes]
        assert seen == ["paused", "ok", "unresponsive", "ok", "lost"]
        with pytest.raises(errors.ConnectionLost):
            await vm.health.wait_for("ok")


@pytest.mark.behaviour("B52")
async def test_the_clock_is_set_after_a_pause() -> None:
    async with booted() as (vm, guest):
        await vm.pause()
        assert not vm.machine.running
        await vm.resume()
        method, told = guest.requests[-1]
        assert method == "system.configure"
        assert told["realtime_ns"] > 0
        assert (told["machine_id"], told["hostname"]) == ("", ""), "nothing else changes"


@pytest.mark.behaviour("B49")
async def test_stacks_and_console_can_be_had_while_the_agent_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byre.vm.STACKS_TIMEOUT", 0.05)

    async def hang(_: Any) -> Any:
        await asyncio.Event().wait()

    async with booted(system__stacks=hang) as (vm, _):
        vm.machine.write_console("last \033[2Jline\n")
        assert "last \\x1b[2Jline" in await vm.stacks()
        assert vm.console_tail() == await vm.console() == "last \\x1b[2Jline"
    async with booted() as (vm, _):
        assert "no stacks" in await vm.stacks()
        info = await vm.info()
        assert set(info) == {"name", "machine", "guest"}
