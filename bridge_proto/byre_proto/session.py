"""Calls and streams between two peers: all state that outlives one connection.

A `Session` turns what the program wants (`request`, `send`, ...) into queued frames and the peer's frames into
events.  It never sees bytes or a handshake: those are `connection.Connection`'s.  Order and budgets of what is
sent: `outbox.Outbox`.

What is checked of a peer's frame, the state it needs, and what happens otherwise:

    frame     needs                               otherwise
    REQUEST   id above all before it              RemoteProtocolError
    REPLY     a call of ours in progress          dropped (late, after its deadline)
    CANCEL    a call of theirs in progress        dropped (it crossed the reply)
    DATA      direction open; credit, not empty   dropped; RemoteProtocolError
    EOF       direction open; total = received    dropped; RemoteProtocolError
    RESET     direction open                      dropped
    STOP      direction open                      dropped (it crossed the end)
    WINDOW    direction open; <= MAX_WINDOW       dropped; RemoteProtocolError
    any of the last five on a stream of ours that was never opened: RemoteProtocolError

A stream is opened by the side whose request names it, and accepted by the other while it handles the request.
Until the answer the opener holds back what it sends on the stream, for the peer would not know it; an ERROR ends
the stream on the opener's side without a frame.
"""

from __future__ import annotations

from . import events, frames, limits, messages
from .deques import deque
from .encoding import pack, unpack_fields
from .errors import (
    ByreError,
    InvalidRequest,
    NotSupported,
    RequestTooLarge,
    ResourceExhausted,
    from_wire,
    printable,
    to_wire,
)
from .frames import LocalProtocolError, RemoteProtocolError
from .outbox import Outbox
from .streams import REASON_CLOSED, REASON_NONE, Stream
from .windows import WindowPool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Call:
    """One of our calls in progress.  `wanted` is False once its deadline has passed here."""

    __slots__ = ("method", "streams", "wanted")

    def __init__(self, method: str, streams: list[Stream]) -> None:
        self.method = method
        self.streams = streams  # opened by it, held until its answer
        self.wanted = True


class Session:
    """See the module's text.  `first` is True on the side that opened the connection (it has the odd ids)."""

    def __init__(self, *, first: bool) -> None:
        self.first = first
        self.id = b""  # chosen by the first side, adopted by the second
        self.begun = False  # a connection has carried it
        self.carrier = b""  # the nonce of the connection that carries it now
        self.events: deque[events.Event] = deque()
        self.streams: dict[int, Stream] = {}
        self.received = 0  # numbered frames taken in
        self.max_data = limits.MAX_DATA  # of a DATA frame that this side sends; less where the channel is slow
        self.outbox = Outbox(self._forget_if_done)
        self._pool = WindowPool()
        self._next_stream = 1 if first else 2
        self._next_call = 1
        self._last_remote_call = 0
        self._calls: dict[int, _Call] = {}  # ours, in progress
        self._remote_calls: dict[int, str] = {}  # theirs: id -> method
        self._unacknowledged_frames = 0
        self._unacknowledged_bytes = 0
        self._handlers = {
            frames.REQUEST: self._on_request,
            frames.REPLY: self._on_reply,
            frames.ERROR: self._on_error,
            frames.CANCEL: self._on_cancel,
            frames.EVENT: self._on_event,
            frames.LOG: self._on_log,
            frames.DATA: self._on_data,
            frames.EOF: self._on_eof,
            frames.RESET: self._on_reset,
            frames.STOP: self._on_stop,
            frames.WINDOW: self._on_window,
            frames.PING: self._on_ping,
            frames.PONG: self._on_pong,
            frames.ACK: self._on_ack,
        }

    # -- calls ---------------------------------------------------------------------------------------------

    def request(self, method: str, arguments: dict[str, Any], timeout: float | None = None) -> int:
        """Ask the peer; returns the call's id.  Next, await ReplyReceived or ErrorReceived with that id.

        Streams that the arguments name carry nothing until then.  Raises `InvalidRequest` (fields),
        `LocalProtocolError` (cannot be encoded), `RequestTooLarge`, `ResourceExhausted` (too many calls, or the
        peer does not read): in each case nothing was sent (B45).
        """
        messages.check_arguments(method, arguments, strict=True)
        milliseconds = None if timeout is None else max(0, round(timeout * 1000))
        call = self._next_call
        payload = pack([call, method, arguments, milliseconds])
        if len(payload) > limits.MAX_CONTROL:
            raise RequestTooLarge(
                f"the {method} request has {len(payload)} bytes; {limits.MAX_CONTROL} is the most",
                hint="make its arguments or environment smaller",
            )
        if len(self._calls) >= limits.MAX_CALLS:
            raise ResourceExhausted(f"{limits.MAX_CALLS} calls are in progress", hint="wait for earlier calls")
        if self.outbox.control_bytes + len(payload) + limits.FRAME_OVERHEAD > limits.MAX_CONTROL_BACKLOG:
            raise ResourceExhausted("the peer does not read its requests", hint="wait for earlier calls")
        self._next_call += 1
        self._calls[call] = _Call(method, self._hold(messages.streams_named(arguments)))
        self.outbox.control(frames.encode(frames.REQUEST, 0, payload))
        return call

    def cancel(self, call: int) -> None:
        """Say that the call's result is no longer wanted; its verdict still arrives."""
        if call in self._calls:
            self.outbox.control(frames.encode_integer(frames.CANCEL, 0, call))

    def forget(self, call: int) -> None:
        """Stop waiting for a call whose deadline has passed; its late reply is dropped (B44)."""
        waiting = self._calls.get(call)
        if waiting is not None:
            waiting.wanted = False
            if not waiting.streams:
                del self._calls[call]

    def reply(self, call: int, result: dict[str, Any]) -> None:
        """Answer a RequestReceived.

        A result that cannot be sent (over the limit, not what its method gives, not encodable) becomes an error:
        whatever this side does wrong, the caller gets a verdict.
        """
        method = self._remote_calls.get(call)
        if method is None:
            raise LocalProtocolError(f"call {call} is not in progress")
        try:
            messages.check_result(method, result, strict=True)
            payload = pack([call, result])
        except ByreError as error:
            self.fail(call, ByreError(f"the answer to {method} is wrong: {error.message}", hint="this is a bug"))
            return
        if len(payload) > limits.MAX_CONTROL:
            self.fail(call, RequestTooLarge(f"the answer to {method} has {len(payload)} bytes"))
            return
        del self._remote_calls[call]
        self.outbox.control(frames.encode(frames.REPLY, 0, payload))

    def fail(self, call: int, error: ByreError) -> None:
        """Answer a RequestReceived with an error.  Streams that were accepted for it are the caller's to end."""
        if call not in self._remote_calls:
            raise LocalProtocolError(f"call {call} is not in progress")
        code, message, hint, data = to_wire(error)
        try:
            frame = frames.encode(frames.ERROR, 0, pack([call, code, message, hint, data]))
        except LocalProtocolError:  # evidence that cannot be carried must not cost the answer
            frame = frames.encode(frames.ERROR, 0, pack([call, code, message, hint, {}]))
        del self._remote_calls[call]
        self.outbox.control(frame)

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Tell the peer that something happened.  Never dropped."""
        messages.check_event(name, fields, strict=True)
        self.outbox.control(frames.encode(frames.EVENT, 0, pack([name, fields])))

    def log(self, source: str, level: int, message: str) -> bool:
        """Offer a log message, sent line by line; False when a line did not fit the log's budget (B50)."""
        fitted = [self.outbox.log(source, level, line) for line in message.split("\n")]
        return all(fitted)

    def ping(self, token: int) -> None:
        """Ask for a sign of life; PongReceived has the same token."""
        self.outbox.control(frames.encode_integer(frames.PING, 0, token))

    # -- streams -------------------------------------------------------------------------------------------

    def new_stream(self, *, sending: bool, receiving: bool) -> int:
        """Open a stream and name it in a request.  Raises `ResourceExhausted` past MAX_STREAMS."""
        number = self._next_stream
        if number > limits.MAX_STREAM_ID:
            raise ResourceExhausted("all stream ids of this session are used", hint="connect anew")
        self._open(number, sending=sending, receiving=receiving)
        self._next_stream += 2
        return number

    def accept_stream(self, number: int, *, sending: bool, receiving: bool) -> None:
        """Open the stream that a peer's request names.  Raises `InvalidRequest`, `ResourceExhausted`."""
        if number in self.streams or not 0 < number <= limits.MAX_STREAM_ID or self._is_ours(number):
            raise InvalidRequest(f"stream {number} is not one that this request may name")
        self._open(number, sending=sending, receiving=receiving)

    def _is_ours(self, number: int) -> bool:
        return (number % 2 == 1) == self.first

    def _open(self, number: int, *, sending: bool, receiving: bool) -> None:
        if len(self.streams) >= limits.MAX_STREAMS:
            raise ResourceExhausted(
                f"{limits.MAX_STREAMS} streams are open", hint="close the processes that are no longer needed"
            )
        self.streams[number] = Stream(number, self._pool, sending=sending, receiving=receiving)

    def _hold(self, numbers: list[int]) -> list[Stream]:
        """Keep back what is sent on these streams, until `_release`."""
        held = [self.streams[n] for n in numbers if n in self.streams and self._is_ours(n)]
        for stream in held:
            stream.held = []
        return held

    def _release(self, held: list[Stream], *, accepted: bool) -> None:
        for stream in held:
            if stream.held is None:
                continue  # named twice
            if not accepted:
                self.outbox.drop(stream)
                stream.sending = stream.receiving = False
                stream.consumed = stream.received
            self.outbox.release(stream, accepted=accepted)
            if stream.sending:
                self.events.append(events.CreditReceived(stream.id))
            self._forget_if_done(stream)

    def credit(self, number: int) -> int:
        """Bytes that may be sent on the stream now: 0 until CreditReceived, -1 once it can send no more."""
        stream = self.streams.get(number)
        if stream is None or not stream.sending:
            return -1
        return stream.send_window.credit if stream.held is None else 0

    def send(self, number: int, data: bytes) -> None:
        """Queue stream data, within `credit`.  A large `bytes` object is not copied."""
        stream = self.streams.get(number)
        if stream is None or not stream.sending:
            raise LocalProtocolError(f"stream {number} is not open for sending")
        if not data:
            return
        if len(data) > stream.send_window.credit:
            raise LocalProtocolError(
                f"stream {number}: {len(data)} bytes with credit for {stream.send_window.credit}"
            )
        data = bytes(data)  # no copy of bytes; whatever else it is may change before it is sent
        stream.send_window.spend(len(data))
        stream.sent += len(data)
        if len(data) <= self.max_data:
            self.outbox.data(stream, frames.encode_data(number, data))
            return
        for start in range(0, len(data), self.max_data):
            self.outbox.data(stream, frames.encode_data(number, data[start : start + self.max_data]))

    def send_header(self, number: int, size: int) -> bytes:
        """The header of a DATA frame whose `size` bytes the caller itself gives to the channel, right behind it.

        Only while nothing is `pending` (else it would overtake) and nothing is kept for a resumed session, and
        within `credit` and MAX_DATA.
        """
        stream = self.streams.get(number)
        if stream is None or not stream.sending:
            raise LocalProtocolError(f"stream {number} is not open for sending")
        if self.outbox.pending or self.outbox.keep_for_replay:
            raise LocalProtocolError(f"stream {number}: data cannot be sent past the queue")
        if not 0 < size <= min(stream.send_window.credit, limits.MAX_DATA):
            raise LocalProtocolError(f"stream {number}: {size} bytes with credit for {stream.send_window.credit}")
        stream.send_window.spend(size)
        stream.sent += size
        return frames.HEADER.pack(size, frames.DATA, 0, 0, number)

    def send_eof(self, number: int) -> int:
        """End our direction in good order; returns the bytes that were sent in all, -1 when it had ended."""
        stream = self.streams.get(number)
        if stream is None or not stream.sending:
            return -1
        stream.sending = False
        self.outbox.data(stream, (frames.encode_integer(frames.EOF, number, stream.sent),))
        return stream.sent

    def reset(self, number: int, reason: int = REASON_CLOSED) -> None:
        """Give up sending: what is queued is thrown away.  Harmless on a stream that no longer sends."""
        stream = self.streams.get(number)
        if stream is not None and (stream.sending or stream.pending):
            self.outbox.drop(stream)
            stream.sending = False
            self.outbox.stream_control(stream, frames.encode_integer(frames.RESET, number, reason))
            self._forget_if_done(stream)

    def stop(self, number: int, reason: int = REASON_NONE) -> None:
        """Read no more: the peer's writer gets a broken pipe (B4).  Harmless when repeated or after the end."""
        stream = self.streams.get(number)
        if stream is None:
            return
        stream.consumed = stream.received
        if stream.receiving:
            stream.receiving = False
            self.outbox.stream_control(stream, frames.encode_integer(frames.STOP, number, reason))
        self._forget_if_done(stream)

    def consume(self, number: int, amount: int) -> None:
        """The reader took `amount` bytes; gives the sender its credit back.  Harmless once nothing is unread."""
        stream = self.streams.get(number)
        if stream is None or (not stream.receiving and stream.consumed == stream.received):
            return
        stream.consumed += amount
        if stream.consumed > stream.received:
            raise LocalProtocolError(f"stream {number}: more is consumed than was received")
        if not stream.receiving:
            self._forget_if_done(stream)
            return
        credit = stream.receive_window.consumed(amount)
        if credit:
            self.outbox.control(frames.encode_integer(frames.WINDOW, number, credit))

    def _forget_if_done(self, stream: Stream) -> None:
        if not stream.receiving and stream.consumed == stream.received:
            stream.receive_window.close()
        if stream.done:
            self.streams.pop(stream.id, None)

    # -- what goes out -------------------------------------------------------------------------------------

    @property
    def data_backlog(self) -> int:
        """Bytes of stream data that wait to be sent: a producer pauses while this is large."""
        return self.outbox.data_bytes

    @property
    def pending(self) -> bool:
        """Whether the connection has something of this session to send."""
        return self.outbox.pending

    # -- what comes in -------------------------------------------------------------------------------------

    def receive_frame(self, kind: int, stream: int, payload: Any) -> None:
        """Take in one frame; adds to `events`.  Raises `RemoteProtocolError`: then the connection is over."""
        handler = self._handlers.get(kind)
        if handler is None:
            raise RemoteProtocolError(f"{frames.TYPES[kind][0]} has no place here")
        handler(stream, payload)
        if kind in frames.REPLAYED:
            self.received += 1
            if self.outbox.keep_for_replay:
                self._acknowledge(len(payload))

    def _acknowledge(self, size: int) -> None:
        self._unacknowledged_frames += 1
        self._unacknowledged_bytes += size
        if self._unacknowledged_frames >= limits.ACK_FRAMES or self._unacknowledged_bytes >= limits.ACK_BYTES:
            self._unacknowledged_frames = self._unacknowledged_bytes = 0
            self.outbox.control(frames.encode_integer(frames.ACK, 0, self.received))

    def _on_request(self, _stream: int, payload: bytes) -> None:
        call, method, arguments, milliseconds = unpack_fields(payload, int, str, dict, None)
        if not self._last_remote_call < call <= limits.MAX_CALL_ID:
            raise RemoteProtocolError(f"call {call} is not above {self._last_remote_call}")
        self._last_remote_call = call
        self._remote_calls[call] = method
        try:
            if len(self._remote_calls) > limits.MAX_CALLS:
                raise ResourceExhausted(f"{limits.MAX_CALLS} calls are in progress")
            arguments = messages.check_arguments(method, arguments)
        except ByreError as error:
            self.fail(call, error)
            return
        timeout = None if milliseconds is None else max(0, milliseconds) / 1000
        self.events.append(events.RequestReceived(call, method, arguments, timeout))

    def _on_reply(self, _stream: int, payload: bytes) -> None:
        call, result = unpack_fields(payload, int, dict)
        waiting = self._calls.pop(call, None)
        if waiting is None:
            return
        if waiting.wanted:
            try:
                result = messages.check_result(waiting.method, result)
            except ByreError as error:
                raise RemoteProtocolError(f"the answer to {waiting.method}: {error.message}") from error
            self.events.append(events.ReplyReceived(call, result))
        self._release(waiting.streams, accepted=True)

    def _on_error(self, _stream: int, payload: bytes) -> None:
        call, code, message, hint, data = unpack_fields(payload, int, str, str, str, dict)
        waiting = self._calls.pop(call, None)
        if waiting is None:
            return
        if waiting.wanted:
            self.events.append(events.ErrorReceived(call, from_wire(code, message, hint, data)))
        self._release(waiting.streams, accepted=False)

    def _on_cancel(self, _stream: int, payload: bytes) -> None:
        call = int.from_bytes(payload, "big")
        if call in self._remote_calls:
            self.events.append(events.CancelReceived(call))

    def _on_event(self, _stream: int, payload: bytes) -> None:
        name, fields = unpack_fields(payload, str, dict)
        try:
            fields = messages.check_event(name, fields)
        except NotSupported:
            return  # from a newer peer: not for us
        except ByreError as error:
            raise RemoteProtocolError(f"the event {printable(name)}: {error.message}") from error
        self.events.append(events.EventReceived(name, fields))

    def _on_log(self, _stream: int, payload: bytes) -> None:
        source, level, message, dropped = unpack_fields(payload, str, int, str, int)
        if not 0 <= level <= limits.MAX_LOG_LEVEL or dropped < 0:
            raise RemoteProtocolError(f"a LOG frame of level {level} after {dropped} dropped ones")
        line = printable(message).replace("\n", "\\n")  # one line stays one line: nothing forges another
        self.events.append(events.LogReceived(printable(source).replace("\n", "\\n"), level, line, dropped))

    def _stream(self, number: int) -> Stream | None:
        """The stream of a peer's frame, None when it has ended here.  Raises `RemoteProtocolError`."""
        stream = self.streams.get(number)
        if stream is None and number >= self._next_stream and self._is_ours(number):
            raise RemoteProtocolError(f"stream {number} was never opened")
        return stream

    def _on_data(self, number: int, payload: bytes | memoryview) -> None:
        stream = self.streams.get(number) or self._stream(number)
        if stream is None or not stream.receiving:
            return
        if not payload:
            raise RemoteProtocolError("a DATA frame without data")
        stream.receive_window.received(len(payload))
        stream.received += len(payload)
        self.events.append(events.DataReceived(number, payload))

    def _on_eof(self, number: int, payload: bytes) -> None:
        stream = self._stream(number)
        if stream is None or not stream.receiving:
            return
        total = int.from_bytes(payload, "big")
        if total != stream.received:
            raise RemoteProtocolError(f"stream {number} ends after {total} bytes, {stream.received} arrived")
        stream.receiving = False
        self.events.append(events.EofReceived(number, total))
        self._forget_if_done(stream)

    def _on_reset(self, number: int, payload: bytes) -> None:
        stream = self._stream(number)
        if stream is not None and stream.receiving:
            stream.receiving = False
            self.events.append(events.ResetReceived(number, int.from_bytes(payload, "big")))
            self._forget_if_done(stream)

    def _on_stop(self, number: int, payload: bytes) -> None:
        stream = self._stream(number)
        if stream is None:
            return
        self.outbox.drop(stream)
        if stream.sending:
            stream.sending = False
            self.events.append(events.StopReceived(number, int.from_bytes(payload, "big")))
        self._forget_if_done(stream)

    def _on_window(self, number: int, payload: bytes) -> None:
        stream = self._stream(number)
        if stream is not None and stream.sending:
            stream.send_window.granted(int.from_bytes(payload, "big"))
            self.events.append(events.CreditReceived(number))

    def _on_ping(self, _stream: int, payload: bytes) -> None:
        self.outbox.control(frames.encode(frames.PONG, 0, payload))

    def _on_pong(self, _stream: int, payload: bytes) -> None:
        self.events.append(events.PongReceived(int.from_bytes(payload, "big")))

    def _on_ack(self, _stream: int, payload: bytes) -> None:
        self.outbox.replay.acknowledged(int.from_bytes(payload, "big"))
