"""What can be typed, and what it becomes."""

from __future__ import annotations

import pytest

from byre import rundir
from byre.cli import parser
from byre.cli.copy import Operand
from byre.cli.parser import parse
from byre.errors import InvalidRequest
from byre.mounts import HostDirectory, Volume


def test_options_end_where_the_image_begins() -> None:
    arguments = parse(["run", "-it", "-e", "A=1", "oci:x", "-it", "--", "sh", "-c"])
    assert (arguments.target, arguments.command_line) == ("oci:x", ["-it", "--", "sh", "-c"])
    assert arguments.interactive and arguments.tty and arguments.env == ["A=1"]


@pytest.mark.parametrize(
    ("line", "target", "command"),
    [
        ("run oci:x", "oci:x", []),
        ("run oci:x -- -v", "oci:x", ["-v"]),
        ("run -- oci:x uname -a", "oci:x", ["uname", "-a"]),
        ("run --vm -- uname -a", "", ["uname", "-a"]),
        ("run --vm uname --vm", "", ["uname", "--vm"]),
        ("run oci:x a -- b", "oci:x", ["a", "--", "b"]),
        ("exec web -- ls -l", "web", ["ls", "-l"]),
        ("exec --in other web ls -l", "web", ["ls", "-l"]),
        ("exec --vm -- ls", "", ["ls"]),
    ],
)
def test_image_or_container_and_command_are_told_apart(line: str, target: str, command: list[str]) -> None:
    arguments = parse(line.split())
    assert (arguments.target, arguments.command_line) == (target, command)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "run",
        "run --vm",
        "run --vm --",
        "run --no-such-flag oci:x",
        "run --priv oci:x",  # no abbreviations: a flag that comes later must not change what this means
        "run --fresh --in a oci:x",
        "run --fresh -d oci:x",
        "run --fresh --pod shop oci:x",
        "run --pod shop --hostname web oci:x",
        "run --vm --pod shop true",
        "pod",
        "pod rm",
        "pod create a b",
        "run -d -it oci:x",
        "run -d --timeout 1 oci:x",
        "run --vm -d true",
        "run --vm --rm true",
        "run --vm --cap-add ALL true",
        "run -m none oci:x",
        "run --cpus 0 oci:x",
        "run --timeout nan oci:x",
        "exec web",
        "exec",
        "cp",
        "cp a:/x",
        "stop",
        "logs",
        "image",
        "image export",
        "image pull",
        "image pull --tls-verify=maybe debian",
        "image rm",
        "image prune --older-than 3",
        "run --pull sometimes debian",
        "run --vm --pull always true",
        "run --vm --tls-verify=false true",
        "up a b",
        "up --machine vax",
    ],
)
def test_usage_errors_exit_with_2_and_a_hint(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("byre: error: ") and "\nhint: byre" in err


@pytest.mark.parametrize(
    ("text", "host", "guest"),
    [
        ("8080:80", "127.0.0.1:8080", "127.0.0.1:80"),
        ("8080:80/tcp", "127.0.0.1:8080", "127.0.0.1:80"),
        ("80", "127.0.0.1:0", "127.0.0.1:80"),
        ("0:80", "127.0.0.1:0", "127.0.0.1:80"),
        ("127.0.0.2::80", "127.0.0.2:0", "127.0.0.1:80"),
        ("0.0.0.0:8080:80", "0.0.0.0:8080", "127.0.0.1:80"),
        ("[::1]:8080:80", "[::1]:8080", "127.0.0.1:80"),
    ],
)
def test_ports_are_closed_to_others_unless_an_address_says_so(text: str, host: str, guest: str) -> None:
    for line in (f"run -p {text} oci:x", f"run --vm --publish {text} true", f"up -p {text}"):
        ((here, there),) = parse(line.split()).publish
        assert (str(here), str(there)) == (host, guest)


@pytest.mark.parametrize(
    "text",
    ["", ":", "80:", "a:80", "80:80/udp", "1:2:3:4", "x.org:80:80", "65536:80", "80:0", "80:65536", "\u0668:80"],
)
def test_what_is_no_port_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["run", "-p", text, "oci:x"])
    assert caught.value.code == 2
    assert "-p" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512m", 512 << 20), ("2G", 2 << 30), ("3k", 3 << 10), ("7b", 7), ("1t", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parser.size(text) == size


@pytest.mark.parametrize(
    ("text", "age"), [("90s", 90), ("5m", 300), ("12h", 43200), ("30d", 30 * 86400), ("0s", 0)]
)
def test_ages(text: str, age: float) -> None:
    assert parser.age(text) == age


def test_flags_stand_before_and_after_the_command() -> None:
    assert parse(["-v", "ps"]).verbose and parse(["ps", "-v"]).verbose and not parse(["ps"]).verbose
    assert parse(["--debug", "image", "ls"]).debug


def test_help_states_which_vm_is_used_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ('"default" while it is up', "124", "125", "126", "127", "128+n", "Ctrl-C", "SIGHUP"):
        assert word in text


def test_every_command_leads_to_a_function() -> None:
    from importlib import import_module

    lines = [
        "run oci:x",
        "exec --vm a",
        "cp a:/x .",
        "shell",
        "up",
        "down",
        "ps",
        "stop a",
        "rm a",
        "logs a",
        "doctor",
    ]
    lines += ["image build", "image ls", "image verify", "image export f", "image import f", "image pull a b"]
    lines += ["image inspect a", "image rm a", "image prune"]
    lines += ["volume create a", "volume ls", "volume inspect a", "volume rm a b", "volume prune -f"]
    lines += ["template ls", "template rm x", "template prune", "template verify"]
    for line in lines:
        module, function = parse(line.split()).command.split(":")
        assert callable(getattr(import_module(f"byre.cli.{module}"), function)), line


@pytest.mark.parametrize(
    ("text", "container", "path"),
    [
        ("web:/etc/passwd", "web", "/etc/passwd"),
        ("web:relative", "web", "relative"),
        ("web:a:b", "web", "a:b"),
        (":/run/x", "", "/run/x"),
        ("file", None, "file"),
        ("./web:x", None, "./web:x"),
        ("/srv/web:x", None, "/srv/web:x"),
        ("dir/web:x", None, "dir/web:x"),
        ("-", None, "-"),
    ],
)
def test_what_cp_copies(text: str, container: str | None, path: str) -> None:
    assert Operand.of(text) == (container, path)


def test_a_container_alone_is_nothing_to_copy() -> None:
    with pytest.raises(InvalidRequest, match="web:"):
        Operand.of("web:")


def test_the_default_vm_is_the_run_directorys() -> None:
    assert parser.DEFAULT_VM == rundir.DEFAULT


def test_mounts_and_roots_of_this_host() -> None:
    arguments = parse(["run", "-v", "/src:/dst:ro", "-v", "data:/data", "image", "true"])
    assert arguments.volume == [HostDirectory("/src", "/dst", read_only=True), Volume("data", "/data")]
    arguments = parse(["run", "--rootfs", "root", "--", "sh", "-c", "x"])
    assert (arguments.rootfs, arguments.target, arguments.command_line) == ("root", "", ["sh", "-c", "x"])


@pytest.mark.parametrize(
    "line", ["run -v /src image", "run -v src:dst image", "run --rootfs root", "run --vm -v /a:/b true"]
)
def test_what_cannot_be_mounted_is_a_usage_error(line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    assert caught.value.code == 2
