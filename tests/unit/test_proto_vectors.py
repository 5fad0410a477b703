"""The golden vectors: the files are what the generator gives now, and the code passes them, bytewise too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import line_vectors, proto_vectors
from .proto_vectors import DIRECTORY, FILES, LINE_FILE, Player

HOW = "the wire changed: if that is meant, run  python -m tests.unit.proto_vectors  and say so in CHANGELOG.md"


def stored(name: str) -> list[dict[str, Any]]:
    return list(json.loads((DIRECTORY / name).read_text())["vectors"])


VECTORS = [(name, vector) for name in FILES for vector in stored(name)]


def test_the_directory_has_just_these_files() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == {*FILES, LINE_FILE, "README.md"}


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_up_to_date(name: str) -> None:
    assert (DIRECTORY / name).read_text() == proto_vectors.render(FILES[name]), HOW


def test_the_file_of_the_line_is_up_to_date() -> None:
    assert (DIRECTORY / LINE_FILE).read_text() == line_vectors.render(), HOW


@pytest.mark.parametrize("name, vector", VECTORS, ids=[f"{name}: {v['description']}" for name, v in VECTORS])
def test_the_code_passes_it_byte_by_byte(name: str, vector: dict[str, Any]) -> None:
    player = Player(vector)
    for step in vector["steps"]:
        if "receive" not in step:
            assert player.play(step) == step, HOW
            continue
        data = bytes.fromhex(step["receive"])
        size = 1 if len(data) < 3000 else 499
        played = [player.play({"receive": data[at : at + size].hex()}) for at in range(0, len(data), size)]
        assert [event for part in played for event in part["events"]] == step["events"], HOW
        assert [sent for part in played for sent in part["send"]] == step["send"], HOW


def test_every_negative_vector_ends_the_connection() -> None:
    for vector in stored("negative.json"):
        assert vector["steps"][-1]["events"][-1]["event"] == "Closed", vector["description"]
        assert vector["steps"][-1]["send"][-1]["frame"] == "CLOSE"
