"""A world to reach: two network namespaces, `here` and beyond it a host with servers; nothing of this machine's.

    here 198.51.100.1 ---- 198.51.100.2 servers: TCP 8000, UDP 8001, DNS 53 (every name is 203.0.113.7, theirs too)

The way on from `here` leads to the servers, and they have the address of this machine's name server as well.  What
listens at `here` on its loopback and on all of its addresses (8888, 8889) counts who connects: nobody may.

Servers' lines: "GIVE n" sends n bytes, "TAKE n" answers with the SHA-256 of n bytes, anything else is echoed.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE, BEYOND, BY_NAME = "198.51.100.1", "198.51.100.2", "203.0.113.7"
TCP, UDP, DNS = 8000, 8001, 53
LOOPBACK_PORT, ANY_PORT = 8888, 8889

PATIENCE = 20.0

_TRY = ["unshare", "--net", "ip", "link", "add", "type", "veth"]

#: Why this host lets nobody make networks and connect them; "" where it does.
REFUSAL = subprocess.run(_TRY, stderr=subprocess.PIPE, text=True).stderr.strip()

needs_networks = pytest.mark.skipif(bool(REFUSAL), reason=f"no networks of one's own on this host: {REFUSAL}")


class World:
    """See the module; a context manager."""

    def __enter__(self) -> World:
        self._processes = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in range(2)]
        here, beyond = self._processes
        own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + PATIENCE
        while any(os.readlink(f"/proc/{process.pid}/ns/net") == own for process in self._processes):
            assert time.monotonic() < deadline, "no new network namespace"
            time.sleep(0.01)
        self.pid = here.pid
        server = name_server()
        self._ip(here, "link set lo up", f"link add up0 type veth peer name down0 netns {beyond.pid}")
        self._ip(here, f"address add {HERE}/24 dev up0", "link set up0 up", f"route add default via {BEYOND}")
        self._ip(beyond, "link set lo up", f"address add {BEYOND}/24 dev down0", "link set down0 up")
        local = server if server.startswith("127.") else ""
        for address in filter(None, (BY_NAME, "" if local else server)):
            self._ip(beyond, f"address add {address}/32 dev lo")
        self._serve(beyond, "beyond")
        self._here = self._serve(here, local)
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            with process:  # and its pipes
                process.kill()

    def _ip(self, where: subprocess.Popen[bytes], *commands: str) -> None:
        for command in commands:
            subprocess.run(_inside(where.pid, ["ip", *command.split()]), check=True, timeout=PATIENCE)

    def _serve(self, where: subprocess.Popen[bytes], role: str) -> subprocess.Popen[bytes]:
        command = _inside(where.pid, [sys.executable, __file__, role])
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process

    def visitors(self) -> int:
        """How many have connected to what listens `here`, by TCP, or sent a datagram."""
        assert self._here.stdin is not None and self._here.stdout is not None
        self._here.stdin.write(b"?\n")
        self._here.stdin.flush()
        return int(self._here.stdout.readline())

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv`, to be run `here`."""
        return _inside(self.pid, argv)

    def program(self, directory: Path, name: str, real: str) -> Path:
        """A program of this name in the directory that runs the real one `here`."""
        path = directory / name
        path.write_text(f'#!/bin/sh\nexec nsenter --net=/proc/{self.pid}/ns/net -- {real} "$@"\n')
        path.chmod(0o755)
        return path


def _inside(pid: int, argv: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--", *argv]


def name_server() -> str:
    """The first that this machine's /etc/resolv.conf names, as slirp takes it; "" without one: it asks nobody."""
    found = re.search(r"^nameserver\s+(\d+\.\d+\.\d+\.\d+)", Path("/etc/resolv.conf").read_text(), re.MULTILINE)
    return found[1] if found else ""


# -- the servers, in a process of their own ----------------------------------------------------------------


class _Tcp(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        word, _, number = line.decode(errors="replace").strip().partition(" ")
        if word == "GIVE":
            self.wfile.write(hashlib.shake_128(b"byre").digest(int(number)))
        elif word == "TAKE":
            self.wfile.write(hashlib.sha256(self.rfile.read(int(number))).hexdigest().encode())
        else:
            self.wfile.write(line)


class _Udp(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


class _Dns(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        end = data.index(0, 12) + 5
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(BY_NAME)
        is_address = data[end - 4 : end - 2] == b"\0\1"
        header = data[:2] + b"\x81\x80\0\1" + bytes([0, is_address]) + bytes(4)
        sock.sendto(header + data[12:end] + (answer if is_address else b""), self.client_address)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 64


def _start(kind: type[Any], address: tuple[str, int], handler: type[Any]) -> None:
    server = kind(address, handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main(role: str) -> None:
    visits: list[object] = []

    class Visit(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            visits.append(self.client_address)

    if role == "beyond":
        _start(_Server, ("0.0.0.0", TCP), _Tcp)
        _start(socketserver.ThreadingUDPServer, ("0.0.0.0", UDP), _Udp)
        _start(socketserver.ThreadingUDPServer, ("0.0.0.0", DNS), _Dns)
    else:
        for address in (("127.0.0.1", LOOPBACK_PORT), ("0.0.0.0", ANY_PORT)):
            _start(_Server, address, Visit)
            _start(socketserver.ThreadingUDPServer, address, Visit)
        if role:
            _start(socketserver.ThreadingUDPServer, (role, DNS), _Dns)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(len(visits), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
