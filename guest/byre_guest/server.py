"""Answers the host: one connection at a time, calls to handlers, events of streams to the pumps.

    handlers[method](call, arguments)   returns soon; answers by call.reply(result) or call.fail(error)
    call.on_cancel = f                  f(error): cancelled or its deadline passed; clean up, then call.fail(error)

A handler that raises a `ByreError` fails the call with it.  Any other exception becomes the code "internal", its
traceback goes to the log, and the agent goes on.

Rule: a session that ends takes its calls and streams with it, never a process or a container.  It ends with its
connection, unless the channel was only cut and another one can be had: then calls, streams and pumps stay, rest,
and go on over the next connection that is for this session (WIRE.md, section 7), for RESUME_SECONDS at most.
"""

from __future__ import annotations

import errno

from byre_proto import events
from byre_proto.connection import RESUME, ChannelEnded, Connection, SessionLost
from byre_proto.errors import ByreError, Cancelled, DeadlineExceeded, NotSupported, ResourceExhausted
from byre_proto.limits import RESUME_SECONDS

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
    from .sockets import Sockets

    Handler = Callable[["Call", dict[str, Any]], object]


#: What a system call says when there are no more descriptors, or no more memory: a limit, and nobody's mistake.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


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

    def done(self, error: ByreError | None) -> None:
        """What has no result is over."""
        if error is None:
            self.reply({})
        else:
            self.fail(error)

    def give_up(self, error: ByreError) -> None:
        """Nobody wants the result any more: the handler cleans up and fails it; without `on_cancel` it goes on."""
        if not self.answered and self.on_cancel is not None:
            on_cancel, self.on_cancel = self.on_cancel, None
            on_cancel(error)

    def wait_among(self, waiting: list[Call]) -> None:
        """It is answered later, with all of these; given up, it is none of them."""

        def leave(error: ByreError) -> None:
            waiting.remove(self)
            self.fail(error)

        waiting.append(self)
        self.on_cancel = leave

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
        return self.server.keeps(self._session)


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
        self.sockets: Sockets | None = None
        self.holding = False  # requests wait, but for `system.configure`
        self._held: list[events.Event] = []
        self._on_drop = on_drop
        self._channel: Channel | None = None
        self._connection: Connection | None = None
        self._pumps: Pumps | None = None  # of the session that there is, with a connection or without one
        self._carried = False  # the present connection carries it
        self._patience: Timer | None = None  # with which it waits for its next connection
        self._ended = False  # nobody is there to take what is left to send
        loop.end_round = self._end_round

    # -- connections ---------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """Of the present host."""
        assert self._pumps is not None, "a call comes in a session"
        return self._pumps.session

    def keeps(self, session: Session) -> bool:
        """Whether this is the session that there is, although perhaps without a connection now."""
        return self._pumps is not None and self._pumps.session is session

    @property
    def connected(self) -> bool:
        """Whether there is a connection, be it only the begin of one."""
        return self._connection is not None

    def connect(self, channel: Channel, secret: bytes | None) -> None:
        """Begin a connection over the channel, and greet the host at once."""
        self._channel = channel
        self._connection = Connection(
            first=False,
            name=f"byre-guest {VERSION}",
            secret=secret,
            session=self._pumps.session if self._pumps is not None else None,
            capabilities=frozenset([RESUME] if channel.resumable else []),
        )
        self._carried = self._ended = False
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
        """The connection is over.  One that never carried the session changes nothing for it."""
        connection, self._connection = self._connection, None
        if self._carried and self._pumps is not None and connection is not None:
            self._carried = False
            if self.session.outbox.keep_for_replay and isinstance(connection.error, ChannelEnded):
                self._patience = self.loop.call_later(RESUME_SECONDS, self._give_up)
            else:
                self._give_up()
        self._on_drop()

    def _give_up(self) -> None:
        """The session is over."""
        pumps, self._pumps = self._pumps, None
        self._stop_waiting()
        calls = list(self.calls.values())
        self._held.clear()
        self.logs.disconnected()
        if pumps is not None:
            pumps.close()
        self.processes.disconnected()
        if self.sockets is not None:
            self.sockets.disconnected()
        for call in calls:
            call.give_up(Cancelled("the host has gone"))
        self.calls.clear()
        connection = self._connection
        if connection is not None and pumps is not None and connection.session is pumps.session:
            connection.close(SessionLost("the session was given up", hint="connect anew"))
            self._ended = True  # a handshake that was about to go on with it; the next one is without it

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _end_round(self) -> None:
        """Send what there is to send, and what the pumps then read."""
        connection, channel = self._connection, self._channel
        if self._patience is not None and self._pumps is not None and self._pumps.session.outbox.choked:
            self._give_up()  # nobody reads what all happens
        pumps = self._pumps if self._carried else None
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
            if channel.resumable:
                self._hear_out(connection, channel)
            self._ended = True
            connection.receive_eof()
        return False

    def _hear_out(self, connection: Connection, channel: Channel) -> None:
        """The host takes nothing more.  Its last word may be there: an end in order is no cut."""
        channel.readable = True
        while channel.readable and connection.connected:
            self.on_channel()

    # -- events and calls ----------------------------------------------------------------------------------

    def stop_holding(self) -> None:
        """Serve what has waited, in its order."""
        self.holding = False
        held, self._held = self._held, []
        for event in held:
            self._on_event(event)

    def _is_to_wait(self, event: events.Event) -> bool:
        if isinstance(event, events.CancelReceived):
            return event.call not in self.calls
        return isinstance(event, events.RequestReceived) and event.method != "system.configure"

    def _on_event(self, event: events.Event) -> None:
        if self.holding and self._is_to_wait(event):
            self._held.append(event)
            return
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
            self._on_connected(event.resumed)

    def _on_connected(self, resumed: bool) -> None:
        """Go on with the session that there is, or begin a fresh one in its place."""
        channel, connection = self._channel, self._connection
        assert channel is not None and connection is not None, "it is what has connected"
        if not resumed and self._pumps is not None:
            self._give_up()
        self._stop_waiting()
        connection.session.max_data = channel.max_data
        if self._pumps is None:
            self._pumps = self.processes.pumps = Pumps(self.loop, connection.session, channel)
            self.logs.connected(connection.session)
        self._pumps.channel = channel
        self._carried = True

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
            call.fail(self._typed(call.method, error))
        call.start_clock(self.loop)

    def _typed(self, method: str, error: Exception) -> ByreError:
        """For what a handler has raised that is none of the protocol's errors."""
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            hint = "end some of what goes on in the guest"
            return ResourceExhausted(f"{method}: {error.strerror}", hint=hint, errno=error.errno)
        self.logs.failure(f"{method} failed", error)
        return ByreError(f"an error of the agent itself: {error!r}", hint="see the guest's log")

    def _handler(self, method: str, arguments: dict[str, Any]) -> Handler:
        """Containers are looked at when the first one is: most of a boot's imports would be theirs."""
        if method.startswith(("container.", "disk.", "pod.", "share.")) and method not in self.handlers:
            from . import containers

            self.handlers.update(containers.handlers(self))
        if method == "process.create" and arguments["container"]:
            from . import containers

            return containers.create_process_in_container
        if method == "files.start":
            return _files(arguments)
        if method.startswith("socket."):
            return self._sockets(arguments)
        try:
            return self.handlers[method]
        except KeyError:
            raise NotSupported(f"the guest's agent does not serve {method}", method=method) from None

    def _sockets(self, arguments: dict[str, Any]) -> Handler:
        """Loaded with the first of their calls."""
        if self.sockets is None:
            from .sockets import Sockets

            self.sockets = Sockets(self)
        if arguments.get("container"):
            from . import containers

            return containers.handle_socket_of_container
        return self.sockets.handle


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
