"""The agent as a child process over a socketpair, driven by a small blocking client: what its tests need, no more.

Rule: every wait has a deadline, and what was not expected is shown in the failure.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byre_proto import events
from byre_proto.connection import Connection

ROOT = Path(__file__).resolve().parents[2]

#: Seconds that a wait may take; scaled for slow machines.
PATIENCE = float(os.environ.get("BYRE_TEST_PATIENCE", "20"))


class Stream:
    """What has arrived on a stream, and how it ended: "eof", "reset", "stop" or ""."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.end = ""
        self.total = -1


class AgentClient:
    """`first` side of a connection to an agent.  Data of streams in `held` is kept unconsumed."""

    def __init__(self, *, secret: bytes | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", "-c", BOOT, "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.socket = ours
        self.socket.setblocking(False)
        self.connection = Connection(first=True, name="test", secret=secret)
        self.out = bytearray()
        self.streams: dict[int, Stream] = {}
        self.replies: dict[int, Any] = {}
        self.exits: dict[int, dict[str, Any]] = {}
        self.logs: list[str] = []
        self.held: set[int] = set()
        self.pongs: set[int] = set()
        self.closed: events.Closed | None = None
        self.wait(lambda: self.connection.connected)

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> int:
        """Close the channel; the agent ends.  Returns its exit status."""
        self.socket.close()
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()

    # -- driving -------------------------------------------------------------------------------------------

    def pump(self, timeout: float) -> None:
        """Exchange what there is; wait up to `timeout` for more."""
        self.out += b"".join(self.connection.data_to_send())
        readable, writable, _ = select.select([self.socket], [self.socket] if self.out else [], [], timeout)
        if writable:
            del self.out[: self.socket.send(self.out)]
        if readable:
            self.receive()

    def receive(self) -> None:
        """Take in what has arrived."""
        data = self.socket.recv(1 << 18)
        if data:
            self.connection.receive_data(data)
        else:
            self.connection.receive_eof()
        for event in self.connection.take_events():
            self.on_event(event)

    def on_event(self, event: events.Event) -> None:
        """Keep what it says."""
        if isinstance(event, events.ReplyReceived):
            self.replies[event.call] = event.result
        elif isinstance(event, events.ErrorReceived):
            self.replies[event.call] = event.error
        elif isinstance(event, events.DataReceived):
            self.streams[event.stream].data += event.data
            if event.stream not in self.held:
                self.connection.session.consume(event.stream, len(event.data))
        elif isinstance(event, events.EofReceived):
            self.streams[event.stream].end = "eof"
            self.streams[event.stream].total = event.total
        elif isinstance(event, events.ResetReceived):
            self.streams[event.stream].end = "reset"
        elif isinstance(event, events.StopReceived):
            self.streams[event.stream].end = "stop"
        elif isinstance(event, events.EventReceived) and event.name == "process.exit":
            assert event.fields["process"] not in self.exits, "an exit is reported once"
            self.exits[event.fields["process"]] = event.fields
        elif isinstance(event, events.LogReceived):
            self.logs.append(event.message)
        elif isinstance(event, events.PongReceived):
            self.pongs.add(event.token)
        elif isinstance(event, events.Closed):
            self.closed = event

    def wait(self, ready: Callable[[], Any], timeout: float = PATIENCE) -> Any:
        """Drive until `ready()` is true; returns it."""
        deadline = time.monotonic() + timeout
        while not (result := ready()):
            left = deadline - time.monotonic()
            assert left > 0, f"not ready in time; exits {self.exits}, logs {self.logs}, closed {self.closed}"
            assert self.closed is None, f"the agent has gone: {self.closed}"
            self.pump(min(left, 1))
        return result

    # -- calls ---------------------------------------------------------------------------------------------

    def request(self, method: str, *, timeout: float | None = None, **arguments: Any) -> int:
        """Send a request; returns the call's number."""
        return self.connection.session.request(method, arguments, timeout)

    def result(self, call: int) -> Any:
        """The result of a call, or its error, raised."""
        self.wait(lambda: call in self.replies)
        answer = self.replies.pop(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, method: str, **arguments: Any) -> Any:
        """Ask and wait."""
        return self.result(self.request(method, **arguments))

    def stream(self, *, sending: bool) -> int:
        """A new stream for stdin (`sending`) or for an output."""
        number = self.connection.session.new_stream(sending=sending, receiving=not sending)
        self.streams[number] = Stream()
        return number

    def start(self, *args: str, stdio: str = "", hold: bool = False, **arguments: Any) -> Process:
        """Start a process with streams by the letters of `stdio`: i, o, e.  `hold`: its output is not consumed."""
        process = Process(self, stdio)
        if hold:
            self.held.update(process.ids.values())
        answer = self.call("process.create", args=list(args), **process.ids, **arguments)
        process.id, process.pid = answer["process"], answer["pid"]
        return process

    def run(self, *args: str, **arguments: Any) -> tuple[int, bytes, bytes]:
        """Run to the end: `(code, stdout, stderr)`."""
        process = self.start(*args, stdio="oe", **arguments)
        code = process.wait()["code"]
        self.wait(lambda: process.out.end and process.err.end)
        self.call("process.release", process=process.id)
        return code, bytes(process.out.data), bytes(process.err.data)

    def send(self, stream: int, data: bytes, *, patience: float = PATIENCE) -> int:
        """Send all of it, as credit comes; returns how much went before the stream was stopped."""
        session = self.connection.session
        sent = 0
        while sent < len(data):
            self.wait(lambda: session.credit(stream), patience)
            credit = session.credit(stream)
            if credit < 0:
                return sent
            session.send(stream, data[sent : sent + min(credit, 65536)])
            sent += min(credit, 65536, len(data) - sent)
        return sent


class Process:
    """A started process and its streams."""

    def __init__(self, client: AgentClient, stdio: str) -> None:
        self.client = client
        self.id = self.pid = 0
        self.ids = {
            name: client.stream(sending=letter == "i") if letter in stdio else 0
            for letter, name in (("i", "stdin"), ("o", "stdout"), ("e", "stderr"))
        }

    @property
    def stdin(self) -> Stream:
        return self.client.streams[self.ids["stdin"]]

    @property
    def out(self) -> Stream:
        return self.client.streams[self.ids["stdout"]]

    @property
    def err(self) -> Stream:
        return self.client.streams[self.ids["stderr"]]

    def write(self, data: bytes) -> int:
        """Send to its stdin."""
        return self.client.send(self.ids["stdin"], data)

    def close_stdin(self) -> None:
        self.client.connection.session.send_eof(self.ids["stdin"])

    def wait(self) -> dict[str, Any]:
        """Its exit."""
        return self.client.wait(lambda: self.client.exits.get(self.id))  # type: ignore[no-any-return]

    def read_until(self, text: bytes) -> bytes:
        """Wait until its stdout has `text`."""
        self.client.wait(lambda: text in self.out.data)
        return bytes(self.out.data)

    def signal(self, number: int = signal.SIGKILL, *, tree: bool = False) -> bool:
        answer = self.client.call("process.signal", process=self.id, signal=int(number), tree=tree)
        return bool(answer["delivered"])

    def release(self) -> None:
        self.client.call("process.release", process=self.id)


#: The agent's own directories, and the interpreter's with msgpack, as in the image.
BOOT_PATH = f"""
import sys
sys.path[:0] = [{str(ROOT / "guest")!r}, {str(ROOT / "bridge_proto")!r}]
sys.path += {[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]!r}
"""
BOOT = f"{BOOT_PATH}\nfrom byre_guest.__main__ import main\nmain()\n"


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def restlessness(pid: int, seconds: float) -> tuple[int, int]:
    """`(voluntary sleeps, ticks of 10 ms on a processor)` of a process within a while.

    That nothing happens cannot be awaited: this is the one place where a test sleeps.
    """

    def count() -> tuple[int, int]:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return next(int(line.split()[1]) for line in status if line.startswith("voluntary")), sum(map(int, times))

    before = count()
    time.sleep(seconds)
    return count()[0] - before[0], count()[1] - before[1]


def open_descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
