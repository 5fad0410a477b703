"""Parts of the agent that need no process of their own: settings of a VM, modules, logs, terminals, channels."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from byre_guest import init, linux, modules, processes, spawn, system, terminals
from byre_guest.channels import FEW, FRAME, PAGE, READ_SIZE, Channel
from byre_guest.logs import INFO, MAX_EARLY, Logs, describe
from byre_guest.pumps import BULK_SIZE, F_SETPIPE_SZ, PIPE_SIZE, Frames
from byre_proto import errors, events, frames
from byre_proto.connection import Connection
from byre_proto.errors import InvalidRequest
from byre_proto.limits import MAX_DATA

from .agent_client import BOOT, PATIENCE, AgentClient, alive, restlessness

# -- the kernel's command line, modules, cgroups -----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "channel"),
    [
        ("console=ttyS0 quiet", "virtio-serial"),
        ("byre.channel=virtio-serial ro", "virtio-serial"),
        ("quiet byre.channel=vsock:2:1024", "vsock:2:1024"),
        ("byre.channel=virtio-serial byre.channel=vsock:2:7\n", "vsock:2:7"),
        ("console=ttyS0 byre.channel=serial:ttyS1", "serial:ttyS1"),
        ("byre.channel=serial:ttyUSB0:9600", "serial:ttyUSB0:9600"),
    ],
)
def test_the_command_line_names_the_channel(line: str, channel: str) -> None:
    assert init.channel_argument(line) == channel


@pytest.mark.parametrize(
    "value",
    [
        "",
        "vsock",
        "vsock:2",
        "vsock:a:b",
        "vsock:2:3:4",
        "serial",
        "serial:",
        "serial:../sda",
        "serial:ttyS0:fast",
        "serial:ttyS0:1:2",
        "virtio-serial:1",
    ],
)
def test_a_channel_that_there_is_not_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match="names no channel"):
        init.channel_argument(f"byre.channel={value}")


def test_modules_are_loaded_after_what_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/a/sd-mod.ko: kernel/a/scsi_mod.ko kernel/a/common.ko\nkernel/a/scsi_mod.ko: kernel/a/common.ko\n"
        "kernel/a/common.ko:\nkernel/b/other.ko:\n"
    )
    loaded: list[str] = []
    monkeypatch.setattr(modules, "_insert", loaded.append)
    modules.load("sd_mod", "other", directory=str(tmp_path))
    names = [path.removeprefix(f"{tmp_path}/kernel/") for path in loaded]
    assert names == ["a/common.ko", "a/scsi_mod.ko", "a/sd-mod.ko", "b/other.ko"]
    with pytest.raises(FileNotFoundError, match="no_such_module"):
        modules.load("no_such_module", directory=str(tmp_path))


def test_a_module_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("bad.ko:\n")
    (tmp_path / "bad.ko").write_bytes(b"no module")
    with pytest.raises(OSError, match=r"bad\.ko"):
        modules.load("bad", directory=str(tmp_path))


# -- identity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "x" * 65, "../etc", "ü", "-\n"])
def test_a_host_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        system.set_hostname(name)


@pytest.mark.parametrize("name", ["", "0" * 31, "0" * 33, "G" * 32, "0" * 31 + "\n"])
def test_a_machine_id_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        system.set_machine_id(name)


def test_the_machine_id_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "MACHINE_ID", str(tmp_path / "machine-id"))
    system.set_machine_id("0123456789abcdef" * 2)
    assert (tmp_path / "machine-id").read_text() == "0123456789abcdef" * 2 + "\n"
    assert os.listdir(tmp_path) == ["machine-id"]


def test_capabilities_by_name() -> None:
    assert linux.capability_mask(["CAP_CHOWN", "kill", "Cap_Checkpoint_Restore"]) == 1 | 1 << 5 | 1 << 40
    with pytest.raises(ValueError, match="CAP_NONE"):
        linux.capability_mask(["CAP_NONE"])


def test_a_report_that_makes_no_sense_is_still_an_error() -> None:
    plan = spawn.Plan(_arguments(args=["prog"]), {})
    for report in (b"", b"\xff\xfe", b"exec\0x\0", b"\0\0\0\0\0", b"cwd"):
        assert isinstance(spawn.failure(plan, report), errors.ByreError)


def _arguments(**given: object) -> dict[str, object]:
    from byre_proto.messages import check_arguments

    return check_arguments("process.create", given)


def test_a_host_that_releases_nothing_is_refused_more_processes() -> None:
    known = processes.Processes(None, None, lambda _name, _fields: None)  # type: ignore[arg-type]
    known.by_id = dict.fromkeys(range(1, processes.MAX_PROCESSES))  # type: ignore[assignment]
    known.by_id[-1] = known.reserve()  # type: ignore[assignment]
    with pytest.raises(errors.ResourceExhausted, match="release"):
        known.reserve()


# -- logs --------------------------------------------------------------------------------------------------


class Sink:
    """Stands for the session: takes log lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, str]] = []

    def log(self, source: str, level: int, message: str) -> bool:
        self.lines.append((source, level, message))
        return True


@pytest.mark.behaviour("B50")
def test_early_lines_are_kept_for_the_first_host_up_to_a_bound() -> None:
    logs, sink = Logs(), Sink()
    logs.log(10, "too low")
    for number in range(MAX_EARLY + 5):
        logs.log(INFO, f"line {number}")
    logs.connected(sink)  # type: ignore[arg-type]
    logs.log(INFO, "later")
    logs.disconnected()
    assert [message for _, _, message in sink.lines] == [*(f"line {n}" for n in range(MAX_EARLY)), "later"]


def test_an_error_is_described_with_its_way() -> None:
    def inner() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        inner()
    text = describe(caught.value)
    assert text.startswith("KeyError: 'x'\n")
    assert text.endswith("in inner")


# -- terminals ---------------------------------------------------------------------------------------------


def test_the_end_of_file_character_is_typed_twice_after_an_unfinished_line() -> None:
    master, slave = pty.openpty()
    try:
        assert terminals.end_of_file(master, b"") == b"\x04"
        assert terminals.end_of_file(master, b"\n") == b"\x04"
        assert terminals.end_of_file(master, b"x") == b"\x04\x04"
        subprocess.run(["stty", "eof", "^X"], stdin=slave, check=True)
        assert terminals.end_of_file(master, b"\n") == b"\x18"
        subprocess.run(["stty", "-icanon", "eof", "^D"], stdin=slave, check=True)
        assert terminals.end_of_file(master, b"x") == b"\x04"
    finally:
        os.close(master)
        os.close(slave)


# -- channels ----------------------------------------------------------------------------------------------


def test_a_channel_writes_in_order_as_room_comes() -> None:
    reading, writing = os.pipe()
    channel = Channel(reading, writing)
    data = [bytes([n % 256]) * 3000 for n in range(200)]
    channel.write(data)
    assert not channel.flush()
    got = bytearray()
    while not channel.idle:
        got += os.read(reading, 1 << 16)
        channel.writable = True
        channel.flush()
    got += os.read(reading, 1 << 16)
    channel.close()
    assert bytes(got) == b"".join(data)


@pytest.mark.parametrize("port", [False, True])
@pytest.mark.parametrize("size", [1, PAGE, FEW - 1, FEW, FEW + 1, FEW + PAGE, READ_SIZE + 17])
def test_a_channel_reads_all_that_there_is_and_then_says_so(size: int, port: bool) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, PIPE_SIZE)
    data = os.urandom(size)
    channel = Channel(reading, writing, port=port)
    for _ in range(2):  # after much, and after little
        os.write(writing, data)
        channel.readable, got = True, b""
        while channel.readable:
            got += channel.read() or b""
        assert got == data
        assert channel.read() is None
    channel.close()


@pytest.mark.parametrize("port", [False, True])
def test_a_channel_reads_to_the_end_of_a_frame(port: bool) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, PIPE_SIZE)
    channel = Channel(reading, writing, port=port)
    for lacking, most in ((0, READ_SIZE), (17, 17 + FRAME), (0, READ_SIZE)):
        os.write(writing, bytes(READ_SIZE + 1000))
        channel.readable = True
        assert len(channel.read(lacking) or b"") == most
        while channel.readable:
            channel.read()
    channel.close()


@pytest.mark.parametrize("most", [1, MAX_DATA - 1, MAX_DATA, MAX_DATA + 1, BULK_SIZE - 1, BULK_SIZE, BULK_SIZE + 1])
@pytest.mark.parametrize("there", [1, MAX_DATA, 2 * MAX_DATA + 5, PIPE_SIZE])
def test_frames_are_made_around_what_was_read(most: int, there: int) -> None:
    data = os.urandom(there)
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, PIPE_SIZE)
    os.write(writing, data)
    made = Frames()
    count = made.read(reading, most)
    assert count == min(most, there, BULK_SIZE)
    assert made.copy(min(count, 100)) == data[: min(count, 100)]
    whole = made.finish(count, lambda size: frames.HEADER.pack(size, frames.DATA, 0, 0, 1))
    got = [bytes(payload) for _, _, payload in frames.FrameBuffer().frames(whole)]
    assert b"".join(got) == data[:count]
    assert [len(payload) for payload in got[:-1]] == [MAX_DATA] * (len(got) - 1)
    os.close(reading)
    os.close(writing)


class FifoClient(AgentClient):
    """A host on a port: opens it, leaves it, comes back."""

    def __init__(self, to_agent: Path, from_agent: Path, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.reading = os.open(from_agent, os.O_RDONLY | os.O_NONBLOCK)
        self.writing = os.open(to_agent, os.O_WRONLY)
        self.connection = Connection(first=True, name="test")
        self.out = bytearray()
        self.streams, self.replies, self.exits, self.logs = {}, {}, {}, []
        self.held, self.pongs, self.closed = set(), set(), None
        self.wait(lambda: self.connection.connected)

    def pump(self, timeout: float) -> None:
        self.out += b"".join(self.connection.data_to_send())
        if self.out:
            del self.out[: os.write(self.writing, self.out)]
        if select.select([self.reading], [], [], min(timeout, 0.1))[0]:
            data = os.read(self.reading, 1 << 16)
            self.connection.receive_data(data)
            for event in self.connection.take_events():
                self.on_event(event)

    def leave(self) -> None:
        """Close this end of the port."""
        os.close(self.reading)
        os.close(self.writing)


def test_a_port_without_a_host_waits_for_the_next_one(tmp_path: Path) -> None:
    """Two FIFOs behave as a port does: reading nothing is no end, only a host that has gone (HUP).

    Processes go on, the next host finds them, and the agent does not spin meanwhile.
    """
    to_agent, from_agent = tmp_path / "to", tmp_path / "from"
    os.mkfifo(to_agent)
    os.mkfifo(from_agent)
    program = (
        BOOT.replace("\nmain()", "")
        + f"""
import os
from byre_guest.__main__ import Agent
from byre_guest.channels import Channel
agent = Agent()
agent.attach(Channel(
    os.open({str(to_agent)!r}, os.O_RDONLY | os.O_NONBLOCK), os.open({str(from_agent)!r}, os.O_RDWR), port=True
))
agent.run()
"""
    )
    agent = subprocess.Popen([sys.executable, "-I", "-S", "-E", "-c", program])
    pids: list[int] = []
    try:
        for round_number in range(3):
            host = FifoClient(to_agent, from_agent, agent)
            assert len(host.call("process.list")["processes"]) == round_number
            pids.append(host.start("sh", "-c", "trap '' PIPE; echo x; exec sleep 1000", stdio="io").pid)
            host.leave()
            sleeps, ticks = restlessness(agent.pid, 0.3)
            assert sleeps < 10
            assert ticks < 5
        assert all(map(alive, pids))
        agent.terminate()
        assert agent.wait(PATIENCE) == 0
    finally:
        agent.kill()
        agent.wait()
        for pid in filter(alive, pids):
            os.kill(pid, 9)


def test_events_of_streams_that_have_ended_are_nothing() -> None:
    """A stop that crosses an end of file, as any host may send it."""
    with AgentClient() as agent:
        process = agent.start("true", stdio="ioe")
        process.wait()
        session = agent.connection.session
        for number in process.ids.values():
            session.stop(number)
            session.reset(number)
        assert agent.call("process.list")["processes"]
        assert not isinstance(agent.closed, events.Closed)
