"""byre's wire protocol, without I/O: frames, flow control, calls, sessions.  Specified in `WIRE.md`.

Rule: imports msgpack and the standard library's cheap parts only; runs on Python 3.9 and later; no asyncio, no
typing, no dataclasses at run time, because the guest's agent pays for every import at each boot.
"""
