"""apt and the other tools: what is asked of them, and what is said when they fail or are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byre_images import packages, tools
from byre_images.errors import BuildFailed, HostNotSupported, PackagesUnavailable, ToolMissing
from byre_images.packages import Apt, Pin

URI = "'http://host/pool/main/l/libc/libcap2_2.66-4%2bdeb12u3_amd64.deb' libcap2_1%3a2.66-4+deb12u3_amd64.deb 27708"


def test_a_printed_uri_becomes_a_pin() -> None:
    pin = packages._parse(f"{URI} SHA256:{'ab' * 32}")
    assert pin == Pin("libcap2", "1:2.66-4+deb12u3", "amd64", "ab" * 32, 27708)
    assert pin.filename == "libcap2_1%3a2.66-4+deb12u3_amd64.deb"


@pytest.mark.parametrize("digest", ["", " MD5Sum:8d98f0c882f269aaee8437bcfe89346e"])
def test_a_package_without_a_good_digest_is_refused(digest: str) -> None:
    with pytest.raises(PackagesUnavailable, match="SHA-256"):
        packages._parse(URI + digest)


def test_pins_come_back_from_their_text_in_one_order() -> None:
    pins = [Pin("b", "1", "all", "0" * 64, 1), Pin("a", "2~x", "amd64", "1" * 64, 2)]
    assert packages.load_pins(packages.save_pins(pins)) == sorted(pins)
    assert packages.save_pins(pins) == packages.save_pins(pins[::-1])


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "SEARCH", str(tmp_path))
    with pytest.raises(ToolMissing, match="apt-get install squashfs-tools-ng"):
        tools.find("tar2sqfs")


def test_a_failed_command_is_shown_ready_to_paste_with_its_words_escaped() -> None:
    with pytest.raises(BuildFailed) as caught:
        tools.run(["/bin/sh", "-c", "printf 'no \\033[31m' >&2; exit 3"])
    assert "/bin/sh -c 'printf" in str(caught.value)
    assert "no \\x1b[31m" in str(caught.value)
    assert caught.value.data["status"] == 3


def test_a_failed_stream_is_told_after_its_end() -> None:
    with pytest.raises(BuildFailed, match="status 4"), tools.reading(["/bin/sh", "-c", "echo x; exit 4"]) as out:
        assert out.read() == b"x\n"


def test_nothing_of_the_callers_environment_reaches_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    lines = tools.run(["/usr/bin/env"]).decode().splitlines()
    assert {"TZ=UTC", "LC_ALL=C.UTF-8", "SOURCE_DATE_EPOCH=0"} <= set(lines)
    assert len(lines) == len(tools.ENVIRONMENT)


def test_a_host_without_apt_is_told_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: False)
    with pytest.raises(HostNotSupported, match="byre image import"):
        Apt(tmp_path / "apt").resolve(lambda line: None)


class Programs:
    """Stands for every program: records the calls, and answers by apt's verb."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.answers: dict[str, bytes | Exception] = {}

    def run(self, command: list[str], **rest: Any) -> bytes:
        self.calls.append(command)
        verb = next(word for word in command[1:] if not word.startswith("-"))
        answer = self.answers.get(verb, b"")
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs()
    monkeypatch.setattr(tools, "find", lambda tool: tool)
    monkeypatch.setattr(tools, "run", programs.run)
    return programs


@pytest.fixture
def apt(tmp_path: Path) -> Apt:
    return Apt(tmp_path / "apt")


def test_the_hosts_settings_are_kept_and_its_hooks_are_not(apt: Apt, programs: Programs) -> None:
    programs.answers["dump"] = (
        b'Acquire::http::Proxy "http://proxy:3128";\nAPT::Update::Post-Invoke:: "rm -rf /";\n'
        b'DPkg::Pre-Install-Pkgs:: "x";\nDir::Cache "var/cache/apt";\n'
    )
    programs.answers["install"] = f"{URI} SHA256:{'ab' * 32}\n".encode()
    assert [pin.name for pin in apt.resolve(lambda line: None)] == ["libcap2"]
    settings = (apt.directory / "apt.conf").read_text()
    assert 'Acquire::http::Proxy "http://proxy:3128";' in settings
    assert "rm -rf" not in settings
    assert "DPkg" not in settings
    assert settings.count("Dir::Cache ") == 1
    stanzas = (apt.directory / "status").read_text().split("\n\n")
    assert "Package: initramfs-tools" in "".join(stanzas)
    assert sum("Provides: awk" in stanza for stanza in stanzas) == 1


@pytest.mark.parametrize("step", ["update", "install"])
def test_what_apt_says_is_passed_on(apt: Apt, programs: Programs, step: str) -> None:
    programs.answers[step] = BuildFailed("status 100 from: apt-get\nE: Unable to locate package")
    with pytest.raises(PackagesUnavailable, match=r"(?s)Unable to locate.*byre image import"):
        apt.resolve(lambda line: None)


def test_packages_that_are_no_longer_wanted_go(apt: Apt, programs: Programs) -> None:
    apt.archives.mkdir(parents=True)
    pin = Pin("new", "1", "all", "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", 3)
    (apt.archives / "old_1_all.deb").write_bytes(b"old")
    (apt.archives / pin.filename).write_bytes(b"foo")
    apt.fetch([pin], lambda line: None)
    assert [path.name for path in apt.archives.iterdir()] == ["new_1_all.deb"]
    assert programs.calls == []
