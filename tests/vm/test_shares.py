"""Directories of this host in a VM and its containers (`byre.shares`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from byre import ProcessParameters, errors
from byre.mounts import HostDirectory
from examples import busybox_image
from tests.conformance.test_process import SOON
from tests.namespaces import needs_user_namespaces
from tests.unit.test_shares import children

pytestmark = [pytest.mark.vm, needs_user_namespaces]

#: Whether owners are kept: an ordinary user has but himself.
OWNERS = os.geteuid() == 0


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that everybody may enter, with a file."""
    directory = tmp_path / "shared"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    (directory / "hello").write_text("from the host\n")
    return directory


async def sh(host: Any, script: str, **options: Any) -> str:
    options.setdefault("timeout", 60)
    done = await host.run(["sh", "-ec", script], capture_output=True, text=True, **options)
    assert not done.returncode, done.stderr
    return str(done.stdout)


@contextlib.asynccontextmanager
async def in_container(vm: Any, image: str, *mounts: HostDirectory) -> Any:
    async with await vm.create_container(image=image, args=["sleep", "infinity"], mounts=mounts) as container:
        await container.start()
        yield container


async def test_a_container_and_the_host_see_the_same_files(vm: Any, busybox: str, shared: Path) -> None:
    async with in_container(vm, busybox, HostDirectory(shared, "/srv/it")) as container:
        assert await sh(container, "cat /srv/it/hello") == "from the host\n"
        script = """cd /srv/it; umask 022
            echo one > a; ln a hard; ln -s a soft; mkdir d; echo two > d/b; mv d e; mv e/b c; chmod 640 c
            cat soft hard c; touch -d @86400 a; mkfifo pipe; rmdir e"""
        assert await sh(container, script) == "one\none\ntwo\n"
        assert sorted(os.listdir(shared)) == ["a", "c", "hard", "hello", "pipe", "soft"]
        status = (shared / "a").stat()
        assert (status.st_nlink, status.st_mtime, (shared / "c").stat().st_mode & 0o7777) == (2, 86400, 0o640)
        assert os.readlink(shared / "soft") == "a"
        (shared / "hello").write_text("changed on the host\n")
        (shared / "new").touch()
        assert await sh(container, "cat /srv/it/hello; ls /srv/it/new") == "changed on the host\n/srv/it/new\n"
        await sh(container, "echo mine > /srv/it/mine", user="1000:100")
        owner = (shared / "mine").stat()
        assert (owner.st_uid, owner.st_gid) == ((1000, 100) if OWNERS else (os.geteuid(), os.getegid()))
        if OWNERS:
            await sh(container, "chown 7:8 /srv/it/c")
            assert ((shared / "c").stat().st_uid, (shared / "c").stat().st_gid) == (7, 8)
    assert await sh(vm, "ls /run/byre/s") == "", "it went with its container"


@pytest.mark.behaviour("B65")
async def test_root_inside_cannot_leave_it(vm: Any, busybox: str, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (shared / "link").symlink_to(tmp_path / "secret")
    (shared / "up").symlink_to("..")
    async with in_container(vm, busybox, HostDirectory(shared, "/it")) as container:
        for script in ("cat /it/link", "cat /it/up/secret", "cat /it/../secret", "echo x > /it/link"):
            done = await container.run(["sh", "-c", script], capture_output=True, timeout=SOON)
            assert done.returncode and b"secret" not in done.stdout, script
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.behaviour("B65")
async def test_read_only_is_refused_where_the_guest_has_no_say(vm: Any, busybox: str, shared: Path) -> None:
    async with await vm.share(shared, read_only=True) as share:
        script = (
            f"mount -o remount,rw {share.path} && ! echo x > {share.path}/x 2>/dev/null && cat {share.path}/hello"
        )
        assert await sh(vm, script) == "from the host\n"
    async with in_container(vm, busybox, HostDirectory(shared, "/it", read_only=True)) as container:
        assert await sh(container, "! echo x > /it/x 2>/dev/null && cat /it/hello") == "from the host\n"
    assert os.listdir(shared) == ["hello"]


async def test_a_project_runs_its_tests_and_writes_its_report_back(vm: Any, debian: str, shared: Path) -> None:
    (shared / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (shared / "test_sums.py").write_text(
        "import mmap, unittest, sums\n"
        "class Sums(unittest.TestCase):\n"
        "    def test_add(self):\n        self.assertEqual(sums.add(1, 2), 3)\n"
        "    def test_mapped(self):\n"
        "        with open('sums.py', 'rb') as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:\n"
        "            self.assertTrue(m[:7] == b'def add')\n"
    )
    async with in_container(vm, debian, HostDirectory(shared, "/project")) as container:
        await sh(container, "python3 -m unittest -v > report.txt 2>&1", cwd="/project", timeout=120)
    report = (shared / "report.txt").read_text()
    assert "Ran 2 tests" in report and report.endswith("OK\n")
    assert (shared / "__pycache__").is_dir()


async def test_ten_thousand_small_files_are_listed(vm: Any, shared: Path) -> None:
    for number in range(10_000):
        (shared / f"file-{number:05}").touch()
    async with await vm.share(shared) as share:
        listing = f"import os; print(*sorted(os.listdir('{share.path}')))"  # nothing that looks at each of them
        names = (await sh(vm, f'python3 -c "{listing}"')).split()
    assert names == sorted(os.listdir(shared))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with busybox's root file system."""
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["tar", "-x", "-C", root], input=busybox_image.busybox_layer(), check=True)
    return root


async def test_a_directory_is_the_whole_root_of_a_container(vm: Any, root: Path) -> None:
    before = sorted(str(path) for path in root.rglob("*"))
    async with await vm.create_container(rootfs=root, args=["sleep", "infinity"]) as container:
        await container.start()
        assert await sh(container, "echo x > /new; rm /bin/ls; chown 5 /tmp; stat -c %u /tmp; cat /new") == "5\nx\n"
    assert sorted(str(path) for path in root.rglob("*")) == before
    assert await sh(vm, "ls /run/byre/s") == ""


@pytest.mark.behaviour("B47")
async def test_a_server_that_does_not_answer_stops_its_askers_only(vm: Any, busybox: str, shared: Path) -> None:
    """`cat` of busybox is sendfile(2) into a pipe that the agent reads; the kernel locks it meanwhile."""
    (shared / "large").write_bytes(bytes(256 * 1024))
    async with in_container(vm, busybox, HostDirectory(shared, "/it")) as container:
        with stopped(shared):
            reading = asyncio.create_task(sh(container, "cat /it/hello /it/large | head -c 6; cat /it/hello"))
            asking = asyncio.create_task(sh(container, "cat /it/large"))
            assert await sh(vm, "echo alive", timeout=SOON) == "alive\n"
            assert await sh(container, "echo alive", timeout=SOON) == "alive\n"
            assert not reading.done() and not asking.done()
        assert await reading == "from tfrom the host\n"
        assert len(await asking) == 256 * 1024


@pytest.mark.behaviour("B47")
async def test_what_is_older_than_the_first_share_holds_nobody_up_either(vm: Any, shared: Path) -> None:
    """Its pipes are switched over.  Of a large file the agent reads what came, while sendfile(2) waits for more."""
    (shared / "large").write_bytes(os.urandom(512 * 1024))
    assert await sh(vm, "ls -A /run/byre/s 2>/dev/null || :") == "", "there is no other share"
    script = "import os; fd = os.open(input(), 0)\nwhile os.sendfile(1, fd, None, 1 << 20): pass"
    parameters = ProcessParameters(args=["python3", "-c", script], stdin=True, stdout=True)
    async with await vm.create_process(parameters) as process:
        share = await vm.share(shared)
        process.stdio.stdin.write(f"{share.path}/large\n".encode())
        assert await asyncio.wait_for(process.stdio.stdout.read(), SOON) == (shared / "large").read_bytes()
        assert (await asyncio.wait_for(process.wait(), SOON)).code == 0
    assert await sh(vm, "echo alive", timeout=SOON) == "alive\n"
    await share.close()


@pytest.mark.behaviour("B20")
async def test_the_log_of_a_container_with_a_share_has_all_at_its_exit(vm: Any, busybox: str, shared: Path) -> None:
    args = ["sh", "-c", "seq 1 20000; cat /it/hello"]
    mounts = [HostDirectory(shared, "/it")]
    async with await vm.create_container(image=busybox, args=args, mounts=mounts) as container:
        await container.start()
        await container.wait()
        assert (await container.log()).endswith(b"\n20000\nfrom the host\n")


@contextlib.contextmanager
def stopped(directory: Path) -> Any:
    """The server of a directory, which does not run meanwhile."""
    pid = served_by(directory)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def served_by(directory: Path) -> int:
    """The server's own process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(directory) in words and b"-S" in words:
                    return children(int(entry.name))[0]
    raise AssertionError(f"nobody serves {directory}")


async def test_a_server_that_dies_leaves_errors_and_nothing_else(vm: Any, shared: Path) -> None:
    share = await vm.share(shared)
    waiting = asyncio.create_task(share.wait())
    await sh(vm, f"cat {share.path}/hello")
    os.kill(served_by(shared), signal.SIGKILL)
    with pytest.raises(errors.ShareLost):
        await asyncio.wait_for(waiting, SOON)
    done = await vm.run(["cat", f"{share.path}/hello"], capture_output=True, text=True, timeout=SOON)
    assert done.returncode and "error" in done.stderr
    await share.close()
    await share.close()
    async with await vm.share(shared) as again:
        assert await sh(vm, f"cat {again.path}/hello") == "from the host\n"


async def test_what_is_not_there_leaves_nothing(vm: Any, busybox: str, tmp_path: Path) -> None:
    with pytest.raises(errors.PathNotFound):
        await vm.create_container("c1", image=busybox, mounts=[HostDirectory(tmp_path / "none", "/it")])
    for wrong in (HostDirectory(tmp_path, "/it"),):
        with pytest.raises(errors.UserNotFound):
            await vm.create_container("c1", image=busybox, user="nobody-such", mounts=[wrong])
    assert await vm.containers() == []
    assert await sh(vm, "ls /run/byre/s 2>/dev/null || true") == ""
