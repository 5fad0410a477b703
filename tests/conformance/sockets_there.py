"""A server and a client that run where the test wants them (`python3 -c`): standard library, nothing of this tree.

serve ADDRESS...                 a line "ready [PORT]" for each; a connection's first byte says what it is for
ask ADDRESS COUNT BYTES          COUNT connections at once, a digest of BYTES through each; a line "ok COUNT"
hold ADDRESS                     one connection that sends "h", half-closes, and prints what comes as a digest

e  echo                     d  read to the end, answer with the digest
f  answer "first", half-close, go on reading; then a line "read BYTES CRC" on stdout
r  reset                    z  zeros without end
w  read to the end, then a line "end" on stdout

Where nobody reads any more the server says "stopped", and "reset" where the connection was.
"""

from __future__ import annotations

import inspect
import sys


def program() -> None:
    import os
    import socket
    import struct
    import sys
    import threading
    import zlib

    lock = threading.Lock()

    def say(text: str) -> None:
        with lock:
            os.write(1, text.encode() + b"\n")

    def open_socket(address: str) -> tuple[socket.socket, object]:
        if address.startswith("/"):
            return socket.socket(socket.AF_UNIX), address
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.socket(family), (host.strip("[]") or "127.0.0.1", int(port))

    def read_all(connection: socket.socket) -> tuple[int, int]:
        size = crc = 0
        while data := connection.recv(65536):
            size, crc = size + len(data), zlib.crc32(data, crc)
        return size, crc

    def serve_one(connection: socket.socket) -> None:
        try:
            answer(connection)
        except BrokenPipeError:
            say("stopped")
        except ConnectionResetError:
            say("reset")
        connection.close()

    def answer(connection: socket.socket) -> None:
        kind = connection.recv(1)
        if kind == b"e":
            while data := connection.recv(65536):
                connection.sendall(data)
        elif kind == b"d":
            size, crc = read_all(connection)
            connection.sendall(f"{size} {crc}".encode())
        elif kind == b"f":
            connection.sendall(b"first")
            connection.shutdown(socket.SHUT_WR)
            say("read {} {}".format(*read_all(connection)))
        elif kind == b"r":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == b"z":
            while True:
                connection.sendall(bytes(65536))
        elif kind == b"w":
            read_all(connection)
            say("end")

    def accept(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    def ask(address: str, size: int) -> None:
        connection, where = open_socket(address)
        connection.connect(where)
        data = os.urandom(size)
        connection.sendall(b"d" + data)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while more := connection.recv(4096):
            got += more
        connection.close()
        if got == f"{size} {zlib.crc32(data)}".encode():
            with lock:
                right.append(1)

    right: list[int] = []
    command, *rest = sys.argv[1:]
    if command == "serve":
        for address in rest:
            listener, where = open_socket(address)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(256)
            say("ready" if address.startswith("/") else f"ready {listener.getsockname()[1]}")
            threading.Thread(target=accept, args=(listener,), daemon=True).start()
        sys.stdin.read()
    elif command == "ask":
        address, count, size = rest[0], int(rest[1]), int(rest[2])
        threads = [threading.Thread(target=ask, args=(address, size)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say(f"ok {len(right)}")
    elif command == "hold":
        connection, where = open_socket(rest[0])
        connection.connect(where)
        try:
            connection.sendall(b"h")
            connection.shutdown(socket.SHUT_WR)
            say("got {} {}".format(*read_all(connection)))
        except OSError:  # of the shutdown it is ENOTCONN
            say("reset")


def command(python: str, *args: str) -> list[str]:
    """What runs it."""
    lines = inspect.getsource(program).splitlines()[1:]
    source = "\n".join(line[4:] for line in lines)
    return [python, "-c", "from __future__ import annotations\n" + source, *args]


if __name__ == "__main__":
    program() if len(sys.argv) > 1 else None
