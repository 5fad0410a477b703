"""Tests that are not run on the nested vehicle, each with its reason.

The key begins a test's id, as `record.plain` gives it: without the name of its vehicle.
"""

from __future__ import annotations

_SLOW = "hundreds of processes, or tens of VMs, take minutes where the owner's Python is itself emulated"
_CLIENT = "about programs beside the VM (keeper, command line, pytest), which do not see what carries the bridge"
_IMAGE = "about the guest image, booted by a QEMU of the test's own; no accelerator or transport plays a part"
_LAYERS = "about an image's layers, which reach the guest in the same way on every accelerator"
_SERIAL = "over the serial line, where a byte takes a millisecond"
_THERE = "about what the other vehicle has not, and this one has"

#: Beginning of an id -> reason.
EXCLUDED = {
    "tests/conformance/test_memory.py::test_a_thousand_in_turn": _SLOW,
    "tests/conformance/test_memory.py::test_a_thousand_unread": _SLOW,
    "tests/conformance/test_memory.py::test_many_processes_at_once_and_in_turn[VM/container]": _SLOW,
    "tests/image/": _IMAGE,
    "tests/vm/test_bad_input.py::test_an_accelerator_that_is_required_and_not_there": _THERE,
    "tests/vm/test_bad_input.py::test_a_transport_that_is_required_and_not_there": _THERE,
    "tests/vm/test_ci_recipe.py": _CLIENT,
    "tests/vm/test_cli.py": _CLIENT,
    "tests/vm/test_keeper.py": _CLIENT,
    "tests/vm/test_faults.py": _SLOW,
    "tests/vm/test_images.py": _LAYERS,
    "tests/vm/test_networks.py::test_by_the_commands": _CLIENT,
    "tests/vm/test_postgres.py": _LAYERS,
    "tests/vm/test_pytest_plugin.py": _CLIENT,
    "tests/vm/test_sandbox_service.py": _CLIENT,
    "tests/vm/test_serial.py": _SERIAL,
}


def reason(test_id: str) -> str | None:
    """Why a test is left out; None: it is run."""
    return next((text for start, text in EXCLUDED.items() if test_id.startswith(start)), None)
