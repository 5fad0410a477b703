"""The pytest plugin without a VM: it costs nothing where it is not used, and mistakes are told at once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from byre import pytest_plugin

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """pytest with the plugin, and nothing else that happens to be installed, in a process of its own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

    def run(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "byre.pytest_plugin", *arguments, timeout=60)

    return run


def test_loading_it_imports_nothing_else_of_byre() -> None:
    """Every pytest run of everybody who has byre pays for it."""
    code = (
        "import sys, pytest; before = set(sys.modules)\n"
        "import byre.pytest_plugin; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["byre", "byre.pytest_plugin"]


def test_a_run_that_uses_no_fixture_imports_nothing_either(run: Run) -> None:
    source = """
        import sys

        def test_plain():
            assert {name for name in sys.modules if name.startswith(("byre", "qemu", "msgpack"))} == {
                "byre", "byre.pytest_plugin"}
    """
    run(source).assert_outcomes(passed=1)


def test_its_marker_and_its_option_are_known(run: Run) -> None:
    source = """
        import pytest

        @pytest.mark.byre(image="debian:12", memory_mib=256, cpus=2)
        def test_marked():
            pass
    """
    result = run(source, "--strict-markers", "--byre-keep", "-W", "error")
    result.assert_outcomes(passed=1)
    assert "left up" not in result.stdout.str()
    run(source, "--markers").stdout.fnmatch_lines(["@pytest.mark.byre(*image*memory_mib*cpus*"])


@pytest.mark.parametrize(
    "marker, fixture, told",
    [
        ("byre(memory='1g')", "clean_vm", "*does not take memory*"),
        ("byre('debian:12')", "container", "*does not take 'debian:12'*"),
        ("byre(memory_mib=256)", "utility_vm", "*utility_vm is every test's*"),
    ],
)
def test_a_marker_that_would_have_no_effect_is_an_error(run: Run, marker: str, fixture: str, told: str) -> None:
    source = f"""
        import pytest

        @pytest.mark.{marker}
        def test_it({fixture}):
            pass
    """
    result = run(source)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([told])


def test_the_nearest_marker_counts(run: Run) -> None:
    source = """
        import pytest
        from byre import pytest_plugin

        pytestmark = pytest.mark.byre(image="debian:12", cpus=2)

        @pytest.mark.byre(cpus=1)
        def test_it(request):
            assert pytest_plugin._wanted(request.node) == {"image": "debian:12", "cpus": 1}
    """
    run(source).assert_outcomes(passed=1)


def test_fixtures_of_the_same_name_are_not_in_the_way(run: Run) -> None:
    source = """
        import pytest

        @pytest.fixture
        def container():
            return "a box"

        @pytest.fixture
        def clean_vm():
            return "a room"

        def test_own(container, clean_vm):
            assert (container, clean_vm) == ("a box", "a room")
    """
    run(source).assert_outcomes(passed=1)


def test_the_log_is_taken_down_and_nobody_else_hears_more_than_before(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("byre.guest.0123")
    with pytest_plugin._Log("byre.guest.0123") as log:
        logger.info("kernel: %s", "one")
        logger.warning("agent: two")
    logger.warning("kernel: three")
    assert list(log.lines) == ["INFO kernel: one", "WARNING agent: two"]
    assert caplog.messages == ["agent: two", "kernel: three"]


def test_a_log_has_an_end() -> None:
    with pytest_plugin._Log("byre.guest.4567") as log:
        for number in range(pytest_plugin.LINES + 5):
            logging.getLogger("byre.guest.4567").info("%d", number)
    assert len(log.lines) == pytest_plugin.LINES
    assert log.lines[-1] == f"INFO {pytest_plugin.LINES + 4}"
