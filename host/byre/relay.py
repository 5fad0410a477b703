r"""What a keeper does with its clients' frames: passes them on to the guest's agent, and the answers back.

    client A --\                          every call with its deadline, its cancellation and its verdict;
    client B ---  Relay  --- guest        every stream under a number of its own on each side;
    client C --/                          every exit to the clients that it concerns

Rule: the relay holds no more of a stream than its window (see `passage`), so a client that does not read stops its
own processes and nothing else (B3).  A reply never comes after an event that followed it.

A client whose channel is cut has not gone: it may come back over another one, for RESUME_SECONDS, unless its
process has ended.  When a client goes, its calls are cancelled, and what it had started goes on (B43): the streams
are *held*, not closed, so a process that writes stands still when its window is full rather than die of SIGPIPE.  A
client that said `vm.tie` wants it otherwise: its processes, with their trees, are killed when it goes.  Of its
sockets nothing stays: connections are reset, listeners closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from byre_proto import events

from . import peer
from .bridge import Bridge
from .errors import ByreError, Cancelled, ConnectionLost, DeadlineExceeded
from .passage import Passage

if TYPE_CHECKING:
    import socket

log = logging.getLogger(__name__)

#: Serves one of the keeper's own methods: arguments in, result out.
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

#: Which of a request's stream fields carry bytes towards the guest.
_TOWARDS_GUEST = {"stdin": True, "stdout": False, "stderr": False}

#: Deadline of what the relay itself asks of the guest, in seconds.
TIDY_TIMEOUT = 30.0

#: A client that connects and does not shake hands is let go after this, in seconds.
HANDSHAKE_TIMEOUT = 30.0

SIGKILL, SIGTERM = 9, 15


class Client:
    """One attached client."""

    def __init__(self, sock: socket.socket, number: int, relay: Relay) -> None:
        self.number = number  # for the log
        self.bridge = Bridge(sock, label=f"client {number}", server=self._serve, bridges=relay.bridge_of)
        self.tied = False  # what it starts ends with it
        self.gone = False
        self.listeners: set[int] = set()  # of the guest's sockets: of use to nobody else
        self.connections: list[Passage] = []
        self._relay = relay
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def until_its_end(self, pidfd: int) -> str:
        await peer.ended(pidfd)
        return "its process has ended"

    def cancel_calls(self) -> None:
        for task in self._calls.values():
            task.cancel()

    def _serve(self, event: events.RequestReceived | events.CancelReceived) -> None:
        if isinstance(event, events.CancelReceived):
            self._calls[event.call].cancel()
            return
        answer = _Answer(self, event)
        task = asyncio.get_running_loop().create_task(self._relay.serve(self, event, answer))
        self._calls[event.call] = task
        task.add_done_callback(answer.done)

    def answered(self, call: int) -> None:
        del self._calls[call]


class Started:
    """A process that a client started: its streams, and whose it is.  Clients that ask for the same container's
    init process later are its owners as well."""

    def __init__(self, number: int, client: Client) -> None:
        self.id = number
        self.starter = client
        self.owners = {client}
        self.streams: list[Passage] = []
        self.exited = False
        self.is_files = False  # an operation on files: of no use to anybody else


class Relay:
    """All clients of one VM.  `guest` leads to its agent; `own` are the methods that the keeper itself serves."""

    def __init__(self, guest: Bridge, own: dict[str, Handler]) -> None:
        self._guest = guest
        self._own = {**own, "vm.remove_at_exit": self._remove_at_exit}
        self._clients: set[Client] = set()
        self._numbers = itertools.count(1)
        self._started: dict[int, Started] = {}
        self._to_remove: set[str] = set()  # containers to be deleted when they end
        self._tasks: set[asyncio.Task[None]] = set()

    # -- clients -------------------------------------------------------------------------------------------

    async def accept(self, listener: socket.socket) -> None:
        """Take in clients until cancelled.  The listener is non-blocking, and the caller's to close."""
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._spawn(self.attend(sock))

    async def attend(self, sock: socket.socket) -> None:
        """One client, from its handshake to its end, in whatever way it goes."""
        client = Client(sock, next(self._numbers), self)
        with contextlib.ExitStack() as stack:
            try:
                pidfd = peer.open_process(sock)
            except OSError:
                pidfd = -1  # unknown, or gone: its channel will say so
            else:
                stack.callback(os.close, pidfd)
            await self._attend(client, pidfd)

    async def _attend(self, client: Client, pidfd: int) -> None:
        try:
            await client.bridge.open(HANDSHAKE_TIMEOUT)
        except ByreError as error:
            log.info("! client %d: %s", client.number, error)
            return
        if client.bridge.handed_over:
            log.info("= a client whose channel was cut goes on")
            return
        if pidfd >= 0 and client.bridge.resumable:
            client.bridge.explain = lambda: client.until_its_end(pidfd)
        self._clients.add(client)
        log.info("= client %d attached, %d in all", client.number, len(self._clients))
        try:
            await client.bridge.wait_lost()
        finally:
            self._left(client)
            await client.bridge.close()

    def bridge_of(self, session: bytes) -> Bridge | None:
        """Of the client that has this session, perhaps without a channel now."""
        return next((c.bridge for c in self._clients if c.bridge.session.id == session), None)

    async def close(self, reason: str) -> None:
        """The VM has ended: every client is told why, and let go."""
        for client in self._clients:
            client.bridge.tell("vm.exit", {"reason": reason})
        for client in list(self._clients):
            await client.bridge.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _left(self, client: Client) -> None:
        """Its calls are cancelled; see the module's text for what it had started."""
        client.gone = True
        self._clients.discard(client)
        log.info("= client %d left, %d in all", client.number, len(self._clients))
        client.cancel_calls()
        for stream in client.connections:
            stream.close()
        for listener in client.listeners:
            self._spawn(self._ask("socket.close", listener=listener))
        for started in [s for s in self._started.values() if client in s.owners]:
            started.owners.discard(client)
            if started.exited and not started.owners:
                self._release(started)
            elif started.is_files:
                self._spawn(self._ask("process.signal", process=started.id, signal=SIGTERM))
            elif not started.exited and client.tied and client is started.starter:
                log.info("= process %d is killed: its client is gone", started.id)
                self._spawn(self._ask("process.signal", process=started.id, signal=SIGKILL, tree=True))

    def _announce(self, name: str, fields: dict[str, Any]) -> None:
        """Of containers, that is: any client may have opened one."""
        for client in self._clients:
            client.bridge.tell(name, fields)

    # -- calls ---------------------------------------------------------------------------------------------

    async def serve(self, client: Client, request: events.RequestReceived, answer: _Answer) -> None:
        """Answer one request of a client."""
        try:
            if request.method == "vm.tie":
                client.tied = True
                answer.reply({})
            elif request.method in self._own:
                async with asyncio.timeout(request.timeout):
                    answer.reply(await self._own[request.method](request.arguments))
            else:
                await self._pass_on(client, request, answer)
        except ByreError as error:
            answer.refuse(error)
        except TimeoutError:
            answer.refuse(DeadlineExceeded(f"{request.method} was not done in time"))
        except Exception as error:
            log.exception("! %s", request.method)
            answer.refuse(ByreError(f"the keeper failed at {request.method}: {error!r}", hint="see its keeper.log"))

    async def _pass_on(self, client: Client, request: events.RequestReceived, answer: _Answer) -> None:
        streams: list[Passage] = []
        undo = _UNDO.get(request.method)
        try:
            arguments = self._map_streams(client, request.arguments, streams)

            def accept(result: dict[str, Any]) -> None:
                # In the turn in which the guest answered: no event can overtake the reply.
                self._note(client, request.method, arguments, result, streams)
                answer.reply(result)

            await self._guest.call(
                request.method,
                timeout=request.timeout,
                accept=accept,
                undo=None if undo is None else lambda result: undo(self, arguments, result),
                **arguments,
            )
        finally:
            if not answer.succeeded:
                for stream in streams:
                    stream.close()

    def _map_streams(self, client: Client, arguments: dict[str, Any], streams: list[Passage]) -> dict[str, Any]:
        """The arguments with the guest's stream numbers; adds the streams as they are opened."""
        mapped = dict(arguments)
        for field, towards_guest in _TOWARDS_GUEST.items():
            number = arguments.get(field, 0)
            if number:
                mapped[field] = theirs = self._guest.session.new_stream(
                    sending=towards_guest, receiving=not towards_guest
                )
                ends = (client.bridge, number), (self._guest, theirs)
                source, sink = ends if towards_guest else ends[::-1]
                try:
                    client.bridge.session.accept_stream(number, sending=not towards_guest, receiving=towards_guest)
                except ByreError:
                    self._guest.session.reset(theirs)
                    self._guest.session.stop(theirs)
                    raise
                streams.append(Passage(*source, *sink))
        return mapped

    def _note(
        self,
        client: Client,
        method: str,
        arguments: dict[str, Any],
        result: dict[str, Any],
        streams: list[Passage],
    ) -> None:
        """Remember what a successful call made or ended."""
        if method in ("process.create", "container.init", "files.start"):
            started = self._started.setdefault(result["process"], Started(result["process"], client))
            started.is_files = method == "files.start"
            started.owners.add(client)
            started.streams += streams
            self._guest.subscribe("process.exit", started.id, self._process_exited)
        elif method in ("socket.connect", "socket.accept"):
            client.connections = [stream for stream in client.connections if not stream.done] + streams
        elif method == "socket.listen":
            client.listeners.add(result["listener"])
        elif method == "socket.close":
            client.listeners.discard(arguments["listener"])
        elif method == "process.release":
            self._forget(arguments["process"])
        elif method == "container.create":
            container = arguments["container"]
            self._guest.subscribe("container.exit", container, self._container_exited)
        elif method == "container.delete":
            self._deleted(arguments["container"])

    # -- what the guest reports ----------------------------------------------------------------------------

    def _process_exited(self, fields: dict[str, Any] | ConnectionLost) -> None:
        if isinstance(fields, ConnectionLost):
            return  # the keeper hears of it, and ends
        self._guest.unsubscribe("process.exit", fields["process"])
        started = self._started.get(fields["process"])
        if started is None:
            return
        started.exited = True
        for client in started.owners:
            client.bridge.tell("process.exit", fields)
        if not started.owners:
            self._release(started)

    def _container_exited(self, fields: dict[str, Any] | ConnectionLost) -> None:
        if isinstance(fields, ConnectionLost):
            return
        self._announce("container.exit", fields)
        container = fields["container"]
        if container in self._to_remove:
            self._deleted(container)
            self._spawn(self._ask("container.delete", container=container))

    # -- undoing and tidying -------------------------------------------------------------------------------

    async def _undo_process(self, _: dict[str, Any], result: dict[str, Any]) -> None:
        """It was made although its client cancelled, went, or would not wait: end it with its tree (B15)."""
        self._forget(result["process"])
        await self._ask("process.signal", process=result["process"], signal=SIGKILL, tree=True)
        await self._ask("process.release", process=result["process"])

    async def _undo_files(self, _: dict[str, Any], result: dict[str, Any]) -> None:
        """It tidies up what it had begun."""
        self._forget(result["process"])
        await self._ask("process.signal", process=result["process"], signal=SIGTERM)
        await self._ask("process.release", process=result["process"])

    async def _undo_listen(self, _: dict[str, Any], result: dict[str, Any]) -> None:
        await self._ask("socket.close", listener=result["listener"])

    async def _undo_container(self, arguments: dict[str, Any], _: dict[str, Any]) -> None:
        self._deleted(arguments["container"])
        await self._ask("container.delete", container=arguments["container"])

    async def _remove_at_exit(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._to_remove.add(arguments["container"])
        return {}

    def _deleted(self, container: str) -> None:
        self._to_remove.discard(container)
        self._guest.unsubscribe("container.exit", container)

    def _forget(self, process: int) -> None:
        self._started.pop(process, None)
        self._guest.unsubscribe("process.exit", process)

    def _release(self, started: Started) -> None:
        """A process that ended after its client did: nobody else can read its streams."""
        self._forget(started.id)
        for stream in started.streams:
            stream.close()
        self._spawn(self._ask("process.release", process=started.id))

    async def _ask(self, method: str, **arguments: Any) -> None:
        with contextlib.suppress(ByreError):  # gone by itself, or with the VM
            await self._guest.call(method, timeout=TIDY_TIMEOUT, **arguments)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


#: How a call that succeeded in spite of its cancellation is undone.
_UNDO: dict[str, Callable[[Relay, dict[str, Any], dict[str, Any]], Awaitable[None]]] = {
    "process.create": Relay._undo_process,
    "files.start": Relay._undo_files,
    "socket.listen": Relay._undo_listen,
    "container.create": Relay._undo_container,
}


class _Answer:
    """The one answer to one call; later ones, and those for a client that is gone, are dropped."""

    def __init__(self, client: Client, request: events.RequestReceived) -> None:
        self._client = client
        self._request = request
        self._open = True
        self.succeeded = False

    def reply(self, result: dict[str, Any]) -> None:
        if self._open and not self._client.gone:
            self.succeeded = True
            self._client.bridge.reply(self._request.call, result)
        self._open = False

    def refuse(self, error: ByreError) -> None:
        if self._open:
            self._client.bridge.refuse(self._request.call, error)
        self._open = False

    def done(self, _: asyncio.Task[None]) -> None:
        """The task has ended; without an answer it was cancelled, perhaps before its first step."""
        self.refuse(Cancelled(f"{self._request.method} was cancelled"))
        self._client.answered(self._request.call)
