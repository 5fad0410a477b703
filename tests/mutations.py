"""`python -m tests.mutations [NUMBER…]`: break the code on purpose, and see the tests of each behaviour fail.

Each mutation of `mutation_table` is made in a copy of the tree, where its tests are then run: "caught" when one of
them fails, "survived" when they pass.  Exits non-zero when one survives, or could not be judged: its text is gone,
no test was run, or the run had no end.

Rule: neither the working tree nor the user's caches are touched; what a broken VM spoils is a copy.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .mutation_table import MUTATIONS, Mutation
from .nested.userland import SOURCES

ROOT = Path(__file__).resolve().parent.parent

SOURCE_ROOTS = ("host", "guest", "bridge_proto", "images")

#: Of the cache, what takes long to make: packages, and what every guest image shares.  Images and layers are made
#: anew in each copy; a broken VM may write to them.
CACHED = ("images/apt", "images/base", "images/pins.json")

#: Seconds for one test, and for all tests of one mutation: many a mutation makes something wait for ever.
TEST_LIMIT = 90
RUN_LIMIT = 600

#: pytest's exit status when tests were run and one failed.
TESTS_FAILED = 1


def main(numbers: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not numbers or m.number in numbers]
    unknown = set(numbers) - {m.number for m in chosen}
    if unknown:
        print(f"no mutation of: {', '.join(sorted(unknown))}")
        return 2
    bad = 0
    for mutation in sorted(chosen, key=lambda m: m.vehicle != "local"):  # the quick ones first
        begin = time.monotonic()
        caught, how = judge(mutation)
        bad += not caught
        seconds = time.monotonic() - begin
        print(f"{mutation.number:<5} {'caught' if caught else 'NOT CAUGHT'}: {mutation.what}", flush=True)
        print(f"      on {mutation.vehicle}, {seconds:.0f} s: {how}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutations were caught")
    return 1 if bad else 0


def judge(mutation: Mutation) -> tuple[bool, str]:
    """Whether its tests notice it, and which of them, or why that is not known."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "tree"
        copy(tree)
        if mutate(tree, mutation) != 1:
            return False, f"its text does not stand once in {mutation.file}"
        environment = environment_of(tree, mutation.vehicle)
        if mutation.vehicle != "local":
            copy_cache(Path(environment["XDG_CACHE_HOME"]) / "byre")
        status, output = run(tree, mutation.tests, environment)
    if status == TESTS_FAILED:
        failed = re.findall(r"^(?:FAILED|ERROR) (tests/.+)", output, re.MULTILINE)
        return True, failed[0] if failed else "a test failed"
    if status == 0:
        return False, f"survived {', '.join(mutation.tests)}"
    return False, f"not judged (status {status}):\n{output[-2000:]}"


def copy(tree: Path) -> None:
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)


def mutate(tree: Path, mutation: Mutation) -> int:
    """How often the text was found; it is replaced where that is once."""
    path = tree / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    return text.count(mutation.old)


def environment_of(tree: Path, vehicle: str) -> dict[str, str]:
    """The copy instead of the tree, in every process that the tests start."""
    environment = {
        **os.environ,
        "PYTHONPATH": ":".join(str(tree / root) for root in ("", *SOURCE_ROOTS)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "BYRE_TEST_VEHICLES": vehicle,
        "BYRE_TEST_RESULTS": str(tree / "test-results"),
        "TMPDIR": str(tree.parent),
        "COLUMNS": "200",  # so that the summary says why a test failed
    }
    if vehicle != "local":
        environment["XDG_CACHE_HOME"] = str(tree.parent / "cache")
    return environment


def copy_cache(destination: Path) -> None:
    source = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byre"
    for name in CACHED:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, destination / name)
        elif (source / name).exists():
            shutil.copy2(source / name, destination / name)


def run(tree: Path, tests: tuple[str, ...], environment: dict[str, str]) -> tuple[int | str, str]:
    """pytest's exit status and output; "no end" for the status when it had to be killed."""
    command = ["env", "--default-signal"]  # whatever started this may ignore some, and the tests look at them
    command += [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"--timeout={TEST_LIMIT}", *tests]
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=RUN_LIMIT)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return "no end", output
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a broken agent has left
    return process.returncode, output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
