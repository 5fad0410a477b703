"""What waits to be sent, and in which order.

Control frames first, then logs and stream data in turn, one frame of each stream per round: control never waits
behind bulk data in here, and no stream starves another.  A frame is a tuple of buffers.  Each kind has a budget:
control over its own makes the outbox `choked` (the connection is closed), logs are dropped and counted, data is
bounded by the peer's credit.
"""

from __future__ import annotations

from . import frames, limits
from .deques import deque
from .encoding import pack, text
from .replay import Replay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .streams import Stream


class Outbox:
    """The queues of one session; `sent_last(stream)` is called when a stream's last queued frame was taken."""

    def __init__(self, sent_last: Callable[[Stream], None]) -> None:
        self.replay = Replay()
        self.keep_for_replay = False
        self.choked = False
        self.control_bytes = 0
        self.data_bytes = 0
        self._sent_last = sent_last
        self._control: deque[bytes] = deque()
        self._logs: deque[bytes] = deque()
        self._log_bytes = 0
        self._logs_dropped = 0
        self._log_turn = False
        self._ready: deque[Stream] = deque()  # streams with pending frames that are not held, each once

    @property
    def pending(self) -> bool:
        return bool(self._control or self._logs or self._ready)

    def control(self, frame: bytes) -> None:
        """Queue a control frame."""
        self._control.append(frame)
        self.control_bytes += len(frame) + limits.FRAME_OVERHEAD
        if self.control_bytes > limits.MAX_CONTROL_BACKLOG:
            self.choked = True

    def stream_control(self, stream: Stream, frame: bytes) -> None:
        """Queue a control frame about a stream, kept back while the stream is held."""
        if stream.held is None:
            self.control(frame)
        else:
            stream.held.append(frame)

    def log(self, source: str, level: int, message: str) -> bool:
        """Queue one log line; False when it did not fit and was counted instead."""
        level = min(max(level, 0), limits.MAX_LOG_LEVEL)
        line = [text(source, limits.MAX_LOG_SOURCE), level, text(message, limits.MAX_LOG_LINE), self._logs_dropped]
        frame = frames.encode(frames.LOG, 0, pack(line))
        if self._log_bytes + len(frame) + limits.FRAME_OVERHEAD > limits.MAX_LOG_BACKLOG:
            self._logs_dropped += 1
            return False
        self._logs_dropped = 0
        self._logs.append(frame)
        self._log_bytes += len(frame) + limits.FRAME_OVERHEAD
        return True

    def data(self, stream: Stream, frame: tuple[bytes, ...]) -> None:
        """Queue a DATA or EOF frame of a stream."""
        if not stream.pending and stream.held is None:
            self._ready.append(stream)
        stream.pending.append(frame)
        self.data_bytes += sum(map(len, frame))

    def release(self, stream: Stream, *, accepted: bool) -> None:
        """The peer has answered: what was held may go, or there is nobody to tell it to."""
        if accepted:
            for frame in stream.held or ():
                self.control(frame)
        stream.held = None
        if stream.pending:
            self._ready.append(stream)

    def drop(self, stream: Stream) -> None:
        """Throw away the queued DATA and EOF of a stream."""
        if stream.pending:
            if stream.held is None:
                self._ready.remove(stream)
            self.data_bytes -= sum(len(buffer) for frame in stream.pending for buffer in frame)
            stream.pending.clear()

    def next_frame(self) -> tuple[bytes, ...] | None:
        """The next frame to send, or None.  Taking it counts as sending it."""
        frame: tuple[bytes, ...]
        if self._control:
            frame = (self._control.popleft(),)
            self.control_bytes -= len(frame[0]) + limits.FRAME_OVERHEAD
        elif self._logs and (not self._ready or self._take_turn()):
            frame = (self._logs.popleft(),)
            self._log_bytes -= len(frame[0]) + limits.FRAME_OVERHEAD
        elif self._ready:
            frame = self._next_data()
        else:
            return None
        if self.keep_for_replay and frame[0][4] in frames.REPLAYED:
            self.replay.add(frame)
        return frame

    def _take_turn(self) -> bool:
        self._log_turn = not self._log_turn
        return self._log_turn

    def _next_data(self) -> tuple[bytes, ...]:
        stream = self._ready.popleft()
        frame = stream.pending.popleft()
        self.data_bytes -= sum(map(len, frame))
        if stream.pending:
            self._ready.append(stream)
        else:
            self._sent_last(stream)
        return frame
