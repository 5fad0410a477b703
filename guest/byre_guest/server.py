"""Answers the host: one connection at a time, calls to handlers, events of streams to the pumps.

    handlers[method](call, arguments)   returns soon; answers by call.reply(result) or call.fail(error)
    call.on_cancel = f                  f(error): cancelled or its deadline passed; clean up, then call.fail(error)

A handler that raises a `ByreError` fails the call with it.  Any other exception becomes the code "internal", its
traceback goes to the log, and the agent goes on.

Rule: a connection that ends takes its calls and streams with it, never a process or a container.
"""

from __future__ import annotations

from byre_proto import events
from byre_proto.connection import Connection
from byre_proto.errors import ByreError, Cancelled, DeadlineExceeded, NotSupported

from . import VERSION
from .logs import DEBUG
from .pumps import Pumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from byre_proto.session import Session

    from .channels import Channel
    from .logs import Logs
    from .loop import Loop, Timer
    from .processes import Processes
    from .reaper import Reaper

    Handler = Callable[["Call", dict[str, Any]], object]


class Call:
    """A request in progress.  Answered once; what comes later is dropped, so a late answer is harmless (B44)."""

    def __init__(self, server: Server, request: events.RequestReceived) -> None:
        self.server = server
        self.number: int = request.call
        self.method: str = request.method
        self.timeout: float | None = request.timeout
        self.on_cancel: Callable[[ByreError], object] | None = None
        self.answered = False
        self._session = server.session
        self._timer: Timer | None = None

    def reply(self, result: dict[str, Any]) -> None:
        """It succeeded."""
        if self._finish():
            self._session.reply(self.number, result)

    def fail(self, error: ByreError) -> None:
        """It did not."""
        if self._finish():
            self._session.fail(self.number, error)

    def give_up(self, error: ByreError) -> None:
        """Nobody wants the result any more: the handler cleans up and fails it; without `on_cancel` it goes on."""
        if not self.answered and self.on_cancel is not None:
            on_cancel, self.on_cancel = self.on_cancel, None
            on_cancel(error)

    def start_clock(self, loop: Loop) -> None:
        """Enforce the deadline of a call that was not answered at once."""
        if self.timeout is not None and not self.answered:
            self._timer = loop.call_later(self.timeout, self._expired)

    def _expired(self) -> None:
        error = DeadlineExceeded(f"{self.method} took longer than {self.timeout:g} s in the guest")
        if self.on_cancel is not None:
            self.give_up(error)
        else:
            self.fail(error)

    def _finish(self) -> bool:
        if self.answered:
            return False
        self.answered = True
        if self._timer is not None:
            self._timer.cancel()
        self.server.calls.pop(self.number, None)
        return self.server.connected and self._session is self.server.session


class Server:
    """See the module's text.  `on_drop()` is called when the connection has ended."""

    def __init__(
        self, loop: Loop, reaper: Reaper, logs: Logs, processes: Processes, on_drop: Callable[[], object]
    ) -> None:
        self.loop = loop
        self.reaper = reaper
        self.logs = logs
        self.processes = processes
        self.handlers: dict[str, Handler] = {}
        self.before_request: Callable[[str], object] | None = None  # called with each one's method
        self.calls: dict[int, Call] = {}
        self._on_drop = on_drop
        self._channel: Channel | None = None
        self._connection: Connection | None = None
        self._pumps: Pumps | None = None
        self._ended = False  # nobody is there to take what is left to send
        loop.end_round = self._end_round

    # -- connections ---------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """Of the present connection."""
        assert self._connection is not None, "a call or an event comes over a connection"
        return self._connection.session

    @property
    def connected(self) -> bool:
        """Whether there is a connection, be it only the begin of one."""
        return self._connection is not None

    def connect(self, channel: Channel, secret: bytes | None) -> None:
        """Begin a fresh session over the channel, and greet the host at once."""
        self._channel = channel
        self._connection = Connection(first=False, name=f"byre-guest {VERSION}", secret=secret)
        self.session.max_data = channel.max_data
        self._pumps = None
        self._ended = False
        self._end_round()

    def on_channel(self) -> None:
        """The channel may have become readable or writable."""
        channel, connection = self._channel, self._connection
        if channel is None or connection is None or not channel.readable:
            return
        data = channel.read(connection.lacking)
        if data is None:
            return
        if data:
            connection.receive_data(data)
        else:
            self._ended = True
            connection.receive_eof()
        try:
            for event in connection.take_events():
                self._on_event(event)
        finally:  # before the channel's buffer is read into again
            if self._pumps is not None:
                self._pumps.write_out()
        if channel.readable and not connection.close_due:
            self.loop.call_soon(self.on_channel)

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Tell the host, if there is one, that something happened."""
        if self._pumps is not None:
            self.session.event(name, fields)

    def _drop(self) -> None:
        """The connection is over."""
        pumps, self._pumps = self._pumps, None
        calls = list(self.calls.values())
        self._connection = None
        self.logs.disconnected()
        if pumps is not None:
            pumps.close()
        self.processes.disconnected()
        for call in calls:
            call.give_up(Cancelled("the host has gone"))
        self.calls.clear()
        self._on_drop()

    def _end_round(self) -> None:
        """Send what there is to send, and what the pumps then read."""
        connection, channel, pumps = self._connection, self._channel, self._pumps
        if connection is None or channel is None:
            return
        if self._send(connection, channel) and pumps is not None and pumps.ready:
            pumps.turn()
            self._send(connection, channel)
        if connection.close_due and (channel.idle or self._ended):
            self._drop()
        elif pumps is not None and pumps.ready and channel.idle:
            self.loop.call_soon(_nothing)  # another round at once, after a look at everything else

    def _send(self, connection: Connection, channel: Channel) -> bool:
        """Send what is queued, as far as the channel takes it; whether that was all."""
        try:
            while channel.flush():
                buffers = connection.data_to_send(channel.room)
                if not buffers:
                    return True
                channel.write(buffers)
        except OSError as error:
            self.logs.log(DEBUG, f"the channel broke: {error}")
            self._ended = True
            connection.receive_eof()
        return False

    # -- events and calls ----------------------------------------------------------------------------------

    def _on_event(self, event: events.Event) -> None:
        if isinstance(event, _STREAM_EVENTS):
            if self._pumps is not None:
                self._pumps.on_event(event)
        elif isinstance(event, events.RequestReceived):
            self._on_request(event)
        elif isinstance(event, events.CancelReceived):
            call = self.calls.get(event.call)
            if call is not None:
                call.give_up(Cancelled(f"{call.method} was cancelled"))
        elif isinstance(event, events.Connected):
            assert self._channel is not None, "a connection has one"
            self._pumps = self.processes.pumps = Pumps(self.loop, self.session, self._channel)
            self.logs.connected(self.session)

    def _on_request(self, request: events.RequestReceived) -> None:
        call = self.calls[request.call] = Call(self, request)
        try:
            if self.before_request is not None:
                self.before_request(request.method)
            handler = self._handler(request.method, request.arguments)
            handler(call, request.arguments)
        except ByreError as error:
            call.fail(error)
        except Exception as error:
            self.logs.failure(f"{request.method} failed", error)
            call.fail(ByreError(f"an error of the agent itself: {error!r}", hint="see the guest's log"))
        call.start_clock(self.loop)

    def _handler(self, method: str, arguments: dict[str, Any]) -> Handler:
        """Containers are looked at when the first one is: most of a boot's imports would be theirs."""
        if method.startswith(("container.", "disk.")) and method not in self.handlers:
            from . import containers

            self.handlers.update(containers.handlers(self))
        if method == "process.create" and arguments["container"]:
            from . import containers

            return containers.create_process_in_container
        if method == "files.start":
            return _files(arguments)
        try:
            return self.handlers[method]
        except KeyError:
            raise NotSupported(f"the guest's agent does not serve {method}", method=method) from None


_STREAM_EVENTS = (
    events.DataReceived,
    events.CreditReceived,
    events.EofReceived,
    events.StopReceived,
    events.ResetReceived,
)


def _files(arguments: dict[str, Any]) -> Handler:
    """Loaded with the first of their operations."""
    from . import containers, files

    return containers.start_files_in_container if arguments["container"] else files.start


def _nothing() -> None:
    """A round without work of its own."""
