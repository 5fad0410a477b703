"""What crun says, and what becomes of it; the terminal that it hands over; what happens where it cannot be."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byre_guest import bundle, children, containers, runtime
from byre_proto.errors import (
    ByreError,
    ContainerNotReady,
    InvalidRequest,
    NotSupported,
    ProgramNotExecutable,
    ProgramNotFound,
    RuntimeFailed,
    WorkingDirectoryNotFound,
)

from .agent_client import AgentClient

#: As crun 1.8.1 wrote it in a VM.
STAMP = "2026-11-23T12:32:55.797735Z: "


@pytest.mark.behaviour("B14")
@pytest.mark.parametrize(
    ("words", "error", "data"),
    [
        ("executable file `no` not found in $PATH: No such file or directory", ProgramNotFound, {"program": "no"}),
        ("open executable: Permission denied", ProgramNotExecutable, {"program": "no"}),
        ("open executable: Operation not permitted", ProgramNotExecutable, {"program": "no"}),
        ("chdir `/bin/sh`: Not a directory", WorkingDirectoryNotFound, {"cwd": "/bin/sh"}),
        ("the container `c` is not running", ContainerNotReady, {}),
        ("mount `x` to `/chdir`: Operation not permitted", RuntimeFailed, {}),
    ],
)
def test_what_crun_says(words: str, error: type[ByreError], data: dict[str, str]) -> None:
    said = runtime.meaning_text(f"{STAMP}{words}\n")
    assert said == words
    found = runtime.error_of("c", "exec", said, {"args": ["no"], "cwd": "/bin/sh"})
    assert type(found) is error
    assert found.data == {"container": "c", **data}
    assert words in str(found)
    for value in data.values():
        assert repr(value) in str(found), "what is missing is named"


def test_without_a_time_stamp_a_line_is_whole() -> None:
    assert runtime.meaning_text("first\nsecond") == "first\nsecond"


class Recorder:
    """In place of `children.command`: keeps what it was asked for; `end` is its program's end."""

    def __init__(self) -> None:
        self.argv: list[str] = []
        self.options: dict[str, Any] = {}
        self.done: Any = None

    def __call__(self, _loop: Any, _reaper: Any, argv: list[str], timeout: float, done: Any, **options: Any) -> Any:
        self.argv, self.done, self.options = argv, done, options

    def end(self, code: int | None, stderr: bytes = b"") -> None:
        self.done(code, b"", stderr)


class FakeStdio:
    def __init__(self, *, terminal: bool) -> None:
        self.terminal = terminal
        self.theirs = [-1, -1, -1] if terminal else [10, 11, 12]
        self.master = -1

    def set_master(self, master: int) -> None:
        self.master = master


@pytest.fixture
def crun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[runtime.Call, Recorder, Path]]:
    recorder = Recorder()
    monkeypatch.setattr(bundle, "BASE", str(tmp_path))
    monkeypatch.setattr(children, "command", recorder)
    (tmp_path / "c").mkdir()
    call = runtime.Call(None, None, "c", 7)  # type: ignore[arg-type]
    yield call, recorder, tmp_path / "c"
    call.close()
    assert not list((tmp_path / "c").iterdir()), "no file is left"


def test_crun_gets_the_streams_and_little_else(crun: tuple[runtime.Call, Recorder, Path]) -> None:
    call, recorder, folder = crun
    stdio, results = FakeStdio(terminal=False), []
    call.run(["exec", "--detach"], results.append, stdio=stdio)  # type: ignore[arg-type]
    assert recorder.argv[0] == runtime.CRUN
    assert recorder.argv[-1] == "c"
    assert (recorder.options["stdin"], recorder.options["stdout"], recorder.options["stderr"]) == (10, 11, 12)
    assert set(recorder.options["env"]) == {"PATH"}, "nothing of the agent's environment"
    (folder / "7.pid").write_text("4242")
    recorder.end(0)
    assert results == [None]
    assert call.finish(stdio) == 4242  # type: ignore[arg-type]


def test_its_log_is_believed_before_its_stderr(crun: tuple[runtime.Call, Recorder, Path]) -> None:
    call, recorder, folder = crun
    results: list[ByreError | None] = []
    call.run(["start"], results.append)
    (folder / "7.log").write_text(f"{STAMP}mount went wrong\n")
    recorder.end(1, b"something of the container's own")
    assert isinstance(results[0], RuntimeFailed)
    assert "mount went wrong" in str(results[0])
    (folder / "7.log").unlink()
    recorder.end(1, b"no log at all\n")
    assert "no log at all" in str(results[1])
    recorder.end(-9)
    assert "-9" in str(results[2])
    recorder.end(None)
    assert isinstance(results[3], TimeoutError)


@pytest.mark.behaviour("B44")
def test_its_end_is_told_though_its_log_cannot_be_read(crun: tuple[runtime.Call, Recorder, Path]) -> None:
    """As where there are no more descriptors: the call that waits for it must not wait for ever."""
    call, recorder, folder = crun
    results: list[ByreError | None] = []
    call.run(["exec"], results.append)
    (folder / "7.log").mkdir()
    recorder.end(1, b"something")
    (folder / "7.log").rmdir()
    assert isinstance(results[0], RuntimeFailed)
    assert "its log cannot be read: Is a directory" in str(results[0])


def test_a_pid_file_that_is_none(crun: tuple[runtime.Call, Recorder, Path]) -> None:
    call, _, folder = crun
    stdio = FakeStdio(terminal=False)
    for text in ("", "-1", "12 34", "x"):
        (folder / "7.pid").write_text(text)
        with pytest.raises(RuntimeFailed):
            call.finish(stdio)  # type: ignore[arg-type]


@pytest.mark.behaviour("B12")
def test_the_terminal_is_handed_over(crun: tuple[runtime.Call, Recorder, Path]) -> None:
    call, recorder, folder = crun
    stdio = FakeStdio(terminal=True)
    call.run(["create"], lambda _error: None, stdio=stdio)  # type: ignore[arg-type]
    path = recorder.argv[recorder.argv.index("--console-socket") + 1]
    assert recorder.options["stdout"] is None, "crun itself needs no terminal"
    (folder / "7.pid").write_text("1")
    master, slave = os.openpty()
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(path)
        socket.send_fds(sender, [b"\0"], [master])
    call.finish(stdio)  # type: ignore[arg-type]
    assert not os.get_inheritable(stdio.master)
    assert os.path.samestat(os.fstat(stdio.master), os.fstat(master))
    for fd in (master, slave, stdio.master):
        os.close(fd)


@pytest.mark.behaviour("B12")
@pytest.mark.parametrize("connects", [False, True])
def test_a_terminal_that_never_comes(crun: tuple[runtime.Call, Recorder, Path], connects: bool) -> None:
    call, recorder, folder = crun
    stdio = FakeStdio(terminal=True)
    call.run(["create"], lambda _error: None, stdio=stdio)  # type: ignore[arg-type]
    (folder / "7.pid").write_text("1")
    with socket.socket(socket.AF_UNIX) as sender:
        if connects:
            sender.connect(recorder.argv[recorder.argv.index("--console-socket") + 1])
            sender.send(b"no descriptor")
        with pytest.raises(RuntimeFailed, match="terminal"):
            call.finish(stdio)  # type: ignore[arg-type]


@pytest.mark.behaviour("B22", "B65")
@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "-x", ".x", "_x", "a b", "x" * 65, "ä", "a\n", "a\0"]
)
def test_what_is_no_id(name: str) -> None:
    with pytest.raises(InvalidRequest):
        containers.check_id(name)


@pytest.mark.parametrize("name", ["a", "9", "A.b_c-D", "x" * 64, "a..b"])
def test_what_is_an_id(name: str) -> None:
    containers.check_id(name)


def test_where_there_can_be_no_containers_the_reason_is_said() -> None:
    with AgentClient() as agent:
        for method, arguments in (
            ("container.list", {}),
            ("container.create", {"container": "c", "spec": {}}),
            ("disk.mount", {"target": 0, "lun": 1}),
            ("process.create", {"container": "c", "args": ["true"]}),
        ):
            with pytest.raises(NotSupported, match=r"cgroup|root"):
                agent.call(method, **arguments)
        agent.call("system.info")
