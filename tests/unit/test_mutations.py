"""The mutations that the tests were seen to catch: still there to be made, and listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutations
from tests.behaviours import NUMBERS
from tests.mutation_table import MUTATIONS, Mutation

README = Path(mutations.__file__).parent / "README.md"


def test_every_behaviour_has_a_mutation() -> None:
    assert {mutation.number for mutation in MUTATIONS} == set(NUMBERS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.number}-{m.what}")
def test_its_text_stands_once_and_its_tests_exist(mutation: Mutation) -> None:
    assert (mutations.ROOT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests:
        file, *names = test.split("::")
        text = (mutations.ROOT / file).read_text()
        assert all(f"def {name}(" in text or f"class {name}:" in text for name in names), test


def test_the_list_is_the_readmes() -> None:
    rows = [f"| {m.number} | {m.what} | `{m.file}` | {m.vehicle} |" for m in MUTATIONS]
    assert README.read_text().split("|---|---|---|---|\n")[-1].splitlines() == rows
