"""A pytest plugin (`-p tests.nested.record`): which tests belong to this run's machine, and how they ended.

Writes to the file that BYRE_NESTED_RECORD names, one JSON object a line: first `{"collected": {id: node id}}`, then
`{"id": …, "outcome": …}` for each test that was run.  An id is a node id without the name of its vehicle, so that
those of different vehicles can be compared.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from tests import vehicles

#: A vehicle as part of a parametrized test's id: `test_x[kvm]`, `test_x[kvm/container-15]`.
_NAME = re.compile(rf"(?<=[\[-])({'|'.join(vehicles.MACHINES)})(?=[\]/-])")


def plain(node_id: str) -> str:
    """A node id for any vehicle."""
    return _NAME.sub("VM", node_id)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave only what belongs to the machine of this run."""
    from tests.conftest import _vehicle

    mine = [item for item in items if _vehicle(item) in vehicles.MACHINES]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine
    _write({"collected": {plain(item.nodeid): item.nodeid for item in items}})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write({"id": plain(report.nodeid), "outcome": report.outcome})


def _write(line: dict[str, Any]) -> None:
    with open(os.environ["BYRE_NESTED_RECORD"], "a") as file:
        file.write(json.dumps(line) + "\n")
