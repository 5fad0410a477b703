"""A small HTTP service that runs strangers' snippets, each in a container of a VM that nobody had before.

    python -m examples.sandbox_service --image debian:12 --tenants tenants.json --port 8080

    POST /run      Authorization: Bearer TOKEN, {"code": "echo $((6*7))", "language": "sh", "stdin": ""}
        200        {"status": 0, "stdout": "42\\n", "stderr": "", "truncated": false, "timed_out": false, ...}
        400, 401, 413   no such request, no such tenant, too long
        429, 503   the tenant has as many running as it may; there was no VM in time.  Both: Retry-After
    GET /metrics   for Prometheus

tenants.json: [{"name": "alice", "token": "...", "concurrency": 2, "seconds": 10, "output_bytes": 65536,
"memory_mib": 64}, ...]; all but the first two can be left out.

Rule: what keeps strangers from each other is the VM; the limits here keep one from taking what is the others'.  It
is an example: TLS, and patience with slow clients, are a reverse proxy's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from byre import Resources
from byre.errors import ByreError, DeadlineExceeded, PoolQueueFull, PoolTimeout
from byre.sync import Pool

#: How each language is run in the container's image; the code is the last argument.
LANGUAGES = {"sh": ["sh", "-c"], "python": ["python3", "-c"]}

#: Bytes of a request, which is code and its input.  An argument of a program may have 128 KiB on Linux.
MAX_BODY = 96 * 1024

#: Connections at the same time; each is a thread.
MAX_CONNECTIONS = 128

#: Seconds that a client may be silent.
CLIENT_TIMEOUT = 10.0

#: MiB of a VM beside the snippet's: kernel, agent, and the container's files.
VM_RESERVE_MIB = 160

#: Processes and threads of one snippet.
PIDS = 64


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Who may run snippets, and how much."""

    name: str
    token: str
    concurrency: int = 2
    seconds: float = 10.0
    output_bytes: int = 64 * 1024
    memory_mib: int = 64


class Refused(Exception):
    """An answer other than 200: its status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Bounded(io.RawIOBase):
    """Keeps `limit` bytes; whoever writes more is told that nobody reads, as in a pipeline that has ended."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.truncated = False
        self._limit = limit

    def write(self, data: Any, /) -> int:
        room = self._limit - len(self.data)
        self.data += bytes(data)[:room]
        if len(data) > room:
            self.truncated = True
            raise BrokenPipeError("there is enough output")
        return len(data)

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


class Metrics:
    """What happened, by tenant, and what the pool says of itself."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.registry = CollectorRegistry()
        self.runs = Counter(
            "sandbox_runs", "Snippets, by how it went", ["tenant", "outcome"], registry=self.registry
        )
        self.running = Gauge("sandbox_running", "Snippets under way", ["tenant"], registry=self.registry)
        self.seconds = Histogram("sandbox_seconds", "From request to answer", ["tenant"], registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Any:
        """The pool's figures at this moment."""
        for name, value in dataclasses.asdict(self._pool.stats()).items():
            if isinstance(value, int):
                yield GaugeMetricFamily(f"sandbox_pool_{name}", f"byre.PoolStats.{name}", value)


class Service:
    """Runs snippets.  A context manager; `options` are the pool's."""

    def __init__(self, image: str, tenants: list[Tenant], *, wait: float = 30.0, **options: Any) -> None:
        memory = max(tenant.memory_mib for tenant in tenants) + VM_RESERVE_MIB
        self.pool = Pool(memory_mib=memory, **options)
        self.metrics = Metrics(self.pool)
        self.wait = wait
        self._image = image
        self._tenants = {_digest(tenant.token): tenant for tenant in tenants}
        self._slots = {tenant.name: threading.BoundedSemaphore(tenant.concurrency) for tenant in tenants}

    def __enter__(self) -> Service:
        self.pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.__exit__(*error)

    def tenant(self, authorization: str) -> Tenant:
        """Whose token this is."""
        scheme, _, token = authorization.partition(" ")
        tenant = self._tenants.get(_digest(token.strip()))
        if scheme.lower() != "bearer" or tenant is None:
            raise Refused(401, "no tenant has this token")
        return tenant

    def run(self, tenant: Tenant, request: dict[str, str]) -> dict[str, Any]:
        """One snippet, within the tenant's limits; what becomes of it is counted."""
        outcome = "refused"
        slots = self._slots[tenant.name]
        if not slots.acquire(blocking=False):
            self.metrics.runs.labels(tenant.name, outcome).inc()
            raise Refused(429, f"{tenant.concurrency} of your snippets are running already")
        try:
            with self.metrics.running.labels(tenant.name).track_inprogress():
                answer = self._run(tenant, request)
                outcome = "timed_out" if answer["timed_out"] else "ended"
                self.metrics.seconds.labels(tenant.name).observe(answer["seconds"])
                return answer
        except (PoolTimeout, PoolQueueFull) as error:
            raise Refused(503, error.message) from error
        except ByreError as error:
            outcome = "failed"
            raise Refused(503, "the VM failed") from error  # why is for the log, not for strangers
        finally:
            slots.release()
            self.metrics.runs.labels(tenant.name, outcome).inc()

    def _run(self, tenant: Tenant, request: dict[str, str]) -> dict[str, Any]:
        begin = time.monotonic()
        stdout, stderr = Bounded(tenant.output_bytes), Bounded(tenant.output_bytes)
        answer: dict[str, Any] = {"status": None, "timed_out": False, "out_of_memory": False}
        limits = Resources(memory_bytes=tenant.memory_mib << 20, cpus=1, pids=PIDS)
        with self.pool.acquire(timeout=self.wait) as vm:
            container = vm.create_container(
                image=self._image, entrypoint=["sleep", "infinity"], resources=limits, pull="never"
            )
            container.start()
            try:
                result = container.run(
                    [*LANGUAGES[request.get("language", "sh")], request["code"]],
                    input=request.get("stdin", "").encode(),
                    stdout=stdout,
                    stderr=stderr,
                    user="65534:65534",
                    timeout=tenant.seconds,
                )
                answer.update(status=result.returncode, out_of_memory=result.oom)
            except DeadlineExceeded:
                answer["timed_out"] = True
        answer.update(stdout=stdout.text, stderr=stderr.text, truncated=stdout.truncated or stderr.truncated)
        return {**answer, "seconds": time.monotonic() - begin}


def _digest(token: str) -> bytes:
    """Tokens are looked up by their digest, so that how long that takes tells nothing of them."""
    return hashlib.sha256(token.encode()).digest()


class Server(ThreadingHTTPServer):
    """The service on a port of this host; 0 takes a free one.  Closing it waits for what is running."""

    daemon_threads = False

    def __init__(self, service: Service, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.service = service
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = CLIENT_TIMEOUT
    server_version = "sandbox"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(200, generate_latest(self.server.service.metrics.registry), "text/plain; version=0.0.4")
        else:
            self._answer(404, b"")

    def do_POST(self) -> None:
        try:
            if self.path != "/run":
                raise Refused(404, "not found")
            tenant = self.server.service.tenant(self.headers.get("Authorization", ""))
            answer = self.server.service.run(tenant, self._request())
        except Refused as refused:
            self._answer(refused.status, json.dumps({"error": str(refused)}).encode())
        else:
            self._answer(200, json.dumps(answer).encode())

    def _request(self) -> dict[str, str]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(400, "Content-Length is needed")
        if int(length) > MAX_BODY:
            raise Refused(413, f"{MAX_BODY} bytes at most")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        known = {"code", "language", "stdin"}
        if not isinstance(request, dict) or "code" not in request or set(request) - known:
            raise Refused(400, "an object with code, language and stdin is needed")
        if not all(isinstance(text, str) and "\0" not in text for text in request.values()):
            raise Refused(400, "code, language and stdin are strings without NUL")
        if request.get("language", "sh") not in LANGUAGES:
            raise Refused(400, f"languages: {', '.join(LANGUAGES)}")
        return request

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The metrics say it."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run strangers' snippets, each in a VM of its own.")
    parser.add_argument("--image", required=True, help="of the snippets' containers; pull it before")
    parser.add_argument("--tenants", required=True, type=Path)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--size", type=int, default=2, help="VMs that are kept ready (%(default)s)")
    arguments = parser.parse_args()
    tenants = [Tenant(**each) for each in json.loads(arguments.tenants.read_text())]
    with Service(arguments.image, tenants, size=arguments.size) as service:
        service.pool.wait_full(timeout=600)  # the very first VM may have to wait for its image to be built
        server = Server(service, arguments.port)
        # From a thread: `shutdown` waits for the loop that this signal interrupts.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        with server:
            print(f"listening on port {server.server_port}", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    main()
