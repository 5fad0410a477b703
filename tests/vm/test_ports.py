"""What only containers show of ports and sockets: their own network and root, their end; and real load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from byre import ProcessParameters, errors
from tests.conformance.sockets_there import command
from tests.conformance.test_ports import expected, listening, running, said
from tests.conformance.test_process import SOON

pytestmark = pytest.mark.vm

#: A web server as programs have it: HTTP/1.1 with connections that are kept.
WEB = """
import http.server, os
pages = {f"/{name}": open(name, "rb").read() for name in os.listdir(".")}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(pages[self.path])))
        self.end_headers()
        self.wfile.write(pages[self.path])
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 80), Handler).serve_forever()
"""

REQUESTS = 10_000


@pytest.fixture
async def python_container(vm: Any, debian: str) -> AsyncIterator[Any]:
    async with await vm.create_container(image=debian, args=["sleep", "infinity"]) as container:
        await container.start()
        yield container


@contextlib.asynccontextmanager
async def serving(host: Any, *addresses: str) -> AsyncIterator[tuple[Any, list[int]]]:
    """`sockets_there` at these addresses, and its ports."""
    async with running(host, *command("python3", "serve", *addresses)) as process:
        ports = [int((await said(process)).removeprefix("ready").strip() or 0) for _ in addresses]
        yield process, ports


async def agent(vm: Any) -> dict[str, str]:
    """Where the agent is, and how many it is."""
    script = "readlink /proc/1/ns/net; readlink /proc/self/ns/net; ls /proc/1/task | wc -l; ls /proc/1/fd | wc -l"
    lines = (await vm.run(["sh", "-c", script], capture_output=True)).stdout.decode().split()
    return dict(zip(("network", "own network", "threads", "descriptors"), lines, strict=True))


@pytest.mark.behaviour("B30")
async def test_a_container_has_ports_of_its_own(vm: Any, container: Any) -> None:
    before = await agent(vm)
    httpd = ("httpd", "-f", "-h", "/", "-p")
    async with (
        serving(vm, "127.0.0.1:7001", "[::1]:7003"),
        running(container, *httpd, "127.0.0.1:7002"),
        running(container, *httpd, "[::1]:7004"),
    ):
        for there, elsewhere, port in ((vm, container, "[::1]:7003"), (container, vm, "[::1]:7004")):
            await there.wait_for_port(port)
            with pytest.raises(errors.ConnectionRefused):
                await elsewhere.connect(port)
        await container.wait_for_port(7002)
        with pytest.raises(errors.ConnectionRefused):
            await vm.connect(7002)
        with pytest.raises(errors.ConnectionRefused):
            await container.connect(7001)
        async with (
            listening() as (port, _),
            container.expose(port, 7001),
            await container.connect(7001) as (reader, writer),
        ):
            writer.write(b"d" + b"x" * 1000)
            writer.write_eof()
            assert await reader.read() == expected(b"x" * 1000), "of the container, not of the VM"
        async with container.expose(1, 7005):
            with pytest.raises(errors.ConnectionRefused):
                await vm.connect(7005)
    after = await agent(vm)
    assert after["network"] == after["own network"] == before["network"], "the agent is where it was"
    assert after["threads"] == "1"


@pytest.mark.behaviour("B30", "B65")
async def test_no_link_leads_a_path_out_of_its_container(vm: Any, container: Any) -> None:
    outside = "/run/byre-ports-outside.sock"
    links = {
        "/tmp/absolute": outside,
        "/tmp/up": f"../../../../../..{outside}",
        "/tmp/magic": f"/proc/1/root{outside}",
        "/tmp/parents": f"/proc/self/cwd/../../..{outside}",
    }
    script = "".join(f"ln -s {target} {link}; " for link, target in links.items())
    script += "mkdir -p /run; ln -s /run /tmp/run"
    await container.run(["sh", "-c", script], check=True)
    async with serving(vm, outside):
        await vm.wait_for_port(outside)
        for link in links:
            with pytest.raises((errors.PathNotFound, errors.PathRefused, errors.SocketFailed)):
                await container.connect(link)
        inside = "/tmp/run/byre-ports-inside.sock"
        async with container.expose(1, inside):
            assert (await container.run(["test", "-S", inside])).returncode == 0
            assert (await vm.run(["test", "-e", "/run/byre-ports-inside.sock"])).returncode == 1
        with pytest.raises(errors.AddressInUse):  # a link at the end is a name that is taken
            async with container.expose(1, "/tmp/absolute"):
                pass
    await vm.run(["rm", "-f", outside])


async def test_ports_end_with_their_container(vm: Any, debian: str, tmp_path: Path) -> None:
    before = await agent(vm)
    async with await vm.create_container(image=debian, args=["sleep", "infinity"]) as container:
        with pytest.raises(errors.ContainerNotReady):
            await container.connect(80)
        await container.start()
        async with (
            serving(container, "127.0.0.1:80"),
            container.forward(0, 80) as forward,
            container.expose(1, 81) as exposure,
        ):
            published = await vm.publish(0, 80, container=container.id)
            assert [(port.host, port.container) for port in await vm.published()] == [(published, container.id)]
            reader, writer = await asyncio.open_connection("127.0.0.1", published.port)
            writer.write(b"e" * 11)
            assert await reader.readexactly(10) == b"e" * 10
            await container.terminate()
            async with asyncio.timeout(SOON):
                assert await reader.read() == b""
                writer.close()
                await forward.ended.wait()
                await exposure.ended.wait()
                while await vm.published():
                    await asyncio.sleep(0)
        for port in (forward.port, published.port):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(errors.ContainerNotReady):
            await container.connect(80)
        with pytest.raises(errors.ContainerNotReady):
            async with container.forward(0, 80):
                pass
    with pytest.raises(errors.ContainerNotFound):
        await vm.publish(0, 80, container="nosuch")
    async with asyncio.timeout(SOON):
        while int((await agent(vm))["descriptors"]) > int(before["descriptors"]):
            pass


@pytest.mark.behaviour("B42")
async def test_the_end_of_the_vm_ends_what_leads_there(fresh_vm: Any) -> None:
    server = await fresh_vm.start_process(
        ProcessParameters(args=command("python3", "serve", "127.0.0.1:80"), stdin=True, stdout=True)
    )
    assert await said(server) == "ready 80"
    forward = fresh_vm.forward(0, 80)
    await forward.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
    direct = await fresh_vm.connect(80)
    for each in (writer, direct.writer):
        each.write(b"e1")
    for each in (reader, direct.reader):
        assert await each.readexactly(1) == b"1"
    await fresh_vm.terminate()
    async with asyncio.timeout(SOON):
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(errors.ConnectionLost):
            await direct.reader.read()
        await forward.ended.wait()
    writer.close()
    with pytest.raises(errors.ConnectionLost):
        await fresh_vm.connect(80)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", forward.port)
    await server.close()


@pytest.mark.timeout(300)
@pytest.mark.not_on("serial")  # half an hour there, and no affair of the channel
async def test_a_web_server_answers_10000_requests_through_a_forward(vm: Any, python_container: Any) -> None:
    pages = {f"page{n}": os.urandom(100 + 500 * n) for n in range(8)}
    for name, data in pages.items():
        await python_container.files.write(f"/srv/{name}", data)
    at = asyncio.get_running_loop().time
    async with running(python_container, "sh", "-c", 'cd /srv && exec python3 -c "$0"', WEB):
        await python_container.wait_for_port(80)
        async with python_container.forward(0, 80) as forward:

            async def client(name: str) -> int:
                reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
                right = 0
                for _ in range(REQUESTS // len(pages)):
                    writer.write(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                    body = await reader.readexactly(length)
                    right += head.startswith(b"HTTP/1.1 200 ") and zlib.crc32(body) == zlib.crc32(pages[name])
                writer.close()
                return right

            begin = at()
            answered = await asyncio.gather(*(client(name) for name in pages))
            print(f"{REQUESTS} requests in {at() - begin:.1f} s")
            assert sum(answered) == REQUESTS
            assert forward.refused == 0
