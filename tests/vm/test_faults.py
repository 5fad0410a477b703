"""A short round of the faults: every strike once, each on another phase."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.strikes import STRIKES
from tests.namespaces import needs_own_mounts

pytestmark = [pytest.mark.vm, needs_own_mounts]

#: Seconds; a round takes two to twenty, the longer ones because deadlines run out in them.
LIMIT = 600


@pytest.mark.timeout(LIMIT + 30)
def test_nothing_hangs_is_lost_wrong_or_left_over_whatever_strikes() -> None:
    command = [sys.executable, "-m", "tests.faults", "--rounds", str(len(STRIKES)), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.splitlines()[-1] == f"rounds={len(STRIKES)} hung=0 lost=0 wrong=0 leftover=0", done.stdout
    assert done.returncode == 0, done.stderr
