"""What all tests share: order (fast first), the record of shown behaviours, hosts and images.

The fixtures are named by life-cycle: `host` (any vehicle), `vm` (one VM for the session), `fresh_vm` (a VM of the
test's own).  A VM that cannot boot is a failure, never a skip.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from . import vehicles

RESULTS = Path(os.environ.get("BYRE_TEST_RESULTS", Path(__file__).parent.parent / "test-results"))

#: Directories in the order in which they run: what is fast and needs no VM comes first.
ORDER = ("unit", "fuzz", "conformance", "image", "images", "vm")


@pytest.hookimpl(tryfirst=True)  # before `-m vm` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        if _vehicle(item) in vehicles.MACHINES:
            item.add_marker("vm")
    elsewhere = [item for item in items if _vehicle(item) in _not_on(item)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]

    def rank(item: pytest.Item) -> tuple[int, int]:
        folder = item.path.relative_to(root).parts[0]
        vehicle = _vehicle(item)
        return (
            ORDER.index(folder) if folder in ORDER else len(ORDER),
            vehicles.ALL.index(vehicle) if vehicle in vehicles.ALL else 0,
        )

    items.sort(key=rank)


def _not_on(item: pytest.Item) -> list[str]:
    """Vehicles on which another test shows the same in another way, and all when a VM is not among this run's."""
    if item.get_closest_marker("vm") and not set(vehicles.selected()) & set(vehicles.MACHINES):
        return [_vehicle(item)]
    return [marker.args[0] for marker in item.iter_markers("not_on")]


def _vehicle(item: pytest.Item) -> str:
    parameters = getattr(item, "callspec", None)
    for name in ("vehicle", "place"):
        if parameters is not None and name in parameters.params:
            return str(parameters.params[name]).partition("/")[0]
    marker = item.get_closest_marker("vehicle")
    if marker is not None:
        return str(marker.args[0])
    return vehicles.machine() if item.get_closest_marker("vm") else ""


# -- the record of behaviours ------------------------------------------------------------------------------

_shown: dict[str, dict[str, dict[str, str]]] = {}  # number -> vehicle -> test id -> outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    numbers = [n for marker in item.iter_markers("behaviour") for n in marker.args]
    report.user_properties = [("behaviours", numbers), ("vehicle", _vehicle(item) or "any")]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs where the tests run, and again in the process that they report to, if that is another (pytest-xdist)."""
    properties = dict(report.user_properties)
    if report.when == "call" or report.outcome != "passed":
        for number in properties["behaviours"]:
            tests = _shown.setdefault(number, {}).setdefault(properties["vehicle"], {})
            tests[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add this run to the record, so that a run of a few tests forgets no other; `make test` begins a new one."""
    if not _shown or hasattr(session.config, "workerinput"):
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"behaviours-{'-'.join(vehicles.selected())}.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    for number, by_vehicle in _shown.items():
        for name, tests in by_vehicle.items():
            record.setdefault(number, {}).setdefault(name, {}).update(tests)
    file.write_text(json.dumps(record, indent=1, sort_keys=True))


# -- hosts -------------------------------------------------------------------------------------------------


def machine_options() -> dict[str, Any]:
    """What a UtilityVM of this run is forced to be: the vehicle is not left to chance."""
    if vehicles.machine() == "kvm":
        return {"accelerator": "kvm", "transport": "vsock"}
    if vehicles.machine() == "serial":
        return {"accelerator": "tcg", "transport": "serial"}
    return {"accelerator": "tcg", "transport": "virtio-serial"}


def keep_console(vm: Any, request: pytest.FixtureRequest, name: str = "") -> None:
    """Keep the console under the test's name when the test failed."""
    folder = RESULTS / "consoles"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name or request.node.name}.log").write_text(vm.console_tail(lines=400))


@pytest.fixture(scope="session")
async def living_vm(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """One VM for the whole session, and another one when it has died: its death fails one test, not all."""
    import byre

    machines: list[Any] = []
    async with AsyncExitStack() as stack:

        async def living() -> Any:
            if not machines or machines[-1].bridge.lost is not None:
                machines.append(await stack.enter_async_context(byre.UtilityVM(**machine_options())))
            return machines[-1]

        yield living
        if request.session.testsfailed:
            for number, machine in enumerate(machines):
                keep_console(machine, request, f"session-{number}")


@pytest.fixture
async def vm(living_vm: Callable[[], Awaitable[Any]]) -> Any:
    """The session's VM, for tests that leave it as they found it."""
    return await living_vm()


@pytest.fixture
async def fresh_vm(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A VM of the test's own, which may be killed."""
    import byre

    async with byre.UtilityVM(**machine_options()) as machine:
        failed = request.session.testsfailed
        yield machine
        if request.session.testsfailed > failed:
            keep_console(machine, request)


@pytest.fixture(params=vehicles.places())
def place(request: pytest.FixtureRequest) -> str:
    """Where a process test runs: a vehicle, or a container in one."""
    return str(request.param)


@pytest.fixture
def host(place: str, request: pytest.FixtureRequest) -> Any:
    """A `ProcessHost` for each place of this run."""
    names = {"local": "local_host", "sync": "sync_host", "line": "line_host", "cut": "cut_host"}
    return request.getfixturevalue("container" if place.endswith("/container") else names.get(place, "vm"))


@pytest.fixture
async def local_host() -> AsyncIterator[Any]:
    import byre

    async with byre.LocalHost() as local:
        yield local


@pytest.fixture
async def sync_host() -> AsyncIterator[Any]:
    from .sync_adapter import SyncHost

    async with SyncHost() as sync:
        yield sync


@pytest.fixture
async def line_host(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """An agent at the end of a line on which every thousandth byte is damaged, in each test others."""
    from .bad_line import line_host

    async with line_host(rate=1e-3, seed=zlib.crc32(request.node.name.encode())) as (host, _):
        yield host


@pytest.fixture
async def cut_host(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """An agent on a socket, the way to it cut every 20 kB each way, in each test elsewhere."""
    from .cuts.agent import cut_host

    async with cut_host(mean=20_000, seed=zlib.crc32(request.node.name.encode())) as (host, _, _):
        yield host


@pytest.fixture
async def container(vm: Any, busybox: str) -> AsyncIterator[Any]:
    """A running container whose init does nothing."""
    async with await vm.create_container(image=busybox, args=["sleep", "infinity"]) as running:
        await running.start()
        yield running


@pytest.fixture(scope="session")
def busybox() -> str:
    """The reference of a small container image."""
    from .images import busybox_layout

    return f"oci:{busybox_layout()}"


@pytest.fixture(scope="session")
def debian() -> str:
    """The reference of a real Debian userland in several layers."""
    from .images import debian_layout

    return f"oci:{debian_layout()}"
