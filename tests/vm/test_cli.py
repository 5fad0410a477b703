"""The command line with a real VM: streams, signals, terminals, exit statuses, and the commands around them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from byre import rundir
from tests.conftest import machine_options
from tests.unit import oci_registry

pytestmark = pytest.mark.vm

#: A command in a VM that is up takes a second under emulation; a boot, ten times that on a loaded machine.
TIMEOUT = 100.0

BYRE = (sys.executable, "-m", "byre")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The VM named "default" is up, in a run directory of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        options = [f"--{name}={value}" for name, value in machine_options().items()]
        done = byre("up", *options)
        assert (done.returncode, done.stdout) == (0, b"default\n"), done.stderr
        yield
        assert byre("down").returncode == 0


def byre(*args: str, stdin: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    streams: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "input": stdin}
    return subprocess.run([*BYRE, *args], timeout=TIMEOUT, **{**streams, **options})  # type: ignore[call-overload, no-any-return]


def until(condition: Callable[[], bool]) -> None:
    """Each look is a command of its own."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def shell(script: str) -> subprocess.CompletedProcess[bytes]:
    """A pipeline of our own shell; `byre` in it is ours."""
    function = f'byre() {{ {sys.executable} -m byre "$@"; }}\n'
    return subprocess.run(["bash", "-c", function + script], timeout=TIMEOUT, capture_output=True)


@pytest.mark.behaviour("B8")
@pytest.mark.parametrize("where", ["vm", "container"])
def test_the_exit_status_is_the_commands(up: None, busybox: str, where: str) -> None:
    target = ["--vm"] if where == "vm" else ["--rm", busybox]
    assert byre("run", *target, "sh", "-c", "exit 7").returncode == 7
    # The first process of a pid namespace ignores signals from inside it.
    killed = "kill -9 $$" if where == "vm" else "sh -c 'kill -9 $$'; exit $?"
    assert byre("run", *target, "--", "sh", "-c", killed).returncode == 137


@pytest.mark.parametrize("where", ["vm", "container", "exec"])
def test_not_found_is_127_not_executable_126(
    up: None, busybox: str, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "exec":
        target = ["exec", request.getfixturevalue("web")]
    else:
        target = ["run", "--vm"] if where == "vm" else ["run", "--rm", busybox]
    done = byre(*target, "nosuch")
    assert (done.returncode, done.stdout) == (127, b"")
    assert done.stderr.startswith(b"byre: error: ") and b"nosuch" in done.stderr
    assert byre(*target, "/etc/passwd").returncode == 126


def test_an_error_of_our_own_is_125_with_the_next_step(up: None) -> None:
    done = byre("run", "oci:/no/such/image", "true")
    assert done.returncode == 125
    assert re.match(rb"byre: error: .*/no/such/image.*\nhint: .+", done.stderr)


@pytest.mark.behaviour("B1")
@pytest.mark.parametrize("where", ["vm", "container"])
def test_stdin_stdout_and_stderr_pass_unchanged(up: None, busybox: str, where: str) -> None:
    data = os.urandom(3 * 1024 * 1024)
    target = ["--vm"] if where == "vm" else ["--rm", busybox]
    done = byre("run", "-i", *target, "sh", "-c", "echo to stderr >&2; cat", stdin=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert (done.returncode, done.stderr) == (0, b"to stderr\n")


def test_timings_say_where_the_time_went(up: None) -> None:
    done = byre("run", "--vm", "--timings", "echo", "hi")
    assert (done.returncode, done.stdout) == (0, b"hi\n")
    lines = done.stderr.decode().splitlines()
    assert lines[0].split() == ["start", "took"]
    assert [line[20:] for line in lines[1:]] == ["Python and imports", "exec", "output"]


def test_stdin_is_passed_on_only_with_i(up: None) -> None:
    assert byre("run", "--vm", "cat", stdin=b"unseen").stdout == b""


HTTPD = ("sh", "-c", "echo page > /tmp/page; exec httpd -f -p 127.0.0.1:80 -h /tmp")


def get(port: int) -> bytes:
    """A page of HTTPD, which may be about to start: then a connection is reset."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            answer = b""
            while data := client.recv(4096):
                answer += data
            return answer.rpartition(b"\r\n\r\n")[2]


def closed(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def chosen(stderr: bytes) -> int:
    found = re.search(rb"port 80 is 127\.0\.0\.1:(\d+)\n", stderr)
    assert found, stderr
    return int(found[1])


def test_ports_of_a_container_that_is_left_running_are_its_keepers(up: None, busybox: str) -> None:
    done = byre("run", "-d", "--name", "ported", "-p", "0:80", busybox, *HTTPD)
    assert (done.returncode, done.stdout) == (0, b"ported\n"), done.stderr
    port = chosen(done.stderr)
    assert get(port) == b"page\n"
    assert byre("port", "ported").stdout == f"80/tcp -> 127.0.0.1:{port}\n".encode()
    assert f"ported 80/tcp -> 127.0.0.1:{port}\n".encode() in byre("port").stdout
    taken = byre("run", "-d", "--name", "late", "-p", f"{port}:80", busybox, *HTTPD)
    assert (taken.returncode, b"is in use" in taken.stderr, b"hint: " in taken.stderr) == (125, True, True)
    assert byre("port", "late").returncode == 125, "the container went with its port"
    assert byre("rm", "-f", "ported").returncode == 0
    until(lambda: closed(port))
    assert byre("port").stdout == b""


def test_ports_of_a_command_in_the_foreground_end_with_it(up: None, busybox: str) -> None:
    with subprocess.Popen(
        [*BYRE, "run", "--rm", "-p", "0:80", busybox, *HTTPD], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as running:
        assert running.stderr is not None
        port = chosen(running.stderr.readline())
        assert get(port) == b"page\n"
        running.send_signal(signal.SIGTERM)  # which an init without a handler for it does not even get
        running.send_signal(signal.SIGINT)
        assert running.wait(TIMEOUT) == 137
    assert closed(port)


def test_ports_of_a_vm_end_with_it(up: None) -> None:
    options = [f"--{name}={value}" for name, value in machine_options().items()]
    done = byre("up", "other", "-p", "0:80", *options)
    assert done.returncode == 0, done.stderr
    port = chosen(done.stderr)
    assert byre("port", "--in", "other").stdout == f"- 80/tcp -> 127.0.0.1:{port}\n".encode()
    taken = byre("up", "third", "-p", f"{port}:80", *options)
    assert (taken.returncode, b"is in use" in taken.stderr) == (125, True)
    assert b"third" not in byre("ps").stdout
    assert byre("down", "other").returncode == 0
    assert closed(port)


def test_files_are_read_and_written(up: None, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(os.urandom(200_000))
    with source.open("rb") as stdin, target.open("wb") as stdout:
        command = [*BYRE, "run", "-i", "--vm", "cat"]
        subprocess.run(command, stdin=stdin, stdout=stdout, timeout=TIMEOUT, check=True)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.behaviour("B4")
def test_yes_piped_into_head_ends(up: None) -> None:
    done = shell("byre run --vm yes | head -1; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == (b"y\n141\n", b"")


@pytest.mark.behaviour("B5")
def test_a_background_child_that_holds_stdout_does_not_hold_us(up: None) -> None:
    begin = time.monotonic()
    done = byre("run", "--vm", "sh", "-c", "sleep 90 & echo done")
    assert (done.returncode, done.stdout) == (0, b"done\n")
    assert time.monotonic() - begin < 60


@pytest.mark.behaviour("B15b")
def test_the_timeout_kills_the_whole_tree(up: None) -> None:
    done = byre("run", "--timeout", "2", "--vm", "sh", "-c", "sleep 4321 & sleep 4321")
    assert done.returncode == 124
    assert b"sleep 4321" not in byre("run", "--vm", "ps", "-ef").stdout


def test_environment_directory_and_user(up: None, busybox: str) -> None:
    flags = ["-e", "A=1=2", "-e", "HOME", "-e", "NOT_SET_HERE", "-w", "/tmp", "-u", "1000:100"]
    script = "echo $A; echo $HOME; echo ${NOT_SET_HERE-unset}; pwd; id -u; id -g"
    expected = f"1=2\n{os.environ['HOME']}\nunset\n/tmp\n1000\n100\n".encode()
    assert byre("run", *flags, "--rm", busybox, "sh", "-c", script).stdout == expected
    assert byre("run", *flags, "--vm", "sh", "-c", script).stdout == expected


def test_limits_and_restrictions_of_a_container(up: None, busybox: str) -> None:
    script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; hostname; "
    script += "touch /x || echo read-only; touch /scratch/x && echo writable; grep NoNewPrivs /proc/self/status"
    flags = ["-m", "64m", "--cpus", "0.5", "--pids-limit", "77", "--hostname", "there", "--read-only"]
    done = byre("run", "--rm", *flags, "--tmpfs", "/scratch", busybox, "sh", "-c", script)
    assert done.stdout.split(b"\n")[:5] == [b"67108864", b"50000 100000", b"77", b"there", b"read-only"]
    assert b"writable" in done.stdout and b"NoNewPrivs:\t1" in done.stdout
    done = byre("run", "--rm", "--allow-new-privileges", busybox, "grep", "NoNewPrivs", "/proc/self/status")
    assert done.stdout == b"NoNewPrivs:\t0\n"


def test_rm_frees_the_name_and_without_it_the_container_stays(up: None, busybox: str) -> None:
    for _ in range(2):
        assert byre("run", "--rm", "--name", "once", busybox, "true").returncode == 0
    assert byre("run", "--name", "stays", busybox, "sh", "-c", "exit 3").returncode == 3
    assert byre("run", "--name", "stays", busybox, "true").returncode == 125
    assert re.search(rb"stays +default +stopped \(3\)", byre("ps").stdout)
    assert byre("rm", "stays").stdout == b"stays\n"
    assert b"stays" not in byre("ps").stdout


@pytest.fixture
def web(up: None, busybox: str) -> Iterator[str]:
    """A container that runs in the background."""
    script = "echo started; trap 'echo stopping; exit 5' TERM; while :; do sleep 0.2; done"
    done = byre("run", "-d", "--name", "web", busybox, "sh", "-c", script)
    assert done.stdout == b"web\n", done.stderr
    yield "web"
    byre("rm", "-f", "web")


@pytest.mark.behaviour("B43")
def test_a_detached_container_goes_on_and_is_looked_after_by_its_name(web: str) -> None:
    assert re.search(rb"web +default +running", byre("ps").stdout)
    assert byre("exec", "-e", "A=b", "-w", "/tmp", web, "sh", "-c", "echo $A; pwd; exit 4").stdout == b"b\n/tmp\n"
    assert byre("rm", web).returncode == 125
    assert byre("stop", web).stdout == b"web\n"
    assert re.search(rb"web +default +stopped \(5\)", byre("ps").stdout)
    assert byre("logs", web).stdout == b"started\nstopping\n"


def test_a_detached_container_with_rm_is_deleted_when_it_ends(up: None, busybox: str) -> None:
    name = byre("run", "-d", "--rm", busybox, "sleep", "1").stdout.strip()
    deadline = time.monotonic() + TIMEOUT
    while name in byre("ps").stdout:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_are_passed_on(up: None, number: signal.Signals) -> None:
    script = f"trap 'echo got it; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.1; done"
    command = [*BYRE, "run", "--vm", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(number)
        assert running.stdout.read() == b"got it\n"
        assert running.wait(TIMEOUT) == 9


def test_a_second_interrupt_kills_what_ignores_the_first(up: None, busybox: str) -> None:
    script = "trap 'echo ignored' INT; echo ready; while :; do sleep 0.1; done"
    command = [*BYRE, "run", "--rm", busybox, "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == b"ignored\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(TIMEOUT) == 137


@pytest.mark.behaviour("B43")
@pytest.mark.parametrize("where", ["vm", "container"])
def test_what_runs_in_the_foreground_dies_with_a_killed_client(up: None, busybox: str, where: str) -> None:
    target = ["--vm"] if where == "vm" else ["--rm", "--name", "doomed", busybox]
    command = [*BYRE, "run", *target, "sh", "-c", "echo ready; sleep 5432"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.kill()
    deadline = time.monotonic() + TIMEOUT
    while b"5432" in (found := byre("ps").stdout) or b"doomed" in found:
        assert time.monotonic() < deadline


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *args: str, width: int = 91, height: int = 17) -> None:
        self.master, slave = pty.openpty()
        self.resize(width, height)
        self.process = subprocess.Popen(
            [*BYRE, *args], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        self.slave = slave
        self.before = termios.tcgetattr(slave)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def shown(self, seconds: float) -> bytes:
        """What comes next; nothing when nothing comes for so long."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        return os.read(self.master, 65536) if ready else b""

    def until(self, text: bytes) -> bytes:
        """What is shown, up to and with the text."""
        seen = b""
        while text not in seen:
            new = self.shown(TIMEOUT)
            assert new, f"{text!r} was not shown: {seen!r}"
            seen += new
        return seen

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def end(self) -> int:
        """Its exit status; the terminal must be as it was."""
        status = self.process.wait(TIMEOUT)
        assert termios.tcgetattr(self.slave) == self.before
        return status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.mark.behaviour("B11", "B12")
def test_a_terminal_resizes_interrupts_and_passes_the_status_on(up: None, busybox: str) -> None:
    with Terminal("run", "-it", "--rm", busybox, "sh") as terminal:
        terminal.until(b"# ")
        terminal.type(b"stty size; echo $TERM-; tty\n")
        shown = terminal.until(b"/dev/pts/")
        assert b"17 91\r\n" in shown and os.environ.get("TERM", "xterm").encode() + b"-" in shown
        terminal.resize(103, 29)
        terminal.process.send_signal(signal.SIGWINCH)  # the kernel tells only the terminal's foreground group
        while b"29 103" not in shown:
            terminal.type(b"stty size; echo now$((1+1))\n")
            shown = terminal.until(b"now2\r\n")
        terminal.type(b"echo then$((3+4)); sleep 7654\n")
        terminal.until(b"then7\r\n")  # not its echo: the prompt before it may still be on its way
        while b"# " not in terminal.shown(2):  # the first may come before the shell has started it
            terminal.type(b"\x03")
        terminal.type(b"exit 5\n")
        assert terminal.end() == 5


def test_cp_both_ways_and_as_a_tar(web: str, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "f").write_bytes(b"contents\n")
    (tmp_path / "src" / "run").write_bytes(b"#!/bin/sh\necho it runs\n")
    (tmp_path / "src" / "run").chmod(0o750)
    assert byre("cp", str(tmp_path / "src"), f"{web}:/srv").returncode == 0
    assert byre("exec", web, "sh", "-c", "cat /srv/f; /srv/run").stdout == b"contents\nit runs\n"
    assert byre("cp", "web:/srv/.", str(tmp_path)).returncode == 0
    assert (tmp_path / "f").read_bytes() == b"contents\n" and (tmp_path / "run").stat().st_mode & 0o111
    tree = shlex.quote(str(tmp_path))
    done = shell(f"set -o pipefail; byre cp web:/srv - | tar -tv; tar -C {tree} -c src | byre cp - :/run")
    assert done.returncode == 0, done.stderr
    assert re.search(rb"-rwxr-x--- .* srv/run\n", done.stdout), done.stdout
    assert byre("exec", "--vm", "cat", "/run/src/f").stdout == b"contents\n"


def test_cp_says_what_is_wrong(web: str, tmp_path: Path) -> None:
    byre("exec", web, "sh", "-c", "mkdir -p /d; mkfifo /d/fifo; ln -s /etc/passwd /link")
    for args, text in (
        (("web:/none", "."), b"No such file"),
        (("web:/d", str(tmp_path)), b"fifo is not made here"),
        (("web:/link", str(tmp_path)), b"lead out"),
        (("nowhere:/x", "."), b"nowhere"),
        (("a", "b"), b"one of SRC and DST"),
        (("a:/x", "b:/x"), b"between two: byre cp"),
        ((str(tmp_path / "none"), "web:/"), b"No such file"),
    ):
        done = byre("cp", *args)
        assert done.returncode == 125 and text in done.stderr, (args, done.stderr)
    assert byre("cp", "-a", "web:/link", str(tmp_path)).returncode == 0
    assert os.readlink(tmp_path / "link") == "/etc/passwd"
    done = byre("cp", "-", "web:/d", stdin=b"no tar" * 200)
    assert done.returncode == 125 and b"archive" in done.stderr


@pytest.mark.behaviour("B43")
def test_a_cp_that_is_killed_leaves_the_old_file(web: str, tmp_path: Path) -> None:
    byre("exec", web, "sh", "-c", "mkdir /k; echo old > /k/f")
    header = tarfile.TarInfo("f")
    header.size = 4 << 20
    with subprocess.Popen([*BYRE, "cp", "-", "web:/k"], stdin=subprocess.PIPE) as running:
        assert running.stdin is not None
        running.stdin.write(header.tobuf() + bytes(5 << 19))  # it is sent by the MiB
        running.stdin.flush()
        until(lambda: len(byre("exec", web, "ls", "-A", "/k").stdout.split()) == 2)
        running.kill()
    until(lambda: byre("exec", web, "ls", "-A", "/k").stdout == b"f\n")
    assert byre("exec", web, "cat", "/k/f").stdout == b"old\n"
    assert b"files." not in byre("ps").stdout


def test_a_shell_in_the_vm_and_in_a_container(web: str) -> None:
    for args in (("shell",), ("shell", "-C", web)):
        with Terminal(*args) as terminal:
            terminal.until(b"# ")
            terminal.type(b"echo in-$((6*7)); exit 3\n")
            terminal.until(b"in-42")
            assert terminal.end() == 3


def test_without_a_vm_that_is_up_it_boots_its_own_and_leaves_nothing(
    up: None, tmp_path: Path, busybox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    done = byre("run", "--verbose", busybox, "sh", "-c", "echo hello; exit 6")
    assert (done.returncode, done.stdout) == (6, b"hello\n")
    assert b"in a VM of its own" in done.stderr
    assert not list(tmp_path.glob("byre/*"))


def test_an_interrupted_boot_leaves_nothing(up: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen([*BYRE, "run", "--verbose", "--vm", "true"], stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert b"starts now" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(TIMEOUT) == 130
    assert [path for path in tmp_path.iterdir() if path.name != "byre"] == []


@pytest.mark.parametrize("where", ["fresh", "up"])
def test_an_image_is_pulled_from_its_registry_and_run(
    up: None, busybox: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    options = ["--rm", *(["--fresh"] if where == "fresh" else [])]
    with oci_registry.registry(tmp_path / "registry") as address:
        name = f"{address}/busybox:latest"
        oci_registry.push(f"{busybox}:latest", name)
        done = byre("run", *options, "--tls-verify=false", name, "echo", "hi")
        assert (done.returncode, done.stdout) == (0, b"hi\n"), done.stderr
        assert f"byre: pulling {name}\n".encode() in done.stderr
    if where == "up":  # the registry is gone, the image is here
        done = byre("run", "--rm", "--pull=never", name, "true")
        assert (done.returncode, done.stderr) == (0, b"")
        done = byre("run", "--rm", "--pull=always", "--tls-verify=false", name, "true")
        assert done.returncode == 125 and b"hint: " in done.stderr
        done = byre("run", "--rm", "--pull=never", "nosuch", "true")
        assert done.returncode == 125 and b"hint: fetch it: byre image pull nosuch\n" in done.stderr


def test_pods(up: None, busybox: str) -> None:
    """Made, filled, listed; removed only with what runs in it, or by force."""
    assert byre("pod", "create", "--share-pid", "-m", "128m", "shop").stdout == b"shop\n"
    run = ("run", "--pod", "shop")
    try:
        assert byre(*run, "-d", "--name", "web", busybox, "httpd", "-f", "-h", "/bin", "-p", "80").returncode == 0
        fetch = ("sh", "-c", "hostname; wget -qO /dev/null http://web/sh && ps | grep -c '[h]ttpd'")
        done = byre(*run, "--rm", busybox, *fetch)
        assert (done.stdout, done.returncode) == (b"shop\n1\n", 0), done.stderr
        assert byre("pod", "ls").stdout.splitlines()[1].split()[-1] == b"web"
        assert byre("pod", "rm", "shop").returncode == 125
    finally:
        assert byre("pod", "rm", "-f", "shop").stdout == b"shop\n"
    assert b"web" not in byre("ps").stdout
    assert b"no pod 'shop'" in byre(*run, busybox, "true").stderr


def test_a_volume_outlives_vms_and_their_keepers(
    up: None, busybox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    mount = ["-v", "data:/data"]
    done = byre("run", "--fresh", *mount, busybox, "sh", "-c", "echo kept > /data/file")
    assert done.returncode == 0, done.stderr
    assert byre("up", "other", *(f"--{name}={value}" for name, value in machine_options().items())).returncode == 0
    keeper = rundir.find("other").info()["pid"]
    try:
        scratch = ["--storage-opt", "size=64m"]
        done = byre("run", "--in", "other", "-d", *scratch, *mount, busybox, "sh", "-c", "df -m /; sleep infinity")
        assert done.returncode == 0, done.stderr
        until(lambda: b" 5" in byre("logs", "--in", "other", done.stdout.decode().strip()).stdout)
        assert byre("volume", "ls").stdout.splitlines()[1].split()[-1] == b"other"
        done = byre("run", "--rm", *mount, busybox, "true")
        assert (done.returncode, b"in use by the VM 'other'" in done.stderr) == (125, True), done.stderr
    finally:
        os.kill(keeper, signal.SIGKILL)
    done = byre("run", "--rm", "-v", "data:/data:ro", busybox, "sh", "-c", "cat /data/file; echo no > /data/file")
    assert done.stdout == b"kept\n", done.stderr
    assert b"Read-only" in done.stderr
    assert byre("volume", "rm", "data").stdout == b"data\n"
    assert list((tmp_path / "byre/scratch").iterdir()) == []


@contextlib.contextmanager
def running(*args: str) -> Iterator[IO[bytes]]:
    """What a command writes that goes on; it is interrupted at the end."""
    with subprocess.Popen([*BYRE, *args], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) in (0, 130)


def test_events_stats_top_and_logs_of_a_container(up: None, busybox: str) -> None:
    script = "echo one; while [ ! -e /go ]; do sleep 0.1; done; echo two"
    limits = ("--pids-limit=9", "-m", "32m")
    with running("events", "--since", "1h") as watching:
        assert byre("run", "-d", "--name=seen", *limits, busybox, "sh", "-c", script).returncode == 0
        with running("logs", "-f", "seen") as following:
            assert following.readline() == b"one\n"
            heads, row = byre("stats", "--no-stream", "seen").stdout.decode().splitlines()
            assert heads.startswith("CONTAINER  CPU %")
            assert re.match(r"seen +[0-9.]+ +[0-9.]+ [KM]iB / 32.0 MiB +[0-9.]+ +[12] / 9 ", row)
            (line,) = byre("stats", "--format=json", "seen").stdout.splitlines()
            assert json.loads(line)["container"] == "seen"
            assert "sh -c echo one" in byre("top", "seen").stdout.decode()
            assert byre("exec", "seen", "touch", "/go").returncode == 0
            assert following.read() == b"two\n"
        assert byre("rm", "seen").returncode == 0
        told: list[str] = []
        while "deleted" not in told:
            _, kind, container, *_ = watching.readline().decode().split()
            told += [kind] if container == "seen" else []
    assert told == ["created", "started", "exited", "deleted"]
    kept = [json.loads(line) for line in byre("events", "--no-follow", "--format=json").stdout.splitlines()]
    assert [event["kind"] for event in kept if event.get("container") == "seen"] == told
    assert byre("stats", "nobody").returncode == 125
