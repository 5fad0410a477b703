"""Which Debian packages make the image, and how they get here: resolved and fetched by apt, never installed.

apt runs on a state directory of its own, with the host's sources, keys, proxies and pins, and with the host's
hooks left out; no root is needed and nothing of the host is changed.  apt checks signatures and digests; the
digests are written down as *pins*, and checked again whenever a package file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import tools
from .errors import IMPORT_HINT, BuildFailed, HostNotSupported, ImageCorrupt, PackagesUnavailable

#: What the guest is made of.  The generic kernel, because the cloud one has no 9p; tcc only compiles `init.c`.
WANTED = (
    "base-files",
    "base-passwd",
    "libc-bin",
    "linux-image-amd64",
    "python3",
    "python3-msgpack",
    "crun",
    "busybox-static",
    "tcc",
)

#: Dependencies that the image does without, told to apt as installed: what only maintainer scripts call, what
#: busybox stands for, and libraries of stdlib modules that `rootfs` leaves out.
ASSUMED = (
    "adduser",
    "coreutils",
    "cpio",
    "debconf",
    "dpkg",
    "initramfs-tools",
    "kmod",
    "libdb5.3",
    "libdebconfclient0",
    "libncursesw6",
    "libnsl2",
    "libreadline8",
    "libselinux1",
    "libsqlite3-0",
    "libssl3",
    "libtirpc3",
    "linux-base",
    "mawk",
    "media-types",
    "passwd",
    "tar",
    "udev",
)

#: Settings of the host that must not act here: hooks act on the host, extra indexes are only slow.
FOREIGN_SETTINGS = re.compile(
    r"(DPkg|APT::Update::(Pre|Post)-Invoke[^:]*|Acquire::IndexTargets|Dir::(State|Cache|Log))[ :]"
)

#: `'URL' file size SHA256:digest`, as `apt-get --print-uris` writes it.
PRINTED_URI = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})$")


@dataclass(frozen=True, order=True)
class Pin:
    """One package file: `name`, Debian `version`, `architecture`, `sha256` in hex, `size` in bytes."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int

    @property
    def filename(self) -> str:
        """As apt names it in its archive directory."""
        return f"{self.name}_{urllib.parse.quote(self.version, safe='+~-.')}_{self.architecture}.deb".replace(
            "%3A", "%3a"
        )


def save_pins(pins: Iterable[Pin]) -> str:
    """Pins as JSON text, in the order of their names."""
    return json.dumps([asdict(pin) for pin in sorted(pins)], indent=1) + "\n"


def load_pins(text: str) -> list[Pin]:
    """The reverse of `save_pins`; ValueError or TypeError for anything else."""
    return sorted(Pin(**fields) for fields in json.loads(text))


class Apt:
    """apt on a state directory of its own, `directory`; package files lie in `archives`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.archives = directory / "archives"

    def resolve(self, say: Callable[[str], None]) -> list[Pin]:
        """Look up what `WANTED` needs today.  Takes the network; seconds."""
        self._prepare()
        say("looking up packages")
        self._apt_get("update")
        # An archive directory that is empty: apt does not print what it has already.
        elsewhere = f"-oDir::Cache::archives={self.directory}/none"
        printed = self._apt_get("install", "--print-uris", elsewhere, *WANTED).decode()
        pins = sorted(_parse(line) for line in printed.splitlines() if line.startswith("'"))
        if not pins:
            raise PackagesUnavailable("apt named no package to fetch", hint=IMPORT_HINT)
        return pins

    def fetch(self, pins: list[Pin], say: Callable[[str], None]) -> None:
        """Download what `resolve` named and is not here yet, and drop what it did not name."""
        missing = [pin for pin in pins if not self._has(pin)]
        if missing:
            megabytes = sum(pin.size for pin in missing) / 1e6
            say(f"fetching {len(missing)} packages, {megabytes:.0f} MB")
            self._apt_get("install", "--download-only", *WANTED)
        wanted = {pin.filename for pin in pins}
        for file in self.archives.glob("*.deb"):
            if file.name not in wanted:
                file.unlink()
        for pin in pins:
            self.file(pin)

    def complete(self, pins: list[Pin]) -> bool:
        """Whether every package file is here, by name and size."""
        return all(self._has(pin) for pin in pins)

    def file(self, pin: Pin) -> Path:
        """The package file, its digest checked now."""
        path = self.archives / pin.filename
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != pin.sha256:
            path.unlink()
            raise ImageCorrupt(f"{path} has sha256 {found} and not {pin.sha256}", hint="build again")
        return path

    def _has(self, pin: Pin) -> bool:
        path = self.archives / pin.filename
        return path.is_file() and path.stat().st_size == pin.size

    def _prepare(self) -> None:
        """The state directory: the host's settings without its hooks, and a status file of what is assumed."""
        if not os.path.exists("/usr/bin/apt-get"):
            raise HostNotSupported("this host has no apt: images are built from Debian packages", hint=IMPORT_HINT)
        for part in ("lists/partial", "archives/partial", "none/partial"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        stanzas = (
            f"Package: {name}\nStatus: install ok installed\nMaintainer: none\nArchitecture: amd64\n"
            f"Multi-Arch: foreign\nVersion: 999\n{'Provides: awk' if name == 'mawk' else 'Section: none'}\n"
            f"Description: assumed\n\n"
            for name in ASSUMED
        )
        (self.directory / "status").write_text("".join(stanzas))
        settings = tools.run([tools.find("apt-config"), "dump"]).decode().splitlines()
        kept = [line for line in settings if not FOREIGN_SETTINGS.match(line)]
        (self.directory / "apt.conf").write_text("\n".join([*kept, *self._own_settings()]) + "\n")

    def _own_settings(self) -> list[str]:
        here = self.directory
        return [
            'Dir::Etc::parts "/dev/null";',  # `kept` has what it said
            'Dir::Etc::main "/dev/null";',
            f'Dir::State "{here}";',
            f'Dir::State::status "{here}/status";',
            f'Dir::State::lists "{here}/lists";',
            f'Dir::Cache "{here}";',
            f'Dir::Cache::archives "{self.archives}";',
            f'Dir::Log "{here}";',
            'APT::Architecture "amd64";',
            "#clear APT::Architectures;",
            'APT::Architectures { "amd64"; };',
            'APT::Install-Recommends "false";',
            'APT::Sandbox::User "root";',  # the sandbox user could not read a private directory
            'Acquire::Languages "none";',
            'Acquire::ForceHash "SHA256";',  # or --print-uris prints MD5, or nothing
            'Acquire::Retries "3";',
            'Debug::NoLocking "true";',  # the cache has a lock of its own
        ]

    def _apt_get(self, *arguments: str) -> bytes:
        command = [tools.find("apt-get"), "-q", "-y", *arguments]
        try:
            return tools.run(command, env={"APT_CONFIG": str(self.directory / "apt.conf"), **_proxies()})
        except BuildFailed as error:
            raise PackagesUnavailable(
                error.message, hint="check the network and /etc/apt, or " + IMPORT_HINT, **error.data
            ) from error


def _proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}


def _parse(line: str) -> Pin:
    match = PRINTED_URI.match(line)
    if match is None:
        raise PackagesUnavailable(f"apt gives no SHA-256 for a package: {line}", hint=IMPORT_HINT)
    _, filename, size, digest = match.groups()
    name, version, architecture = urllib.parse.unquote(filename.removesuffix(".deb")).split("_")
    return Pin(name, version, architecture, digest, int(size))
