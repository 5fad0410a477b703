"""Calls and streams between two peers: all state that outlives one connection.

A `Session` turns what the program wants (`request`, `send`, ...) into queued frames and the peer's frames into
events.  It never sees bytes or a handshake: those are `connection.Connection`'s.

Order of sending: control frames first, then logs and stream data in turn, one frame of each stream per round.
So control waits for at most one DATA frame, and no stream starves another.

What is checked of a peer's frame, the state it needs, and what else may be true of it:

    frame     needs                             otherwise
    REQUEST   id above all before it            RemoteProtocolError
    REPLY     a call of ours in progress        dropped (late, after its deadline)
    CANCEL    a call of theirs in progress      dropped (it crossed the reply)
    DATA      credit, direction open            dropped on a stream closed here; else RemoteProtocolError
    EOF       direction open, total = received  dropped / RemoteProtocolError
    WINDOW    direction open                    dropped; RemoteProtocolError over MAX_WINDOW
"""

from __future__ import annotations

from collections import deque

import msgpack

from . import events, frames, limits, messages
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
from .replay import Replay
from .streams import REASON_CLOSED, REASON_NONE, Stream
from .windows import WindowPool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


def pack(value: object) -> bytes:
    """msgpack of a control payload.  Raises `LocalProtocolError` for what msgpack cannot carry."""
    try:
        return bytes(msgpack.packb(value, use_bin_type=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot be encoded: {error}") from error


def unpack(payload: bytes) -> Any:
    """The value of a control payload, decoded within the limits.  Raises `RemoteProtocolError`."""
    try:
        return msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_array_len=limits.MAX_ELEMENTS,
            max_map_len=limits.MAX_ELEMENTS,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises whatever its C code does; all of it means the same
        raise RemoteProtocolError(f"malformed message: {printable(str(error))[:200]}") from error


def unpack_fields(payload: bytes, *kinds: type | tuple[type, ...]) -> list[Any]:
    """The fields of a control payload that is a list of just these kinds.  Raises `RemoteProtocolError`."""
    value = unpack(payload)
    if not isinstance(value, list) or len(value) != len(kinds):
        raise RemoteProtocolError(f"a message of {len(kinds)} fields was expected")
    for field, kind in zip(value, kinds):
        if not isinstance(field, kind) or (isinstance(field, bool) and kind is int):
            raise RemoteProtocolError(f"a {type(field).__name__} stands where {kind} was expected")
    return value


class Session:
    """See the module's text.  `first` is True on the side that opened the connection (it has the odd ids)."""

    def __init__(self, *, first: bool) -> None:
        self.first = first
        self.id = b""  # set by the handshake
        self.events: deque[events.Event] = deque()
        self.streams: dict[int, Stream] = {}
        self.received = 0  # numbered frames taken in
        self.replay = Replay()
        self.keep_for_replay = False
        self._pool = WindowPool()
        self._next_stream = 1 if first else 2
        self._next_call = 1
        self._last_remote_call = 0
        self._calls: dict[int, str] = {}  # ours, in progress: id -> method
        self._remote_calls: set[int] = set()
        self._control: deque[bytes] = deque()
        self._control_bytes = 0
        self._logs: deque[bytes] = deque()
        self._log_bytes = 0
        self._logs_dropped = 0
        self._ready: deque[Stream] = deque()  # streams with pending frames, each once
        self._data_bytes = 0
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

        Raises `InvalidRequest` (fields), `RequestTooLarge`, `ResourceExhausted` (the peer does not read): in each
        case nothing was sent (B45).
        """
        arguments = messages.check_arguments(method, arguments)
        milliseconds = None if timeout is None else max(0, round(timeout * 1000))
        payload = pack([self._next_call, method, arguments, milliseconds])
        if len(payload) > limits.MAX_CONTROL:
            raise RequestTooLarge(
                f"the {method} request has {len(payload)} bytes; {limits.MAX_CONTROL} is the most",
                hint="make its arguments or environment smaller",
            )
        if self._control_bytes + len(payload) > limits.MAX_CONTROL_BACKLOG:
            raise ResourceExhausted("the peer does not read its requests", hint="wait for earlier calls")
        call = self._next_call
        self._next_call += 1
        self._calls[call] = method
        self._queue_control(frames.encode(frames.REQUEST, 0, payload))
        return call

    def cancel(self, call: int) -> None:
        """Say that the call's result is no longer wanted; its verdict still arrives."""
        if call in self._calls:
            self._queue_control(frames.encode_integer(frames.CANCEL, 0, call))

    def forget(self, call: int) -> None:
        """Stop waiting for a call whose deadline has passed; its late reply is dropped (B44)."""
        self._calls.pop(call, None)

    def reply(self, call: int, result: dict[str, Any]) -> None:
        """Answer a RequestReceived.  An answer over the limit becomes the error too-large."""
        if call not in self._remote_calls:
            raise LocalProtocolError(f"call {call} is not in progress")
        payload = pack([call, result])
        if len(payload) > limits.MAX_CONTROL:
            self.fail(call, RequestTooLarge(f"the answer has {len(payload)} bytes"))
            return
        self._remote_calls.discard(call)
        self._queue_control(frames.encode(frames.REPLY, 0, payload))

    def fail(self, call: int, error: ByreError) -> None:
        """Answer a RequestReceived with an error."""
        if call not in self._remote_calls:
            raise LocalProtocolError(f"call {call} is not in progress")
        self._remote_calls.discard(call)
        code, message, hint, data = to_wire(error)
        try:
            frame = frames.encode(frames.ERROR, 0, pack([call, code, message, hint, data]))
        except LocalProtocolError:  # evidence that cannot be carried must not cost the answer
            frame = frames.encode(frames.ERROR, 0, pack([call, code, message, hint, {}]))
        self._queue_control(frame)

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Tell the peer that something happened.  Never dropped."""
        self._queue_control(frames.encode(frames.EVENT, 0, pack([name, messages.check_event(name, fields)])))

    def log(self, source: str, level: int, message: str) -> bool:
        """Offer a log line; False when it did not fit the log's budget and was counted instead (B50)."""
        payload = pack([source, level, message[: limits.MAX_DATA // 8], self._logs_dropped])
        if self._log_bytes + len(payload) > limits.MAX_LOG_BACKLOG:
            self._logs_dropped += 1
            return False
        self._logs_dropped = 0
        frame = frames.encode(frames.LOG, 0, payload)
        self._logs.append(frame)
        self._log_bytes += len(frame)
        return True

    def ping(self, token: int) -> None:
        """Ask for a sign of life; PongReceived has the same token."""
        self._queue_control(frames.encode_integer(frames.PING, 0, token))

    # -- streams -------------------------------------------------------------------------------------------

    def new_stream(self, *, sending: bool, receiving: bool) -> int:
        """Open a stream and name it in a request.  Raises `ResourceExhausted` past MAX_STREAMS."""
        number = self._next_stream
        self._open(number, sending=sending, receiving=receiving)
        self._next_stream += 2
        return number

    def accept_stream(self, number: int, *, sending: bool, receiving: bool) -> None:
        """Open the stream that a peer's request names.  Raises `InvalidRequest`, `ResourceExhausted`."""
        if number in self.streams or number < 1 or (number % 2 == 1) == self.first:
            raise InvalidRequest(f"stream {number} is not one that this request may name")
        self._open(number, sending=sending, receiving=receiving)

    def _open(self, number: int, *, sending: bool, receiving: bool) -> None:
        if len(self.streams) >= limits.MAX_STREAMS:
            raise ResourceExhausted(
                f"{limits.MAX_STREAMS} streams are open", hint="close the processes that are no longer needed"
            )
        self.streams[number] = Stream(number, self._pool, sending=sending, receiving=receiving)

    def credit(self, number: int) -> int:
        """Bytes that may be sent on the stream now: 0 until CreditReceived, -1 once it can send no more."""
        stream = self.streams.get(number)
        return stream.send_window.credit if stream is not None and stream.sending else -1

    def send(self, number: int, data: bytes) -> None:
        """Queue stream data, within `credit`."""
        stream = self._sending(number)
        stream.send_window.spend(len(data))
        stream.sent += len(data)
        if len(data) <= limits.MAX_DATA:
            self._queue_stream(stream, frames.encode(frames.DATA, number, data))
            return
        for start in range(0, len(data), limits.MAX_DATA):
            self._queue_stream(stream, frames.encode(frames.DATA, number, data[start : start + limits.MAX_DATA]))

    def send_eof(self, number: int) -> int:
        """End our direction of the stream in good order; returns the bytes that were sent in all."""
        stream = self._sending(number)
        self._queue_stream(stream, frames.encode_integer(frames.EOF, number, stream.sent))
        stream.sending = False
        return stream.sent

    def reset(self, number: int, reason: int = REASON_CLOSED) -> None:
        """Give up sending: what is queued is thrown away.  Harmless on a stream that no longer sends."""
        stream = self.streams.get(number)
        if stream is not None and stream.sending:
            self._drop_pending(stream)
            stream.sending = False
            self._queue_control(frames.encode_integer(frames.RESET, number, reason))
            self._forget_if_done(stream)

    def stop(self, number: int, reason: int = REASON_NONE) -> None:
        """Read no more: the peer's writer gets a broken pipe (B4).  Harmless when repeated or after the end."""
        stream = self.streams.get(number)
        if stream is None:
            return
        stream.consumed = stream.received
        if stream.receiving:
            stream.receiving = False
            self._queue_control(frames.encode_integer(frames.STOP, number, reason))
        self._forget_if_done(stream)

    def consume(self, number: int, amount: int) -> None:
        """The reader took `amount` bytes of the stream; gives the sender its credit back."""
        stream = self.streams.get(number)
        if stream is None:
            return
        stream.consumed += amount
        if stream.consumed > stream.received:
            raise LocalProtocolError(f"stream {number}: more is consumed than was received")
        if not stream.receiving:
            self._forget_if_done(stream)
            return
        credit = stream.receive_window.consumed(amount)
        if credit:
            self._queue_control(frames.encode_integer(frames.WINDOW, number, credit))

    def _sending(self, number: int) -> Stream:
        stream = self.streams.get(number)
        if stream is None or not stream.sending:
            raise LocalProtocolError(f"stream {number} is not open for sending")
        return stream

    def _drop_pending(self, stream: Stream) -> None:
        self._data_bytes -= sum(map(len, stream.pending))
        stream.pending.clear()

    def _forget_if_done(self, stream: Stream) -> None:
        if not stream.receiving and stream.consumed == stream.received:
            stream.receive_window.close()
        if stream.done:
            self.streams.pop(stream.id, None)

    # -- what goes out -------------------------------------------------------------------------------------

    @property
    def data_backlog(self) -> int:
        """Bytes of stream data that wait to be sent: a producer pauses while this is large."""
        return self._data_bytes

    @property
    def pending(self) -> bool:
        """Whether `next_frame` has something."""
        return bool(self._control or self._logs or self._ready)

    def next_frame(self) -> bytes | None:
        """The next frame to send, or None.  Taking it counts as sending it."""
        if self._control:
            frame = self._control.popleft()
            self._control_bytes -= len(frame)
        elif self._logs and (not self._ready or self._log_turn()):
            frame = self._logs.popleft()
            self._log_bytes -= len(frame)
        else:
            data = self._next_data()
            if data is None:
                return None
            frame = data
        if self.keep_for_replay and frame[4] in frames.REPLAYED:
            self.replay.add(frame)
        return frame

    _turn = False

    def _log_turn(self) -> bool:
        self._turn = not self._turn
        return self._turn

    def _next_data(self) -> bytes | None:
        while self._ready:
            stream = self._ready.popleft()
            if stream.pending:
                frame = stream.pending.popleft()
                self._data_bytes -= len(frame)
                if stream.pending:
                    self._ready.append(stream)
                else:
                    self._forget_if_done(stream)
                return frame
        return None

    def _queue_control(self, frame: bytes) -> None:
        self._control.append(frame)
        self._control_bytes += len(frame)

    def _queue_stream(self, stream: Stream, frame: bytes) -> None:
        if not stream.pending and stream not in self._ready:
            self._ready.append(stream)
        stream.pending.append(frame)
        self._data_bytes += len(frame)

    # -- what comes in -------------------------------------------------------------------------------------

    def receive_frame(self, kind: int, stream: int, payload: bytes) -> None:
        """Take in one frame; adds to `events`.  Raises `RemoteProtocolError`: then the connection is over."""
        handler = self._handlers.get(kind)
        if handler is None:
            raise RemoteProtocolError(f"{frames.TYPES[kind][0]} has no place here")
        handler(stream, payload)
        if kind in frames.REPLAYED:
            self._count_received(len(payload))
        if self._control_bytes > limits.MAX_CONTROL_BACKLOG:
            raise RemoteProtocolError("the peer asks without reading the answers")

    def _count_received(self, size: int) -> None:
        self.received += 1
        if not self.keep_for_replay:
            return
        self._unacknowledged_frames += 1
        self._unacknowledged_bytes += size
        if self._unacknowledged_frames >= limits.ACK_FRAMES or self._unacknowledged_bytes >= limits.ACK_BYTES:
            self._unacknowledged_frames = self._unacknowledged_bytes = 0
            self._queue_control(frames.encode_integer(frames.ACK, 0, self.received))

    def _on_request(self, _stream: int, payload: bytes) -> None:
        call, method, arguments, milliseconds = unpack_fields(payload, int, str, dict, (int, type(None)))
        if not self._last_remote_call < call < 1 << 32:
            raise RemoteProtocolError(f"call {call} is not above {self._last_remote_call}")
        self._last_remote_call = call
        self._remote_calls.add(call)
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
        method = self._calls.pop(call, None)
        if method is None:
            return
        try:
            result = messages.check_result(method, result)
        except ByreError as error:
            raise RemoteProtocolError(f"the answer to {method}: {error.message}") from error
        self.events.append(events.ReplyReceived(call, result))

    def _on_error(self, _stream: int, payload: bytes) -> None:
        call, code, message, hint, data = unpack_fields(payload, int, str, str, str, dict)
        if self._calls.pop(call, None) is not None:
            self.events.append(events.ErrorReceived(call, from_wire(code, message, hint, data)))

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
        self.events.append(events.LogReceived(printable(source), level, printable(message), dropped))

    def _on_data(self, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is None or not stream.receiving:
            return
        if not payload:
            raise RemoteProtocolError("a DATA frame without data")
        stream.receive_window.received(len(payload))
        stream.received += len(payload)
        self.events.append(events.DataReceived(number, payload))

    def _on_eof(self, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is None or not stream.receiving:
            return
        total = int.from_bytes(payload, "big")
        if total != stream.received:
            raise RemoteProtocolError(f"stream {number} ends after {total} bytes, {stream.received} arrived")
        stream.receiving = False
        self.events.append(events.EofReceived(number, total))
        self._forget_if_done(stream)

    def _on_reset(self, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and stream.receiving:
            stream.receiving = False
            self.events.append(events.ResetReceived(number, int.from_bytes(payload, "big")))
            self._forget_if_done(stream)

    def _on_stop(self, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and stream.sending:
            self._drop_pending(stream)
            stream.sending = False
            self.events.append(events.StopReceived(number, int.from_bytes(payload, "big")))
            self._forget_if_done(stream)

    def _on_window(self, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and stream.sending:
            stream.send_window.granted(int.from_bytes(payload, "big"))
            self.events.append(events.CreditReceived(number))

    def _on_ping(self, _stream: int, payload: bytes) -> None:
        self._queue_control(frames.encode(frames.PONG, 0, payload))

    def _on_pong(self, _stream: int, payload: bytes) -> None:
        self.events.append(events.PongReceived(int.from_bytes(payload, "big")))

    def _on_ack(self, _stream: int, payload: bytes) -> None:
        self.replay.acknowledged(int.from_bytes(payload, "big"))

    # -- another connection --------------------------------------------------------------------------------

    def resume(self, received_by_peer: int) -> Iterable[bytes] | None:
        """What to send again on a new connection; None when the session cannot go on."""
        return self.replay.resume(received_by_peer) if self.keep_for_replay else None
