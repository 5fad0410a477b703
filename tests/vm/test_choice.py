"""What a VM runs on is chosen by what this host really has, and the reasons are in the log."""

from __future__ import annotations

import logging
import re

import pytest

import byre
from tests import vehicles

pytestmark = pytest.mark.vm


async def test_left_alone_it_takes_the_best_that_runs_here_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="byre.machines"):
        async with byre.UtilityVM() as vm:
            assert (await vm.run(["echo", "up"], capture_output=True)).stdout == b"up\n"
    said = dict(re.findall(r"= vm \w+ (accelerator|machine|transport) ([\w-]+): \w", caplog.text))
    assert said.keys() == {"accelerator", "machine", "transport"}
    if vehicles.machine() == "kvm":  # there KVM runs, and the kernel has vsock: anything less is a fallback
        assert (said["accelerator"], said["transport"]) == ("kvm", "vsock")
    if said["accelerator"] == "tcg":
        assert said["transport"] == "virtio-serial"
