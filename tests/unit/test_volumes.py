"""Named volumes: made once and whole, locked by whoever has them, free when that is dead."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre import disk_files, errors, volumes
from byre.cli import parser, volume

MIB = 2**20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(volumes, "PATIENCE", 0.05)
    return tmp_path / "byre/volumes"


@contextlib.contextmanager
def taken(name: str, vm: str = "web") -> Iterator[int]:
    fd = volumes.take(volumes.path_of(name), vm)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_volume_is_a_sparse_file_with_a_file_system(home: Path) -> None:
    info = volumes.create("data", 1024 * MIB)
    assert (info.name, info.path, info.size_bytes, info.vm) == ("data", home / "data.disk", 1024 * MIB, "")
    assert 0 < info.disk_bytes < 4 * MIB
    assert info.path.stat().st_mode & 0o777 == 0o600
    with open(info.path, "rb") as file:
        file.seek(1024 + 56)
        assert file.read(2) == b"\x53\xef", "ext4's magic number"
    assert [path.name for path in home.iterdir()] == ["data.disk"]


def test_names_and_sizes_that_cannot_be_are_refused_and_leave_nothing(home: Path) -> None:
    for name in ("", "../x", ".x", "a/b", "x" * 65):
        with pytest.raises(errors.InvalidRequest):
            volumes.create(name)
    for size in (0, disk_files.MIN_BYTES - 1, disk_files.MAX_BYTES + 1):
        with pytest.raises(errors.InvalidRequest):
            volumes.create("data", size)
    assert not home.exists()
    for look in (volumes.inspect, volumes.remove):
        with pytest.raises(errors.VolumeNotFound):
            look("data")


def test_of_many_that_make_it_at_once_one_does(home: Path) -> None:
    outcomes: list[str] = []

    def make() -> None:
        try:
            volumes.create("data", 64 * MIB)
            outcomes.append("made")
        except errors.VolumeExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["exists"] * 7 + ["made"]
    assert [path.name for path in home.iterdir()] == ["data.disk"]
    assert volumes.ensure("data") == volumes.path_of("data")


def test_what_mke2fs_says_is_told_and_nothing_is_left(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "mke2fs"
    program.write_text("#!/bin/sh\necho it does not want to >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(errors.StorageFailed, match="does not want to"):
        volumes.create("data")
    assert list(home.iterdir()) == []
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(disk_files, "_SBIN", str(home))
    with pytest.raises(errors.ToolMissing) as caught:
        disk_files.scratch(64 * MIB)
    assert "e2fsprogs" in caught.value.hint


def test_who_has_it_is_told_to_who_wants_it() -> None:
    volumes.create("data", 64 * MIB)
    with taken("data"):
        assert (volumes.inspect("data").vm, volumes.inspect("data").pid) == ("web", os.getpid())
        for want in (lambda: volumes.take(volumes.path_of("data"), "db"), lambda: volumes.remove("data")):
            with pytest.raises(errors.VolumeInUse, match="'web'") as caught:
                want()
            assert caught.value.data == {"volume": "data", "vm": "web", "pid": os.getpid()}
        assert isinstance(caught.value, errors.DiskInUse)
        assert volumes.prune() == []
    assert volumes.inspect("data").vm == ""
    with taken("data", "db"):
        assert volumes.inspect("data").vm == "db"


def test_a_lock_lasts_as_long_as_anybody_has_the_file_open() -> None:
    """As QEMU has, which gets the descriptor from its owner and may outlive it by a moment."""
    volumes.create("data", 64 * MIB)
    program = (
        "import os, signal, socket, sys\n"
        "from byre import volumes\n"
        "fd = volumes.take(volumes.path_of('data'), 'web')\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b'x'], [fd])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program, str(theirs.fileno())]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], env=environment, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    with pytest.raises(errors.VolumeInUse):
        volumes.take(volumes.path_of("data"), "db")
    os.close(fd)
    with taken("data", "db"):
        pass


def test_a_removed_volume_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """To one who waited for it, and gets the lock of a file that has no name any more."""
    volumes.create("data", 64 * MIB)
    path = volumes.path_of("data")
    monkeypatch.setattr(volumes, "PATIENCE", 60)
    with taken("data") as fd:

        def check() -> None:
            if path.exists():
                path.unlink()
                os.close(fd)
                os.open(os.devnull, os.O_RDONLY)  # the same number again, for the end of the block

        with pytest.raises(errors.VolumeNotFound):
            volumes.take(path, "db", check)


def test_what_a_killed_maker_left_is_pruned_and_a_living_ones_is_not(home: Path) -> None:
    volumes.create("one", 64 * MIB)
    (home / ".new-dead").write_bytes(b"")
    with volumes._new(home) as (_, living):
        assert [info.name for info in volumes.prune(["other"])] == []
        assert [info.name for info in volumes.prune()] == ["one"]
        assert {path.name for path in home.iterdir()} == {living.name}


def test_a_scratch_has_no_name() -> None:
    fd = disk_files.scratch(64 * MIB)
    try:
        status = os.fstat(fd)
        assert (status.st_nlink, status.st_size) == (0, 64 * MIB)
        assert list((disk_files.data_home() / "scratch").iterdir()) == []
    finally:
        os.close(fd)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> tuple[int, str]:
        arguments = parser.parse(["volume", *words])
        status: int = getattr(volume, arguments.command.partition(":")[2])(arguments)
        return status, capsys.readouterr().out

    assert run("create", "--size", "64m", "a", "b") == (0, "a\nb\n")
    with taken("a"):
        _, shown = run("ls")
        lines = [line.split() for line in shown.splitlines()]
        assert lines[0] == ["VOLUME", "SIZE", "DISK", "WRITTEN", "VM"]
        assert [(line[0], line[1], line[-1]) for line in lines[1:]] == [("a", "64", "web"), ("b", "64", "-")]
        described = json.loads(run("inspect", "a")[1])
        assert (described[0]["name"], described[0]["vm"]) == ("a", "web")
        with open(os.devnull) as nobody, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", nobody)
            assert run("prune") == (1, ""), "nobody has said yes"
        assert run("prune", "--force") == (0, "b\n")
    assert run("rm", "a") == (0, "a\n")
    assert volumes.list_volumes() == []
