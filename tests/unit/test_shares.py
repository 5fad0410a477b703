"""The server of a shared directory, met as a hostile guest would: by raw 9P messages on its socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from byre import errors
from byre.shares import server
from tests.namespaces import REFUSAL, needs_user_namespaces
from tests.unit import ninep
from tests.unit.ninep import Client, Refused

SECRET = b"not for the guest"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory with a secret, and the one that is shared beside it."""
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "inside").write_bytes(b"inside")
    (tmp_path / "share" / "sub").mkdir()
    return tmp_path


@contextlib.asynccontextmanager
async def serving(directory: Path, *, read_only: bool = False) -> AsyncIterator[tuple[server.Server, Client]]:
    diod = server.Server(str(directory), read_only)
    await diod.begin()
    try:
        with socket.socket(fileno=os.dup(diod.sock.fileno())) as sock:
            yield diod, await asyncio.to_thread(lambda: Client(sock))
    finally:
        diod.sock.close()
        diod.kill()
        await diod.wait()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def everything(directory: Path) -> dict[str, tuple[int, bytes]]:
    """All that is outside of the share: names, modes, contents."""
    found = {}
    for path in directory.iterdir():
        if path.name != "share":
            found[path.name] = path.stat().st_mode, path.read_bytes()
    return found


def walks(outside: Path) -> Iterator[tuple[str, Callable[[Client], bytes]]]:
    """Ways to read the secret."""
    names = os.fsencode(outside / "secret").split(b"/")[1:]
    yield "up", lambda client: client.read(client.walk(b"..", b"secret"))
    yield "up far", lambda client: client.read(client.walk(*[b".."] * 9, *names))
    yield "up from below", lambda client: client.read(client.walk(b"sub", b"..", b"..", b"secret"))
    yield "one name", lambda client: client.read(client.walk(b"../secret"))
    yield "an absolute name", lambda client: client.read(client.walk(os.fsencode(outside / "secret")))
    for kind, target in (("an absolute link", outside / "secret"), ("a relative link", Path("../secret"))):

        def through(client: Client, target: Path = target) -> bytes:
            client.send(ninep.TSYMLINK, "<IssI", client.root, b"link", os.fsencode(target), 0)
            fid = client.walk(b"link")
            (outside / "share" / "link").unlink()
            (outside / "share" / "link").symlink_to(target)
            return client.read(fid)

        yield kind, through

        def behind(client: Client, target: Path = target) -> bytes:
            client.send(ninep.TSYMLINK, "<IssI", client.root, b"up", os.fsencode(target.parent), 0)
            return client.read(client.walk(b"up", b"secret"))

        yield f"{kind} to a directory", behind


@pytest.mark.behaviour("B65")
@needs_user_namespaces
async def test_no_walk_leads_out(outside: Path) -> None:
    for name, way in walks(outside):
        for left in ("link", "up"):
            (outside / "share" / left).unlink(missing_ok=True)
        async with serving(outside / "share") as (_, client):
            assert await asyncio.to_thread(lambda client=client: client.read(client.walk(b"inside"))) == b"inside"
            with pytest.raises(Refused) as caught:
                data = await asyncio.to_thread(lambda way=way, client=client: way(client))
                pytest.fail(f"{name}: {data!r}")
            assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP), name


@pytest.mark.behaviour("B65")
@needs_user_namespaces
async def test_nothing_outside_is_changed(outside: Path) -> None:
    before = everything(outside)
    root = Client.root
    link = os.fsencode(outside / "secret")
    messages: list[Callable[[Client], object]] = [
        lambda c: c.send(ninep.TLCREATE, "<IsIII", c.walk(), b"../made", ninep.O_RDWR | ninep.O_CREAT, 0o644, 0),
        lambda c: c.send(ninep.TMKDIR, "<IsII", root, b"../made", 0o755, 0),
        lambda c: c.send(ninep.TSYMLINK, "<IssI", root, b"../made", b"x", 0),
        lambda c: c.send(ninep.TMKNOD, "<IsIIII", root, b"../made", 0o100644, 0, 0, 0),
        lambda c: c.send(ninep.TLINK, "<IIs", root, c.walk(b"inside"), b"../made"),
        lambda c: c.send(ninep.TRENAME, "<IIs", c.walk(b"inside"), root, b"../made"),
        lambda c: c.send(ninep.TREMOVE, "<I", c.walk(b"..", b"secret")),
        lambda c: c.send(ninep.TSYMLINK, "<IssI", root, b"link", link, 0),
        lambda c: c.send(ninep.TSETATTR, "<IIIIIQQQQQ", c.walk(b"link"), ninep.SET_SIZE, *[0] * 8),
        lambda c: c.send(ninep.TSETATTR, "<IIIIIQQQQQ", c.walk(b"link"), ninep.SET_MODE, 0o777, *[0] * 7),
        lambda c: c.send(ninep.TLCREATE, "<IsIII", c.walk(), b"link", ninep.O_RDWR | ninep.O_CREAT, 0o644, 0),
    ]
    async with serving(outside / "share") as (_, client):
        for message in messages:
            with contextlib.suppress(Refused):
                await asyncio.to_thread(lambda message=message: message(client))
    assert everything(outside) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user may not look into its server")
@needs_user_namespaces
async def test_the_server_has_nothing_but_the_share(outside: Path) -> None:
    async with serving(outside / "share") as (diod, _):
        (pid,) = children(diod.pid)
        assert sorted(os.listdir(f"/proc/{pid}/root")) == ["inside", "sub"]
        assert len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) == 1
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["CapBnd"], 16) == int(status["CapPrm"], 16) == 0b11011011
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for kind in ("user", "mnt", "pid", "net", "ipc", "uts"):
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        interfaces = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


@needs_user_namespaces
async def test_devices_cannot_be_made(outside: Path) -> None:
    async with serving(outside / "share") as (_, client):
        with pytest.raises(Refused) as caught:
            client.send(ninep.TMKNOD, "<IsIIII", client.root, b"null", 0o20666, 1, 3, 0)
        assert caught.value.errno == errno.EPERM


@pytest.mark.behaviour("B65")
@needs_user_namespaces
async def test_read_only_is_this_hosts_word(outside: Path) -> None:
    async with serving(outside / "share", read_only=True) as (_, client):
        assert client.read(client.walk(b"inside")) == b"inside"
        for kind, form, values in (
            (ninep.TMKDIR, "<IsII", (client.root, b"made", 0o755, 0)),
            (ninep.TREMOVE, "<I", (client.walk(b"inside"),)),
            (ninep.TSETATTR, "<IIIIIQQQQQ", (client.walk(b"inside"), ninep.SET_SIZE, *[0] * 8)),
            (ninep.TLOPEN, "<II", (client.walk(b"inside"), ninep.O_RDWR)),
        ):
            with pytest.raises(Refused) as caught:
                client.send(kind, form, *values)
            assert caught.value.errno == errno.EROFS, kind
    assert (outside / "share" / "inside").read_bytes() == b"inside"


@needs_user_namespaces
async def test_a_server_that_is_killed_says_so(outside: Path) -> None:
    async with serving(outside / "share") as (diod, _):
        os.kill(diod.pid, signal.SIGKILL)
        assert "killed by signal 9" in await asyncio.wait_for(diod.wait(), 10)


@pytest.mark.behaviour("B43")
@needs_user_namespaces
async def test_a_server_dies_with_its_owner(outside: Path) -> None:
    script = (
        "import asyncio, sys; from byre.shares.server import Server; s = Server(sys.argv[1], False)\n"
        "async def main():\n    await s.begin(); print(s.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    argv = [sys.executable, "-c", script, str(outside / "share")]
    owner = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    ends = [os.pidfd_open(each) for each in (pid, *children(pid))]
    owner.kill()
    await owner.wait()
    assert len(ends) == 2
    for pidfd in ends:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        await asyncio.wait_for(ended.wait(), 10)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


def test_what_cannot_be_shared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.PathNotFound):
        server.check(str(tmp_path / "none"))
    with pytest.raises(errors.PathNotDirectory):
        server.check(str(tmp_path / "file"))
    monkeypatch.setattr(server, "DIOD", "no-such-server")
    with pytest.raises(errors.ToolMissing) as caught:
        server.found()
    assert "apt install diod" in caught.value.hint


async def test_without_user_namespaces_the_hint_says_what_to_do(outside: Path) -> None:
    script = (
        "import asyncio, sys; from byre import errors; from byre.shares.server import Server\n"
        "try:\n    asyncio.run(Server(sys.argv[1], False).begin())\n"
        "except errors.ShareFailed as error:\n    print(error)"
    )
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    argv: list[Any] = [sys.executable, "-c", script, outside / "share"]
    if not REFUSAL:
        argv = ["unshare", "-Ur", "sh", "-c", forbid, "sh", *argv]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=30)
    assert "max_user_namespaces" in done.stdout, done.stderr
