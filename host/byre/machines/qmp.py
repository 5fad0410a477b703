"""QMP with a deadline on every call, typed errors, and nothing that grows with what QEMU sends.

Rule: QEMU may be silent, gone or wrong; every call ends all the same.  The protocol is `qemu.qmp`'s.

Two of its habits do not fit here.  It logs at ERROR what is reported by an exception as well, so its log goes to
DEBUG; and its default listener keeps every event for ever, of which a guest can cause any number (I/O errors,
say), so a listener that keeps none replaces it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError, Runstate

from byre.errors import ConnectionLost, DeadlineExceeded, MachineFailed
from byre_proto.errors import printable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

#: QEMU answers in milliseconds.  Its lock is held longer by a loaded host, and by a slow disk under blockdev-add.
CALL_TIMEOUT = 20.0
#: QEMU greets once it has made the machine: 0.1 s, 1 s on a loaded host.
GREETING_TIMEOUT = 30.0
#: Longest message from QEMU, in bytes; nothing that is asked here is answered by more.
MAX_MESSAGE = 1024 * 1024
#: The end of file is there when QEMU has ended; this is for what must not happen.
_EOF_TIMEOUT = 1.0


class _Demoted(logging.LoggerAdapter[logging.Logger]):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        super().log(logging.DEBUG, msg, *args, **kwargs)


class _Dispatch(EventListener):
    def __init__(self, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._on_event = on_event

    async def put(self, event: Any) -> None:
        data = event.get("data")
        self._on_event(str(event["event"]), data if isinstance(data, dict) else {})


class Qmp:
    """One QMP session.  `on_event(name, data)` is called for each event, in the event loop; it must not block."""

    def __init__(self, name: str, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._client = QMPClient(readbuflen=MAX_MESSAGE)
        self._client.logger = _Demoted(logger, {"machine": name})  # type: ignore[assignment]
        keeps_all, self._client.events = self._client.events, _Dispatch(on_event)
        self._client.register_listener(self._client.events)
        self._client.remove_listener(keeps_all)
        self._connecting = asyncio.Lock()

    async def connect(self, sock: socket.socket) -> None:
        """Take `sock` over, await the greeting and leave negotiation mode."""
        try:
            async with self._connecting, asyncio.timeout(GREETING_TIMEOUT):
                await self._client.connect(sock)
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU did not answer within {GREETING_TIMEOUT:g} s of its start") from None
        except ConnectError as error:
            raise ConnectionLost(f"QEMU closed its control channel: {printable(str(error))}") from error
        except AssertionError as error:  # qemu.qmp's own, when QEMU ends just after it has answered
            raise ConnectionLost("QEMU closed its control channel at its start") from error
        finally:
            if self._client.runstate is not Runstate.RUNNING:
                sock.close()

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, as it says itself."""
        greeting = self._client.greeting
        assert greeting is not None
        found: Any = greeting.QMP.version["qemu"]
        return int(found["major"]), int(found["minor"]), int(found["micro"])

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """QEMU's answer; MachineFailed if it refuses, DeadlineExceeded, or ConnectionLost if it is gone."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise DeadlineExceeded(
                f"QEMU did not answer {command} within {CALL_TIMEOUT:g} s", command=command
            ) from None
        except ExecuteError as error:
            raise MachineFailed(
                f"QEMU refused {command}: {printable(str(error))}", command=command, qmp_class=error.error_class
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise ConnectionLost(f"QEMU went away during {command}", command=command) from error

    def send_fd(self, fd: int) -> None:
        """Hand a descriptor over, for the next `getfd`.  ConnectionLost if QEMU is gone."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise ConnectionLost("QEMU went away") from error

    async def close(self, *, orderly: bool = True) -> None:
        """End the session, once QEMU has ended.  Orderly: what it sent last is dispatched first."""
        async with self._connecting:  # which ends at once, the other end being closed
            try:
                async with asyncio.timeout(_EOF_TIMEOUT):
                    while orderly and self._client.runstate is Runstate.RUNNING:
                        await self._client.runstate_changed()
            except TimeoutError:
                logger.warning("! QEMU has ended, and its control channel has not")
            try:
                await self._client.disconnect()
            except Exception as error:  # the reader's end of file or reset, mostly
                logger.debug("x QMP: %r", error)
