"""The table of methods and events alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre_proto import messages
from byre_proto.errors import BY_CODE, ByreError, InvalidRequest, NotSupported, from_wire, to_wire
from tests.fuzz.pair import unhurried

TABLES = [(n, t) for n, (a, r) in messages.METHODS.items() for t in (a, r)] + list(messages.EVENTS.items())


@pytest.mark.parametrize("name, table", TABLES)
def test_every_type_of_the_table_is_known_and_every_default_fits_it(
    name: str, table: dict[str, tuple[Any, ...]]
) -> None:
    for field, spec in table.items():
        assert len(spec) in (1, 2), (name, field)
        for value in (None, 1, "x", b"x", True, [], {}, [1], {"a": 1}):
            messages.fits(value, spec[0])
        if len(spec) == 2:
            assert messages.fits(spec[1], spec[0]), (name, field)


@pytest.mark.parametrize(
    "value, kind, fit",
    [
        (1, "int", True),
        (True, "int", False),
        (1 << 64, "int", False),
        (-(1 << 63), "int", True),
        (1.0, "int", False),
        (None, "int", False),
        (None, "int?", True),
        ("x", "int?", False),
        (["a"], "[str]", True),
        (("a",), "[str]", True),
        (["a", 1], "[str]", False),
        ("ab", "[str]", False),
        ({"a": "b"}, "{str}", True),
        ({"a": 1}, "{str}", False),
        ({1: "a"}, "{any}", False),
        ({b"a": 1}, "{any}", False),
        ([object()], "[any]", True),
        (b"x", "bytes", True),
        (bytearray(b"x"), "bytes", False),
        ("x", "bytes", False),
        (1, "bool", False),
    ],
)
def test_kinds(value: object, kind: str, fit: bool) -> None:
    assert messages.fits(value, kind) is fit


@unhurried
@given(st.sampled_from(sorted(messages.METHODS)), st.dictionaries(st.text(), st.none() | st.integers() | st.text()))
def test_any_arguments_give_checked_ones_or_an_invalid_request(method: str, given_: dict[str, Any]) -> None:
    for check in (messages.check_arguments, messages.check_result):
        try:
            checked = check(method, given_)
        except InvalidRequest as error:
            assert error.data["field"]
            continue
        assert check(method, checked, strict=True) == checked


def test_unknown_names() -> None:
    with pytest.raises(NotSupported):
        messages.check_arguments("no.such", {})
    with pytest.raises(NotSupported):
        messages.check_event("no.such", {})


def test_streams_named() -> None:
    arguments = messages.check_arguments("process.create", {"stdin": 1, "stderr": 5})
    assert messages.streams_named(arguments) == [1, 5]
    assert messages.streams_named({}) == []


def test_the_module_prints_its_table() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "byre_proto.messages"], capture_output=True, text=True, check=True
    )
    assert run.stdout == messages.describe()


def test_every_code_is_a_word_of_its_own_and_survives_the_wire() -> None:
    for code, cls in BY_CODE.items():
        assert cls.code == code
        assert code == code.lower()
        assert " " not in code
        again = from_wire(*to_wire(cls("m", hint="h", a=1)))
        assert (type(again), again.message, again.hint, again.data) == (cls, "m", "h", {"a": 1})


def test_every_error_has_a_builtin_or_the_root_for_a_base() -> None:
    assert issubclass(BY_CODE["deadline-exceeded"], TimeoutError)
    assert issubclass(BY_CODE["program-not-found"], FileNotFoundError)
    assert issubclass(BY_CODE["protocol-error"], ConnectionError)
    assert all(issubclass(cls, ByreError) for cls in BY_CODE.values())
