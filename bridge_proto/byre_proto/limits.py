"""Every limit of the wire, in one place, each with the attack or the reason behind it.

The sender enforces a limit so that a mistake fails where it was made; the receiver enforces it again because
the peer may be hostile.  A limit is part of the protocol version: changing one changes `WIRE.md`.
"""

from __future__ import annotations

#: Payload of one DATA frame.  Large enough that what a frame costs does not matter, even to an emulated guest;
#: small enough that a control frame never waits long behind one: a millisecond at 250 MB/s.
MAX_DATA = 256 * 1024

#: Payload of one control frame.  An OCI spec with its seccomp profile is about 60 KiB; ten times that is room.
MAX_CONTROL = 1024 * 1024

#: Elements in one msgpack array or map: a small frame must not decode into a huge list.
MAX_ELEMENTS = 16 * 1024

#: Largest stream id: the header has 32 bits, and an id is never used again.  A hundred processes a second use
#: them up in 80 days; then a new session is due.
MAX_STREAM_ID = (1 << 32) - 1

#: Largest call id, never used again either.
MAX_CALL_ID = (1 << 63) - 1

#: Streams open at once, each with its guaranteed window: 4,096 x 16 KiB bounds what unread streams can hold.
MAX_STREAMS = 4096

#: Window that every stream has from its first byte, guaranteed: an unread stream holds no more than this.
INITIAL_WINDOW = 16 * 1024

#: Window to which a stream that is read may grow: several of the largest frames, so that its sender never waits.
MAX_WINDOW = 2 * 1024 * 1024

#: Shared by all growing streams of one side, beyond the guaranteed windows.
WINDOW_POOL = 16 * 1024 * 1024

#: Calls from the peer in progress at once; one more is answered with resource-exhausted.
MAX_CALLS = 4096

#: What one queued frame costs in memory beside its bytes (objects, queue entry): it counts in the backlogs, so
#: that a million tiny frames are not cheap.
FRAME_OVERHEAD = 128

#: Control bytes queued for a peer that does not read.  Over it the connection is closed: nothing else bounds
#: the answers to a flood of pings or requests.
MAX_CONTROL_BACKLOG = 8 * 1024 * 1024

#: Characters of one log line and of its source; the rest is cut.
MAX_LOG_LINE = 8192
MAX_LOG_SOURCE = 256

#: Log levels are Python's: 10 debug, 20 info, 30 warning, 40 error, 50 critical.
MAX_LOG_LEVEL = 100

#: Log bytes queued; what does not fit is dropped and counted.
MAX_LOG_BACKLOG = 256 * 1024

#: Bytes kept for replay after a dropped connection; over it the session cannot resume.  What a peer lets us send
#: before it acknowledges is far less, so only one that never acknowledges meets this.
MAX_REPLAY = WINDOW_POOL + MAX_STREAMS * INITIAL_WINDOW + MAX_CONTROL_BACKLOG

#: Seconds without a connection after which a side gives a session up, and with it all that waits: what a pulled
#: plug or a terminal server that starts anew takes.  What is known to be gone is not waited for.
RESUME_SECONDS = 30.0

#: Bytes thrown away while looking for the preface: a serial console's whole boot log fits, a flood does not.
MAX_NOISE = 16 * 1024 * 1024

#: Frames or bytes received between two acknowledgements.
ACK_FRAMES = 64
ACK_BYTES = 256 * 1024
