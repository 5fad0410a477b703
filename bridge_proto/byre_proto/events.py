"""What a connection reports to the program that feeds it.  Plain records; one class per thing that can happen."""

from __future__ import annotations

TYPE_CHECKING = False  # no dataclasses either: importing them costs the guest 50 ms under emulation
if TYPE_CHECKING:
    from typing import Any

    from .errors import ByreError


class Event:
    """Root of the records; equality and repr by fields."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in self.__slots__)})"


class Connected(Event):
    """The handshake is complete; requests and streams may start.  `resumed`: with the old session's state."""

    __slots__ = ("capabilities", "peer", "resumed", "version")

    def __init__(self, version: int, peer: str, capabilities: frozenset[str], resumed: bool) -> None:
        self.version = version
        self.peer = peer
        self.capabilities = capabilities
        self.resumed = resumed


class RequestReceived(Event):
    """The peer asks; answer with `reply` or `fail`, exactly once.  `timeout` is in seconds or None."""

    __slots__ = ("arguments", "call", "method", "timeout")

    def __init__(self, call: int, method: str, arguments: dict[str, Any], timeout: float | None) -> None:
        self.call = call
        self.method = method
        self.arguments = arguments
        self.timeout = timeout


class CancelReceived(Event):
    """The peer no longer wants this call; it still waits for the verdict."""

    __slots__ = ("call",)

    def __init__(self, call: int) -> None:
        self.call = call


class ReplyReceived(Event):
    """One of our calls succeeded."""

    __slots__ = ("call", "result")

    def __init__(self, call: int, result: dict[str, Any]) -> None:
        self.call = call
        self.result = result


class ErrorReceived(Event):
    """One of our calls failed."""

    __slots__ = ("call", "error")

    def __init__(self, call: int, error: ByreError) -> None:
        self.call = call
        self.error = error


class EventReceived(Event):
    """Something happened at the peer (a process ended, ...)."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.fields = fields


class LogReceived(Event):
    """A log line of the peer; `dropped` lines before it did not fit its budget."""

    __slots__ = ("dropped", "level", "message", "source")

    def __init__(self, source: str, level: int, message: str, dropped: int) -> None:
        self.source = source
        self.level = level
        self.message = message
        self.dropped = dropped


class DataReceived(Event):
    """Bytes of a stream; tell `consume` once the reader has taken them.

    They may be a view into what `receive_data` was given: whoever keeps them longer than that copies them.
    """

    __slots__ = ("data", "stream")

    def __init__(self, stream: int, data: bytes | memoryview) -> None:
        self.stream = stream
        self.data = data


class EofReceived(Event):
    """The peer will send no more on this stream; it had sent `total` bytes, all of which arrived."""

    __slots__ = ("stream", "total")

    def __init__(self, stream: int, total: int) -> None:
        self.stream = stream
        self.total = total


class ResetReceived(Event):
    """The peer gave up sending on this stream; bytes may be missing."""

    __slots__ = ("reason", "stream")

    def __init__(self, stream: int, reason: int) -> None:
        self.stream = stream
        self.reason = reason


class StopReceived(Event):
    """The peer no longer reads this stream; sending is over (a broken pipe)."""

    __slots__ = ("reason", "stream")

    def __init__(self, stream: int, reason: int) -> None:
        self.stream = stream
        self.reason = reason


class CreditReceived(Event):
    """The stream may be sent more: ask `credit`."""

    __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class PongReceived(Event):
    """The answer to `ping`."""

    __slots__ = ("token",)

    def __init__(self, token: int) -> None:
        self.token = token


class Closed(Event):
    """The connection is over; `error` says whose fault, or is None after a close in good order."""

    __slots__ = ("error",)

    def __init__(self, error: ByreError | None) -> None:
        self.error = error
