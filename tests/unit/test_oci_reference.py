"""Names of images, and how they are told from paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from byre.errors import InvalidRequest
from byre.oci.reference import is_path, parse

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("docker.io/library/debian:12", "docker.io/library/debian:12"),
        ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
        ("docker://debian", "docker.io/library/debian:latest"),
        ("grafana/grafana", "docker.io/grafana/grafana:latest"),
        ("quay.io/podman/stable", "quay.io/podman/stable:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:v1.2-rc_3", "localhost:5000/app:v1.2-rc_3"),
        ("127.0.0.1:5000/a/b__c/d-e.f", "127.0.0.1:5000/a/b__c/d-e.f:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("REGISTRY.example/app", "REGISTRY.example/app:latest"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}"),
        (f"debian:12@{DIGEST}", f"docker.io/library/debian@{DIGEST}"),
        ("image.tar", "docker.io/library/image.tar:latest"),
    ],
)
def test_names_are_filled_in_as_docker_does(text: str, name: str) -> None:
    assert parse(text).name == name
    assert parse(name).name == name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no image's name"),
        ("Debian", "lower case"),
        ("a//b", "no image's name"),
        ("debian:", "no tag"),
        ("debian:.x", "no tag"),
        ("debian:" + "t" * 129, "no tag"),
        ("debian@sha256:12", "digest"),
        ("debian@md5:" + "0" * 32, "digest"),
        (DIGEST, "it is a digest"),
        (DIGEST[7:], "it is a digest"),
        ("-x/y", "no image's name"),
        ("host_name:1/x", "no registry"),
        ("a.b:port/x", "no registry"),
        ("a.b/../x", "no image's name"),
        ("a.b/" + "x" * 252, "more than 255"),
        ("x" * 5000, "too long"),
        ("a b", "no image's name"),
        ("a\nb", "no image's name"),
        ("a\0b", "no image's name"),
        ("--authfile=x", "no image's name"),
    ],
)
def test_what_is_no_name_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        parse(text)
    assert caught.value.hint and len(str(caught.value)) < 600


def test_a_file_that_was_meant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Image.tar").touch()
    with pytest.raises(InvalidRequest) as caught:
        parse("Image.tar")
    assert "./Image.tar" in caught.value.hint


def test_paths_are_told_by_the_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debian").mkdir()
    for path in ("/x", "./x", "../x", ".", "..", "oci:x", "oci-archive:x", "docker-archive:x", ""):
        assert is_path(path), path
    for name in ("debian", "debian:12", "docker://debian", "oci", "a/b", "oci.example/x", ".x"):
        assert not is_path(name), name
