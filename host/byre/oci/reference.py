"""Names of images in registries: ``registry[:port]/name[:tag][@digest]``, short forms filled in as docker does.

Rule: what is a path and what is a name is told from the text alone, never from what lies in the working directory:

    oci:PATH  oci-archive:PATH  docker-archive:PATH   a path
    /…  ./…  ../…  .  ..                              a path
    docker://NAME, and everything else                a name

so that a directory called ``debian`` cannot stand in for an image of that name.  Source: the grammar of
distribution/reference, which docker, podman and skopeo use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from byre.errors import InvalidRequest
from byre.oci.tarstream import show

DEFAULT_REGISTRY, DEFAULT_NAMESPACE, DEFAULT_TAG = "docker.io", "library", "latest"
#: Characters of registry and name together, as the grammar's authors bound them.
MAX_NAME = 255

_TRANSPORTS = ("oci:", "oci-archive:", "docker-archive:")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True)
class Reference:
    """A full name.  `digest` is "" where the tag decides; with a digest there is no tag, for it would not count."""

    registry: str
    path: str
    tag: str
    digest: str

    @property
    def repository(self) -> str:
        return f"{self.registry}/{self.path}"

    @property
    def name(self) -> str:
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag}"


def is_path(text: str) -> bool:
    """Whether it names a file or directory rather than an image in a registry; see the module."""
    return text.startswith((*_TRANSPORTS, "/", "./", "../")) or text in ("", ".", "..")


def parse(text: str) -> Reference:
    """``debian`` → docker.io/library/debian:latest.  Raises InvalidRequest, saying what is wrong."""
    rest = text.removeprefix("docker://")
    if len(rest) > 2 * MAX_NAME + 128:
        raise _invalid(text, "it is too long")
    if re.fullmatch(r"sha256:.*|[0-9a-f]{64}", rest):
        raise _invalid(text, "it is a digest, and no image here has it")
    rest, at, digest = rest.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _invalid(text, "what follows the @ is no sha256 or sha512 digest")
    tag = ""
    if ":" in rest.rpartition("/")[2]:
        rest, _, tag = rest.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise _invalid(text, f"{show(tag)} is no tag")
    registry, path = _split(rest)
    if not _REGISTRY.fullmatch(registry):
        raise _invalid(text, f"{show(registry)} is no registry's host name")
    if not _PATH.fullmatch(path):
        wrong = "names are in lower case" if _PATH.fullmatch(path.lower()) else f"{show(path)} is no image's name"
        raise _invalid(text, wrong)
    if len(registry) + 1 + len(path) > MAX_NAME:
        raise _invalid(text, f"registry and name have more than {MAX_NAME} characters")
    return Reference(registry, path, "" if digest else tag or DEFAULT_TAG, digest)


def _split(rest: str) -> tuple[str, str]:
    """`(registry, path)`: the first component is a registry if it looks like a host name."""
    first, slash, path = rest.partition("/")
    if not slash or not (set(".:") & set(first) or first == "localhost"):
        first, path = DEFAULT_REGISTRY, rest
    if first == "index.docker.io":  # what the Hub was called once
        first = DEFAULT_REGISTRY
    if first == DEFAULT_REGISTRY and path and "/" not in path:
        path = f"{DEFAULT_NAMESPACE}/{path}"
    return first, path


def _invalid(text: str, why: str) -> InvalidRequest:
    hint = "a name is [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST]; a path begins with / or . or oci:"
    if "\0" not in text and len(text) < MAX_NAME and os.path.exists(text):
        hint = f"for the file that is there give ./{text}"
    return InvalidRequest(f"{show(text)} names no image: {why}", hint=hint)
