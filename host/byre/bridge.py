"""The asyncio shell around `byre_proto.Connection`: one connected socket, many calls (`calls`) and streams
(`stream_table`), and events.

Rule: protocol decisions are the core's, this moves bytes and wakes tasks.  Everything that waits here ends with a
result, its deadline, its cancellation, or the loss of the connection, which is published once (B42).  A channel
that was only cut is no loss where another one can carry the session on: then the bridge *rests*, for
RESUME_SECONDS at most, and what waits goes on waiting (WIRE.md, section 7).
Nothing here knows of machines, containers or processes.

All methods belong to the event loop in which `open` ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from byre_proto import events
from byre_proto.connection import RESUME, ChannelEnded, Connection
from byre_proto.limits import RESUME_SECONDS

from . import resumption
from .calls import Calls, Result
from .channel import CLOSE_GRACE, SEND_BUFFER, Channel, Owner
from .errors import ByreError, ConnectionLost, DeadlineExceeded, NotSupported
from .guestlog import GuestLog
from .stream_table import StreamTable

if TYPE_CHECKING:
    from byre_proto.session import Session

#: How long a machine's own word for its end is awaited after its channel ended, in seconds (B42: within one).
EXPLAIN_GRACE = 0.5

#: The field by which events find their subscriber.
_KEYS = {"process.exit": "process", "container.exit": "container"}

#: Called with the event's fields, or with the loss of the connection: either ends what waits.
Subscriber = Callable[[Result | ConnectionLost], None]
#: Called with each event and log line, and at last with the loss.
Observer = Callable[[events.EventReceived | events.LogReceived | ConnectionLost], None]
Server = Callable[[events.RequestReceived | events.CancelReceived], None]


class Bridge(Calls):
    """One connection to an agent or a keeper.  `label` names the VM in logs and errors.

    With `server` it is the other side, which is asked: each request, and each cancellation of one, is given to it,
    to be answered once by `reply` or `refuse`.  `channel` is what the bytes of the socket pass through.

    A cut is survived where the peer can survive it, too, and there is a way to another channel: `redial` gives a
    connected socket, raises OSError when there is none now, and a ByreError when there will be none.  A server has
    `bridges`, which finds the one that has a session: a bridge whose peer goes on with another's session hands its
    channel over to that one, and is nothing from then on (`handed_over`).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        label: str = "",
        secret: bytes | None = None,
        server: Server | None = None,
        channel: Callable[[Owner], Channel] = Channel,
        redial: Callable[[], Awaitable[socket.socket]] | None = None,
        bridges: Callable[[bytes], Bridge | None] | None = None,
    ) -> None:
        super().__init__()
        self.label = label
        self.streams = StreamTable(self)
        self.peer = ""
        #: Where set: says why the channel ended, in the words of whoever knows (the machine).
        self.explain: Callable[[], Awaitable[str]] | None = None
        self.handed_over = False
        self.resume_seconds = RESUME_SECONDS
        self._sock = sock
        self._server = server
        self._make_channel = channel
        self._secret = secret
        self._redial = redial
        self._bridges = bridges
        self._connection = self._new_connection(None)
        self._resting: asyncio.Task[None] | None = None
        self._channel: Channel | None = None
        self._opened: asyncio.Future[None] | None = None
        self._subscribers: dict[tuple[str, Any], Subscriber] = {}
        self._observers: list[Observer] = []
        self._loss: ConnectionLost | None = None
        self._lost = asyncio.Event()
        self._flush_due = False
        self._log = GuestLog(label)

    # -- life ----------------------------------------------------------------------------------------------

    async def open(self, timeout: float) -> None:
        """Shake hands.  Raises `DeadlineExceeded`, `ConnectionLost`, `VersionMismatch` (B46), `ProofRefused`.

        The socket is the bridge's from now on; after an error or a cancellation it is closed.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._connect(self._sock)
        except TimeoutError:
            self._lose(None, "the handshake took too long")
            raise DeadlineExceeded(f"the agent did not answer within {timeout:g} s") from None
        except BaseException:
            self._lose(None, "the handshake failed")
            if self._channel is None:
                self._sock.close()
            raise

    def _new_connection(self, session: Session | None) -> Connection:
        return Connection(
            first=self._server is None,
            name="byre",
            secret=self._secret,
            session=session,
            sessions=self._session_of if self._bridges is not None else None,
            capabilities=frozenset([RESUME] if self._redial or self._bridges else []),
        )

    def _session_of(self, number: bytes) -> Session | None:
        bridge = self._bridges(number) if self._bridges is not None else None
        return bridge.session if bridge is not None else None

    async def _connect(self, sock: socket.socket) -> None:
        """Shake hands over a socket."""
        loop = asyncio.get_running_loop()
        opened = self._opened = loop.create_future()
        channel = self._make_channel(self)
        self.session.max_data = channel.max_data
        with contextlib.suppress(OSError):  # not every kind of socket has it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        await loop.create_connection(lambda: channel, sock=sock)
        self.flush_soon()
        await opened

    async def close(self, reason: str = "the connection was closed here") -> None:
        """End the connection; whatever waits gets `ConnectionLost` with `reason`.  Harmless when repeated."""
        self._flush()  # what was said before goes out before the end
        self._connection.close()
        self._flush()
        self._lose(None, reason)
        if self._channel is not None:
            await self._channel.wait_closed()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_GRACE)

    @property
    def lost(self) -> ConnectionLost | None:
        """A fresh error that says why the connection is lost; None while it is not."""
        if self._loss is None:
            return None
        error = ConnectionLost(self._loss.message, hint=self._loss.hint, **self._loss.data)
        error.__cause__ = self._loss.__cause__
        return error

    async def wait_lost(self) -> ConnectionLost:
        """Wait for the loss of the connection.  Any number of tasks may."""
        await self._lost.wait()
        assert self._loss is not None
        return self._loss

    def fail(self, reason: str) -> None:
        """The machine is known to be gone: everything ends now, with this reason (B42)."""
        self._lose(None, reason)

    # -- events --------------------------------------------------------------------------------------------

    def subscribe(self, name: str, key: Any, subscriber: Subscriber) -> None:
        """Hear of the events `name` about `key` (a process id, a container id), and of the loss."""
        if self._loss is not None:
            subscriber(self._lost_error())
        else:
            self._subscribers[name, key] = subscriber

    def unsubscribe(self, name: str, key: Any) -> None:
        """Harmless when repeated."""
        self._subscribers.pop((name, key), None)

    def observe(self, observer: Observer) -> None:
        """Hear of every event and log line, and of the loss."""
        if self._loss is not None:
            observer(self._lost_error())
        else:
            self._observers.append(observer)

    # -- as a server ---------------------------------------------------------------------------------------

    def reply(self, call: int, result: Result) -> None:
        """Answer a request.  Nobody may be there any longer to hear it."""
        if self._loss is None:
            self.session.reply(call, result)
            self.flush_soon()

    def refuse(self, call: int, error: ByreError) -> None:
        """Answer a request with an error."""
        if self._loss is None:
            self.session.fail(call, error)
            self.flush_soon()

    def tell(self, name: str, fields: Result) -> None:
        """Send an event."""
        if self._loss is None:
            self.session.event(name, fields)
            self.flush_soon()

    def _on_request(self, event: events.RequestReceived | events.CancelReceived) -> None:
        if self._server is not None:
            self._server(event)
        elif isinstance(event, events.RequestReceived):
            self.refuse(event.call, NotSupported("this side answers no requests"))

    # -- the channel's side --------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        return self._connection.session

    def flush_soon(self) -> None:
        """Send what is queued before the loop waits again: what one turn says goes out together."""
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        channel = self._channel
        if channel is None:
            if self._resting is not None and self.session.outbox.choked:
                self._lose(None, "the channel was cut, and too much happened meanwhile")
            return
        while not channel.paused:
            frames = self._connection.data_to_send(channel.room)
            if not frames:
                break
            channel.write(frames)
            self.streams.pump_waiting()

    def channel_made(self, channel: Channel) -> None:
        self._channel = channel

    def channel_writable(self) -> None:
        self.flush_soon()  # not from within asyncio's own writing: a failure there would end the transport twice

    def channel_received(self, data: memoryview) -> None:
        self.heard()
        self._connection.receive_data(data)
        self._dispatch()

    def _dispatch(self) -> None:
        bridge, taken = self, self._connection.take_events()
        if self._bridges is not None and taken and isinstance(taken[0], events.Connected):
            bridge = self._whose(taken[0])
        for event in taken:
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(bridge, event)
        self.flush_soon()

    def channel_lost(self, error: Exception | None) -> None:
        if self._loss is None and self.resumable:
            self._rest()
            return
        if self.explain is not None and self._loss is None:
            self.background(self._lose_explained(self.explain(), error))
            return
        self._connection.receive_eof()
        self._dispatch()
        self._lose(error, "the channel to the guest ended" + (f": {error}" if error else ""))

    async def _lose_explained(self, explanation: Awaitable[str], error: Exception | None) -> None:
        """The channel ended because the machine did, mostly; its own word comes some milliseconds later."""
        reason = "the channel to the guest ended"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXPLAIN_GRACE):
                reason = await explanation
        self._lose(error, reason)

    # -- a cut ---------------------------------------------------------------------------------------------

    @property
    def resumable(self) -> bool:
        """Whether a cut would be survived."""
        return self.session.outbox.keep_for_replay

    def _rest(self) -> None:
        """Without a channel: what is said meanwhile waits in the session."""
        self._channel = None
        if self._resting is None:
            self._opened = asyncio.get_running_loop().create_future()
            self._resting = self.background(self._wait_for_another(self._opened))
        elif self._opened is not None and not self._opened.done():  # in a handshake: the next attempt, then
            self._opened.set_exception(ChannelEnded("the channel ended in the handshake"))
            self._opened.exception()  # perhaps nobody awaits it yet

    async def _wait_for_another(self, opened: asyncio.Future[None]) -> None:
        """Until another channel carries the session on, or it is lost."""
        coming = resumption.until_open(self._attempt) if self._redial else opened
        error = await resumption.why_not(coming, self.explain() if self.explain else None, self.resume_seconds)
        if self._resting is asyncio.current_task():
            self._resting = None
            self._lose(error, error.message if isinstance(error, ByreError) else str(error))

    async def _attempt(self) -> None:
        """Carry the session on over a new channel."""
        assert self._redial is not None, "who asks has it"
        sock = await self._redial()
        self._connection = self._new_connection(self.session)
        try:
            await self._connect(sock)
        except BaseException:
            if self._channel is not None:
                self._channel.abandon()
                self._channel = None
            raise

    def _whose(self, event: events.Connected) -> Bridge:
        """The bridge whose session the peer goes on with: this one, or one that this one hands its channel to."""
        bridge = self._bridges(self.session.id) if event.resumed and self._bridges is not None else None
        if bridge is None or bridge is self:
            return self
        assert self._channel is not None and self._opened is not None, "it is in its handshake"
        if bridge._channel is not None:
            bridge._channel.abandon()  # cut as well, and nobody has noticed
        bridge._channel, self._channel = self._channel, None
        bridge._channel.owner = bridge
        bridge._connection = self._connection
        self.handed_over = True
        self._opened.set_result(None)
        return bridge

    def _lose(self, cause: Exception | None, reason: str) -> None:
        """Publish the loss, once, to everything that waits."""
        if self._loss is not None:
            return
        who = f"VM {self.label}: " if self.label else ""
        hint = "what was under way may or may not have happened"
        self._loss = ConnectionLost(who + reason, hint=hint, reason=reason)
        self._loss.__cause__ = cause
        resting, self._resting = self._resting, None
        if resting is not None:
            resting.cancel()
        if self._channel is not None:
            self._channel.end()
        self._lost.set()
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(self._lost_error())
            self._opened.exception()  # perhaps nobody awaits it
        self.lose_calls(self._lost_error)
        self.streams.lose(self._lost_error)
        observers, self._observers = self._observers, []
        for observer in observers:
            observer(self._lost_error())
        subscribers, self._subscribers = self._subscribers, {}
        for subscriber in subscribers.values():
            subscriber(self._lost_error())

    def _lost_error(self) -> ConnectionLost:
        error = self.lost
        assert error is not None
        return error

    def _on_connected(self, event: events.Connected) -> None:
        self.peer = event.peer
        self._resting = None
        if event.resumed:
            self.repeat_pings()
            self.flush_soon()
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)

    def _on_closed(self, event: events.Closed) -> None:
        error = event.error
        opened = None if isinstance(error, ChannelEnded) else self._opened  # that is a loss like any other
        if error is not None and opened is not None and not opened.done():
            opened.set_exception(error)
        self._flush()
        self._lose(error, str(error) if error else "the guest's agent closed the connection")

    def _on_event(self, event: events.EventReceived) -> None:
        key = event.fields.get(_KEYS.get(event.name, ""))
        subscriber = self._subscribers.get((event.name, key))
        if subscriber is not None:
            subscriber(event.fields)
        for observer in self._observers:
            observer(event)

    def _on_log(self, event: events.LogReceived) -> None:
        for observer in self._observers:
            observer(event)
        self._log.emit(event.source, event.level, event.message, event.dropped)


_HANDLERS: dict[type[events.Event], Callable[[Bridge, Any], None]] = {
    events.Connected: Bridge._on_connected,
    events.Closed: Bridge._on_closed,
    events.RequestReceived: Bridge._on_request,
    events.CancelReceived: Bridge._on_request,
    events.ReplyReceived: Bridge.on_reply,
    events.ErrorReceived: Bridge.on_error,
    events.EventReceived: Bridge._on_event,
    events.LogReceived: Bridge._on_log,
    events.DataReceived: lambda bridge, event: bridge.streams.on_data(event),
    events.EofReceived: lambda bridge, event: bridge.streams.on_eof(event),
    events.ResetReceived: lambda bridge, event: bridge.streams.on_reset(event),
    events.StopReceived: lambda bridge, event: bridge.streams.on_stop(event),
    events.CreditReceived: lambda bridge, event: bridge.streams.on_credit(event),
    events.PongReceived: Bridge.on_pong,
}
