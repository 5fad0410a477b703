"""Layers become squashfs images: whole, the same bytes each time, shared, and never torn (B63)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from byre.errors import ByreError, ImageInvalid, MachineFailed, StorageFailed, ToolMissing
from byre.oci import layers as layers_module
from byre.oci import tarstream, tree
from byre.oci.layout import open_image
from byre.oci.store import LayerImage, LayerProgress, LayerStore
from examples.busybox_image import Layer, write_layout
from tests import images

from . import oci_oracle
from .oci_tar import header

pytestmark = pytest.mark.behaviour("B63")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting the images needs root")
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")


def prepare(layout: Path, store: Path, progress: Callable[[LayerProgress], None] | None = None) -> list[LayerImage]:
    with open_image(f"oci:{layout}") as image:
        return LayerStore(store).prepare(image, progress)


def layout(tmp_path: Path, *layers: bytes, compress: bool = True, name: str = "layout") -> Path:
    return write_layout(tmp_path / name, layers, {}, compress=compress)


def listed(image: Path) -> dict[str, tarfile.TarInfo]:
    """The image's entries as sqfs2tar, another program, gives them back."""
    packed = subprocess.run(["sqfs2tar", image], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {entry.name.rstrip("/"): entry for entry in archive}


def hashes(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (store / "v1/images").iterdir()}


def rich() -> bytes:
    """A layer with one of everything."""
    layer = Layer()
    layer.directory("./", 0o751)
    layer.directory("d", 0o3770, owner=(1000, 2000), xattrs={"user.dir": b"1"})
    layer.add("d/setuid", b"program", mode=0o4755, owner=(3_000_000_000, 5))
    layer.add(
        "d/capable", b"program", mode=0o755, xattrs={"security.capability": NET_RAW, "user.bytes": b"\0\n=\xff"}
    )
    layer.add("d/linked", kind=tarfile.LNKTYPE, target="d/capable")
    layer.symlink("d/symlink", "../anywhere/" + "t" * 500)
    layer.add("fifo", kind=tarfile.FIFOTYPE)
    layer.add("null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    layer.add("disk", kind=tarfile.BLKTYPE, mode=0o660, device=(253, 300_000))
    layer.add("empty")
    layer.add("zeros", bytes(3 << 20))
    layer.add("big", bytes(range(256)) * 5000)
    layer.add("bad\udcff\udcfe\\name", b"x")
    layer.add("new\nline/" + "n" * 255, b"x")
    layer.add("plain/old", b"x")
    layer.add("deep/" * 700 + "file", b"x")
    layer.add("bad\udcfflink", kind=tarfile.LNKTYPE, target="bad\udcff\udcfe\\name")
    return layer.data()


def test_an_image_has_all_that_the_layer_has(tmp_path: Path) -> None:
    (image,) = prepare(layout(tmp_path, rich()), tmp_path / "store")
    assert image.size == image.path.stat().st_size
    found = listed(image.path)
    with tarfile.open(fileobj=io.BytesIO(rich())) as archive:
        for want in archive:
            name = want.name.rstrip("/")
            have = found[name if name != "." else ""] if name != "." else None
            if have is None or want.islnk() or have.islnk():
                continue
            fields = ("type", "mode", "uid", "gid", "size", "mtime", "linkname", "devmajor", "devminor")
            assert {f: getattr(have, f) for f in fields} == {f: getattr(want, f) for f in fields}, name
            attributes = {k: v for k, v in want.pax_headers.items() if k.startswith("SCHILY.xattr.")}
            assert {k: v for k, v in have.pax_headers.items() if k.startswith("SCHILY.xattr.")} == attributes


def test_the_same_bytes_whatever_the_compression_the_archive_and_the_store(tmp_path: Path) -> None:
    rich_layer, other = rich(), Layer()
    other.add("d/.wh.setuid")
    layers = [rich_layer, other.data()]
    plain = layout(tmp_path, *layers, compress=False)
    zipped = layout(tmp_path, *layers, name="zipped")
    subprocess.run(["skopeo", "copy", "-q", f"oci:{plain}:latest", f"oci-archive:{tmp_path}/oci.tar"], check=True)
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci:{plain}:latest", f"docker-archive:{tmp_path}/docker.tar"], check=True
    )
    zstd = ["--dest-compress", "--dest-compress-format=zstd", f"oci:{plain}:latest", f"oci:{tmp_path}/zstd:latest"]
    subprocess.run(["skopeo", "copy", "-q", *zstd], check=True)
    assert "+zstd" in "".join(path.read_text("latin-1") for path in (tmp_path / "zstd/blobs/sha256").iterdir())
    expected = None
    for number, name in enumerate([plain, zipped, "oci.tar", "docker.tar", "zstd"]):
        store = tmp_path / f"store{number}"
        prepare(tmp_path / name, store) if name != "docker.tar" else _prepare_docker(tmp_path / name, store)
        assert len(hashes(store)) == 2
        assert expected in (None, hashes(store))
        expected = hashes(store)


def _prepare_docker(archive: Path, store: Path) -> None:
    with open_image(f"docker-archive:{archive}") as image:
        LayerStore(store).prepare(image)


def test_layers_are_shared_between_images_and_by_what_they_take_from_below(tmp_path: Path) -> None:
    base, other, orphan = Layer(), Layer(), Layer()
    base.directory("tmp", 0o1777)
    other.directory("tmp", 0o1777)
    other.add("more")
    orphan.add("tmp/foo", b"foo")
    store, top = tmp_path / "store", orphan.data()
    one = prepare(layout(tmp_path, base.data(), top, name="1"), store)
    two = prepare(layout(tmp_path, other.data(), top, name="2"), store)
    alone = prepare(layout(tmp_path, top, name="3"), store)
    assert one[1] == two[1]
    assert alone[0].key != one[1].key
    assert (listed(one[1].path)["tmp"].mode, listed(alone[0].path)["tmp"].mode) == (0o1777, 0o755)


def test_a_layer_that_comes_twice_is_two_images_and_one_that_changes_nothing_none(tmp_path: Path) -> None:
    add, remove, nothing = Layer(), Layer(), Layer()
    add.add("file", b"1")
    remove.add(".wh.file")
    tars = [add.data(), remove.data(), add.data()]
    found = prepare(layout(tmp_path, tars[0], nothing.data(), tars[1], nothing.data(), tars[2]), tmp_path / "store")
    assert len(found) == len({image.path for image in found}) == 3
    again = prepare(tmp_path / "layout", tmp_path / "store")
    assert again == found
    assert listed(found[0].path)["file"].size == listed(found[2].path)["file"].size == 1


def test_a_prepared_image_needs_neither_its_blobs_nor_tar2sqfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = layout(tmp_path, rich())
    found = prepare(source, tmp_path / "store")
    with open_image(f"oci:{source}") as image:
        Path(source / "blobs/sha256" / image.layers[0].digest.removeprefix("sha256:")).write_bytes(b"gone")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert LayerStore(tmp_path / "store").prepare(image) == found


def test_a_missing_list_is_made_again(tmp_path: Path) -> None:
    one, two = Layer(), Layer()
    one.directory("d", 0o700)
    two.add("d/x", b"x")
    store = tmp_path / "store"
    prepare(layout(tmp_path, one.data(), name="one"), store)
    for kept in (store / "v1/lists").iterdir():
        kept.unlink()
    found = prepare(layout(tmp_path, one.data(), two.data(), name="two"), store)
    assert listed(found[1].path)["d"].mode == 0o700


def test_progress_is_told_and_cancels(tmp_path: Path) -> None:
    source, seen = layout(tmp_path, rich()), list[LayerProgress]()
    prepare(source, tmp_path / "store", seen.append)
    assert {(p.number, p.layers) for p in seen} == {(1, 1)}
    assert seen[-1].done >= 2 * seen[-1].total > 0

    def cancel(progress: LayerProgress) -> None:
        if progress.done > 2 * progress.total:  # while it is converted
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "cancelled", cancel)
    assert _left(tmp_path / "cancelled") == {"lists", "locks"}


def _left(store: Path) -> set[str]:
    return {path.parent.name for path in store.rglob("*") if path.is_file()}


# -- several at once ---------------------------------------------------------------------------------------------


def _worker(source: Path, store: Path, answers: multiprocessing.Queue[object]) -> None:
    answers.put(prepare(source, store))


def test_processes_and_threads_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    shutil.copytree(images.hundred_layers(), tmp_path / "hundred")
    counting = tmp_path / "bin"
    counting.mkdir()
    (counting / "tar2sqfs").write_text(f'#!/bin/sh\necho >>{tmp_path}/runs\nexec {shutil.which("tar2sqfs")} "$@"\n')
    (counting / "tar2sqfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{counting}:{os.environ['PATH']}")
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[list[LayerImage]] = context.Queue()
    workers = [context.Process(target=_worker, args=(tmp_path / "hundred", store, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda _: prepare(tmp_path / "hundred", store), range(3))]
    found += [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert all(each == found[0] for each in found) and len(found[0]) == 100
    assert len((tmp_path / "runs").read_text().splitlines()) == 100


def _killed(source: Path, store: Path) -> None:
    def die(progress: LayerProgress) -> None:
        if progress.done > 2 * progress.total:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(source, store, die)


def test_a_worker_that_is_killed_leaves_nothing_torn(tmp_path: Path) -> None:
    source, store = layout(tmp_path, rich()), tmp_path / "store"
    worker = multiprocessing.get_context("spawn").Process(target=_killed, args=(source, store))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert _left(store) <= {"lists", "locks", "new"}
    found = prepare(source, store)
    assert _left(store) == {"images", "chains", "lists", "locks"}
    assert hashes(store) == {found[0].path.name: hashlib.sha256(found[0].path.read_bytes()).hexdigest()}
    assert "d/setuid" in listed(found[0].path)


def test_a_waiter_can_be_cancelled_while_another_works(tmp_path: Path) -> None:
    source, store = layout(tmp_path, rich()), tmp_path / "store"
    working, go_on = threading.Event(), threading.Event()

    def hold(progress: LayerProgress) -> None:
        working.set()
        assert go_on.wait(60)

    def give_up(progress: LayerProgress) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(prepare, source, store, hold)
        assert working.wait(60)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, store, give_up)
        go_on.set()
        assert len(first.result(60)) == 1


# -- bad input ---------------------------------------------------------------------------------------------------


def _with_blob(tmp_path: Path, blob: bytes, *, diff_id: str = "", digest: str = "", kind: str = "tar+gzip") -> Path:
    """A layout whose one layer's blob is as given, with all other digests right."""
    source = layout(tmp_path, b"", compress=False)
    blobs = source / "blobs/sha256"
    index = json.loads((source / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())

    def put(data: bytes, name: str = "") -> dict[str, object]:
        name = name or hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    config["rootfs"]["diff_ids"] = ["sha256:" + (diff_id or hashlib.sha256(blob).hexdigest())]
    manifest["config"] |= put(json.dumps(config).encode())
    manifest["layers"] = [{"mediaType": f"application/vnd.oci.image.layer.v1.{kind}", **put(blob, digest)}]
    index["manifests"][0] |= put(json.dumps(manifest).encode())
    (source / "index.json").write_text(json.dumps(index))
    return source


def _fails(source: Path, tmp_path: Path, error: type[ByreError], reason: str) -> ByreError:
    with pytest.raises(error, match=reason) as caught:
        prepare(source, tmp_path / "store")
    assert _left(tmp_path / "store") <= {"lists", "locks"}
    return caught.value


@pytest.mark.behaviour("B22")
def test_a_blob_with_the_wrong_digest(tmp_path: Path) -> None:
    source = _with_blob(tmp_path, gzip.compress(rich()), digest="0" * 64)
    error = _fails(source, tmp_path, ImageInvalid, "has the digest sha256:")
    assert "copy it anew" in error.hint


def test_a_blob_with_the_wrong_diff_id(tmp_path: Path) -> None:
    _fails(_with_blob(tmp_path, gzip.compress(rich()), diff_id="0" * 64), tmp_path, ImageInvalid, "diff_id")


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_a_blob_that_is_cut_off_or_broken(tmp_path: Path, name: str) -> None:
    packed = subprocess.run(
        [name, "-c"], input=rich() + os.urandom(1 << 20), capture_output=True, check=True
    ).stdout
    for number, blob in enumerate((packed[:-100], packed[:5000] + b"damage" + packed[5006:], packed[:20])):
        (tmp_path / f"{number}").mkdir()
        source = _with_blob(tmp_path / f"{number}", blob, diff_id="0" * 64)
        _fails(source, tmp_path / f"{number}", ImageInvalid, f"the {name} data are|bad header|has sha256:")


def test_members_of_gzip_and_padding_behind_them(tmp_path: Path) -> None:
    tar = rich()
    blob = gzip.compress(tar[:99999]) + gzip.compress(tar[99999:]) + bytes(700)
    assert (
        len(prepare(_with_blob(tmp_path, blob, diff_id=hashlib.sha256(tar).hexdigest()), tmp_path / "store")) == 1
    )


def test_a_compression_that_is_not_known(tmp_path: Path) -> None:
    blob = subprocess.run(["xz", "-c"], input=rich(), capture_output=True, check=True).stdout
    _fails(_with_blob(tmp_path, blob), tmp_path, ImageInvalid, "xz")


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarstream, "MAX_BYTES", 64 << 20)
    layer = Layer()
    layer.add("bomb", bytes(80 << 20))
    _fails(_with_blob(tmp_path, gzip.compress(layer.data())), tmp_path, ImageInvalid, "over the limit|longer than")


def test_rubbish_behind_the_archive_is_limited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarstream, "MAX_BYTES", 64 << 20)
    _fails(_with_blob(tmp_path, gzip.compress(bytes(80 << 20))), tmp_path, ImageInvalid, "longer than")


def test_many_entries(tmp_path: Path) -> None:
    tar = b"".join(header(b"%03d/%d" % (number // 100, number)) for number in range(100_000))
    (image,) = prepare(layout(tmp_path, tar), tmp_path / "store")
    assert image.size < 8 << 20


def test_many_entries_of_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_DIRECTORY", 1000)
    tar = b"".join(header(b"d/%d" % number) for number in range(1001))
    assert len(prepare(layout(tmp_path, tar[512:], name="good"), tmp_path / "good-store")) == 1
    _fails(layout(tmp_path, tar), tmp_path, ImageInvalid, "'d' of layer 1 has 1001 entries, over the limit")


@pytest.mark.parametrize("name", ["/etc/passwd", "a/../../etc", "l/../../x"])
def test_nothing_of_a_hostile_layer_reaches_the_host(tmp_path: Path, name: str) -> None:
    layer = Layer()
    layer.symlink("l", str(tmp_path))
    layer.add(name, b"owned")
    _fails(layout(tmp_path, layer.data()), tmp_path, ImageInvalid, "absolute name|leaves the archive")


def test_a_link_to_the_host_is_resolved_inside(tmp_path: Path) -> None:
    layer = Layer()
    layer.symlink("l", str(tmp_path))
    layer.add("l/owned", b"owned")
    (image,) = prepare(layout(tmp_path, layer.data()), tmp_path / "store")
    assert not (tmp_path / "owned").exists()
    assert str(tmp_path / "owned").removeprefix("/") in listed(image.path)


@pytest.mark.parametrize("tool", ["tar2sqfs", "zstd"])
def test_a_missing_tool_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    blob = subprocess.run(["zstd", "-c"], input=rich(), capture_output=True, check=True).stdout
    source = _with_blob(tmp_path, blob, diff_id=hashlib.sha256(rich()).hexdigest())
    tools = tmp_path / "bin"
    tools.mkdir()
    for other in {"tar2sqfs", "zstd"} - {tool}:
        (tools / other).symlink_to(shutil.which(other) or "")
    monkeypatch.setenv("PATH", str(tools))
    error = _fails(source, tmp_path, ToolMissing, tool)
    assert "install" in error.hint


def _fake_tar2sqfs(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "tar2sqfs").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "tar2sqfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'disk is \033[1mfull' >&2; exit 1", r"ended early: disk is \\x1b\[1mfull"),
        ("cat >/dev/null; echo no >&2; exit 3", "ended with status 3: no"),
        ("kill -9 $$", "ended early"),
        ("exec sleep 60", "took nothing"),
        ("cat >/dev/null; exec sleep 60", "did not end"),
    ],
)
def test_a_tar2sqfs_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str) -> None:
    monkeypatch.setattr(layers_module, "STALL", 0.5)
    _fake_tar2sqfs(tmp_path, script, monkeypatch)
    error = _fails(layout(tmp_path, rich()), tmp_path, MachineFailed, reason)
    assert "MiB left" in error.hint


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [(b"program", b"PROGRAM", "has sha256:"), (b"d/setuid", b"d/steuid", "changed while")],  # the same checksum
)
def test_a_blob_that_changes_while_it_is_read(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    source = layout(tmp_path, rich(), compress=False)
    with open_image(f"oci:{source}") as image:
        blob = source / "blobs/sha256" / image.layers[0].digest.removeprefix("sha256:")

    def change(progress: LayerProgress) -> None:
        if progress.done == 2 * progress.total:  # the digest was checked and the list made
            with open(blob, "r+b") as out:
                out.seek(rich().index(old))
                out.write(new)

    with pytest.raises(ImageInvalid, match=reason):
        prepare(source, tmp_path / "store", change)
    assert _left(tmp_path / "store") <= {"lists", "locks"}


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageFailed, match="cannot be used"):
        prepare(layout(tmp_path, rich()), tmp_path / "store")


# -- against independent judges ----------------------------------------------------------------------------------


def _tars(source: Path, folder: Path) -> Sequence[Path]:
    found = []
    with open_image(f"oci:{source}") as image:
        for number, layer in enumerate(image.layers):
            with layer.open() as blob:
                (folder / f"{number}.tar").write_bytes(gzip.decompress(blob.read()))
            found.append(folder / f"{number}.tar")
    return found


def _compare(source: Path, tmp_path: Path) -> int:
    """Mounted as an overlay, the images show what GNU tar unpacks."""
    found = prepare(source, tmp_path / "store")
    unpacked = oci_oracle.describe(oci_oracle.unpack(_tars(source, tmp_path), tmp_path))
    with oci_oracle.mounted([image.path for image in found], tmp_path) as merged:
        mounted = oci_oracle.describe(merged)
    assert mounted == unpacked
    return len(mounted)


@ROOT
@pytest.mark.timeout(1500)  # the image is made first, once
def test_debian_is_what_gnu_tar_makes_of_it(tmp_path: Path) -> None:
    assert _compare(images.debian_layout(), tmp_path) > 5000


@ROOT
def test_a_hundred_layers_are_what_gnu_tar_makes_of_them(tmp_path: Path) -> None:
    assert _compare(images.hundred_layers(), tmp_path) > 200


@ROOT
def test_odd_layers_are_what_gnu_tar_makes_of_them(tmp_path: Path) -> None:
    second, third = Layer(), Layer()
    second.add("d/.wh.setuid")
    second.add("d/capable", b"again")  # its other name keeps the old contents
    second.add("plain/.wh..wh..opq")
    second.add("plain/x", b"x")
    second.add("zeros", kind=tarfile.LNKTYPE, target="big")
    third.add("d/setuid", b"back")
    third.add("newer", kind=tarfile.LNKTYPE, target="plain/x")
    third.add("null", b"no device now")
    assert _compare(layout(tmp_path, rich(), second.data(), third.data()), tmp_path) > 20


@ROOT
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["debian", "hundred"])
def test_images_are_what_umoci_makes_of_them(tmp_path: Path, name: str) -> None:
    source = images.debian_layout() if name == "debian" else images.hundred_layers()
    found = prepare(source, tmp_path / "store")
    command = ["umoci", "unpack", "--image", f"{source}:latest", tmp_path / "bundle"]
    subprocess.run(command, check=True, capture_output=True)
    unpacked = oci_oracle.describe(tmp_path / "bundle/rootfs")
    with oci_oracle.mounted([image.path for image in found], tmp_path) as merged:
        mounted = oci_oracle.describe(merged)
    assert mounted == unpacked and len(mounted) > 200
