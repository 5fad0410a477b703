"""WIRE.md says what the code does, wherever a table can be compared."""

from __future__ import annotations

import pytest

from byre_proto import connection, frames, limits, line, messages, streams, stuffing

from .proto_document import PAYLOADS, TABLES, WIRE, section
from .proto_vectors import FILES, LINE_FILE

HOW = "run  python -m tests.unit.proto_document"
DOCUMENT = WIRE.read_text()


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_the_codes(name: str) -> None:
    begin, end = section(DOCUMENT, name)
    assert DOCUMENT[begin:end] == TABLES[name](), HOW


def test_the_methods_table_is_describe() -> None:
    assert messages.describe() in DOCUMENT


def test_every_limit_and_every_frame_type_is_in_it() -> None:
    named = [name for name in vars(limits) if name.isupper()]
    assert [name for name in named if f"| {name} | {getattr(limits, name)} |" not in DOCUMENT] == []
    assert set(PAYLOADS) == {name for name, _ in frames.TYPES.values()}


def test_the_constants_in_its_text() -> None:
    assert " ".join(f"{byte:02x}" for byte in connection.MAGIC) in DOCUMENT
    assert f"prefaces of {connection.PREFACE_SIZE} bytes" in DOCUMENT
    assert f"A nonce is {connection.NONCE_SIZE} random bytes" in DOCUMENT
    assert f"version {connection.VERSIONS[1]}\n" in DOCUMENT.splitlines(keepends=True)[0]
    assert f"Capabilities: `{connection.RESUME}`" in DOCUMENT
    for number, name in enumerate(["NONE", "CANCELLED", "CLOSED", "PROCESS_GONE"]):
        assert getattr(streams, f"REASON_{name}") == number
    assert "Reasons: 0 none, 1 cancelled, 2 closed, 3 the process is gone." in DOCUMENT


def test_the_constants_in_the_text_about_lines() -> None:
    assert f"at most {line.MAX_PAYLOAD} bytes" in DOCUMENT
    assert f"At most {line.MAX_WINDOW} frames" in DOCUMENT
    assert f"A nonce is {line.NONCE_SIZE} random bytes" in DOCUMENT
    kinds = {"SYNC": line.SYNC, "SYNCED": line.SYNCED, "DATA": line.DATA, "ACK": line.ACK}
    for name, kind in kinds.items():
        assert f"| `{chr(kind)}` | {name} |" in DOCUMENT
    assert set(stuffing.SPECIAL) == {0x7D, 0x7E, *range(0x20), 0x7F, 0xFF}
    assert "00 to 1f, 7d, 7e, 7f and ff" in DOCUMENT


def test_every_vector_file_is_in_it() -> None:
    for name in (*FILES, LINE_FILE):
        assert f"| `{name}` |" in DOCUMENT


def test_the_streams_of_a_request_are_the_fields_it_says() -> None:
    for number, field in enumerate(("stdin", "stdout", "stderr"), 1):
        assert messages.streams_named({field: number}) == [number]
        assert f"`{field}`" in DOCUMENT
