"""The files of a place: a VM, a container, this host; and what must hold of copies between them and here."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import os
import struct
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from byre import DEVNULL, errors
from byre.file_operation import Operation

from .test_memory import resident
from .test_process import SOON, shell

MIB = 1024 * 1024

#: A value of security.capability (capabilities(7)): CAP_NET_RAW permitted; a tmpfs takes it, of root.
CAPABILITY = struct.pack("<5I", 0x02000000, 1 << 13, 0, 0, 0)

_numbers = itertools.count()


@pytest.fixture
async def there(host: Any) -> AsyncIterator[str]:
    """A new directory of the place."""
    path = f"/tmp/byre-files-{os.getpid()}-{next(_numbers)}"
    await host.files.mkdir(path, parents=True)
    yield path
    await host.run(["chmod", "-R", "u+rwx", path], stderr=DEVNULL, timeout=SOON)  # for an ordinary user
    await host.files.remove(path, recursive=True)


async def names(files: Any, path: str) -> list[str]:
    return [entry.name for entry in await files.list(path)]


# -- one file ----------------------------------------------------------------------------------------------


async def test_bytes_are_written_and_read(host: Any, there: str) -> None:
    name = os.fsdecode(b"name with space, \xff and \n")
    files, path = host.files, f"{there}/{name}"
    await files.write(path, b"first", mode=0o640)
    assert await files.read(path) == b"first"
    status = await files.stat(path)
    assert (status.kind, status.mode, status.size) == ("file", 0o640, 5)
    await files.write(path, b"")
    assert await files.read(path) == b""
    assert (await files.stat(path)).mode == 0o640, "a file that is replaced keeps its mode"
    with pytest.raises(errors.PathExists):
        await files.write(path, b"again", exclusive=True)
    await files.write(f"{there}/new", b"x", exclusive=True)
    assert await names(files, there) == sorted(["new", name])
    with pytest.raises(errors.ResourceExhausted):
        await files.read(f"{there}/new", limit=0)
    async with files.open_read(f"{there}/new") as reader:
        assert [await reader.read(5), await reader.read(5)] == [b"x", b""]


async def test_a_process_sees_what_was_written(host: Any, there: str) -> None:
    await host.files.write(f"{there}/script", b"#!/bin/sh\necho hello $1\n", mode=0o755)
    done = await host.run([f"{there}/script", "there"], capture_output=True, timeout=SOON)
    assert done.stdout == b"hello there\n"
    await host.run(["sh", "-c", f"echo answer > {there}/answer"], timeout=SOON)
    assert await host.files.read(f"{there}/answer") == b"answer\n"


async def test_directories(host: Any, there: str) -> None:
    files = host.files
    await files.mkdir(f"{there}/a/b", parents=True)
    await files.mkdir(f"{there}/a/b", exist_ok=True)
    await files.write(f"{there}/a/f", b"1")
    await files.write(f"{there}/a/b/g", b"22")
    await host.run(["ln", "-s", "nowhere", f"{there}/a/link"], timeout=SOON)
    assert [(e.name, e.kind, e.size, e.target) for e in await files.list(f"{there}/a")] == [
        ("b", "dir", 0, ""),
        ("f", "file", 1, ""),
        ("link", "symlink", 0, "nowhere"),
    ]
    walked = [entry.name async for entry in files.walk(there)]
    assert sorted(walked) == ["a", "a/b", "a/b/g", "a/f", "a/link"]
    assert walked.index("a/b") < walked.index("a/b/g")
    await files.rename(f"{there}/a/f", f"{there}/a/b/g")
    assert await files.read(f"{there}/a/b/g") == b"1"
    assert not await files.exists(f"{there}/a/link")
    await files.remove(f"{there}/a/link")
    await files.remove(f"{there}/a", recursive=True)
    await files.remove(f"{there}/a", missing_ok=True)
    assert await names(files, there) == []


async def test_errors_are_typed_and_say_where(host: Any, there: str) -> None:
    files = host.files
    await files.write(f"{there}/f", b"")
    await files.mkdir(f"{there}/d/e", parents=True)
    await host.run(["mkfifo", f"{there}/fifo"], timeout=SOON)
    for call, kind, builtin in (
        (files.read(f"{there}/none"), errors.PathNotFound, FileNotFoundError),
        (files.read(f"{there}/d"), errors.PathIsDirectory, IsADirectoryError),
        (files.read(f"{there}/f/x"), errors.PathNotDirectory, NotADirectoryError),
        (files.list(f"{there}/f"), errors.PathNotDirectory, NotADirectoryError),
        (files.write(f"{there}/none/x", b""), errors.PathNotFound, FileNotFoundError),
        (files.write(f"{there}/d", b""), errors.PathIsDirectory, IsADirectoryError),
        (files.mkdir(f"{there}/d"), errors.PathExists, FileExistsError),
        (files.mkdir(f"{there}/f", exist_ok=True), errors.PathNotDirectory, NotADirectoryError),
        (files.remove(f"{there}/d"), errors.FileFailed, OSError),
        (files.rename(f"{there}/none", f"{there}/x"), errors.PathNotFound, FileNotFoundError),
        (files.write(f"{there}/f", b"", owner="nobody-of-this-name"), errors.UserNotFound, LookupError),
        (files.read("a\0b"), errors.InvalidRequest, ValueError),
        (files.read(f"{there}/fifo"), errors.FileFailed, OSError),
    ):
        with pytest.raises(kind) as caught:
            await asyncio.wait_for(call, SOON)
        assert isinstance(caught.value, builtin)
        if isinstance(caught.value, errors.FileFailed):
            assert str(caught.value.data["path"]).startswith(there) and caught.value.hint


async def test_a_write_that_is_cut_leaves_the_old_file(host: Any, there: str) -> None:
    path = f"{there}/f"
    await host.files.write(path, b"old")
    with pytest.raises(ZeroDivisionError):
        async with host.files.open_write(path) as file:
            await file.write(bytes(MIB))
            raise ZeroDivisionError
    assert await host.files.read(path) == b"old"
    assert await names(host.files, there) == ["f"], "nothing is left of the new one"


@pytest.mark.not_on("sync")
async def test_a_cancelled_operation_leaves_nothing(host: Any, there: str) -> None:
    await host.files.write(f"{there}/f", b"old")
    writing = asyncio.create_task(_write_without_end(host.files, f"{there}/f"))
    while len(await names(host.files, there)) < 2:
        pass
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await names(host.files, there) == ["f"]
    assert await host.files.read(f"{there}/f") == b"old"
    found = (await host.bridge.call("process.list"))["processes"]
    assert [p for p in found if p["exit"] is None and p["args"][0] == "files.write"] == []


async def _write_without_end(files: Any, path: str) -> None:
    async with files.open_write(path) as file:
        while True:
            await file.write(bytes(1000))


@pytest.mark.not_on("sync")
@pytest.mark.not_on("serial")  # 128 MiB: an hour there; test_bytes_are_written_and_read shows the rest of it
@pytest.mark.not_on("line")  # minutes there
async def test_a_large_file_in_constant_memory(host: Any, there: str) -> None:
    size, piece, path = 64 * MIB, os.urandom(MIB), f"{there}/large"
    expected, before = hashlib.sha256(), resident(os.getpid())
    async with host.files.open_write(path) as file:
        for _ in range(size // MIB):
            await file.write(piece)
            expected.update(piece)
        peaks = [await peak(host, file)]
    found = hashlib.sha256()
    async with host.files.open_read(path) as reader:
        assert reader.status.size == size
        async for part in reader:
            found.update(part)
            if len(peaks) == 1:
                peaks.append(await peak(host, reader))
    assert found.digest() == expected.digest()
    assert resident(os.getpid()) - before < 16 * MIB
    assert max(peaks) < 48 * MIB, "an interpreter, and a few buffers"


async def peak(host: Any, opened: Any) -> int:
    """The most memory that the child of an operation has had: itself a copy of the agent."""
    operation: Operation = opened._operation
    pid = operation._process.pid
    if host.bridge.label == "local":
        text = Path(f"/proc/{pid}/status").read_text()
    else:
        from byre.container import GuestContainer
        from byre.files import Files

        in_vm = Files(host, "") if isinstance(host, GuestContainer) else host.files
        text = (await in_vm.read(f"/proc/{pid}/status")).decode()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM"))


# -- trees -------------------------------------------------------------------------------------------------


def make_tree(top: Path) -> None:
    """One of everything that a copy carries; owners and capabilities as far as we may here."""
    long = "l" * 255
    deep = top / "deep" / long / long / long / long
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"below 1,000 bytes of path")
    for mode in (0o400, 0o644, 0o751, 0o4755, 0o2750):
        (top / f"mode{mode:o}").write_bytes(bytes(mode))
        (top / f"mode{mode:o}").chmod(mode)
    (top / "sticky").mkdir()
    (top / "closed").mkdir()
    (top / "closed" / "inside").write_text("x")
    (top / "empty").touch()
    (top / os.fsdecode(b"\xff\xfe not UTF-8\n\t")).write_text("bytes")
    os.link(top / "empty", top / "deep" / "second name")
    for name, target in (("dangling", "nowhere"), ("up", "deep/../empty"), ("absolute", "/etc/passwd")):
        (top / name).symlink_to(target)
    if os.geteuid() == 0:
        os.chown(top / "empty", 1234, 4321)
        os.chown(top / "dangling", 1234, 4321, follow_symlinks=False)
        try:
            os.setxattr(
                top / "mode755" if (top / "mode755").exists() else top / "mode751",
                "security.capability",
                CAPABILITY,
            )
        except OSError:
            pass  # a file system without
    (top / "sticky").chmod(0o1777)
    (top / "closed").chmod(0o500)
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(1, 1_600_000_000_123_456_789), follow_symlinks=False)


def described(top: Path) -> dict[str, tuple[Any, ...]]:
    """Every entry below, with all that a copy carries."""
    found: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted(top.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(top))
        content: Any = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        xattrs = {} if path.is_symlink() else {key: os.getxattr(path, key) for key in os.listxattr(path)}
        link = first.setdefault(status.st_ino, name) if status.st_nlink > 1 and path.is_file() else ""
        owner = (status.st_uid, status.st_gid)
        found[name] = (
            status.st_mode,
            owner,
            status.st_mtime_ns,
            status.st_size * (content is not None),
            content,
            xattrs,
            link,
        )
    return found


@pytest.mark.not_on("serial")  # some MiB, minutes there; test_single_files_and_where_they_go copies as well
async def test_a_tree_goes_there_and_back(host: Any, there: str, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    make_tree(top)
    copied = await host.files.copy_in(top, there, archive=True)
    assert copied.entries == len(described(top)) + 1 and copied.dropped == {}
    back = await host.files.copy_out(f"{there}/tree", tmp_path / "back", archive=True)
    assert (back.entries, back.bytes, back.dropped) == (copied.entries, copied.bytes, {})
    assert described(tmp_path / "back") == described(top)

    file = io.BytesIO()
    await host.files.get_archive(f"{there}/tree", file)
    file.seek(0)
    with tarfile.open(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
        in_tar = {member.name.removeprefix("tree/"): member for member in tar if member.name != "tree"}
    assert in_tar.keys() == described(top).keys()
    assert in_tar["mode4755"].mode == 0o4755
    await host.files.mkdir(f"{there}/of-tar")
    file.seek(0)
    await host.files.put_archive(f"{there}/of-tar", file)
    await host.files.copy_out(f"{there}/of-tar/tree", tmp_path / "again", archive=True)
    without_times = [{k: (*v[:2], *v[3:]) for k, v in described(tmp_path / d).items()} for d in ("again", "tree")]
    assert without_times[0] == without_times[1]
    for copy in ("tree", "back", "again"):
        (tmp_path / copy / "closed").chmod(0o700)  # so that pytest can remove it


async def test_a_plain_copy_is_of_whoever_makes_it(host: Any, there: str, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    (source / "f").write_text("x")
    (source / "f").chmod(0o4755)
    (source / "l").symlink_to("f")
    if os.geteuid() == 0:
        os.chown(source / "f", 1234, 1234)
    await host.files.copy_in(source, there)
    status = await host.files.stat(f"{there}/s/f")
    assert (status.mode, status.uid) == (0o755, (await host.files.stat(there)).uid)
    await host.run(["chmod", "4755", f"{there}/s/f"], timeout=SOON)
    await host.files.copy_out(f"{there}/s/.", tmp_path)
    assert (tmp_path / "f").stat().st_mode & 0o7000 == 0
    assert os.readlink(tmp_path / "l") == "f"
    await host.run(["ln", "-s", "/etc/passwd", f"{there}/s/out"], timeout=SOON)
    with pytest.raises(errors.PathRefused, match="out"):
        await host.files.copy_out(f"{there}/s", tmp_path / "refused")


async def test_single_files_and_where_they_go(host: Any, there: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"contents")
    files = host.files
    await files.copy_in(tmp_path / "f", there)
    await files.copy_in(tmp_path / "f", f"{there}/g")
    await host.run(["ln", "-s", there, f"{there}/link"], timeout=SOON)
    await files.copy_in(tmp_path / "f", f"{there}/link/h")
    await host.run(["ln", "-s", "i", f"{there}/to-i"], timeout=SOON)
    await files.copy_in(tmp_path / "f", f"{there}/to-i")
    assert await names(files, there) == ["f", "g", "h", "i", "link", "to-i"]
    with pytest.raises(errors.PathNotFound):
        await files.copy_in(tmp_path / "f", f"{there}/none/")
    with pytest.raises(errors.PathNotDirectory):
        await files.copy_in(tmp_path, f"{there}/f")
    with pytest.raises(FileNotFoundError):
        await files.copy_in(tmp_path / "none", there)
    await files.copy_out(f"{there}/g", tmp_path)
    assert (tmp_path / "g").read_bytes() == b"contents"
    with pytest.raises(errors.PathNotFound):
        await files.copy_out(f"{there}/none", tmp_path)
    with pytest.raises(errors.ResourceExhausted):
        await files.copy_out(f"{there}/g", tmp_path / "x", max_bytes=7)
    assert not (tmp_path / "x").exists()
    for name in ("../x", "/x"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(name))
        file.seek(0)
        with pytest.raises(errors.FileFailed, match="archive"):
            await files.put_archive(there, file)


@pytest.mark.not_on("sync")
async def test_two_thousand_small_files(host: Any, there: str, tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(2000):
        (source / f"{number}").write_bytes(b"%d" % number * 20)
    copied = await host.files.copy_in(source, there)
    assert copied.entries == 2001
    assert len(await host.files.list(f"{there}/many")) == 2000
    await host.files.copy_out(f"{there}/many", tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }


# -- a container's -----------------------------------------------------------------------------------------


@pytest.mark.vm
@pytest.mark.behaviour("B65")
async def test_links_in_a_container_never_lead_out_of_it(container: Any, vm: Any, tmp_path: Path) -> None:
    marker = f"/run/{container.id}-secret"
    await vm.files.write(marker, b"of the VM")
    pid = (await container.state())["pid"]
    ways = {
        "absolute": marker,
        "relative": "../" * 12 + marker[1:],
        "root": f"/proc/{pid}/root{marker}",
        "own-root": f"/proc/1/root{marker}",
        "cwd": "/proc/1/cwd/../.." + marker,
    }
    script = "".join(f"ln -s {target} /tmp/{name};" for name, target in ways.items())
    await container.run(["sh", "-c", f"mkdir -p /tmp; {script} ln -s / /tmp/slash"], check=True, timeout=SOON)
    for name in ways:
        with pytest.raises(errors.ByreError):
            await container.files.read(f"/tmp/{name}")
        with pytest.raises(errors.ByreError):
            await container.files.copy_out(f"/tmp/{name}", tmp_path / name, follow=True)
        try:
            await container.files.write(f"/tmp/{name}", b"overwritten")
        except errors.ByreError:
            pass
        with pytest.raises(errors.ByreError):
            await container.files.stat(f"/tmp/slash{'/..' * 9}{marker}-none")
    assert await vm.files.read(marker) == b"of the VM"
    (tmp_path / "f").write_text("x")
    await container.files.copy_in(tmp_path / "f", "/tmp/slash/../../run-of-the-vm")
    assert not await vm.files.exists("/run-of-the-vm")
    assert await container.files.exists("/run-of-the-vm")
    await vm.files.remove(marker)


@pytest.mark.vm
@pytest.mark.behaviour("B65")
async def test_a_container_that_swaps_directories_leads_nowhere(container: Any, vm: Any) -> None:
    script = "mkdir -p /tmp/d; cd /tmp; while :; do mv d e; ln -s ../../../../run d; rm d; mv e d; done"
    async with await shell(container, script) as process:
        for number in range(20):
            try:
                await container.files.write(f"/tmp/d/swapped{number}", b"x")
            except errors.ByreError:
                pass
        await process.kill()
    assert [name for name in await names(vm.files, "/run") if name.startswith("swapped")] == []


@pytest.mark.vm
async def test_files_from_creation_to_deletion(vm: Any, busybox: str) -> None:
    arguments = ["sh", "-c", "cat /in; echo done > /out; cp /in /volume/in"]
    container = await vm.create_container(image=busybox, args=arguments, tmpfs=["/volume"])
    async with container:
        await container.files.write("/in", b"given before the start\n")
        await container.start()
        await asyncio.wait_for(container.wait(), SOON)
        assert await container.log() == b"given before the start\n"
        assert await container.files.read("/out") == b"done\n"
        assert not await container.files.exists("/volume/in"), "its mounts went with it"
    with pytest.raises(errors.ContainerNotFound):
        await container.files.read("/out")


@pytest.mark.vm
@pytest.mark.not_on("serial")  # 2 MiB: a minute there; what ends is the container, whatever the channel
async def test_a_deletion_ends_what_goes_on(vm: Any, busybox: str) -> None:
    async with await vm.create_container(image=busybox, args=["sleep", "infinity"]) as container:
        await container.start()
        await container.files.write("/large", bytes(2 * MIB))
        async with container.files.open_read("/large") as reader:
            await asyncio.wait_for(container.delete(), SOON)
            with pytest.raises(errors.ByreError):
                await asyncio.wait_for(reader.read(), SOON)


@pytest.mark.vm
@pytest.mark.behaviour("B64")
@pytest.mark.not_on("serial")  # 9 MiB: minutes there; what is full is the scratch, whatever the channel
async def test_a_full_scratch_is_an_error_and_the_rest_goes_on(vm: Any, busybox: str) -> None:
    async with await vm.create_container(
        image=busybox, args=["sleep", "infinity"], scratch_bytes=4 * MIB
    ) as container:
        await container.start()
        with pytest.raises(errors.NoSpace) as caught:
            await container.files.write("/large", bytes(8 * MIB))
        assert caught.value.data["errno"] == 28
        assert not await container.files.exists("/large")
        await container.files.write("/small", bytes(MIB))
        assert (await container.run(["ls", "/"], capture_output=True, timeout=SOON)).returncode == 0
    with pytest.raises(errors.ReadOnlyFiles):
        await vm.files.write("/usr/new", b"")
