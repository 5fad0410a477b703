"""A real registry (Debian's docker-registry) on a free port of the loopback, and a proxy that cuts connections."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

USER, PASSWORD = "somebody", "a secret"


@contextlib.contextmanager
def registry(folder: Path, *, login: bool = False, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Its ``host:port``; with `login` it wants USER and PASSWORD, with a certificate and key it speaks TLS."""
    config = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "store")}},
        "http": {"addr": "127.0.0.1:0", "secret": "for the uploads of one process"},
    }
    folder.mkdir(exist_ok=True)
    if certificate:
        config["http"]["tls"] = {"certificate": str(certificate[0]), "key": str(certificate[1])}  # type: ignore[index]
    if login:
        import bcrypt  # here: the ordinary user's run and the nested one have few packages, and no login

        hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4, prefix=b"2a"))
        (folder / "htpasswd").write_bytes(USER.encode() + b":" + hashed + b"\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    command = ["docker-registry", "serve", folder / "config.yml"]
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server,
    ):
        assert server.stderr
        seen, port = "", None
        while port is None:
            line = server.stderr.readline().decode()
            assert line, f"docker-registry ended: {seen}"
            seen += line
            port = re.search(r"listening on 127\.0\.0\.1:(\d+)", line)
        drain = threading.Thread(target=log.writelines, args=(server.stderr,))
        drain.start()
        try:
            yield f"127.0.0.1:{port[1]}"
        finally:
            server.kill()
            drain.join()


def push(source: str, target: str, *options: str) -> None:
    command = ["skopeo", "copy", "-q", "--dest-tls-verify=false", *options, source, f"docker://{target}"]
    subprocess.run(command, check=True, timeout=60)


def write_index(layout: Path, members: Sequence[tuple[Path, str]], tag: str = "latest") -> str:
    """An OCI layout whose one tag is an index of other layouts' images, each for an architecture; its digest."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    manifests = []
    for member, architecture in members:
        shutil.copytree(member / "blobs", layout / "blobs", dirs_exist_ok=True)
        (entry,) = json.loads((member / "index.json").read_text())["manifests"]
        entry.pop("annotations")
        manifests.append({**entry, "platform": {"os": "linux", "architecture": architecture}})
    media_type = "application/vnd.oci.image.index.v1+json"
    data = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    descriptor = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return f"sha256:{digest}"


class Proxy:
    """Passes bytes on to `target`.  A connection over which more than `limit` bytes came back is cut, for as long
    as `cuts` are left; with `hold` nothing comes back any more after so many."""

    def __init__(self, target: str, *, limit: int = 1 << 60, cuts: int = 0, hold: bool = False) -> None:
        self._target = target
        self._limit = limit
        self.cuts = cuts
        self._hold = hold
        self.count = 0  # bytes that came back
        self.holding = threading.Event()
        self.dropped = threading.Event()  # a client closed its connection while it was held
        self._go_on = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def release(self) -> None:
        """From now on everything comes back."""
        self._hold = False
        self._go_on.set()

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._target.partition(":")
            far = socket.create_connection((host, int(port)))
            self._sockets += [near, far]
            self._start(self._pump, near, far, False)
            self._start(self._pump, far, near, True)

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                sink.sendall(data)
                if back:
                    passed += len(data)
                    self.count += len(data)
                    if passed > self._limit and self._hold:
                        self.holding.set()
                        self._go_on.wait()
                    if passed > self._limit and self.cuts > 0:
                        self.cuts -= 1
                        break
        if not back and self.holding.is_set():
            self.dropped.set()
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
