"""Real images: a Debian userland in several layers, and one of a hundred layers."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest

from byre import ProcessParameters
from byre.oci import files
from byre.oci.layout import open_image
from byre.oci.store import LayerStore
from tests.conformance.test_process import SOON
from tests.images import hundred_layers

pytestmark = pytest.mark.vm

MIB = 1024 * 1024

PROGRAM = r"""
#include <stdio.h>
int main(void) { printf("compiled %d\n", 6 * 7); return 7; }
"""


@pytest.mark.timeout(300)
async def test_python_starts_and_a_c_program_is_compiled_and_run(vm: Any, debian: str) -> None:
    async with await vm.create_container(image=debian, args=["sleep", "infinity"]) as container:
        await container.start()
        shown = await container.run(
            ["python3", "-c", "import ssl, sys; print(sys.version_info[0])"], capture_output=True, timeout=SOON * 3
        )
        assert shown.stdout == b"3\n"
        await container.run(
            ["gcc", "-x", "c", "-", "-o", "/tmp/p"], input=PROGRAM.encode(), check=True, timeout=SOON * 5
        )
        ran = await container.run(["/tmp/p"], capture_output=True, timeout=SOON)
        assert (ran.stdout, ran.returncode) == (b"compiled 42\n", 7)


async def test_whiteouts_modes_and_links_are_those_of_the_image(vm: Any, debian: str) -> None:
    """What the image's last layer did by hand (tests/images/make_debian_image.py)."""
    script = """
        test ! -e /etc/motd && test ! -e /usr/share/info || echo whiteout
        test "$(ls /usr/share/common-licenses)" = ONLY || echo opaque
        test "$(stat -c %a,%g /opt/byre)" = 2750,50 || echo mode
        test "$(stat -c %a /tmp)" = 1777 || echo tmp
        test -u /opt/byre/setuid || echo setuid
        test /opt/byre/capable -ef /opt/byre/linked || echo hard link
        cmp -s /opt/byre/release /usr/lib/os-release || echo link to a lower layer
        test -p /opt/byre/fifo && test -c /opt/byre/null || echo nodes
        test -f /usr/lib/byre-through-a-link || echo path through a link
        python3 -c 'import os; os.getxattr("/opt/byre/capable", "security.capability")' || echo capability
    """
    async with await vm.create_container(image=debian, args=["sleep", "infinity"]) as container:
        await container.start()
        result = await container.run(["sh", "-c", script], capture_output=True, timeout=SOON * 3)
        assert (result.stdout, result.stderr) == (b"", b"")


@pytest.mark.timeout(300)
async def test_64_mebibytes_pass_both_ways(vm: Any, debian: str) -> None:
    data = os.urandom(MIB) * 64
    async with await vm.create_container(image=debian, args=["sleep", "infinity"]) as container:
        await container.start()
        result = await container.run(["cat"], input=data, capture_output=True, timeout=SOON * 8)
        assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.timeout(300)
async def test_a_hundred_layers(vm: Any) -> None:
    async with await vm.create_container(image=f"oci:{hundred_layers()}", args=["sleep", "infinity"]) as container:
        await container.start()
        config = ProcessParameters(args=["sh", "-c", "cat /layers/last; ls /layers | grep -c ."], stdout=True)
        async with await container.create_process(config) as process:
            assert process.stdio.stdout is not None
            last, count = (await process.stdio.stdout.read()).split()
            assert last == b"99"
            assert int(count) == 99 + 1 + 1, "1 to 99, `last`, and the one that no layer hides"


async def test_a_layer_that_a_machine_has_is_not_pruned(container: Any, busybox: str) -> None:
    with open_image(busybox) as image:
        (layer,) = LayerStore().prepare(image)
    assert files.remove_unless_leased(layer.path) is None
    assert layer.path.exists()
