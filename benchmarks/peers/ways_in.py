"""Peers that are a way into a machine: the guest agent of QEMU, OpenSSH and paramiko, each in the same guest."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from .guest import AGENT, PROGRAMS, SSHD, Guest
from .interface import Cannot, Peer, output_of

#: Between two tries to reach a service that is starting, in seconds.
AGAIN = 0.05

#: Between two questions whether a command has ended: the agent tells nobody by itself.
POLL = 0.001

#: The most that the agent reads or writes of a file at once, before base64 (its limit is 48 MiB).
PIECE = 4 * 1024 * 1024

#: QEMU's GUEST_EXEC_MAX_OUTPUT: the agent keeps that much, and drops the rest with a mark.
MOST_OUTPUT = "guest-exec keeps 16 MiB of output at most"


class WayIn(Peer):
    """`service` is the command that the guest runs for it."""

    service = SSHD

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._guest = Guest(directory, self.service)

    def start_warm(self) -> None:
        raise Cannot("a way into a machine that is there")

    def stop(self) -> None:
        self._guest.stop()


class GuestAgent(WayIn):
    """guest-exec, polled; files by guest-file-*."""

    service = AGENT

    def version(self) -> str:
        return output_of([PROGRAMS / "usr/sbin/qemu-ga", "--version"]).decode().strip()

    def start(self) -> None:
        self._guest.start()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self._guest.agent))
        self._lines = self._socket.makefile("rb")
        self._call("guest-sync", id=1)  # is answered when the agent is there

    def _call(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"]["desc"])
        return answer["return"]

    def run(self, script: str) -> bytes:
        arguments = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        pid = self._call("guest-exec", **arguments)["pid"]
        while not (status := self._call("guest-exec-status", pid=pid))["exited"]:
            time.sleep(POLL)
        if status.get("out-truncated"):
            raise Cannot(MOST_OUTPUT)
        if status.get("exitcode"):
            raise RuntimeError(f"exit status {status['exitcode']}")
        return base64.b64decode(status.get("out-data", ""))

    def put(self, data: bytes, path: str) -> None:
        handle = self._call("guest-file-open", path=path, mode="w")
        for begin in range(0, len(data), PIECE):
            piece = base64.b64encode(data[begin : begin + PIECE]).decode()
            self._call("guest-file-write", **{"handle": handle, "buf-b64": piece})
        self._call("guest-file-close", handle=handle)

    def get(self, path: str) -> bytes:
        handle = self._call("guest-file-open", path=path, mode="r")
        pieces = []
        while not (read := self._call("guest-file-read", handle=handle, count=PIECE))["eof"]:
            pieces.append(base64.b64decode(read["buf-b64"]))
        pieces.append(base64.b64decode(read["buf-b64"]))
        self._call("guest-file-close", handle=handle)
        return b"".join(pieces)

    def stop(self) -> None:
        with contextlib.suppress(AttributeError):
            self._lines.close()
            self._socket.close()
        super().stop()


class OpenSsh(WayIn):
    """One connection that later commands share (ControlMaster); files by sftp over it."""

    def version(self) -> str:
        return subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip()

    def _options(self) -> list[str]:
        guest = self._guest
        options = [f"Port={guest.port}", f"IdentityFile={guest.key}", f"ControlPath={self.directory}/control"]
        options += ["User=root", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        options += ["BatchMode=yes", "ControlMaster=auto", "ControlPersist=yes"]
        return ["-F", "none", *(word for option in options for word in ("-o", option))]

    def start(self) -> None:
        self._guest.start()
        # The connection that stays would hold whatever it inherits.
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        while subprocess.call(["ssh", *self._options(), "127.0.0.1", "true"], **quiet):
            time.sleep(AGAIN)

    def run(self, script: str) -> bytes:
        return output_of(["ssh", *self._options(), "127.0.0.1", script])

    def _sftp(self, line: str) -> None:
        output_of(["sftp", *self._options(), "-q", "-b", "-", "127.0.0.1"], stdin=line.encode())

    def put(self, data: bytes, path: str) -> None:
        source = self.directory / "put"
        source.write_bytes(data)
        self._sftp(f"put {source} {path}\n")

    def get(self, path: str) -> bytes:
        target = self.directory / "got"
        self._sftp(f"get {path} {target}\n")
        return target.read_bytes()

    def stop(self) -> None:
        with contextlib.suppress(Cannot):
            output_of(["ssh", *self._options(), "-O", "exit", "127.0.0.1"])
        super().stop()


class Paramiko(WayIn):
    """One open connection, a channel for each command; files by sftp on it."""

    def __init__(self, directory: Path) -> None:
        import paramiko

        self._paramiko, self._client = paramiko, paramiko.SSHClient()
        super().__init__(directory)

    def version(self) -> str:
        return f"paramiko {importlib.metadata.version('paramiko')}"

    def start(self) -> None:
        self._guest.start()
        self._client = self._paramiko.SSHClient()
        self._client.set_missing_host_key_policy(self._paramiko.AutoAddPolicy())
        while True:
            try:
                self._client.connect(
                    "127.0.0.1", self._guest.port, "root", key_filename=str(self._guest.key), look_for_keys=False
                )
            except (self._paramiko.SSHException, OSError, EOFError):
                time.sleep(AGAIN)
            else:
                return

    def run(self, script: str) -> bytes:
        _, out, _ = self._client.exec_command(script)
        data = bytes(out.read())
        if status := out.channel.recv_exit_status():
            raise RuntimeError(f"exit status {status}")
        return data

    def put(self, data: bytes, path: str) -> None:
        with self._client.open_sftp() as sftp, sftp.open(path, "wb") as file:
            file.set_pipelined(True)
            file.write(data)

    def get(self, path: str) -> bytes:
        with self._client.open_sftp() as sftp, sftp.open(path, "rb") as file:
            file.prefetch()
            return bytes(file.read())

    def stop(self) -> None:
        self._client.close()
        super().stop()
