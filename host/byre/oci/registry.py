"""Talks to registries, by skopeo: manifests, configurations and blobs come from it, each checked by the caller.

Rule: a skopeo that runs here ends with the call, whatever ends that, and with this process.  Logins, mirrors,
certificates and proxies are what its own files and the environment say (containers-auth.json(5),
containers-registries.conf(5), containers-certs.d(5)); `Registry` has only what users give on a command line.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from byre.errors import (
    ByreError,
    ImageInvalid,
    ImageNotFound,
    RegistryFailed,
    RegistryRefused,
    RegistryUnreachable,
    StorageFailed,
    ToolMissing,
)
from byre.machines.spawn import owned
from byre.oci.image import MAX_DOCUMENT
from byre.oci.reference import Reference
from byre_proto.errors import printable

#: Seconds without a new byte after which a registry counts as gone.
STALL = 60.0
#: Seconds between two looks at how far skopeo is.
_POLL = 0.1
#: The end of what skopeo wrote, where its last words are.
_LAST_WORDS = 4096

#: Tells bytes fetched so far, and may raise to end the call.
Tick = Callable[[], int]


@dataclass(frozen=True)
class Registry:
    """How to reach registries.

    authfile     in place of where `skopeo login` and `podman login` keep logins
    tls_verify   False: without TLS, or with a certificate that nobody vouches for
    """

    authfile: str | os.PathLike[str] | None = None
    tls_verify: bool = True

    def manifest(self, reference: Reference, digest: str, tick: Tick) -> bytes:
        """The manifest or index as the registry has it: by `digest`, or by the reference's own digest or tag."""
        return self._inspect(["--raw"], reference, digest, tick)

    def config(self, reference: Reference, digest: str, tick: Tick) -> bytes:
        """The configuration of the image whose manifest has this digest."""
        return self._inspect(["--raw", "--config"], reference, digest, tick)

    def copy(self, reference: Reference, digest: str, blobs: Path, scratch: Path, tick: Tick) -> None:
        """Fetch the image's layers into ``blobs/sha256/HEX``, those that are not there, and some documents.

        skopeo checks each blob against its digest, syncs and renames it.  `scratch`, an empty directory in the same
        file system, has what is under way, in files that begin with ``oci-put-blob``.
        """
        command = ["copy", "--quiet", *self._flags("--src-tls-verify")]
        command += [f"--dest-shared-blob-dir={blobs}", "--dest-oci-accept-uncompressed-layers"]
        _skopeo([*command, _source(reference, digest), f"oci:{scratch}:image"], reference, tick)

    def _inspect(self, what: list[str], reference: Reference, digest: str, tick: Tick) -> bytes:
        command = ["inspect", *what, *self._flags("--tls-verify")]
        return _skopeo([*command, _source(reference, digest)], reference, tick)

    def _flags(self, tls_verify: str) -> list[str]:
        flags = [f"--authfile={os.fspath(self.authfile)}"] if self.authfile is not None else []
        return flags if self.tls_verify else [*flags, f"{tls_verify}=false"]


def _source(reference: Reference, digest: str) -> str:
    return f"docker://{reference.repository}@{digest}" if digest else f"docker://{reference.name}"


def _skopeo(command: Sequence[str], reference: Reference, tick: Tick) -> bytes:
    """What it writes to stdout, a document.  `tick` is called several times a second, in this thread."""
    program = shutil.which("skopeo")
    if program is None:
        raise ToolMissing("there is no skopeo to fetch images with", hint="apt install skopeo")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        argv = owned([program, *command])
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
        ) as process:
            try:
                status = _wait(process, reference, tick)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if status != 0:
            raise _failed(errors, status, reference)
        out.seek(0)
        data = out.read(MAX_DOCUMENT + 1)
        if len(data) > MAX_DOCUMENT:
            raise ImageInvalid(f"a document of {reference.name} is over the limit of {MAX_DOCUMENT} bytes")
        return data


def _wait(process: subprocess.Popen[bytes], reference: Reference, tick: Tick) -> int:
    seen, since = -1, time.monotonic()
    while True:
        try:
            return process.wait(_POLL)
        except subprocess.TimeoutExpired:
            if (count := tick()) != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since > STALL:
                raise RegistryUnreachable(
                    f"{reference.registry} sent nothing for {STALL:.0f} s", hint=_AGAIN, reference=reference.name
                ) from None


# -- what went wrong ---------------------------------------------------------------------------------------

_AGAIN = "try again: layers that came whole are kept"
_LOGIN = "log in, if the name is right: skopeo login {registry}"

#: What skopeo's last words have in them; the first that fits.  The messages are those of Go's net package, of the
#: registry protocol's error codes and of errno.
_CAUSES: tuple[tuple[str, type[ByreError], str, str], ...] = (
    (
        r"no space left on device|disk quota exceeded",
        StorageFailed,
        "there is no room for {name}",
        "make room: byre image prune; or set XDG_DATA_HOME to another directory",
    ),
    (
        r"(open|mkdir|rename|chmod|link) \S+: permission denied",
        StorageFailed,
        "{name} cannot be written",
        "look at the permissions, or set XDG_DATA_HOME to another directory",
    ),
    (
        r"toomanyrequests|too many requests",
        RegistryFailed,
        "{registry} wants fewer requests",
        "wait, or log in for a higher limit: skopeo login {registry}",
    ),
    (
        r"unauthorized|authentication required|denied|invalid username/password|status code 40[13]",
        RegistryRefused,
        "{registry} does not give {name} to this login, or to anybody who is not logged in",
        _LOGIN,
    ),
    (
        r"manifest unknown|name unknown|repository name not known|not found|status code 404",
        ImageNotFound,
        "{registry} has no {name}",
        "look at the name and the tag",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        RegistryUnreachable,
        "{registry} does not speak TLS",
        "if it is your own: --tls-verify=false (in Python: Registry(tls_verify=False))",
    ),
    (
        r"x509:|certificate|tls:",
        RegistryUnreachable,
        "the certificate of {registry} is not trusted",
        "put its authority into /etc/containers/certs.d/{registry}/ca.crt",
    ),
    (
        r"no such host|lookup .* server misbehaving|Temporary failure in name resolution",
        RegistryUnreachable,
        "there is no host {registry}",
        "look at the name, the network and the proxy",
    ),
    (
        r"connection refused|unreachable|no route to host|i/o timeout|deadline exceeded|connection timed out"
        r"|connection reset|broken pipe|\bEOF\b|status code 5\d\d",
        RegistryUnreachable,
        "the connection to {registry} failed",
        _AGAIN,
    ),
    (
        r"digest|did not match|does not match",
        ImageInvalid,
        "what {registry} sent as {name} does not have its digest",
        _AGAIN,
    ),
)


def _failed(errors: IO[bytes], status: int, reference: Reference) -> ByreError:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _LAST_WORDS))
    said = _last_words(errors.read().decode("utf-8", "replace"))
    words = said.replace(reference.repository, "").replace(reference.registry, "")  # a name may be "denied"
    for pattern, error, message, hint in _CAUSES:
        if re.search(pattern, words, re.IGNORECASE):
            message, hint = (
                text.format(registry=reference.registry, name=reference.name) for text in (message, hint)
            )
            return error(f"{message}: {said}", hint=hint, reference=reference.name)
    return RegistryFailed(
        f"skopeo could not fetch {reference.name}: {said or f'status {status}'}",
        hint=f"see for yourself: skopeo inspect docker://{reference.name}",
        reference=reference.name,
    )


def _last_words(text: str) -> str:
    """The message of its last line, out of logrus' ``time=… level=fatal msg="…"``."""
    line = (text.strip().splitlines() or [""])[-1]
    found = re.search(r'msg="(.*)"', line)
    said = found[1].replace('\\"', '"') if found else line
    return printable(re.sub(r'^Error parsing image name "[^"]*": ', "", said)[:1000])
