"""Templates: saved machines from which clones are made, below the user's cache.

    $XDG_CACHE_HOME/byre/templates/     0700 and the user's own
        KEY/                            KEY: a digest of what the template depends on
            memory                      the guest's memory, sparse; every clone's, copied page by page on write
            state                       the state of the machine's devices
            manifest.json               what it depends on, and what the files must look like
        KEY.new/                        being made, by whoever holds the lock
        KEY.lock                        flock(2); the kernel lets go of it when its holder dies

Rule: a template is whole, as it was made, and the user's own, or it is not used: `find` removes what is not.  The
directory appears by a rename, after its files are on the disk, so a maker can be killed at any point.  Whoever
writes to the memory file changes its ctime, which no program can set back: that is looked at for each clone; the
contents only by `verify`, because that takes longer than a clone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ByreError, TemplateBroken
from .oci.files import flush
from .template_files import check_own, digest, look, memory_digest, remove

if TYPE_CHECKING:
    from .machines.base import Identity

logger = logging.getLogger(__name__)

#: Changes when what is in a template, or how a clone is made of it, changes: also the agent's part in it.
FORMAT = 2

#: Templates kept when another one is made, the last used first.  Each takes some 120 MB of disk; one is made anew
#: in the time of a boot.
KEEP = 8

#: Two measurements of the same counter differ by this at most, relative (see `machines.clock`).
TSC_TOLERANCE = 1000e-6

#: Free bytes without which none is made: a guest whose memory file cannot grow is killed.
MIN_FREE = 1024**3


@dataclasses.dataclass(frozen=True)
class Template:
    """A saved machine.  `used` is when a clone was last made of it, in seconds since 1970."""

    directory: Path
    manifest: dict[str, Any]
    used: float

    @property
    def key(self) -> str:
        return self.directory.name

    @property
    def memory(self) -> Path:
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def disk_bytes(self) -> int:
        """What it takes on the disk; the memory is sparse."""
        return sum(path.stat().st_blocks * 512 for path in (self.memory, self.state))


class Claim:
    """The lock of one key, held: its holder alone may make or remove the template.  A context manager."""

    def __init__(self, store: Store, key: str, fd: int) -> None:
        """Takes the lock's descriptor over, and makes `new`: an empty directory in which to make the template."""
        self._path = store.root / f"{key}.lock"
        self._fd = fd
        self.new = store.root / f"{key}.new"
        try:
            remove(self.new)  # of a maker that was killed: we hold the lock
            self.new.mkdir(mode=0o700)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove what is not finished, and let go."""
        try:
            remove(self.new)
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self._fd)


class Store:
    """See the module.  Its methods read and write files, and block for as long as that takes."""

    def __init__(self, root: Path | None = None) -> None:
        """Raises `PermissionRefused` where the directory is not one that only this user can use."""
        self.root = root or default_root()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_own(self.root, stat.S_ISDIR)

    def find(self, identity: Identity) -> Template | None:
        """The template for such a machine, marked as used; one that is not as it was made is removed."""
        directory = self.root / key_of(identity)
        try:
            template = self._load(directory)
            _check_rate(template, identity)
            os.utime(directory)
        except FileNotFoundError:
            if directory.is_dir():
                self.discard(directory.name, "it is not whole")
            return None
        except (ByreError, OSError) as error:
            self.discard(directory.name, str(error))
            return None
        return template

    def claim(self, identity: Identity) -> Claim | None:
        """The lock for making the template; None while another process has it."""
        return self._claim(key_of(identity))

    def finish(self, claim: Claim, identity: Identity, qemu: str) -> Template:
        """Make what is in `claim.new` the template: all of its files are written, and nobody has them open."""
        made = Template(claim.new, {}, time.time())
        for path in (made.memory, made.state):
            path.chmod(0o600)
            flush(path)
        manifest = {
            "format": FORMAT,
            "facts": identity.facts,
            "tsc_khz": identity.tsc_khz,
            "qemu": qemu,
            "made": time.time(),
            "memory": {"sha256": memory_digest(made.memory), **look(made.memory)},
            "state": {"sha256": digest(made.state)},
        }
        file = claim.new / "manifest.json"
        file.write_text(json.dumps(manifest))
        file.chmod(0o600)
        flush(file)
        flush(claim.new)
        final = self.root / key_of(identity)
        remove(final)
        claim.new.rename(final)
        flush(self.root)
        self.prune(KEEP)
        return Template(final, manifest, time.time())

    def templates(self) -> list[Template]:
        """All templates, the last used first; what is none is left out."""
        found = []
        for directory in self.root.iterdir():
            with contextlib.suppress(ByreError, OSError):
                if not directory.suffix:
                    found.append(self._load(directory))
        return sorted(found, key=lambda template: -template.used)

    def verify(self, template: Template) -> None:
        """Compare all contents with the manifest.  Raises `TemplateBroken`."""
        self._load(template.directory)
        if memory_digest(template.memory) != template.manifest["memory"]["sha256"]:
            raise TemplateBroken(f"the memory of the template {template.key} has changed", hint=_HINT)

    def discard(self, key: str, reason: str) -> None:
        """Remove a template.  Clones that run keep the files that they have open."""
        logger.warning("! the template %s is removed: %s", key[:12], reason)
        with contextlib.suppress(OSError):  # then it stays, and is found broken again
            remove(self.root / key)

    def prune(self, keep: int = 0) -> list[str]:
        """Remove all but the last used `keep`, and what killed makers left behind; the names of what is gone."""
        kept = {template.key for template in self.templates()[:keep]}
        gone = []
        for entry in list(self.root.iterdir()):
            if entry.name in kept or entry.suffix == ".lock":
                continue
            if entry.suffix == ".new":
                claim = self._claim(entry.stem)
                if claim is not None:  # its maker is dead
                    with claim:
                        gone.append(entry.name)
                continue
            remove(entry)
            gone.append(entry.name)
        return gone

    def _claim(self, key: str) -> Claim | None:
        path = self.root / f"{key}.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file that we locked may have been removed meanwhile: then the lock guards nothing.
                ours = os.path.samestat(os.fstat(fd), path.stat())
            except FileNotFoundError:
                ours = False
            except BlockingIOError:
                os.close(fd)
                return None
            except BaseException:
                os.close(fd)
                raise
            if ours:
                return Claim(self, key, fd)
            os.close(fd)

    def _load(self, directory: Path) -> Template:
        """What is there, if its files are this user's own and look as they did.  FileNotFoundError if it is not."""
        status = check_own(directory, stat.S_ISDIR)
        template = Template(directory, {}, status.st_mtime)
        for path in (template.memory, template.state, directory / "manifest.json"):
            check_own(path, stat.S_ISREG)
        try:
            manifest = json.loads((directory / "manifest.json").read_bytes())
            if manifest["format"] != FORMAT:
                raise TemplateBroken(f"it has the format {manifest['format']}, and this byre makes {FORMAT}")
            if {**look(template.memory), "sha256": ""} != {**manifest["memory"], "sha256": ""}:
                raise TemplateBroken("its memory was written to since it was made")
            if manifest["state"]["sha256"] != digest(template.state):
                raise TemplateBroken("its state has changed")
        except (ValueError, KeyError, TypeError) as error:
            raise TemplateBroken(f"its manifest cannot be read: {error!r}") from error
        return dataclasses.replace(template, manifest=manifest)


_HINT = "remove it: byre template rm KEY"


def default_root() -> Path:
    """`$XDG_CACHE_HOME/byre/templates`; a relative value of the variable is ignored, as its specification says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return cache / "byre" / "templates"


def key_of(identity: Identity) -> str:
    """The name of the template for such machines."""
    text = json.dumps([FORMAT, identity.facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_rate(template: Template, identity: Identity) -> None:
    then, now = template.manifest.get("tsc_khz"), identity.tsc_khz
    if (then is None) != (now is None) or (then and now and abs(then - now) > TSC_TOLERANCE * now):
        raise TemplateBroken(f"it was made where the time-stamp counter counts {then} kHz, here it is {now}")


def room_problem(root: Path) -> str | None:
    """Why there is no room for another template; None if there is."""
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    return None if free >= MIN_FREE else f"only {free // 1024**2} MiB are free in {root}"
