"""How a VM gets its template, played by machines of memory: made once, cloned, made again, done without."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byre import UtilityVM, clone, errors, templates
from byre.machines.config import MachineConfig
from byre.machines.memory import MemoryMachine
from byre.template_files import digest
from byre.testing import FakeProcess
from byre_proto.messages import QUIET
from tests.unit.test_vm_host import Played

SOON = 10.0


class Machines:
    """Makes machines that can be saved, and remembers them.  ``answers`` changes what their guests answer."""

    def __init__(self) -> None:
        self.made: list[MemoryMachine] = []
        self.saved: list[MemoryMachine] = []
        self.configured: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {}

    def __call__(self, config: MachineConfig) -> MemoryMachine:
        async def quiesce(_: Any) -> dict[str, Any]:
            self.saved.append(machine)
            machine.write_console(QUIET)
            return {}

        async def configure(request: dict[str, Any]) -> dict[str, Any]:
            self.configured.append(request)
            return {"info": {}}

        async def containers(_: Any) -> dict[str, Any]:
            return {"containers": []}

        played = Played(
            {
                "system.quiesce": quiesce,
                "system.configure": configure,
                "container.list": containers,
                **self.answers,
            }
        )
        played.commands["sh"] = warm
        machine = MemoryMachine(played, config=config)
        self.made.append(machine)
        return machine


async def warm(_: FakeProcess) -> int:
    return 0


class ClonedVM(UtilityVM):
    def __init__(self, machines: Machines, **options: Any) -> None:
        super().__init__(**options)
        self.machines = machines

    async def _config(self, progress: Any) -> Any:
        nothing = Path(os.devnull)
        memory = self._options["memory_mib"]
        return MachineConfig(kernel=nothing, initramfs=nothing, root=nothing, memory_mib=memory)

    def _make_machine(self, config: Any) -> Any:
        return self.machines(config)


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(clone, "CALM", 0)
    monkeypatch.setattr(clone, "QUIESCE_TIMEOUT", 0.5)
    yield


async def template_of(machines: Machines, **options: Any) -> str:
    async with ClonedVM(machines, **options) as vm:
        assert (await vm.run(["echo"], capture_output=True)).stdout == b"echo\n"
        found: str = (await vm.info())["machine"]["template"]
        return found


async def test_the_first_is_saved_and_ended_and_all_are_clones() -> None:
    machines = Machines()
    assert "made for this" in await template_of(machines)
    assert "it was there" in await template_of(machines)
    assert len(machines.saved) == 1
    saved = machines.saved[0]
    assert saved.exited is not None
    assert saved.running is False
    clones = [machine for machine in machines.made if machine._config and machine._config.saved]
    assert len(clones) == 2


@pytest.mark.behaviour("B52")
async def test_each_clone_is_told_who_and_when_it_is() -> None:
    machines = Machines()
    for _ in range(3):
        await template_of(machines)
    assert len(machines.configured) == 4
    for field in ("entropy", "machine_id", "realtime_ns"):
        assert len({request[field] for request in machines.configured}) == 4


@pytest.mark.behaviour("B52")
async def test_a_clone_that_cannot_be_made_its_own_is_not_handed_out() -> None:
    machines = Machines()
    await template_of(machines)

    async def refuse(_: Any) -> dict[str, Any]:
        raise errors.ByreError("the entropy of the VM could not be set", step="entropy")

    machines.answers["system.configure"] = refuse
    with pytest.raises(errors.ByreError, match="entropy"):
        await template_of(machines)
    assert machines.made[-1].exited is not None


async def test_off_boots() -> None:
    machines = Machines()
    assert await template_of(machines, template="off") == "none: it was not wanted"
    assert not machines.saved
    with pytest.raises(errors.InvalidRequest):
        await template_of(machines, template="maybe")


async def test_what_cannot_be_saved_boots_and_says_why() -> None:
    async def refuse(_: Any) -> dict[str, Any]:
        raise errors.NotSupported("the agent does not fall quiet")

    machines = Machines()
    machines.answers["system.quiesce"] = refuse
    assert "the agent does not fall quiet" in await template_of(machines)
    assert templates.Store().templates() == []


async def test_an_agent_that_never_falls_quiet_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def quiet(_: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(clone, "QUIESCE_TIMEOUT", 0.05)
    machines = Machines()
    machines.answers["system.quiesce"] = quiet
    assert "did not fall quiet" in await template_of(machines)


async def test_a_directory_that_is_not_ours_alone_is_done_without() -> None:
    templates.Store().root.chmod(0o777)
    assert (await template_of(Machines())).startswith("none: ")


async def test_without_room_it_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MIN_FREE", 1 << 62)
    assert "MiB are free" in await template_of(Machines())


async def test_a_template_that_the_machine_does_not_take_is_made_again() -> None:
    machines = Machines()
    await template_of(machines)
    store = templates.Store()
    (template,) = store.templates()
    template.state.write_bytes(b"another state")
    text = (template.directory / "manifest.json").read_text()
    said = template.manifest["state"]["sha256"]
    (template.directory / "manifest.json").write_text(text.replace(said, digest(template.state)))
    assert "made for this" in await template_of(machines)
    assert len(machines.saved) == 2


async def test_two_at_once_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines()
    found = await asyncio.gather(*(template_of(machines) for _ in range(5)))
    assert sorted("made for this" in how for how in found) == [False] * 4 + [True]
    assert len(machines.saved) == 1


async def test_a_maker_that_does_not_end_is_waited_for_with_a_deadline() -> None:
    machines = Machines()
    nothing = Path(os.devnull)
    config = MachineConfig(kernel=nothing, initramfs=nothing, root=nothing)
    claim = templates.Store().claim(await MemoryMachine(lambda far: far.close, config=config).identity())
    assert claim is not None
    with claim:
        assert "another process is making it" in await template_of(machines, boot_timeout=0.2)
    assert "made for this" in await template_of(machines)


async def test_other_machines_have_other_templates() -> None:
    machines = Machines()
    for memory in (512, 256, 512):
        await template_of(machines, memory_mib=memory)
    assert len(machines.saved) == 2


@pytest.mark.behaviour("B41")
@pytest.mark.parametrize("turns", [0, 1, 5, 20, 60, 150])
async def test_cancelled_at_any_point_nothing_is_left(turns: int) -> None:
    machines = Machines()
    vm = ClonedVM(machines)
    starting = asyncio.create_task(vm.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, SOON)
    assert all(machine.exited is not None for machine in machines.made if machine._started)
    root = templates.Store().root
    assert [entry for entry in os.listdir(root) if entry.endswith((".new", ".lock"))] == []
    await template_of(machines)


async def test_an_error_of_the_boot_is_the_boots_own() -> None:
    async def refuse(_: Any) -> dict[str, Any]:
        raise errors.ByreError("the clock of the VM could not be set")

    machines = Machines()
    machines.answers["system.configure"] = refuse
    with pytest.raises(errors.ByreError, match="clock"):
        await template_of(machines)
    assert templates.Store().templates() == []
