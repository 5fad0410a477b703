"""What is different where calls block: Ctrl-C is what cancels them (B15, B15b), and events are threads' events."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.vehicle("sync")

#: Interrupted while it runs a command, it must take the whole command with it, and itself end by the interrupt.
PROGRAM = """
import sys
from byre.sync import LocalHost
with LocalHost() as host:
    print("ready", flush=True)
    try:
        host.run(["sh", "-c", "sleep {marker} & sleep {marker}"])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.readline()
        print(host.run(["echo", "usable"], capture_output=True).stdout.decode(), flush=True)
"""


def command_lines(having: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text.startswith(f"sleep {having}"):
            found.append(text)
    return found


def until(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.behaviour("B15", "B15b")
def test_an_interrupt_cancels_the_call_and_leaves_nothing() -> None:
    marker = f"{os.getpid()}.5"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(marker=marker)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "ready\n"
        until(lambda: len(command_lines(marker)) == 2)
        program.send_signal(signal.SIGINT)
        assert program.stdout.readline() == "interrupted\n"
        until(lambda: not command_lines(marker))  # by the interrupt, not by the host's end
        program.stdin.write("go on\n")
        program.stdin.flush()
        assert program.stdout.readline() == "usable\n"
        assert program.wait(timeout=20) == 0
