"""The cache: whole images or none, one builder at a time, nothing trusted that comes from outside."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import byre_images
from byre_images import builder, cache, tools, transfer
from byre_images.cache import FILES, FORMAT, MANIFEST, Cache
from byre_images.errors import HostNotSupported, ImageCorrupt
from byre_images.packages import Apt, Pin

PINS = [Pin("crun", "1.8-1", "amd64", "0" * 64, 5)]


def quiet(line: str) -> None:
    pass


def fill(directory: Path, sources: dict[str, str], pins: list[Pin] = PINS) -> None:
    """An image's files, as the builder leaves them; what is in them is of no matter to the cache."""
    for name in FILES:
        (directory / name).write_bytes(name.encode() * 1000)
    manifest = {
        "format": FORMAT,
        "sources": sources,
        "packages": [{**vars(pin), "licences": []} for pin in pins],
        "files": {name: cache.digest_of(directory / name) for name in FILES},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, sort_keys=True))


def add(store: Cache, sources: dict[str, str]) -> byre_images.Image:
    final = store.built / cache.key(sources, PINS)
    with store.locked(quiet), store.new(final) as directory:
        fill(directory, sources)
    image = store.find(final.name)
    assert image is not None
    return image


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any program that the builder starts is a failure."""

    def run(command: Any, **rest: Any) -> bytes:
        raise AssertionError(f"ran {command}")

    monkeypatch.setattr(tools, "run", run)


def test_the_place_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_root() == tmp_path / "byre" / "images"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_root() == tmp_path / "home" / ".cache" / "byre" / "images"


def test_ensure_takes_what_is_there_and_runs_nothing(store: Cache, no_programs: None) -> None:
    image = add(store, builder.digests(builder.agent_sources()))
    store.save_pins(PINS)
    assert byre_images.ensure(cache=store.root) == image
    assert byre_images.list_images(cache=store.root) == [image]
    byre_images.verify(image)


def test_another_agent_is_another_image(store: Cache, no_programs: None, tmp_path: Path) -> None:
    add(store, builder.digests(builder.agent_sources()))
    store.save_pins(PINS)
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "__main__.py").write_text("def main(): ...\n")
    with pytest.raises(AssertionError, match="ran"):  # it starts to build
        byre_images.ensure(cache=store.root, guest=tmp_path / "agent")


def test_a_host_that_is_no_debian_is_told_to_import(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(HostNotSupported, match="byre image import"):
        byre_images.ensure(cache=store.root)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_does_not_pass(store: Cache, name: str) -> None:
    image = add(store, {"agent": "a"})
    path = image.directory / name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ImageCorrupt, match=name):
        byre_images.verify(image)


def test_a_cut_off_file_is_seen_at_once(store: Cache) -> None:
    image = add(store, {"agent": "a"})
    image.root.chmod(0o644)
    image.root.write_bytes(b"")
    with pytest.raises(ImageCorrupt, match="wrong size"):
        store.find(image.directory.name)
    assert store.images() == []


def test_a_changed_manifest_does_not_pass(store: Cache) -> None:
    image = add(store, {"agent": "a"})
    path = image.directory / MANIFEST
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    with pytest.raises(ImageCorrupt, match="manifest"):
        byre_images.verify(image)
    path.write_text(path.read_text().replace('"agent": "a"', '"agent": "b"'))
    with pytest.raises(ImageCorrupt, match="its name"):
        byre_images.verify(cache.load(image.directory))


BUILDER = """
import sys
from pathlib import Path
from byre_images.cache import Cache
store = Cache(Path(sys.argv[1]))
with store.locked(print), store.new(store.built / "final") as directory:
    (directory / "vmlinux").write_bytes(b"half")
    print("half", flush=True)
    sys.stdin.read()
"""


def builder_process(store: Cache) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, store.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    return process


def test_a_killed_builder_leaves_nothing_that_counts(store: Cache) -> None:
    with builder_process(store) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert len(list(store.built.iterdir())) == 1  # its unfinished directory
    assert store.images() == []
    add(store, {"agent": "a"})
    assert [path.name for path in store.built.iterdir()] == [cache.key({"agent": "a"}, PINS)]


def test_the_second_builder_waits_for_the_first(store: Cache) -> None:
    said, entered = [], threading.Event()
    waiting = threading.Event()

    def progress(line: str) -> None:
        said.append(line)
        waiting.set()

    def second() -> None:
        with store.locked(progress):
            entered.set()

    with builder_process(store) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert not entered.is_set()
        assert first.stdin is not None
        first.stdin.close()
        assert entered.wait(30)
        thread.join(30)
    assert said == ["waiting for another builder"]


def test_a_failed_build_leaves_nothing(store: Cache) -> None:
    with pytest.raises(RuntimeError), store.locked(quiet), store.new(store.built / "x") as directory:
        (directory / "vmlinux").write_bytes(b"half")
        raise RuntimeError
    assert list(store.built.iterdir()) == []


def test_images_that_nobody_used_go_and_others_stay(store: Cache) -> None:
    images = [add(store, {"agent": str(number)}) for number in range(cache.KEEP_IMAGES + 2)]
    long_ago = time.time() - cache.KEEP_SECONDS - 100
    for age, image in enumerate(images):
        os.utime(image.directory, (long_ago - age, long_ago - age))
    used = store.find(images[-1].directory.name)
    for age in range(cache.KEEP_BASES + 1):
        (store.base / str(age)).mkdir()
        os.utime(store.base / str(age), (long_ago - age, long_ago - age))
    store.prune()
    assert store.images() == [used, *images[: cache.KEEP_IMAGES - 1]]
    assert {path.name for path in store.base.iterdir()} == {str(age) for age in range(cache.KEEP_BASES)}


# -- export and import -------------------------------------------------------------------------------------


@pytest.fixture
def exported(store: Cache, tmp_path: Path) -> Path:
    byre_images.export(add(store, {"agent": "a"}), tmp_path / "image.tar.gz")
    return tmp_path / "image.tar.gz"


def test_an_exported_image_comes_back_the_same(store: Cache, exported: Path, tmp_path: Path) -> None:
    image = byre_images.import_image(exported, cache=tmp_path / "other")
    byre_images.verify(image)
    assert image.digest == store.images()[0].digest
    again = byre_images.import_image(exported, cache=tmp_path / "other")
    assert again == image
    byre_images.export(image, tmp_path / "again.tar.gz")
    assert (tmp_path / "again.tar.gz").read_bytes() == exported.read_bytes()
    assert Cache(tmp_path / "other").pins() is None  # it is not of our sources: `ensure` will not take it


def test_ensure_uses_an_imported_image_of_its_own_sources(store: Cache, no_programs: None, tmp_path: Path) -> None:
    byre_images.export(add(store, builder.digests(builder.agent_sources())), tmp_path / "file")
    image = byre_images.import_image(tmp_path / "file", cache=tmp_path / "other")
    assert byre_images.ensure(cache=tmp_path / "other") == image


def test_a_corrupt_image_is_not_exported(store: Cache, tmp_path: Path) -> None:
    image = add(store, {"agent": "a"})
    image.root.chmod(0o644)
    image.root.write_bytes(image.root.read_bytes().upper())
    with pytest.raises(ImageCorrupt):
        byre_images.export(image, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def repack(file: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes] | None]) -> None:
    """The same archive with each member changed; None drops it."""
    out = io.BytesIO()
    with tarfile.open(file) as old, tarfile.open(fileobj=out, mode="w:gz") as new:
        for member in old:
            stream = old.extractfile(member)
            assert stream is not None
            changed = change(member, stream.read())
            if changed is not None:
                changed[0].size = len(changed[1])
                new.addfile(changed[0], io.BytesIO(changed[1]))
    file.write_bytes(out.getvalue())


def wrong_bytes(member: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return member, data.replace(b"root.squashfs", b"evil.squashfs") if member.name != MANIFEST else data


def longer(member: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return member, data + b"x" if member.name != MANIFEST else data


def without_root(member: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes] | None:
    return None if member.name == "root.squashfs" else (member, data)


def linked(member: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    if member.name == "vmlinux":
        member.type, member.linkname, data = tarfile.SYMTYPE, "/etc/passwd", b""
    return member, data


def manifest(text: bytes) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]:
    return lambda member, data: (member, text if member.name == MANIFEST else data)


@pytest.mark.parametrize(
    "change",
    [
        wrong_bytes,
        longer,
        without_root,
        linked,
        manifest(b""),
        manifest(b"[]"),
        manifest(b"[" * 100_000),
        manifest(b'{"format": 99}'),
        manifest(b'{"format": 1, "sources": {}, "packages": [], "files": {}}'),
        manifest(b'{"format": 1, "sources": {}, "packages": [1], "files": {}}'),
    ],
)
def test_an_archive_that_is_not_what_it_says_is_refused(
    exported: Path, tmp_path: Path, change: Callable[[tarfile.TarInfo, bytes], Any]
) -> None:
    repack(exported, change)
    with pytest.raises(ImageCorrupt):
        byre_images.import_image(exported, cache=tmp_path / "other")
    assert list((tmp_path / "other" / "built").iterdir()) == []


def test_a_bomb_is_refused_by_its_size(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_FILE", 4096)
    with pytest.raises(ImageCorrupt, match="larger than"):
        byre_images.import_image(exported, cache=tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no tar", mtime=0), None])
def test_what_is_no_archive_is_refused(exported: Path, tmp_path: Path, content: bytes | None) -> None:
    whole = exported.read_bytes()
    exported.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ImageCorrupt):
        byre_images.import_image(exported, cache=tmp_path / "other")


def test_a_missing_archive_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        byre_images.import_image(tmp_path / "none", cache=tmp_path / "other")


def test_lost_pins_are_no_error(store: Cache) -> None:
    assert store.pins() is None
    store.root.mkdir(parents=True)
    store.save_pins(PINS)
    assert store.pins() == PINS
    store.pins_file.write_text('{"torn')
    assert store.pins() is None


def test_a_package_file_that_changed_is_refused_and_removed(store: Cache) -> None:
    apt = Apt(store.apt)
    apt.archives.mkdir(parents=True)
    (apt.archives / PINS[0].filename).write_bytes(b"12345")
    assert apt.complete(PINS)
    with pytest.raises(ImageCorrupt, match="sha256"):
        apt.file(PINS[0])
    assert not apt.complete(PINS)
