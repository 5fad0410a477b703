"""The agent's loop, its timers, its reaper and its helper children, in this process's own child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from byre_guest.loop import EPOLLIN, Loop

from .agent_client import BOOT_PATH

# -- the loop ----------------------------------------------------------------------------------------------


def test_timers_run_in_order_and_a_cancelled_one_never() -> None:
    loop = Loop(_fail)
    seen: list[str] = []
    loop.call_later(0.02, loop.stop)
    loop.call_later(0.01, lambda: seen.append("second"))
    loop.call_later(0.0, lambda: seen.append("first"))
    loop.call_later(0.005, lambda: seen.append("cancelled")).cancel()
    loop.run()
    loop.close()
    assert seen == ["first", "second"]


def test_cancelled_timers_do_not_pile_up() -> None:
    loop = Loop(_fail)
    for _ in range(10_000):
        loop.call_later(3600, lambda: None).cancel()
    assert len(loop._timers) <= 128
    loop.close()


def test_a_failing_callback_is_reported_and_the_loop_goes_on() -> None:
    errors: list[Exception] = []
    loop = Loop(errors.append)
    reading, writing = os.pipe()
    loop.add(reading, EPOLLIN, lambda _mask: os.read(reading, 1) and 1 // 0)
    loop.call_soon(lambda: int("x"))
    loop.call_later(0, lambda: {}["timer"])
    os.write(writing, b"x")
    loop.call_later(0.01, loop.stop)
    loop.run()
    loop.close()
    os.close(reading)
    os.close(writing)
    assert sorted(type(error).__name__ for error in errors) == ["KeyError", "ValueError", "ZeroDivisionError"]


def test_what_was_removed_in_the_same_round_is_not_called() -> None:
    loop = Loop(_fail)
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def first_come(reading: int) -> None:
        called.append(reading)
        for other, _ in pipes:
            loop.remove(other)
        loop.stop()

    for reading, writing in pipes:
        loop.add(reading, EPOLLIN, lambda _mask, r=reading: first_come(r))
        os.write(writing, b"x")
    loop.run()
    loop.close()
    for fd in (fd for pipe in pipes for fd in pipe):
        os.close(fd)
    assert len(called) == 1


def test_the_end_of_a_round_comes_after_its_callbacks() -> None:
    loop = Loop(_fail)
    seen: list[str] = []
    loop.call_soon(lambda: seen.append("soon"))
    loop.end_round = lambda: (seen.append("end"), loop.stop())
    loop.run()
    loop.close()
    assert seen == ["soon", "end"]


def _fail(error: Exception) -> None:
    raise error


# -- children: in a process of their own, because the reaper takes every child of its process ----------------

PROGRAM = (
    BOOT_PATH
    + """
import os, sys
from byre_guest import children
from byre_guest.loop import Loop
from byre_guest.reaper import Reaper
from byre_proto.errors import ByreError, StorageFailed, StartFailed
def fail(error): raise error
loop = Loop(fail)
reaper = Reaper(loop, lambda number: None)
reaper.listen()
before = len(os.listdir("/proc/self/fd"))
answers = []
def answer(*values):
    answers.append(values)
    if len(answers) == wanted:
        loop.stop()
def ended():
    assert len(os.listdir("/proc/self/fd")) == before, os.listdir("/proc/self/fd")
    assert not open(f"/proc/self/task/{os.getpid()}/children").read()
"""
)


def run(body: str) -> list[str]:
    """The lines that `body` prints in a process with a loop and a reaper."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-E", "-c", PROGRAM + body + "\nended()"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_function_runs_in_a_child_and_answers() -> None:
    lines = run("""
wanted = 3
children.run(loop, reaper, lambda: {"parent": os.getppid(), "big": b"x" * 300000}, 10, answer)
def fails(): raise StorageFailed("no disk", hint="add one", lun=3)
children.run(loop, reaper, fails, 10, answer)
children.run(loop, reaper, lambda: 1 // 0, 10, answer)
loop.run()
for result, error in answers:
    if error is None:
        print(result["parent"] == os.getpid(), len(result["big"]))
    else:
        print(type(error).__name__, error, error.data)
""")
    assert sorted(lines) == [
        "ByreError ZeroDivisionError: integer division or modulo by zero {}",
        "StorageFailed no disk (add one) {'lun': 3}",
        "True 300000",
    ]


def test_a_function_that_hangs_meets_its_deadline() -> None:
    lines = run("""
import time
wanted = 1
children.run(loop, reaper, lambda: time.sleep(100), 0.05, answer)
loop.run()
print(type(answers[0][1]).__name__)
""")
    assert lines == ["DeadlineExceeded"]


def test_a_child_that_dies_is_an_error() -> None:
    lines = run("""
wanted = 2
children.run(loop, reaper, lambda: os.kill(os.getpid(), 9), 10, lambda *values: answer("died", *values))
children.run(loop, reaper, lambda: 10, 10, lambda *values: answer("cancelled", *values)).cancel()
loop.run()
_, _, error = max(answers)  # by name: either may end first, and the second may have been too fast to be cancelled
print(error is not None, error and error.data)
""")
    assert lines[0].startswith("True {'status': 9}")


def test_a_child_holds_no_descriptor_of_the_agent() -> None:
    """A pipe's end held by a helper that hangs in a mount would keep another process's stdin open."""
    lines = run("""
wanted = 1
pipe, kept = os.pipe(), os.open("/dev/null", os.O_RDONLY)
children.run(loop, reaper, lambda: sorted(map(int, os.listdir("/proc/self/fd"))), 10, answer, keep=[kept])
loop.run()
found = answers[0][0]
print(len(found), kept in found, pipe[0] in found, pipe[1] in found)
for fd in (*pipe, kept): os.close(fd)
""")
    assert lines == ["6 True False False"]


def test_a_command_is_fed_and_its_output_captured() -> None:
    lines = run("""
wanted = 1
script = "wc -c; echo oops >&2; exit 3"
children.command(loop, reaper, ["/bin/sh", "-c", script], 10, answer, stdin=b"x" * 1000000)
loop.run()
print(answers)
""")
    assert lines == ["[(3, b'1000000\\n', b'oops\\n')]"]


def test_a_command_that_is_killed_or_too_slow_says_so() -> None:
    lines = run("""
wanted = 2
children.command(loop, reaper, ["/bin/sh", "-c", "kill -9 $$"], 10, answer)
children.command(loop, reaper, ["/bin/sleep", "100"], 0.05, answer)
loop.run()
print(sorted(str(values[0]) for values in answers))
try:
    children.command(loop, reaper, ["/no/such"], 1, answer)
except StartFailed as error:
    print(error)
""")
    assert lines == ["['-9', 'None']", "/no/such: No such file or directory"]


def test_a_command_ends_with_its_exit_though_its_child_holds_the_output() -> None:
    started = time.monotonic()
    lines = run("""
wanted = 1
children.command(loop, reaper, ["/bin/sh", "-c", "sleep 30 & echo $!"], 20, answer)
loop.run()
os.kill(int(answers[0][1]), 9)
reaper.wait_for_all()
print(answers[0][0])
""")
    assert lines == ["0"]
    assert time.monotonic() - started < 20


def test_statuses_of_unwatched_children_are_kept_for_whoever_asks_later() -> None:
    lines = run("""
pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 6"], {})
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
reaper.sweep()
reaper.watch(pid, lambda status: (print(os.WEXITSTATUS(status)), loop.stop()))
loop.run()
try:
    reaper.watch(pid, print)
except ProcessLookupError as error:
    print("gone")
print(reaper.signal(pid, 0))
""")
    assert lines == ["6", "gone", "False"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_come_through_the_loop(number: signal.Signals) -> None:
    lines = run(f"""
reaper._on_signal = lambda number: (print(number), loop.stop())
os.kill(os.getpid(), {int(number)})
loop.run()
""")
    assert lines == [str(int(number))]


def test_a_child_whose_pidfd_cannot_be_opened_is_waited_for_all_the_same() -> None:
    lines = run("""
import errno
def refuse(pid, flags=0): raise OSError(errno.EMFILE, "too many open files")
os.pidfd_open = refuse
wanted = 2
children.run(loop, reaper, lambda: 7, 10, answer)
children.command(loop, reaper, ["/bin/sleep", "100"], 100, answer).cancel()
loop.run()
print(sorted(str(values[0]) for values in answers))
""")
    assert lines == ["['-9', '7']"]


def test_a_child_whose_answer_cannot_be_taken_hides_no_other() -> None:
    """Both are told of by one SIGCHLD, perhaps the last one."""
    lines = run("""
import errno
def refuse(pid, flags=0): raise OSError(errno.EMFILE, "too many open files")
os.pidfd_open = refuse
loop._on_error = lambda error: print(repr(error))
wanted = 2
def fails(*values):
    answer(*values)
    raise ValueError(values[0])
for done in (fails, lambda *values: (answer(*values), print(values[0]))):
    children.command(loop, reaper, ["/bin/true"], 10, done)
for pid in list(reaper._watched): os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
loop.call_later(5, loop.stop)
loop.run()
""")
    assert sorted(lines) == ["0", "ValueError(0)"]


def test_a_function_for_which_there_are_no_descriptors_is_answered_from_the_loop() -> None:
    lines = run("""
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
highest = max(map(int, os.listdir("/proc/self/fd")))
wanted = 2
for more in range(2):
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    children.run(loop, reaper, lambda: 7, 10, answer).cancel()
    print(len(answers))
loop.run()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(*{str(error) for _result, error in answers}, *{type(error).__name__ for _result, error in answers})
""")
    assert lines == ["0", "0", "no new process of the agent: Too many open files StartFailed"]


def test_what_is_in_reserve_is_lent_and_kept_again() -> None:
    lines = run("""
import resource
from byre_guest import cgroups, reserve
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
reserve.LENT.keep()
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
for _ in range(2):
    try:
        os.open("/dev/null", os.O_RDONLY)
    except OSError as error:
        print(error.strerror)
    print(cgroups.read("/proc/self/comm") != "")
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
os.close(reserve.LENT._fd)
""")
    assert lines == ["Too many open files", "True"] * 2


def test_a_forked_child_has_no_reserve_that_could_be_another_file() -> None:
    lines = run("""
from byre_guest import reserve
reserve.LENT.keep()
wanted = 1
def in_child():
    pipe = os.pipe()
    while max(pipe) < 20: pipe = os.pipe()  # one of them has its number
    with reserve.LENT:
        return [os.fstat(fd).st_ino > 0 for fd in range(3, 20)].count(True)
children.run(loop, reaper, in_child, 10, answer)
loop.run()
print(answers)
os.close(reserve.LENT._fd)
""")
    assert lines == ["[(17, None)]"]


def test_a_command_for_which_there_are_no_descriptors_leaves_none() -> None:
    lines = run("""
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
highest = max(map(int, os.listdir("/proc/self/fd")))  # of the listing itself, and free again
for more in range(5):
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        children.command(loop, reaper, ["/bin/true"], 10, answer, stdin=b"x")
        print("started")
    except StartFailed as error:
        print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
""")
    assert lines == ["/bin/true: Too many open files"] * 5
