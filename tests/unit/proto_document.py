"""The tables of WIRE.md that are made from the code:  python -m tests.unit.proto_document  writes them."""

from __future__ import annotations

import re
from pathlib import Path

from byre_proto import connection, errors, frames, limits, messages

WIRE = Path(__file__).parents[2] / "bridge_proto" / "byre_proto" / "WIRE.md"

#: Payloads of the frame types, in words.
PAYLOADS = {
    "HELLO": "[versions, name, capabilities, session, received, proof]",
    "REQUEST": "[call int, method str, arguments map, timeout int or nil]",
    "REPLY": "[call int, result map]",
    "ERROR": "[call int, code str, message str, hint str, data map]",
    "CANCEL": "call",
    "EVENT": "[name str, fields map]",
    "LOG": "[source str, level int, message str, dropped int]",
    "DATA": "bytes",
    "EOF": "bytes sent in all",
    "RESET": "reason",
    "STOP": "reason",
    "WINDOW": "increment",
    "PING": "token",
    "PONG": "token",
    "ACK": "numbered frames taken in",
    "CLOSE": "[code str, message str, hint str]",
}


def frames_table() -> str:
    lines = ["| type | name | payload | at most | on a stream | numbered |", "|---|---|---|---|---|---|"]
    for kind, (name, limit) in frames.TYPES.items():
        payload = PAYLOADS[name] + (f", {frames.INTEGERS[kind]}-byte integer" if kind in frames.INTEGERS else "")
        marks = ["yes" if kind in group else "" for group in (frames.STREAM_TYPES, frames.REPLAYED)]
        lines.append(f"| {kind} | {name} | {payload} | {limit} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def errors_table() -> str:
    assert connection.SessionLost.code in errors.BY_CODE  # some codes are added by that module
    lines = ["| code | class | meaning |", "|---|---|---|"]
    for code, cls in sorted(errors.BY_CODE.items()):
        meaning = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        lines.append(f"| `{code}` | {cls.__name__} | {meaning} |")
    return "\n".join(lines) + "\n"


def limits_table() -> str:
    """Names, values and the comments that stand above them; one comment may be about several."""
    source = Path(limits.__file__).read_text()
    lines = ["| limit | value | why |", "|---|---|---|"]
    for comment, names in re.findall(r"((?:^#: .*\n)+)((?:^[A-Z_]+ = .*\n)+)", source, re.MULTILINE):
        why = " ".join(line.removeprefix("#: ").strip() for line in comment.splitlines())
        for name in re.findall(r"^[A-Z_]+", names, re.MULTILINE):
            lines.append(f"| {name} | {getattr(limits, name)} | {why} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "frames": frames_table,
    "methods": messages.describe,
    "errors": errors_table,
    "limits": limits_table,
}


def section(document: str, name: str) -> tuple[int, int]:
    """Where the table of this name begins and ends."""
    begin = document.index(f"<!-- {name} -->\n") + len(f"<!-- {name} -->\n")
    return begin, document.index("<!-- end -->", begin)


def renewed(document: str) -> str:
    for name, table in TABLES.items():
        begin, end = section(document, name)
        document = document[:begin] + table() + document[end:]
    return document


if __name__ == "__main__":
    WIRE.write_text(renewed(WIRE.read_text()))
