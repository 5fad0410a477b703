"""Processes of the agent, as a child program over a socketpair: the behaviours of B1 to B16, without a VM."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre_proto import errors, limits

from .agent_client import AgentClient, alive, open_descriptors, restlessness

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def agent() -> Iterator[AgentClient]:
    with AgentClient() as client:
        yield client


def gone(pid: int, client: AgentClient) -> None:
    """Wait until a process has gone."""
    client.wait(lambda: not alive(pid))


# -- streams -----------------------------------------------------------------------------------------------


@pytest.mark.behaviour("B1")
def test_bytes_come_back_through_cat(agent: AgentClient) -> None:
    data = os.urandom(3_000_001)
    cat = agent.start("cat", stdio="io")
    assert cat.write(data) == len(data)
    cat.close_stdin()
    assert cat.wait()["code"] == 0
    agent.wait(lambda: cat.out.end)
    assert (bytes(cat.out.data), cat.out.end, cat.out.total) == (data, "eof", len(data))


@pytest.mark.behaviour("B2")
def test_output_written_just_before_the_exit_arrives_whole(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "head -c 4000000 /dev/zero; exit 5", stdio="o")
    agent.wait(lambda: process.out.end)
    assert process.wait()["code"] == 5
    assert len(process.out.data) == 4_000_000


@pytest.mark.behaviour("B2")
def test_output_that_fits_the_pipe_is_read_after_the_exit(agent: AgentClient) -> None:
    """The exit is reported although nobody reads, and the bytes are there afterwards."""
    process = agent.start("sh", "-c", "head -c 40000 /dev/zero", stdio="o", hold=True)
    ended = process.wait()
    assert (ended["code"], ended["stdout"]) == (0, 40_000), "what nobody has read yet is not forgotten"
    assert len(process.out.data) == limits.INITIAL_WINDOW
    agent.held.clear()
    agent.connection.session.consume(process.ids["stdout"], limits.INITIAL_WINDOW)
    agent.wait(lambda: process.out.end == "eof")
    assert len(process.out.data) == 40_000


def test_the_exit_carries_the_final_byte_counts(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "printf abc; printf 12345 >&2", stdio="oe")
    ended = process.wait()
    assert (ended["stdout"], ended["stderr"]) == (3, 5)


@pytest.mark.behaviour("B3")
def test_an_unread_output_stops_only_its_own_process(agent: AgentClient) -> None:
    unread = [agent.start("yes", stdio="o", hold=True) for _ in range(5)]
    assert agent.run("sh", "-c", "head -c 1000000 /dev/zero | wc -c") == (0, b"1000000\n", b"")
    for process in unread:
        assert len(process.out.data) <= limits.INITIAL_WINDOW
        assert process.signal()
        assert process.wait()["code"] == 128 + signal.SIGKILL


@pytest.mark.behaviour("B4")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closing_an_output_gives_the_process_a_broken_pipe(agent: AgentClient, stream: str) -> None:
    command = "yes" if stream == "stdout" else "yes >&2"
    process = agent.start("sh", "-c", command, stdio="oe")
    agent.wait(lambda: agent.streams[process.ids[stream]].data)
    agent.connection.session.stop(process.ids[stream])
    assert process.wait()["code"] == 128 + signal.SIGPIPE


@pytest.mark.behaviour("B5")
def test_an_exit_is_reported_while_a_child_holds_the_output(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "exec 9<&0; (read x <&9; echo late) & echo early; exit 3", stdio="io")
    ended = process.wait()
    assert (ended["code"], ended["stdout"]) == (3, len("early\n"))
    process.read_until(b"early\n")
    assert process.out.end == ""
    process.write(b"\n")
    agent.wait(lambda: process.out.end == "eof")
    assert bytes(process.out.data) == b"early\nlate\n"


@pytest.mark.behaviour("B15a")
def test_a_writer_learns_at_once_that_stdin_was_closed(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "exec 0<&-; echo closed; exec sleep 100", stdio="io")
    process.read_until(b"closed")
    agent.wait(lambda: process.stdin.end == "stop")
    assert agent.connection.session.credit(process.ids["stdin"]) == -1


@pytest.mark.behaviour("B15a")
def test_a_writer_that_is_blocked_learns_of_the_exit(agent: AgentClient) -> None:
    process = agent.start("sleep", "100", stdio="i")
    session, stream = agent.connection.session, process.ids["stdin"]
    while session.credit(stream):  # until the pipe and the window are full
        session.send(stream, bytes(session.credit(stream)))
        agent.call("process.list")
    process.signal()
    agent.wait(lambda: process.stdin.end == "stop")


def test_a_reset_of_stdin_is_an_end_of_file(agent: AgentClient) -> None:
    process = agent.start("cat", stdio="i")
    agent.connection.session.reset(process.ids["stdin"])
    assert process.wait()["code"] == 0


def test_streams_that_were_not_asked_for_are_dev_null(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "readlink /proc/self/fd/0 /proc/self/fd/2; cat", stdio="o")
    assert process.wait()["code"] == 0
    agent.wait(lambda: process.out.end)
    assert bytes(process.out.data) == b"/dev/null\n/dev/null\n"


# -- signals and exits -------------------------------------------------------------------------------------


@pytest.mark.behaviour("B7")
def test_signals_say_whether_they_were_delivered(agent: AgentClient) -> None:
    process = agent.start("sleep", "100")
    assert process.signal(0)
    assert process.signal(0)
    assert alive(process.pid)
    assert process.signal(signal.SIGTERM)
    process.wait()
    assert not process.signal(signal.SIGTERM)
    assert not process.signal(0)


@pytest.mark.behaviour("B7")
def test_a_signal_does_not_count_as_delivered_to_one_that_has_just_ended(agent: AgentClient) -> None:
    """The agent has not been told of the exit when it is asked: the request and the exit come in one round."""
    process = agent.start("sleep", "100")
    os.kill(agent.process.pid, signal.SIGSTOP)
    call = agent.request("process.signal", process=process.id, signal=15)
    agent.pump(0)
    os.kill(process.pid, signal.SIGKILL)
    gone(process.pid, agent)
    os.kill(agent.process.pid, signal.SIGCONT)
    assert agent.result(call) == {"delivered": False}


@pytest.mark.parametrize("number", [-1, 65, 1000])
def test_a_number_that_is_no_signal_is_refused(agent: AgentClient, number: int) -> None:
    process = agent.start("sleep", "100")
    with pytest.raises(errors.InvalidRequest, match="not a signal"):
        process.signal(number)
    assert alive(process.pid)


@pytest.mark.behaviour("B8")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_signal_is_128_and_its_number(agent: AgentClient, number: signal.Signals) -> None:
    process = agent.start("sleep", "100")
    process.signal(number)
    ended = process.wait()
    assert (ended["code"], ended["signal"]) == (128 + number, number)


@pytest.mark.behaviour("B10")
def test_any_number_of_waiters_get_the_same_exit(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "read x; exit 9", stdio="i")
    calls = [agent.request("process.wait", process=process.id) for _ in range(3)]
    cancelled = agent.request("process.wait", process=process.id)
    agent.connection.session.cancel(cancelled)
    with pytest.raises(errors.Cancelled):
        agent.result(cancelled)
    process.write(b"\n")
    for call in (*calls, agent.request("process.wait", process=process.id)):
        assert agent.result(call) == {"code": 9, "signal": 0, "oom": False}


@pytest.mark.behaviour("B44")
def test_a_wait_ends_with_its_deadline(agent: AgentClient) -> None:
    process = agent.start("sleep", "100")
    with pytest.raises(errors.DeadlineExceeded):
        agent.result(agent.request("process.wait", timeout=0.05, process=process.id))
    assert process.signal(0)


def test_what_is_not_known_is_an_error(agent: AgentClient) -> None:
    for method in ("process.signal", "process.release", "process.wait", "process.resize"):
        extra = {"signal": 0} if method == "process.signal" else {}
        extra = {"width": 1, "height": 1} if method == "process.resize" else extra
        with pytest.raises(errors.ProcessNotFound, match="12345"):
            agent.call(method, process=12345, **extra)


# -- release -----------------------------------------------------------------------------------------------


def test_an_exit_is_kept_until_it_is_released(agent: AgentClient) -> None:
    process = agent.start("true")
    process.wait()
    assert [entry["process"] for entry in agent.call("process.list")["processes"]] == [process.id]
    process.release()
    assert agent.call("process.list")["processes"] == []
    with pytest.raises(errors.ProcessNotFound):
        process.signal(0)


def test_a_released_process_loses_its_streams_and_runs_on(agent: AgentClient, tmp_path: Path) -> None:
    script = (
        f"cat; echo x || true; echo $? > {tmp_path}/before; sleep 0; echo done > {tmp_path}/done; exec sleep 100"
    )
    process = agent.start("sh", "-c", f"trap '' PIPE; {script}", stdio="io")
    process.release()
    agent.wait(lambda: agent.call("process.list") and (tmp_path / "done").exists())
    assert (tmp_path / "before").read_text() == "0\n"
    assert alive(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    gone(process.pid, agent)
    assert process.id not in agent.exits
    assert agent.connection.session.streams == {}


# -- how they start ----------------------------------------------------------------------------------------


@pytest.mark.behaviour("B14")
@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"args": ["no-such-program"]}, errors.ProgramNotFound, "no-such-program"),
        ({"args": ["/no/such/program"]}, errors.ProgramNotFound, "/no/such/program"),
        ({"args": ["/etc/passwd"]}, errors.ProgramNotExecutable, "/etc/passwd"),
        ({"args": ["/tmp"]}, errors.ProgramNotExecutable, "/tmp"),
        ({"args": ["true"], "cwd": "/no/such/directory"}, errors.WorkingDirectoryNotFound, "/no/such/directory"),
        ({"args": ["true"], "cwd": "/etc/passwd"}, errors.WorkingDirectoryNotFound, "/etc/passwd"),
        ({"args": ["true"], "user": "no-such-user"}, errors.UserNotFound, "no-such-user"),
        ({"args": ["true"], "user": "root:no-such-group"}, errors.UserNotFound, "no-such-group"),
        ({"args": []}, errors.InvalidRequest, "args"),
        ({"args": [""]}, errors.InvalidRequest, "empty"),
        ({"args": ["a"], "command_line": "b"}, errors.InvalidRequest, "either"),
        ({"args": ["a\0b"]}, errors.InvalidRequest, "NUL"),
        ({"args": ["a"], "env": {"A=B": "c"}}, errors.InvalidRequest, "env"),
        ({"args": ["a"], "rlimits": [["RLIMIT_NONE", 1, 1]]}, errors.InvalidRequest, "RLIMIT_NONE"),
        ({"args": ["a"], "capabilities": ["CAP_FLY"]}, errors.InvalidRequest, "CAP_FLY"),
        ({"args": ["a"], "oci": {}}, errors.InvalidRequest, "container"),
        ({"args": ["true"], "env": {"A": "x" * 200_000}}, errors.InvalidRequest, "too large"),
    ],
)
def test_a_failed_start_is_a_typed_error_that_names_its_cause(
    agent: AgentClient, arguments: dict[str, object], error: type[Exception], named: str
) -> None:
    before = open_descriptors(agent.process.pid)
    ids = {name: agent.stream(sending=name == "stdin") for name in ("stdin", "stdout", "stderr")}
    with pytest.raises(error, match=named):
        agent.call("process.create", **arguments, **ids)
    assert agent.call("process.list")["processes"] == []
    assert agent.connection.session.streams == {}
    assert open_descriptors(agent.process.pid) == before


@pytest.mark.behaviour("B14")
def test_a_script_without_an_interpreter_line_is_not_executable(agent: AgentClient, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hi\n")
    script.chmod(0o755)
    with pytest.raises(errors.ProgramNotExecutable):
        agent.start(str(script))


@pytest.mark.behaviour("B14")
def test_a_program_is_looked_for_in_the_path_of_its_own_environment(agent: AgentClient, tmp_path: Path) -> None:
    refused, found = tmp_path / "refused", tmp_path / "found"
    for directory, mode in ((refused, 0o644), (found, 0o755)):
        directory.mkdir()
        (directory / "tool").write_text('#!/bin/sh\necho "$@" $FLAVOUR\n')
        (directory / "tool").chmod(mode)
    env = {"PATH": f"/nowhere:{refused}:{found}", "FLAVOUR": "sweet"}
    assert agent.run("tool", "a", "b c", env=env) == (0, b"a b c sweet\n", b"")
    with pytest.raises(errors.ProgramNotExecutable):
        agent.start("tool", env={"PATH": str(refused)})


@pytest.mark.behaviour("B14")
def test_a_command_line_goes_through_the_shell(agent: AgentClient) -> None:
    assert agent.run(command_line="echo a$((1 + 1)) | tr a b")[1] == b"b2\n"


@pytest.mark.behaviour("B14")
def test_the_environment_is_the_given_one_and_nothing_else(agent: AgentClient) -> None:
    assert agent.run("/usr/bin/env", env={"A": "1"}, add_env={"B": "ü"})[1] == "A=1\nB=ü\n".encode()
    default = agent.run("/usr/bin/env", add_env={"B": "2"})[1]
    assert f"PATH={os.environ['PATH']}\n".encode() in default
    assert b"B=2\n" in default


@pytest.mark.behaviour("B14")
def test_the_working_directory_is_the_given_one(agent: AgentClient, tmp_path: Path) -> None:
    assert agent.run("pwd", cwd=str(tmp_path))[1] == f"{tmp_path}\n".encode()


@ROOT_ONLY
@pytest.mark.behaviour("B14")
@pytest.mark.parametrize(
    ("user", "gids", "expected"),
    [
        ("", [], None),
        ("1234", [], "1234 0 0"),
        ("1234:567", [], "1234 567 567"),
        ("nobody", [], "65534 65534 65534"),
        ("nobody:daemon", [4242], "65534 1 1 4242"),
    ],
)
def test_the_user_and_its_groups(agent: AgentClient, user: str, gids: list[int], expected: str | None) -> None:
    out = (
        agent.run("sh", "-c", "echo $(id -u) $(id -g) $(id -G)", user=user, additional_gids=gids)[1]
        .decode()
        .strip()
    )
    assert out == (expected if expected is not None else f"{os.getuid()} {os.getgid()} {out.split(' ', 2)[2]}")


@ROOT_ONLY
@pytest.mark.behaviour("B14")
@pytest.mark.parametrize("user", ["", "nobody"])
def test_capabilities_are_the_given_ones_in_every_set(agent: AgentClient, user: str) -> None:
    names = ["CAP_NET_BIND_SERVICE", "kill"]
    status = agent.run("cat", "/proc/self/status", capabilities=names, user=user)[1].decode()
    sets = {line.split(":")[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}
    assert sets == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 1 << 10 | 1 << 5)


@pytest.mark.behaviour("B14")
def test_limits_and_no_new_privileges(agent: AgentClient) -> None:
    limits_text = agent.run("sh", "-c", "ulimit -n; ulimit -c", rlimits=[["RLIMIT_NOFILE", 77, 99]])[1].decode()
    assert limits_text.split()[0] == "77"
    status = agent.run("cat", "/proc/self/status", no_new_privileges=True)[1]
    assert b"NoNewPrivs:\t1" in status


@pytest.mark.parametrize("plain", [True, False])
def test_a_program_inherits_nothing_of_the_agent(agent: AgentClient, plain: bool) -> None:
    """Neither descriptors nor signals, session, limits or umask: by both ways to start one."""
    cwd = "" if plain else "/"
    status = "grep -E 'Sig(Blk|Ign)' /proc/self/status; ulimit -n; umask; cut -d' ' -f6 /proc/$$/stat"
    script = f"ls /proc/self/fd | wc -l; {status}"
    process = agent.start("sh", "-c", script, stdio="o", cwd=cwd)
    assert process.wait()["code"] == 0
    agent.wait(lambda: process.out.end)
    descriptors, blocked, ignored, files, umask, session = process.out.data.decode().split("\n")[:6]
    assert int(descriptors) == 4  # and the listing's own
    internal = 1 << 31 | 1 << 32  # of libc's threads: its posix_spawn has always let them be ignored
    assert int(blocked.split()[1], 16) == int(ignored.split()[1], 16) & ~internal == 0
    assert int(files) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert umask == "0022"
    assert int(session) == process.pid


@pytest.mark.parametrize("plain", [True, False])
def test_a_program_ignores_no_signal_that_the_agent_was_made_to_ignore(plain: bool) -> None:
    """As by nohup(1), and by a shell that starts it in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        client = AgentClient()
    finally:
        signal.signal(signal.SIGINT, before)
    with client:
        process = client.start("sh", "-c", "kill -INT $$; exit 4", cwd="" if plain else "/")
        assert process.wait()["signal"] == signal.SIGINT


# -- cancelled on the way ----------------------------------------------------------------------------------


@pytest.mark.behaviour("B15")
def test_a_cancelled_start_leaves_nothing(agent: AgentClient) -> None:
    before = open_descriptors(agent.process.pid)
    for _ in range(20):
        ids = {"stdout": agent.stream(sending=False), "stdin": agent.stream(sending=True)}
        call = agent.request("process.create", args=["sleep", "100"], cwd="/", **ids)
        agent.connection.session.cancel(call)
        try:
            answer = agent.result(call)
        except errors.Cancelled:
            pass
        else:  # the cancellation came too late: it is a process like any other
            agent.call("process.signal", process=answer["process"], signal=9)
            agent.wait(lambda p=answer["process"]: p in agent.exits)
            agent.call("process.release", process=answer["process"])
    assert agent.call("process.list")["processes"] == []
    agent.wait(lambda: not agent.connection.session.streams)
    assert open_descriptors(agent.process.pid) == before


# -- trees -------------------------------------------------------------------------------------------------


TREE = "sleep 1000 & echo $!; (setsid sleep 1000 & echo $!; wait) & sh -c 'sleep 1000 & echo $!; wait' & wait"


@pytest.mark.behaviour("B15b")
def test_the_whole_tree_is_killed(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", TREE, stdio="o")
    agent.wait(lambda: process.out.data.count(b"\n") == 3)
    pids = [int(line) for line in process.out.data.split()]
    assert all(map(alive, pids))
    assert process.signal(tree=True)
    for pid in [process.pid, *pids]:
        gone(pid, agent)
    assert not process.signal(0, tree=True)


@pytest.mark.behaviour("B15b")
def test_what_a_command_left_behind_is_killed_after_its_exit(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "sleep 1000 & echo $!", stdio="o")
    process.wait()
    pid = int(process.read_until(b"\n"))
    assert alive(pid)
    assert process.signal(tree=True)
    gone(pid, agent)


@pytest.mark.behaviour("B15b", "B44")
def test_without_descriptors_every_call_is_answered_and_a_tree_is_killed_all_the_same(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "sleep 1000 & echo $!; wait", stdio="o")
    child = int(process.read_until(b"\n"))
    before = open_descriptors(agent.process.pid)
    limits = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir(f"/proc/{agent.process.pid}/fd")))
    # Not limited to its highest number: that of its socket was ours, and may be far above the number of listeners.
    unused = (fd for fd in itertools.count() if fd not in used)
    few = next(itertools.islice(unused, 4, None))
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (few, limits[1]))
    listeners = []
    try:
        with pytest.raises(errors.ResourceExhausted, match="Too many open files"):
            while True:  # each takes one of the few
                listeners.append(agent.call("socket.listen", host="127.0.0.1")["listener"])
        for method, arguments in (
            ("process.create", {"args": ["true"]}),
            ("files.start", {"operation": "stat", "path": "/", "stdout": agent.stream(sending=False)}),
            ("system.stacks", {}),
        ):
            with pytest.raises((errors.StartFailed, errors.ResourceExhausted), match="Too many open files"):
                agent.call(method, **arguments)
        assert process.signal(tree=True)
        process.wait()
        gone(child, agent)
    finally:
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, limits)
    for listener in listeners:
        agent.call("socket.close", listener=listener)
    assert agent.run("echo", "again")[1] == b"again\n"
    assert open_descriptors(agent.process.pid) <= before


def test_a_tree_does_not_reach_other_processes(agent: AgentClient) -> None:
    other = agent.start("sleep", "100")
    process = agent.start("sh", "-c", "sleep 1000 & wait")
    process.signal(tree=True)
    process.wait()
    assert other.signal(0)


# -- terminals ---------------------------------------------------------------------------------------------


@pytest.mark.behaviour("B12", "B15c")
@pytest.mark.parametrize("plain", [True, False])
def test_a_terminal_is_controlling_and_has_its_size_before_the_program_starts(
    agent: AgentClient, plain: bool
) -> None:
    cwd = "" if plain else "/"
    script = "stty size; tty; echo err >&2; echo to-tty >/dev/tty"
    process = agent.start("sh", "-c", script, stdio="io", terminal=True, width=123, height=45, cwd=cwd)
    assert process.wait()["code"] == 0
    agent.wait(lambda: process.out.end == "eof")
    size, name, *rest = process.out.data.decode().split("\r\n")
    assert (size, rest) == ("45 123", ["err", "to-tty", ""])
    assert name.startswith("/dev/pts/")


@pytest.mark.behaviour("B12")
def test_ctrl_c_interrupts_the_foreground_process(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "trap 'echo caught; exit 7' INT; echo ready; while :; do read x; done",
                          stdio="io", terminal=True)  # fmt: skip
    process.read_until(b"ready")
    process.write(b"\x03")
    assert process.wait()["code"] == 7
    agent.wait(lambda: b"caught" in process.out.data)


@pytest.mark.behaviour("B11")
def test_a_resize_is_seen_and_announced(agent: AgentClient) -> None:
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do read x; done"
    process = agent.start("sh", "-c", script, stdio="io", terminal=True)
    process.read_until(b"ready")
    agent.call("process.resize", process=process.id, width=77, height=33)
    assert process.wait()["code"] == 0
    process.read_until(b"33 77")
    agent.call("process.resize", process=process.id, width=1, height=1)


@pytest.mark.behaviour("B11")
def test_a_resize_without_a_terminal_is_an_error(agent: AgentClient) -> None:
    process = agent.start("sleep", "100", stdio="io")
    with pytest.raises(errors.NotATerminal):
        agent.call("process.resize", process=process.id, width=77, height=33)


@pytest.mark.parametrize("size", [(0, 10), (10, 70_000), (-1, 5)])
def test_an_impossible_size_is_refused(agent: AgentClient, size: tuple[int, int]) -> None:
    process = agent.start("sleep", "100", stdio="io", terminal=True)
    with pytest.raises(errors.InvalidRequest):
        agent.call("process.resize", process=process.id, width=size[0], height=size[1])


@pytest.mark.behaviour("B15c")
def test_output_of_a_terminal_before_the_exit_is_drained(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "seq 20000", stdio="o", terminal=True)
    assert process.wait()["code"] == 0
    agent.wait(lambda: process.out.end == "eof")
    assert process.out.data.decode().split() == [str(number) for number in range(1, 20001)]


@pytest.mark.behaviour("B15c")
@pytest.mark.parametrize("text", [b"", b"whole line\n", b"part of a line"])
def test_closing_stdin_of_a_terminal_is_an_end_of_file(agent: AgentClient, text: bytes) -> None:
    process = agent.start("sh", "-c", "stty -echo; echo ready; cat; echo end", stdio="io", terminal=True)
    process.read_until(b"ready")
    process.write(text)
    process.close_stdin()
    assert process.wait()["code"] == 0
    agent.wait(lambda: process.out.end)
    assert bytes(process.out.data).replace(b"\r", b"") == b"ready\n" + text + b"end\n"


@pytest.mark.behaviour("B15c")
@pytest.mark.parametrize("how", ["release", "stop"])
def test_letting_go_of_a_terminal_hangs_up(agent: AgentClient, tmp_path: Path, how: str) -> None:
    script = f"trap 'echo hup > {tmp_path}/hup; exit' HUP; echo ready; while :; do sleep 0.01; done"
    process = agent.start("sh", "-c", script, stdio="io", terminal=True)
    process.read_until(b"ready")
    if how == "release":
        process.release()
    else:
        agent.connection.session.stop(process.ids["stdout"])
    gone(process.pid, agent)
    assert (tmp_path / "hup").read_text() == "hup\n"


def test_a_terminal_has_no_stderr_of_its_own(agent: AgentClient) -> None:
    with pytest.raises(errors.InvalidRequest, match="one output"):
        agent.start("true", stdio="ioe", terminal=True)
    assert agent.connection.session.streams == {}


# -- many --------------------------------------------------------------------------------------------------


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def children_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


@pytest.mark.behaviour("B16")
def test_a_thousand_processes_one_after_the_other_leave_nothing(agent: AgentClient) -> None:
    def one() -> None:
        process = agent.start("/bin/true", stdio="ioe")
        assert process.wait()["code"] == 0
        agent.wait(lambda: process.out.end and process.err.end)
        process.release()

    for _ in range(200):
        one()
    descriptors, memory = open_descriptors(agent.process.pid), resident_kib(agent.process.pid)
    for _ in range(1000):
        one()
    assert open_descriptors(agent.process.pid) == descriptors
    assert children_of(agent.process.pid) == ""
    assert resident_kib(agent.process.pid) - memory < 1024


@pytest.mark.behaviour("B16")
def test_two_hundred_at_once_leave_nothing(agent: AgentClient) -> None:
    before = open_descriptors(agent.process.pid)
    processes = [agent.start("sh", "-c", "read x; echo $x; exit 4", stdio="io") for _ in range(200)]
    for index, process in enumerate(processes):
        process.write(f"{index}\n".encode())
    for index, process in enumerate(processes):
        assert process.wait()["code"] == 4
        agent.wait(lambda p=process: p.out.end == "eof")
        assert bytes(process.out.data) == f"{index}\n".encode()
        process.release()
    assert open_descriptors(agent.process.pid) == before
    assert children_of(agent.process.pid) == ""


def test_orphans_fall_to_the_agent_and_are_reaped(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "sleep 1000 >/dev/null & echo $!", stdio="o")
    process.wait()
    pid = int(process.read_until(b"\n"))
    assert f"PPid:\t{agent.process.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    os.kill(pid, signal.SIGKILL)
    agent.wait(lambda: agent.call("process.list") and not Path(f"/proc/{pid}").exists())


def test_an_idle_agent_does_not_wake_up(agent: AgentClient) -> None:
    agent.start("sleep", "100", stdio="ioe")
    agent.call("process.list")
    agent.wait(lambda: restlessness(agent.process.pid, 0.2)[0] <= 1)
    sleeps, ticks = restlessness(agent.process.pid, 0.5)
    assert sleeps <= 1  # it sleeps soundly from the next second on
    assert ticks <= 2
