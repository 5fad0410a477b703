"""The image as it is really built and booted: byte for byte the same wherever it is made, and complete inside."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import byre_guest
import byre_images
import byre_proto
from byre.machines.clock import tsc_khz
from byre_images import KERNEL_ARGUMENTS, Image, cache, modules, programs
from byre_images.tree import Tree

pytestmark = pytest.mark.timeout(600)

#: Seconds until a boot under emulation on a busy machine counts as hung.
BOOT_TIMEOUT = 120


@pytest.fixture(scope="module")
def image() -> Image:
    """The image that everything else uses, built now if it is not there."""
    return byre_images.ensure()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user of the host may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="byre-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def seed(target: Path) -> None:
    """Another cache with the packages and the look-up of the user's, so that both build from the same."""
    own = cache.Cache()
    shutil.copytree(own.apt / "archives", target / "apt" / "archives")
    shutil.copy(own.pins_file, target)


#: Builds in a cache, as another user, with everything else different too: what it writes is the digest.
ELSEWHERE = """
import glob, os, random, sys
from pathlib import Path
import byre_images

def shuffled(function):
    def shuffle(*arguments):
        found = list(function(*arguments))
        random.shuffle(found)
        return found
    return shuffle

class Scan(list):
    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None
    close = lambda self: None

scandir = shuffled(os.scandir)
os.listdir, os.scandir = shuffled(os.listdir), lambda *arguments: Scan(scandir(*arguments))
cache, user = Path(sys.argv[1]), int(sys.argv[2])
if os.getuid() != user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
os.umask(0o077)
print(byre_images.ensure(cache=cache).digest)
"""


def test_two_builds_are_the_same_byte_for_byte(image: Image, shared: Path) -> None:
    """Another directory, user, umask, time zone, locale, hash seed and order of directories."""
    seed(shared / "cache")
    sources = shared / "sources"
    for package in (byre_images, byre_guest, byre_proto):
        directory = Path(package.__path__[0])
        shutil.copytree(directory, sources / directory.name, ignore=shutil.ignore_patterns("__pycache__"))
    user = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else os.getuid()
    for path in (shared, *shared.rglob("*")):
        os.chown(path, user, -1)
    environment = {
        "PYTHONPATH": str(sources),
        "PATH": os.environ["PATH"],
        "HOME": str(shared),
        "TMPDIR": str(shared),
        "TZ": "Pacific/Chatham",
        "LC_ALL": "tr_TR.UTF-8",
        "PYTHONHASHSEED": "4711",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, shared / "cache", str(user)],
        env=environment,
        cwd=shared,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (other,) = byre_images.list_images(cache=shared / "cache")
    assert other.kernel.stat().st_uid == user
    assert done.stdout.strip() == other.digest == image.digest
    for name in cache.FILES:
        assert (other.directory / name).read_bytes() == (image.directory / name).read_bytes()


def test_the_manifest_says_what_is_inside(image: Image) -> None:
    byre_images.verify(image)
    names = {package["name"]: package for package in image.manifest["packages"]}
    assert {"crun", "busybox-static", "libc6", "python3-msgpack"} <= set(names)
    assert f"linux-image-{image.manifest['kernel']}" in names
    assert all(re.fullmatch(r"[0-9a-f]{64}", package["sha256"]) for package in names.values())
    assert any("GPL-2" in licence for licence in names["busybox-static"]["licences"])
    nameless = {name for name, package in names.items() if not package["licences"]}
    assert nameless == set()
    assert image.manifest["missing_modules"] == []
    assert {"virtio_blk", "overlay", "9pnet_virtio", "vhost_vsock", "kvm_amd"} <= set(image.manifest["modules"])


@pytest.fixture(scope="module")
def contents(image: Image) -> Tree:
    """The root file system, read back by another program than the one that wrote it."""
    tree = Tree()
    with subprocess.Popen(["sqfs2tar", image.root], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        tree.merge(process.stdout, lambda path: True)
    assert process.returncode == 0
    return tree


def needed(elf: bytes) -> list[str]:
    """DT_NEEDED of a 64-bit ELF file.  Source: elf(5)."""
    dynamic, strings = modules.section(elf, b".dynamic"), modules.section(elf, b".dynstr")
    entries = struct.iter_unpack("<QQ", dynamic[: len(dynamic) // 16 * 16])
    return [strings[value : strings.index(b"\0", value)].decode() for tag, value in entries if tag == 1]


def test_every_library_that_is_needed_is_there(contents: Tree) -> None:
    lacking = {
        (path, library)
        for path, entry in contents.entries.items()
        if entry.data.startswith(b"\x7fELF") and not path.endswith(".ko")
        for library in needed(entry.data)
        if f"{programs.LIBRARIES}/{library}" not in contents.entries
    }
    assert not lacking
    assert needed(contents.read("usr/bin/crun"))  # or the test would see nothing


def test_what_busybox_stands_for_is_there(contents: Tree) -> None:
    for name in (
        *("sh", "uname", "true", "cat", "stty", "ps", "mount", "sleep", "id", "seq", "dd", "head", "sha256sum"),
        *("timeout", "yes", "env", "ls", "tr", "wc", "kill", "test", "printf", "awk", "sed", "grep", "tar"),
    ):
        path = f"usr/bin/{name}"
        assert contents.entries[path].link in ("busybox", "../bin/busybox"), name
    assert contents.entries["usr/sbin/modprobe"].link == "../bin/busybox"
    assert contents.entries["usr/sbin/ip"].link == "../bin/busybox"
    assert "usr/sbin/init" not in contents.entries


def test_users_places_and_modes_are_as_programs_expect(contents: Tree) -> None:
    users = contents.read("etc/passwd").decode()
    assert "root:*:0:0:root:/root:/bin/sh\n" in users
    assert "nobody:*:65534:" in users
    assert "nogroup:*:65534:" in contents.read("etc/group").decode()
    assert contents.entries["tmp"].mode == 0o1777
    assert {"proc", "sys", "dev", "run", "l"} <= set(contents.entries)
    assert all(entry.uid == 0 for entry in contents.entries.values())


def test_all_python_is_compiled_and_nothing_depends_on_dates(contents: Tree) -> None:
    version = programs.python_version(contents).replace(".", "")
    checked = 0
    for path in contents.entries:
        if path.endswith(".py") and path.startswith("usr/lib/python3"):
            directory, _, name = path.rpartition("/")
            code = contents.read(f"{directory}/__pycache__/{name[:-3]}.cpython-{version}.pyc")
            assert struct.unpack_from("<I", code, 4) == (1,), path  # PEP 552: by hash, unchecked
            checked += 1
    assert checked > 300
    assert "usr/lib/byre/agent.pyc" in contents.entries


# -- booted ------------------------------------------------------------------------------------------------

#: An agent that looks at where it woke up and says it on the console.
WITNESS = """
def main():
    import sys
    from msgpack import Packer
    loaded = sorted(sys.modules)
    import ctypes, os, subprocess
    libc = ctypes.CDLL(None, use_errno=True)

    def say(*words):
        print("WITNESS", *words, flush=True)

    def shell(script):
        done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        say("shell", done.returncode, done.stdout.replace(chr(10), " "))

    try:
        say("pid", os.getpid(), *sorted(os.environ), Packer().pack(1), os.path.exists("/dev/vda"))
        say("imports", *loaded)
        say("mounts", *sorted(line.split()[1] for line in open("/proc/mounts")))
        for path in ("/proc/sys/kernel/panic", "/proc/sys/kernel/hostname", "/sys/class/net/lo/operstate",
                     "/sys/kernel/rcu_expedited", "/sys/fs/cgroup/containers/cgroup.subtree_control"):
            say(path, open(path).read().strip())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for name in ("processes", "containers"):
            say("reserve", memory - int(open("/sys/fs/cgroup/" + name + "/memory.max").read()) >> 20)
        say("agent", open("/proc/self/cgroup").read().strip(), *open("/sys/fs/cgroup/agent/memory.min"))
        say("root", [line for line in open("/proc/mounts") if " / " in line][0].strip())
        say("fds", *sorted(os.listdir("/proc/self/fd")))
        import asyncio, hashlib, hmac, json, select, selectors, signal, socket, tarfile, threading, zlib
        say("sha256", hashlib.sha256(b"").hexdigest()[:8], hmac.new(b"k", b"", "sha256").hexdigest()[:8])
        shell("crun --version | head -1")
        shell("echo $((6 * 7)) | cat; seq 3 | tr -d 1; id -u; timeout 5 true && stty -a < /dev/console")
        base = "/lib/modules/" + os.uname().release + "/"
        for line in open(base + "modules.dep"):
            path, _, needs = line.strip().partition(":")
            for name in [*reversed(needs.split()), path]:
                file = os.open(base + name, os.O_RDONLY)
                failed = libc.syscall(313, file, b"", 0)
                if failed and ctypes.get_errno() not in (17, 19, 95):  # loaded already, no such hardware
                    say("module", name, os.strerror(ctypes.get_errno()))
                os.close(file)
        say("loaded", len(os.listdir("/sys/module")))
        shell("dd if=/dev/zero of=/tmp/d bs=1M count=8 2>/dev/null; mke2fs -F /tmp/d >/dev/null; "
              "losetup /dev/loop0 /tmp/d && mkdir /tmp/m && mount -t ext4 /dev/loop0 /tmp/m && echo mounted")
    except BaseException as error:
        say("error", repr(error))
    say("end")
    libc.reboot(0x01234567)
"""


@pytest.fixture(scope="module")
def witness(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image of the same base with another agent."""
    place = tmp_path_factory.mktemp("witness")
    (place / "agent").mkdir()
    (place / "agent" / "__init__.py").write_text("")
    (place / "agent" / "__main__.py").write_text(WITNESS)
    seed(place / "cache")
    shutil.copytree(cache.Cache().base, place / "cache" / "base")
    return byre_images.ensure(cache=place / "cache", guest=place / "agent")


def boot(kernel: Path, initramfs: Path, root: Path | None, machine: str = "pc") -> tuple[int, str]:
    """QEMU's status and the console's text, once the machine has ended by itself."""
    bus = "device" if machine.startswith("microvm") else "pci"
    arguments = f"console=ttyS0 quiet panic=-1 reboot=t {' '.join(KERNEL_ARGUMENTS)}"
    if bus == "device":
        arguments += f" tsc_early_khz={tsc_khz()}"
    command: list[Any] = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
    command += ["-machine", machine, "-accel", "tcg", "-cpu", "max", "-m", "512", "-serial", "stdio"]
    command += ["-kernel", kernel, "-initrd", initramfs, "-append", arguments]
    if root is not None:
        command += ["-drive", f"if=none,id=root,format=raw,readonly=on,file={root}"]
        command += ["-device", f"virtio-blk-{bus},drive=root"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=BOOT_TIMEOUT
    )
    return done.returncode, done.stdout.decode(errors="replace").replace("\r", "")


@pytest.mark.vm
@pytest.mark.parametrize("machine", ["pc", "q35", "microvm,rtc=on,pit=on,pic=on"])
def test_it_boots_into_a_complete_system(witness: Image, machine: str) -> None:
    status, console = boot(witness.kernel, witness.initramfs, witness.root, machine)
    said = re.findall(r"WITNESS (.*)$", console, re.MULTILINE)
    assert status == 0
    assert said and said[-1] == "end", console
    facts = dict(line.split(" ", 1) for line in said if not line.startswith(("shell", "module", "end")))
    assert facts["pid"] == "1 HOME LC_ALL PATH b'\\x01' True"
    heavy = {"collections", "functools", "re", "enum", "typing", "ctypes", "importlib"}  # of msgpack, as it comes
    assert not heavy & set(facts["imports"].split())
    assert set(facts["mounts"].split()) >= {"/proc", "/sys", "/run", "/tmp", "/l", "/dev/pts", "/dev/shm"}
    assert (facts["/proc/sys/kernel/panic"], facts["/proc/sys/kernel/hostname"]) == ("-1", "byre")
    assert facts["/sys/class/net/lo/operstate"] == "unknown"  # which is up, for it
    assert facts["/sys/kernel/rcu_expedited"] == "1"
    assert facts["/sys/fs/cgroup/containers/cgroup.subtree_control"] == "cpu io memory pids"
    assert facts["reserve"] == "64"  # mebibytes that processes and containers cannot have
    assert facts["agent"] == f"0::/agent {32 << 20}"
    assert facts["root"].startswith("/dev/vda / squashfs ro")
    assert facts["fds"] == "0 1 2 3"  # 3 is that of the listing: init leaves nothing open
    assert facts["sha256"] == "e3b0c442 " + "8bb990c4"
    shells = [line for line in said if line.startswith("shell")]
    assert shells[0].startswith("shell 0 crun version")
    assert re.match(r"shell 0 42 +2 3 0 speed \d+ baud", shells[1]), shells
    assert shells[2] == "shell 0 mounted ", shells
    assert [line for line in said if line.startswith("module")] == []
    assert int(facts["loaded"]) > len(witness.manifest["modules"])


@pytest.mark.vm
def test_a_root_disk_that_cannot_be_mounted_ends_the_machine_with_a_clear_line(
    image: Image, tmp_path: Path
) -> None:
    (tmp_path / "garbage").write_bytes(os.urandom(1 << 16))
    status, console = boot(image.kernel, image.initramfs, tmp_path / "garbage")
    assert status == 0
    assert "byre: initramfs: cannot mount /dev/vda (errno 022)" in console


@pytest.mark.vm
def test_a_missing_root_disk_ends_the_machine_with_a_clear_line(image: Image) -> None:
    status, console = boot(image.kernel, image.initramfs, None)
    assert status == 0
    assert "byre: initramfs: there is no root disk /dev/vda (errno 002)" in console


@pytest.mark.vm
def test_a_root_disk_without_the_agent_ends_the_machine_with_a_clear_line(image: Image, tmp_path: Path) -> None:
    tree = Tree()
    for path in ("dev", "proc", "sys", "run", "tmp", "l"):
        tree.directory(path)
    with (tmp_path / "tar").open("wb") as stream:
        tree.write(stream)
    with (tmp_path / "tar").open("rb") as stream:
        subprocess.run(["tar2sqfs", "-q", "-c", "lz4", tmp_path / "root"], stdin=stream, check=True)
    status, console = boot(image.kernel, image.initramfs, tmp_path / "root")
    assert status == 0
    assert "byre: initramfs: cannot execute /usr/bin/python3 (errno 002)" in console


@pytest.mark.vm
def test_a_module_that_cannot_be_loaded_ends_the_machine_with_a_clear_line(image: Image, tmp_path: Path) -> None:
    broken = image.initramfs.read_bytes().replace(b"virtio_blk.ko\n", b"virtio_xyz.ko\n")
    (tmp_path / "initramfs").write_bytes(broken)
    status, console = boot(image.kernel, tmp_path / "initramfs", image.root)
    assert status == 0
    assert "byre: initramfs: cannot load the module virtio_xyz.ko (errno" in console
