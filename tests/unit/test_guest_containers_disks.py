"""Disks as layers: counted, shared, let go of in the right order; the kernel's side is played."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from byre_guest import children, disks, storage
from byre_guest.loop import Loop
from byre_proto.errors import (
    ByreError,
    Cancelled,
    DeadlineExceeded,
    DiskInUse,
    InvalidRequest,
    StorageFailed,
)


class Call:
    """As the server's: what was answered."""

    def __init__(self) -> None:
        self.result: dict[str, Any] | None = None
        self.error: ByreError | None = None
        self.on_cancel: Callable[[ByreError], object] | None = None

    def reply(self, result: dict[str, Any]) -> None:
        assert self.result is None and self.error is None, "answered twice"
        self.result = result

    def fail(self, error: ByreError) -> None:
        assert self.result is None and self.error is None, "answered twice"
        self.error = error


class Played:
    """A kernel with disks, and helper children that end when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.present: set[tuple[int, int]] = set()
        self.mounted: dict[str, str] = {}
        self.refused: set[str] = set()
        self.busy = False
        self.removed: list[tuple[int, int]] = []
        self.children: list[tuple[Callable[[], Any], Callable[[Any, ByreError | None], object]]] = []
        ours, theirs = socket.socketpair()
        self.uevents = ours
        theirs.setblocking(False)
        self.loop = Loop(self._raise)
        monkeypatch.setattr(disks, "_listen", lambda: theirs)
        monkeypatch.setattr(children, "run", self._run)
        monkeypatch.setattr(storage, "find_disk", lambda t, n: f"/dev/{t}.{n}" if (t, n) in self.present else "")
        monkeypatch.setattr(storage, "need", lambda *_names: None)
        monkeypatch.setattr(storage, "mount_layers", self._mount)
        monkeypatch.setattr(storage, "remove_layer", self._remove)
        self.disks = disks.Disks(self.loop, None)  # type: ignore[arg-type]
        self._theirs = theirs
        self.settle()

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error

    def _run(self, _loop: Any, _reaper: Any, function: Any, _timeout: float, done: Any) -> None:
        self.children.append((function, done))

    def _mount(self, wanted: list[tuple[str, str, str]]) -> list[str]:
        self.mounted.update({path: device for device, path, _ in wanted if device not in self.refused})
        return ["refused" if device in self.refused else "" for device, _, _ in wanted]

    def _remove(self, path: str, _filesystem: str, target: int, lun: int) -> None:
        if self.busy:
            raise DiskInUse("busy")
        self.mounted.pop(path, None)
        self.removed.append((target, lun))

    def settle(self) -> None:
        """Rounds of the loop and ends of children until nothing happens."""
        for _ in range(10):
            self.turn()
            started, self.children = self.children, []
            for function, done in started:
                try:
                    result, error = function(), None
                except ByreError as failure:
                    result, error = None, failure
                done(result, error)

    def turn(self) -> None:
        """One round of the loop, with a look at its descriptors."""
        self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
        self.loop.run()

    def appear(self, target: int, lun: int, subsystem: str = "block") -> None:
        self.present.add((target, lun))
        self.uevents.send(f"add@/devices/x\0ACTION=add\0SUBSYSTEM={subsystem}\0".encode())
        self.settle()

    def mount(self, target: int, lun: int, **more: Any) -> Call:
        call = Call()
        self.disks.mount(call, {"target": target, "lun": lun, "filesystem": "squashfs", **more})  # type: ignore[arg-type]
        self.settle()
        return call

    def unmount(self, target: int, lun: int) -> Call:
        call = Call()
        self.disks.unmount(call, {"target": target, "lun": lun})  # type: ignore[arg-type]
        self.settle()
        return call

    def close(self) -> None:
        self.loop.close()
        self.uevents.close()
        self._theirs.close()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    played = Played(monkeypatch)
    yield played
    played.close()


@pytest.mark.behaviour("B60")
def test_the_same_disk_twice_is_one_layer_and_two_removals_let_it_go(kernel: Played) -> None:
    kernel.present.add((0, 1))
    first, second = kernel.mount(0, 1), kernel.mount(0, 1)
    assert first.result is not None
    assert first.result == second.result
    assert kernel.mounted == {f"/l/{first.result['layer']}": "/dev/0.1"}
    assert kernel.unmount(0, 1).result == {}
    assert not kernel.removed
    assert kernel.unmount(0, 1).result == {}
    assert kernel.removed == [(0, 1)]
    assert not kernel.mounted
    assert kernel.unmount(0, 1).result == {}, "once more is harmless"


@pytest.mark.behaviour("B60")
def test_a_disk_is_waited_for_and_mounted_with_the_others(kernel: Played) -> None:
    calls = [kernel.mount(0, 1), kernel.mount(0, 1), kernel.mount(0, 2)]
    assert all(call.result is None for call in calls)
    kernel.present.add((0, 2))
    kernel.appear(0, 1, subsystem="net")
    assert not kernel.mounted, "that was no disk's message"
    kernel.appear(0, 1)
    assert [call.result and call.result["layer"] for call in calls] == ["1", "1", "2"]
    assert kernel.unmount(0, 1).result == {}
    assert not kernel.removed, "both who waited count"


@pytest.mark.behaviour("B60")
def test_a_mount_that_fails_lets_go_of_the_disk(kernel: Played) -> None:
    kernel.refused.add("/dev/0.1")
    kernel.present |= {(0, 1), (0, 2)}
    bad, good = Call(), Call()
    for call, lun in ((bad, 1), (good, 2)):
        kernel.disks.mount(call, {"target": 0, "lun": lun, "filesystem": "erofs"})  # type: ignore[arg-type]
    kernel.settle()
    assert isinstance(bad.error, StorageFailed)
    assert good.result == {"layer": "2"}, "one layer's failure is not another's"
    assert kernel.removed == [(0, 1)], "the guest's side first; then the host takes it away"
    kernel.refused.clear()
    assert kernel.mount(0, 1).result == {"layer": "3"}


def test_a_disk_that_never_comes(kernel: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "MOUNT_TIMEOUT", 0.0)
    call = kernel.mount(0, 1)
    assert isinstance(call.error, DeadlineExceeded)
    kernel.appear(0, 1)
    assert not kernel.mounted


@pytest.mark.behaviour("B15")
def test_a_mount_that_nobody_waits_for_is_undone(kernel: Played) -> None:
    waiting = kernel.mount(0, 1)
    assert waiting.on_cancel is not None
    waiting.on_cancel(Cancelled("no longer wanted"))
    assert isinstance(waiting.error, Cancelled)
    kernel.appear(0, 1)
    assert not kernel.mounted, "nobody waits for it any more"
    mounting = Call()
    kernel.disks.mount(mounting, {"target": 0, "lun": 1, "filesystem": "squashfs"})  # type: ignore[arg-type]
    kernel.turn()
    assert kernel.children, "the helper is at work"
    assert mounting.on_cancel is not None
    mounting.on_cancel(Cancelled("too late for the helper"))
    kernel.settle()
    assert not kernel.mounted
    assert kernel.removed == [(0, 1)]


@pytest.mark.behaviour("B61")
def test_a_layer_of_a_container_stays(kernel: Played) -> None:
    kernel.present.add((0, 1))
    name = kernel.mount(0, 1).result["layer"]  # type: ignore[index]
    assert kernel.disks.use([name, name], "c") == [f"/l/{name}"] * 2
    with pytest.raises(DiskInUse) as caught:
        kernel.unmount(0, 1)
    assert caught.value.data["containers"] == ["c"]
    kernel.disks.release("c")
    kernel.busy = True
    assert isinstance(kernel.unmount(0, 1).error, DiskInUse), "the kernel may know of a user that we do not"
    kernel.busy = False
    assert kernel.mount(0, 1).result == {"layer": name}, "it is still there"
    assert kernel.unmount(0, 1).result == {}
    assert kernel.unmount(0, 1).result == {}
    with pytest.raises(InvalidRequest):
        kernel.disks.use([name], "c")


def test_other_file_systems_are_refused(kernel: Played) -> None:
    with pytest.raises(InvalidRequest):
        kernel.mount(0, 1, filesystem="vfat")


def test_a_disk_is_found_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SCSI_DEVICES", str(tmp_path))
    for name in ("host0", "target0:0:1", "2:0:1:11", "2:0:11:1", "2:1:1:1"):
        (tmp_path / name / "block" / "null").mkdir(parents=True)
    assert storage.find_disk(1, 1) == ""
    (tmp_path / "2:0:1:1").mkdir()
    assert storage.find_disk(1, 1) == "", "the disk is there, its block device not yet"
    (tmp_path / "2:0:1:1" / "block" / "null").mkdir(parents=True)
    assert storage.find_disk(1, 1) == "/dev/null"
    monkeypatch.setattr(storage, "SCSI_DEVICES", str(tmp_path / "none"))
    assert storage.find_disk(1, 1) == ""


def test_a_disk_that_is_shown_and_cannot_yet_be_opened_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO that nobody reads gives the same ENXIO as a disk that the kernel is still adding."""
    fifo = str(tmp_path / "disk")
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: os.close(os.open(fifo, os.O_RDONLY)))
    with monkeypatch.context() as patched:
        patched.setattr(storage, "OPEN_TIMEOUT", 0)
        with pytest.raises(OSError, match="No such device or address"):
            storage._open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    monkeypatch.setattr(storage, "sleep", lambda _: reader.ident or reader.start())
    os.close(storage._open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    reader.join()


def test_uevents_can_be_heard() -> None:
    """The real socket; whoever may not have one would wait for disks for ever."""
    uevents = disks._listen()
    with pytest.raises(BlockingIOError):
        uevents.recv(1)
    assert not os.get_inheritable(uevents.fileno())
    uevents.close()
