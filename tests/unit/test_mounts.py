"""What `-v` and `mounts=` may say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from byre.errors import InvalidRequest
from byre.mounts import HostDirectory, Mount, Volume, parse_mount


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:/var/lib/data", Volume("data", "/var/lib/data")),
        ("data:/d:ro", Volume("data", "/d", read_only=True)),
        ("data:/d:rw", Volume("data", "/d")),
        ("/srv/www:/www", HostDirectory("/srv/www", "/www")),
        ("/srv/www:/www:ro", HostDirectory("/srv/www", "/www", read_only=True)),
        ("a/b:/x", HostDirectory(os.path.abspath("a/b"), "/x")),
        (".:/x", HostDirectory(os.getcwd(), "/x")),
        ("..:/x", HostDirectory(os.path.dirname(os.getcwd()), "/x")),
        ("~:/x", HostDirectory(os.path.expanduser("~"), "/x")),
        ("~/src/:/x", HostDirectory(os.path.expanduser("~/src"), "/x")),
    ],
)
def test_mounts_as_docker_writes_them(text: str, expected: Mount) -> None:
    assert parse_mount(text) == expected


@pytest.mark.parametrize("text", ["", "data", "data:", ":/x", "data:/x:", "a:/b:ro:z", "/srv:/x:cached"])
def test_what_has_another_form_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_mount(text)
    assert ":ro" in caught.value.hint


@pytest.mark.behaviour("B65")
@pytest.mark.parametrize("target", ["x", "", "/", "//", "/.", "/a/../..", "/a\0b"])
def test_a_target_is_an_absolute_path_below_the_root(target: str) -> None:
    for make in (lambda: Volume("data", target), lambda: HostDirectory("/srv", target)):
        with pytest.raises(InvalidRequest) as caught:
            make()
        assert caught.value.hint


@pytest.mark.parametrize("name", ["-data", "da ta", "x" * 65, "", "data\n", "a,b"])
def test_a_volume_has_a_name_that_can_be_a_file(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Volume(name, "/x")
    assert "./data" in caught.value.hint


def test_a_directory_is_meant_from_where_the_program_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mount = HostDirectory(Path("src"), "/src")
    monkeypatch.chdir("/")
    assert mount.path == str(tmp_path / "src")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(InvalidRequest):
        HostDirectory(path, "/x")
