"""The pytest plugin with VMs: fixtures in every kind of test, what a failure shows, workers, what is kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from byre import rundir, templates
from tests.conftest import machine_options

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

Run = Callable[..., pytest.RunResult]

#: The user's, with images: `pytester` gives each test another home.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """pytest with the plugin and those that it must get on with, on this run's kind of VM."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    pytester.makeconftest(f"""
        import pytest

        @pytest.fixture(scope="session")
        def byre_options():
            return {machine_options()!r}
    """)

    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")

    def run(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        plugins = ("byre.pytest_plugin", "pytest_asyncio.plugin", "xdist.plugin")
        more = [word for plugin in plugins for word in ("-p", plugin)]
        return pytester.runpytest_subprocess(*more, "-W", "error", *arguments, timeout=250)

    return run


def test_every_kind_of_test_gets_the_same_fixtures(run: Run, busybox: str) -> None:
    source = f"""
        import asyncio
        import pytest

        seen = []

        def uname(host):
            return host.run(["uname"], capture_output=True, check=True).stdout

        def test_plain(utility_vm, clean_vm):
            assert uname(utility_vm) == uname(clean_vm) == b"Linux\\n"
            assert utility_vm.id != clean_vm.id
            clean_vm.files.write("/tmp/mine", b"")
            seen.extend((utility_vm.id, clean_vm.id))

        @pytest.mark.asyncio
        async def test_async(utility_vm, clean_vm):
            assert await asyncio.to_thread(uname, utility_vm) == uname(clean_vm)
            assert utility_vm.id == seen[0]
            assert clean_vm.id != seen[1]
            assert "mine" not in [entry.name for entry in clean_vm.files.list("/tmp")]

        @pytest.mark.byre(image={busybox!r}, memory_mib=256, cpus=2)
        def test_container(container, clean_vm):
            assert uname(container) == b"Linux\\n"
            assert container.run(["nproc"], capture_output=True, text=True).stdout == "2\\n"
            total = clean_vm.run(["grep", "MemTotal", "/proc/meminfo"], capture_output=True, text=True).stdout
            assert 150_000 < int(total.split()[1]) < 262_144

        def test_no_image(container):
            pass
    """
    result = run(source)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*the fixture container needs an image*"])


FAILS = """
    import pytest
    from byre import pytest_plugin

    def test_fails(utility_vm, clean_vm, request):
        for word, vm in (("shared", utility_vm), ("own", clean_vm)):
            vm.run(["sh", "-c", f"echo the {word} console >/dev/console; echo '<5>the {word} log' >/dev/kmsg"])
        for used in (request.node.stash[pytest_plugin._own], request.config.stash[pytest_plugin._session]):
            if not used._kept_as:
                until(lambda: any("log" in line for line in used._log.lines), used.vm)
        assert clean_vm.run(["false"]).returncode == 0

    def until(condition, vm):  # a line of the log comes when the agent has time for it
        for _ in range(200):
            if condition():
                return
            vm.run(["sleep", "0.05"])

    def test_passes(clean_vm):
        pass
"""


def test_a_failure_shows_the_console_and_the_log_of_its_vms(run: Run) -> None:
    result = run(FAILS)
    result.assert_outcomes(passed=1, failed=1)
    text = result.stdout.str()
    for title in ("VM console (clean_vm)", "VM log (clean_vm)", "VM console (utility_vm)", "VM log (utility_vm)"):
        assert text.count(f"- {title} -") == 1
    for line in ("the own console", "the shared console", "the own log", "the shared log"):
        assert line in text
    assert "VM kept" not in text
    assert not_up(text)


def not_up(text: str) -> bool:
    """No VM of these tests is up."""
    return not [name for name in rundir.names() if name in text]


def test_the_vm_of_a_failed_test_is_left_up_and_one_can_get_in(run: Run) -> None:
    result = run(FAILS, "--byre-keep", "-n", "1")
    result.assert_outcomes(passed=1, failed=1)
    summary = result.stdout.str().partition("VMs that were left up")[2]
    kept = re.findall(r"test_fails.*byre shell (test-\w+) .*byre down \1", summary)
    try:
        assert len(kept) == 2, "the session's, and the test's own"
        assert "the own console" in result.stdout.str()
        assert {name for name in rundir.names() if name.startswith("test-") and rundir.is_up(name)} == set(kept)
        for name in kept:
            done = byre("exec", "--vm", "--in", name, "--", "uname")
            assert (done.returncode, done.stdout) == (0, "Linux\n")
    finally:
        for name in kept:
            assert byre("down", name).returncode == 0
    assert not_up(summary)


def test_a_kept_vm_has_its_container_still(run: Run, busybox: str) -> None:
    source = f"""
        import pytest

        @pytest.mark.byre(image={busybox!r})
        def test_fails(container):
            container.files.write("/left", b"behind")
            raise ValueError
    """
    result = run(source, "--byre-keep")
    found = re.search(r"byre shell -C test (test-\w+) ", result.stdout.str())
    assert found is not None, result.stdout.str()
    try:
        done = byre("exec", "--in", found[1], "test", "--", "cat", "/left")
        assert done.stdout == "behind"
    finally:
        byre("down", found[1])


def byre(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "byre", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_workers_share_a_template_and_do_not_meet(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no template there, so that both come to make it at the same time."""
    own = tmp_path / "cache" / "byre"
    own.mkdir(parents=True)
    for entry in (CACHE / "byre").iterdir():
        if entry.name != "templates":
            (own / entry.name).symlink_to(entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.parent))
    source = """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_it(utility_vm, clean_vm, number, worker_id):
            for vm in (utility_vm, clean_vm):
                assert vm.run(["true"], timeout=60).returncode == 0
                assert not vm.info()["machine"]["template"].startswith("none")
            print("session", utility_vm.id, "clean", clean_vm.id, worker_id)
    """
    result = run(source, "-n", "2", "--dist", "load", "-rP")
    result.assert_outcomes(passed=4)
    seen = re.findall(r"session (\w+) clean (\w+) (gw\d)", result.stdout.str())
    workers = {worker for _, _, worker in seen}
    assert workers == {"gw0", "gw1"}
    assert len({session for session, _, _ in seen}) == 2
    assert len({clean for _, clean, _ in seen}) == 4
    (_,) = templates.Store().templates()
    assert [name for name in os.listdir(own / "templates") if "." in name] == []
