"""B1 to B16: what every process shows, wherever it runs."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any

import pytest

from byre import ProcessParameters, errors
from byre.cow import Process, ProcessHost

MIB = 1024 * 1024

#: Longest that a thing which should happen at once may take here, in seconds: emulated machines are slow.
SOON = float(os.environ.get("BYRE_TEST_SOON", "20"))


async def shell(host: ProcessHost, script: str, **options: Any) -> Process:
    return await host.create_process(ProcessParameters(args=["sh", "-c", script], **options))


async def read_all(process: Process) -> bytes:
    stdout = process.stdio.stdout
    assert stdout is not None
    async with asyncio.timeout(SOON * 3):
        return await stdout.read()


async def read_until(process: Process, text: bytes) -> bytes:
    stdout = process.stdio.stdout
    assert stdout is not None
    async with asyncio.timeout(SOON):
        return await stdout.readuntil(text)


async def ended(process: Process) -> int:
    async with asyncio.timeout(SOON):
        return (await process.wait()).code


def writer(process: Process) -> asyncio.StreamWriter:
    assert process.stdio.stdin is not None
    return process.stdio.stdin


@pytest.mark.behaviour("B1")
async def test_cat_returns_what_it_is_given(host: ProcessHost) -> None:
    async with await host.create_process(ProcessParameters(args=["cat"], stdin=True, stdout=True)) as process:
        data = bytes(range(256)) * 1024
        writer(process).write(data)
        reading = asyncio.ensure_future(read_all(process))
        await writer(process).drain()
        await process.close_stdin()
        assert hashlib.sha256(await reading).digest() == hashlib.sha256(data).digest()
        assert await ended(process) == 0


@pytest.mark.behaviour("B2")
@pytest.mark.parametrize("first", ["wait", "read"])
async def test_output_before_exit_is_whole(host: ProcessHost, first: str) -> None:
    size = 60_000  # what a pipe holds: the process can exit before anybody reads
    async with await shell(host, f"head -c {size} /dev/zero; exit 4", stdout=True) as process:
        if first == "wait":
            assert await ended(process) == 4
        assert len(await read_all(process)) == size
        assert await ended(process) == 4


@pytest.mark.behaviour("B2")
@pytest.mark.not_on("serial")  # it takes half a minute there; test_output_before_exit_is_whole shows the same
async def test_many_mebibytes_before_exit_are_whole(host: ProcessHost) -> None:
    async with await shell(host, "head -c 2097152 /dev/zero; exit 4", stdout=True) as process:
        waiting = asyncio.ensure_future(ended(process))
        assert len(await read_all(process)) == 2 * MIB
        assert await waiting == 4


@pytest.mark.behaviour("B3")
async def test_an_unread_stdout_stops_only_its_own_process(host: ProcessHost) -> None:
    async with await shell(host, "echo started; exec cat /dev/zero", stdout=True) as unread:
        await read_until(unread, b"started\n")
        async with await shell(host, "echo free; sleep 100", stdout=True) as other:
            await read_until(other, b"free\n")
            assert await other.kill()
            assert await ended(other) == 137
        assert await unread.signal(0), "it waits for its reader; it must not have ended"
        assert await unread.kill()
        assert await ended(unread) == 137


@pytest.mark.behaviour("B4")
async def test_a_closed_stdout_breaks_the_pipe(host: ProcessHost) -> None:
    async with await host.create_process(ProcessParameters(args=["yes"], stdout=True)) as process:
        await read_until(process, b"y\n")
        await process.close_stdout()
        status = await asyncio.wait_for(process.wait(), SOON)
        assert (status.code, status.signal) in ((141, 13), (1, 0))


@pytest.mark.behaviour("B5")
async def test_a_background_child_does_not_delay_the_exit(host: ProcessHost) -> None:
    script = "(read line; echo late) <&3 & echo early; exit 3"
    async with await shell(host, f"exec 3<&0; {script}", stdin=True, stdout=True) as process:
        assert await ended(process) == 3
        await read_until(process, b"early\n")
        writer(process).write(b"go\n")
        assert await read_all(process) == b"late\n"


@pytest.mark.behaviour("B6")
async def test_closing_is_harmless_when_repeated_or_not_asked_for(host: ProcessHost) -> None:
    process = await shell(host, "exit 0")
    assert process.stdio == (None, None, None)
    for _ in range(2):
        await process.close_stdin()
        await process.close_stdout()
        await process.close_stderr()
    assert await ended(process) == 0
    await process.close()
    await process.close()
    assert await ended(process) == 0, "a wait after close has the same answer"


@pytest.mark.behaviour("B6", "B14")
async def test_streams_that_are_not_asked_for_are_dev_null(host: ProcessHost) -> None:
    async with await shell(host, "cat; echo lost >&2; echo kept", stdout=True) as process:
        assert process.stdio.stdin is None
        assert process.stdio.stderr is None
        assert await read_all(process) == b"kept\n"


@pytest.mark.behaviour("B7")
async def test_signals_say_whether_they_were_delivered(host: ProcessHost) -> None:
    async with await shell(host, "trap 'echo got; exit 9' TERM; echo ready; read x", stdin=True, stdout=True) as p:
        await read_until(p, b"ready\n")
        assert await p.signal(0)
        assert await p.signal(0), "signal 0 must not have killed it"
        assert await p.signal("TERM")
        assert await read_until(p, b"got\n")
        assert await ended(p) == 9
        assert await p.signal("SIGTERM") is False
        assert await p.signal(0) is False
        assert await p.kill() is False


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize("bad", ["NOSUCH", -1, 65])
async def test_what_is_no_signal_is_refused(host: ProcessHost, bad: Any) -> None:
    async with await host.create_process(ProcessParameters(args=["sleep", "100"])) as process:
        with pytest.raises(errors.InvalidRequest):
            await process.signal(bad)


@pytest.mark.behaviour("B8")
@pytest.mark.parametrize("number", [1, 9, 15])
async def test_death_by_signal_is_128_and_the_number(host: ProcessHost, number: int) -> None:
    async with await host.create_process(ProcessParameters(args=["sleep", "100"])) as process:
        assert await process.signal(number)
        status = await asyncio.wait_for(process.wait(), SOON)
        assert (status.code, status.signal) == (128 + number, number)


@pytest.mark.behaviour("B9")
async def test_the_exit_code_of_a_running_process_is_an_error(host: ProcessHost) -> None:
    async with await host.create_process(ProcessParameters(args=["sleep", "100"])) as process:
        with pytest.raises(errors.ProcessRunning):
            process.exit_code()
        await process.kill()
        assert await ended(process) == process.exit_code() == 137


@pytest.mark.behaviour("B10")
async def test_any_number_of_waiters_get_the_same(host: ProcessHost) -> None:
    async with await shell(host, "read x; exit 6", stdin=True) as process:
        waiters = [asyncio.ensure_future(process.wait()) for _ in range(20)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        await process.close_stdin()
        results = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), SOON)
        assert isinstance(results[0], asyncio.CancelledError)
        assert {status.code for status in results[1:] if not isinstance(status, BaseException)} == {6}
        assert len(results) == 20
    assert await ended(process) == 6


@pytest.mark.behaviour("B11")
async def test_a_terminal_has_the_size_it_is_given(host: ProcessHost) -> None:
    script = "trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 0.05; done"
    async with await shell(host, script, terminal=True, stdin=True, stdout=True, width=91, height=17) as process:
        assert b"17 91" in await read_until(process, b"ready")
        await process.resize_console(100, 40)
        await read_until(process, b"40 100")
        await process.kill()
        await ended(process)
        await process.resize_console(10, 10)  # harmless after the exit


@pytest.mark.behaviour("B11")
async def test_resizing_without_a_terminal_is_an_error(host: ProcessHost) -> None:
    async with await host.create_process(ProcessParameters(args=["sleep", "100"], stdout=True)) as process:
        with pytest.raises(errors.NotATerminal):
            await process.resize_console(80, 24)


@pytest.mark.behaviour("B12")
async def test_control_c_interrupts_the_foreground_job(host: ProcessHost) -> None:
    script = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    async with await shell(host, script, terminal=True, stdin=True, stdout=True) as process:
        await read_until(process, b"ready")
        writer(process).write(b"\x03")
        await read_until(process, b"interrupted")
        assert await ended(process) == 5


@pytest.mark.behaviour("B12")
async def test_a_terminal_merges_output_and_controls_the_session(host: ProcessHost) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && echo out && echo err >&2 && echo tty >/dev/tty"
    async with await shell(host, script, terminal=True, stdin=True, stdout=True) as process:
        assert process.stdio.stderr is None
        assert (await read_all(process)).split() == [b"out", b"err", b"tty"]
        assert await ended(process) == 0


@pytest.mark.behaviour("B12")
async def test_line_editing(host: ProcessHost) -> None:
    async with await shell(
        host, "echo ready; read x; echo got:$x", terminal=True, stdin=True, stdout=True
    ) as process:
        await read_until(process, b"ready")
        writer(process).write(b"abx\x7fc\n")
        await read_until(process, b"got:abc")


class TestConfiguration:
    """B14: what a process is told to be."""

    pytestmark = pytest.mark.behaviour("B14")

    async def output(self, host: ProcessHost, **options: Any) -> list[str]:
        async with await host.create_process(ProcessParameters(stdout=True, **options)) as process:
            out = await read_all(process)
            assert await ended(process) == 0
            return out.decode().split("\n")

    async def test_command_line(self, host: ProcessHost) -> None:
        assert await self.output(host, command_line="echo $((6 * 7)) | cat") == ["42", ""]

    async def test_arguments_arrive_as_they_are(self, host: ProcessHost) -> None:
        args = ["printf", "%s\n", "a b", "", "$HOME", "ü\n"]
        assert await self.output(host, args=args) == ["a b", "", "$HOME", "ü", "", ""]

    async def test_environment_is_exactly_the_given_one(self, host: ProcessHost) -> None:
        env = {"PATH": "/usr/bin:/bin", "GREETING": "x=y z"}
        lines = await self.output(host, args=["env"], env=env)
        # Container runtimes add HOME where it is missing, as a login would.
        shown = sorted(line for line in lines if line and line != "HOME=/root")
        assert shown == ["GREETING=x=y z", "PATH=/usr/bin:/bin"]

    async def test_working_directory(self, host: ProcessHost) -> None:
        assert await self.output(host, args=["pwd"], cwd="/proc") == ["/proc", ""]

    @pytest.mark.parametrize(
        ("user", "uid", "gid"),
        [("12:34", "12", "34"), ("nobody", "65534", "65534"), ("root:nogroup", "0", "65534")],
    )
    async def test_user(self, host: ProcessHost, user: str, uid: str, gid: str) -> None:
        if os.geteuid() != 0 and type(host).__name__ in ("LocalHost", "SyncHost"):
            with pytest.raises(errors.ByreError):
                await self.output(host, args=["id", "-u"], user=user)
            return
        out = await self.output(host, args=["sh", "-c", "id -u; id -g"], user=user)
        assert out == [uid, gid, ""]

    async def test_additional_gids(self, host: ProcessHost) -> None:
        if os.geteuid() != 0 and type(host).__name__ in ("LocalHost", "SyncHost"):
            return
        out = await self.output(host, args=["id", "-G"], user="12:34", additional_gids=[56, 78])
        assert set(out[0].split()) == {"34", "56", "78"}

    async def test_rlimits_and_no_new_privileges(self, host: ProcessHost) -> None:
        script = "ulimit -n; grep NoNewPrivs /proc/self/status"
        out = await self.output(
            host, args=["sh", "-c", script], rlimits={"RLIMIT_NOFILE": (77, 99)}, no_new_privileges=True
        )
        assert out == ["77", "NoNewPrivs:\t1", ""]

    async def test_capabilities(self, host: ProcessHost) -> None:
        if os.geteuid() != 0 and type(host).__name__ in ("LocalHost", "SyncHost"):
            return
        args = ["grep", "-E", "Cap(Eff|Prm|Bnd)", "/proc/self/status"]
        out = await self.output(host, args=args, capabilities=["CAP_CHOWN"])
        assert [line.split()[1] for line in out if line] == ["0000000000000001"] * 3

    async def test_signals_and_descriptors_are_clean(self, host: ProcessHost) -> None:
        script = "grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd"
        out = await self.output(host, args=["sh", "-c", script])
        reserved = 1 << 31 | 1 << 32  # signals 32 and 33 are the C library's own; crun leaves them ignored
        assert [int(line.split()[1], 16) & ~reserved for line in out[:2]] == [0, 0]
        assert set(out[2:]) <= {"0", "1", "2", "3", ""}, "ls itself opens one"

    @pytest.mark.parametrize(
        ("options", "error", "named"),
        [
            ({"args": ["no-such-program"]}, errors.ProgramNotFound, "no-such-program"),
            ({"args": ["/no/such/program"]}, errors.ProgramNotFound, "/no/such/program"),
            ({"args": ["/etc/passwd"]}, errors.ProgramNotExecutable, "/etc/passwd"),
            ({"args": ["true"], "cwd": "/no/such/place"}, errors.WorkingDirectoryNotFound, "/no/such/place"),
            ({"args": ["true"], "user": "nosuchuser"}, errors.UserNotFound, "nosuchuser"),
            ({"args": ["true"], "user": "root:nosuchgroup"}, errors.UserNotFound, "nosuchgroup"),
        ],
    )
    async def test_what_is_missing_is_named(
        self, host: ProcessHost, options: dict[str, Any], error: type[Exception], named: str
    ) -> None:
        with pytest.raises(error, match=named):
            await host.create_process(ProcessParameters(stdin=True, stdout=True, stderr=True, **options))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"args": ["a"], "command_line": "a"},
            {"args": "ls"},
            {"args": ["a\0b"]},
            {"args": ["a"], "env": {"A=B": ""}},
            {"args": ["a"], "terminal": True, "stderr": True},
            {"args": ["a"], "terminal": True, "width": -1},
        ],
    )
    async def test_a_configuration_that_makes_no_sense_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(errors.InvalidRequest):
            ProcessParameters(**options)


@pytest.mark.behaviour("B15")
@pytest.mark.not_on("sync")  # test_sync.py: there a signal cancels
async def test_cancelling_a_create_leaves_no_process(host: ProcessHost) -> None:
    marker = f"byre-cancel-{os.getpid()}"
    script = "sleep 100; : " + marker
    for turns in range(0, 12, 2):
        task = asyncio.ensure_future(shell(host, script, stdin=True, stdout=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, SOON)
        else:  # the agent was faster; the process is ours
            async with await task as process:
                await process.kill()
    async with asyncio.timeout(SOON):
        while marker in await processes(host, "sleep 100"):
            await asyncio.sleep(0.05)


async def processes(host: ProcessHost, having: str) -> str:
    """The command lines of all processes at the host with this text, but of the search itself."""
    pattern = f"[{having[0]}]{having[1:]}"  # does not match itself
    listing = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f 2>/dev/null; echo; done"
    script = f"{listing} | grep '{pattern}'"
    async with await shell(host, script + "; true", stdout=True) as process:
        return (await read_all(process)).decode()


@pytest.mark.behaviour("B15a")
@pytest.mark.parametrize("script", ["exec <&-; echo closed; sleep 100", "echo closed; exit 0"])
async def test_a_writer_learns_at_once_that_nobody_reads(host: ProcessHost, script: str) -> None:
    async with await shell(host, script, stdin=True, stdout=True) as process:
        await read_until(process, b"closed\n")
        with pytest.raises(BrokenPipeError):
            async with asyncio.timeout(SOON):
                while True:
                    writer(process).write(bytes(65536))
                    await writer(process).drain()


@pytest.mark.behaviour("B15b")
async def test_a_timeout_kills_the_whole_tree(host: Any) -> None:
    marker = "271.828"
    script = f"setsid sleep {marker} & (sleep {marker} &) ; sleep {marker}"
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await host.run(["sh", "-c", script], timeout=2)
    assert caught.value.data["ran"] is True
    async with asyncio.timeout(SOON):
        while marker in await processes(host, f"sleep {marker}"):
            await asyncio.sleep(0.05)


@pytest.mark.behaviour("B15b")
@pytest.mark.not_on("sync")  # test_sync.py: there a signal cancels
async def test_cancelling_run_kills_the_whole_tree(host: Any) -> None:
    marker = "314.159"
    running = asyncio.ensure_future(host.run(["sh", "-c", f"sleep {marker} & sleep {marker}"]))
    async with asyncio.timeout(SOON):
        while marker not in await processes(host, f"sleep {marker}"):
            await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, SOON)
    async with asyncio.timeout(SOON):
        while marker in await processes(host, f"sleep {marker}"):
            await asyncio.sleep(0.05)


@pytest.mark.behaviour("B15c")
async def test_terminal_output_before_the_exit_is_drained(host: ProcessHost) -> None:
    async with await shell(host, "seq 1 2000; exit 2", terminal=True, stdin=True, stdout=True) as process:
        assert await ended(process) == 2
        assert (await read_all(process)).split()[-1] == b"2000", "the end is EOF, not an error"


@pytest.mark.behaviour("B15c")
async def test_closing_the_stdin_of_a_terminal_sends_its_end_of_file(host: ProcessHost) -> None:
    async with await shell(host, "echo ready; cat; echo end", terminal=True, stdin=True, stdout=True) as process:
        await read_until(process, b"ready")
        await process.close_stdin()
        await read_until(process, b"end")
        assert await ended(process) == 0


@pytest.mark.behaviour("B15c")
async def test_closing_a_terminal_hangs_up(host: ProcessHost) -> None:
    process = await shell(
        host, "trap 'exit 77' HUP; echo ready; while :; do sleep 0.05; done", terminal=True, stdin=True, stdout=True
    )
    await read_until(process, b"ready")
    waiting = asyncio.ensure_future(process.wait())
    await asyncio.sleep(0)
    await process.close()
    assert (await asyncio.wait_for(waiting, SOON)).code == 77
