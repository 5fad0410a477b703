"""The pytest plugin: VMs and containers as fixtures, and what they had to say in the report of a test that failed.

    def test_it(clean_vm):
        assert clean_vm.run(["uname"], capture_output=True).stdout == b"Linux\\n"

    @pytest.mark.byre(image="debian:12", memory_mib=1024)
    def test_that(container): ...

The fixtures are objects of `byre.sync`, so that they work in every test.  An asyncio object belongs to one loop,
and the loops of pytest-asyncio, anyio and trio come and go with the tests that a VM outlives.  In an async test a
call blocks its loop; ``await asyncio.to_thread(vm.run, ...)`` does not.

Rule: this is loaded in every run of pytest wherever byre is installed.  So nothing of byre is imported before a
fixture asks for it, and tests that use no fixture of this module are not touched.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from byre import sync

_MARKER = (
    "byre(*, image, memory_mib, cpus): the image of the fixture `container`, and memory and processors of the VM "
    "of `clean_vm` and `container`"
)

#: Lines of a console, and of a log, in a report: a panic with its stack is about 60.
LINES = 200

#: The id of the fixture's container.
CONTAINER = "test"

#: How the title of a section begins that says how to get into a VM that was left up.
KEPT = "VM kept"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("byre", "utility VMs")
    text = "leave the VMs of failed tests up, and say how to get in"
    group.addoption("--byre-keep", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


# -- fixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def byre_options() -> dict[str, Any]:
    """Arguments of `byre.UtilityVM` for the VMs of all fixtures.  Override it in a conftest.py."""
    return {}


@pytest.fixture(scope="session")
def utility_vm(request: pytest.FixtureRequest, byre_options: dict[str, Any]) -> Iterator[sync.UtilityVM]:
    """A `byre.sync.UtilityVM` for the whole session (of each worker of pytest-xdist): leave it as it was."""
    with _vm("utility_vm", byre_options, request.config) as used:
        request.config.stash[_session] = used
        yield used.vm


@pytest.fixture
def clean_vm(request: pytest.FixtureRequest, byre_options: dict[str, Any]) -> Iterator[sync.UtilityVM]:
    """A `byre.sync.UtilityVM` of the test's own, a clone that nobody had before; memory and cpus as marked."""
    wanted = _wanted(request.node)
    wanted.pop("image", None)
    with _vm("clean_vm", {**byre_options, **wanted}, request.config) as used:
        request.node.stash[_own] = used
        yield used.vm


@pytest.fixture
def container(request: pytest.FixtureRequest, clean_vm: sync.UtilityVM) -> Iterator[sync.Container]:
    """A running `byre.sync.Container` of the marker's image in the test's `clean_vm`; its init only sleeps."""
    image = _wanted(request.node).get("image")
    if image is None:
        pytest.fail("the fixture container needs an image: @pytest.mark.byre(image=...)", pytrace=False)
    running = clean_vm.create_container(CONTAINER, image=image, entrypoint=["sleep", "infinity"])
    running.start()
    request.node.stash[_own].has_container = True
    yield running
    running.close()  # it ends with its VM, or is left up with it


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A marker that would have no effect is a mistake."""
    fixtures = getattr(item, "fixturenames", ())
    marked = any(marker.name == "byre" for marker in item.own_markers)
    if marked and "utility_vm" in fixtures and not {"clean_vm", "container"} & set(fixtures):
        pytest.fail("utility_vm is every test's: the marker byre is for clean_vm and container", pytrace=False)


def _wanted(item: pytest.Item) -> dict[str, Any]:
    """What the markers say; the nearest to the test counts."""
    wanted: dict[str, Any] = {}
    for marker in item.iter_markers("byre"):
        unknown = [*map(repr, marker.args), *(set(marker.kwargs) - {"image", "memory_mib", "cpus"})]
        if unknown:
            pytest.fail(f"the marker byre does not take {', '.join(unknown)}: {_MARKER}", pytrace=False)
        wanted = {**marker.kwargs, **wanted}
    return wanted


# -- a VM and its evidence ---------------------------------------------------------------------------------


class _Log(logging.Filter):
    """Takes down what a guest logs; on its way to the handlers goes only what would have gone anyway."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=LINES)
        self._logger = logging.getLogger(name)

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines.append(f"{record.levelname} {record.getMessage()}")
        assert self._logger.parent is not None
        return record.levelno >= self._logger.parent.getEffectiveLevel()

    def __enter__(self) -> _Log:
        self._logger.addFilter(self)
        self._logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(self)
        self._logger.setLevel(logging.NOTSET)


class _Used:
    """A VM in the hands of tests."""

    def __init__(self, fixture: str, vm: sync.UtilityVM, log: _Log, kept_as: str) -> None:
        self.vm = vm
        self.failed = False
        self.has_container = False
        self._fixture = fixture
        self._log = log
        self._kept_as = kept_as

    def sections(self) -> Iterator[tuple[str, str]]:
        """For the report of a test that failed."""
        from byre.errors import ByreError

        try:
            console = self.vm.console(LINES)
        except ByreError as error:
            console = f"it cannot be had: {error}"
        yield f"VM console ({self._fixture})", console
        if not self._kept_as:
            yield f"VM log ({self._fixture})", "\n".join(self._log.lines)
            return
        from byre import rundir

        log = rundir.find(self._kept_as).log  # the lines of a detached VM's guest are its keeper's
        yield f"VM log ({self._fixture})", "\n".join(log.read_text(errors="replace").splitlines()[-LINES:])
        inside = f"    its container: byre shell -C {CONTAINER} {self._kept_as}" if self.has_container else ""
        how = f"get in: byre shell {self._kept_as}{inside}    end it: byre down {self._kept_as}"
        yield f"{KEPT} ({self._fixture})", how


_own, _session = pytest.StashKey[_Used](), pytest.StashKey[_Used]()


@contextmanager
def _vm(fixture: str, options: dict[str, Any], config: pytest.Config) -> Iterator[_Used]:
    """A VM until the fixture's end; with --byre-keep a keeper has it from its start, and may go on having it."""
    from byre.sync import UtilityVM

    name = f"test-{os.urandom(4).hex()}" if config.getoption("byre_keep") else ""
    more = {"name": name, "detached": True} if name else {}
    vm = UtilityVM(**{**options, **more})
    vm.start()
    used = None
    try:
        with _Log(f"byre.guest.{vm.id}") as log:
            used = _Used(fixture, vm, log, name)
            yield used
    finally:
        if name and used is not None and used.failed:
            vm.close()
        else:
            vm.terminate()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and report.when != "teardown":  # then its VM is gone
        own, session = item.stash.get(_own, None), item.config.stash.get(_session, None)
        for used in (own, session if "utility_vm" in getattr(item, "fixturenames", ()) else None):
            if used is not None:
                used.failed = True
                report.sections.extend(used.sections())
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where to find what was kept: with pytest-xdist the reports come from the workers."""
    kept: dict[str, str] = {}
    for outcome in ("failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            for title, text in report.sections:
                if title.startswith(KEPT):
                    kept.setdefault(text, report.nodeid)
    if kept:
        terminalreporter.section("byre: VMs that were left up")
    for text, nodeid in kept.items():
        terminalreporter.line(f"{nodeid}: {text}")
