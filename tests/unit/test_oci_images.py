"""The store of images and the cache of layers: what is removed, what stays, and what is said of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from byre import images as byre_images
from byre import sync
from byre.errors import ImageInvalid, ImageNotFound, InvalidRequest, StorageFailed
from byre.machines.disks import Disk, DiskTable
from byre.oci import eviction, files
from byre.oci.images import Image, ImageStore
from byre.oci.layout import open_image
from byre.oci.pull import take_in
from byre.oci.store import LayerImage, LayerStore
from examples.busybox_image import Layer, write_layout

DAY = 86400.0


def tar(name: str, size: int = 50_000) -> bytes:
    made = Layer()
    made.add(name, os.urandom(size))
    return made.data()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


def add(store: ImageStore, folder: Path, name: str, *layers: bytes) -> Image:
    return take_in(store, str(write_layout(folder / name, layers, {"Cmd": ["sh"]})), name)


def converted(store: ImageStore, image: Image, cache: Path) -> list[LayerImage]:
    with store.open(image) as opened:
        return LayerStore(cache).prepare(opened)


def blobs(store: ImageStore) -> int:
    return len(list((store.blobs / "sha256").iterdir()))


# -- names and blobs -------------------------------------------------------------------------------------------


def test_blobs_are_shared_and_go_with_the_last_name(store: ImageStore, tmp_path: Path) -> None:
    base = tar("base")
    one, two = add(store, tmp_path, "one", base, tar("one")), add(store, tmp_path, "two", base, tar("two"))
    assert [image.name for image in store.images()] == [one.name, two.name]
    assert blobs(store) == 2 * 3 + 1
    assert store.collect() == (0, 0, False)
    store.untag(one)
    freed = store.collect()
    assert freed.files == 3 and freed.size >= 50_000
    with store.open(two) as opened:
        assert [layer.size for layer in opened.layers] == [path.size for path in opened.layers]
    store.untag(two)
    store.untag(two)
    store.collect()
    assert blobs(store) == 0 and store.images() == []


def test_an_image_that_is_read_keeps_its_blobs(store: ImageStore, tmp_path: Path) -> None:
    image = add(store, tmp_path, "one", tar("one"))
    with store.open(image):
        store.untag(image)
        assert store.collect() == (0, 0, True)
    assert store.collect().files == 3


def test_a_damaged_image_is_an_error_that_says_what_to_do_and_can_be_removed(
    store: ImageStore, tmp_path: Path
) -> None:
    image = add(store, tmp_path, "one", tar("one"))
    store.blob(image.digest).chmod(0o600)
    store.blob(image.digest).write_bytes(b"x" * image.size)
    with pytest.raises(ImageInvalid, match="does not have its digest") as caught, store.open(image):
        pass
    assert "byre image pull docker.io/library/one:latest" in caught.value.hint
    store.untag(image)
    assert store.collect().files == 3
    (store.root / "names" / "0").write_text('{"name": 1}')
    with pytest.raises(StorageFailed, match="damaged") as damaged:
        store.images()
    assert damaged.value.hint == "remove this file"


def test_digests_stand_for_names_where_they_fit_one_image(store: ImageStore, tmp_path: Path) -> None:
    image = add(store, tmp_path, "one", tar("one"))
    for text in (image.digest, image.digest[7:], image.digest[7:19], f"sha256:{image.digest[7:27]}"):
        assert store.find(text) == image, text
    for text in ("0" * 12, "0" * 64, "sha256:" + "0" * 64, "two", image.digest[7:17]):
        assert store.find(text) is None, text
        with pytest.raises(ImageNotFound, match="no image"):
            store.get(text)
    named = add(store, tmp_path, "0" * 12, tar("two"))
    assert store.find("0" * 12) == named


def test_a_store_that_cannot_be_written_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="cannot be used") as caught:
        add(ImageStore(tmp_path / "file"), tmp_path, "one", tar("one"))
    assert "XDG_DATA_HOME" in caught.value.hint
    assert ImageStore(tmp_path / "none").images() == []
    assert ImageStore(tmp_path / "none").collect() == (0, 0, False)


# -- layers ----------------------------------------------------------------------------------------------------


def test_layers_go_by_age_and_by_size_the_oldest_first(store: ImageStore, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    layers = converted(
        store, add(store, tmp_path, "one", *(tar(str(n), 100_000 * (n + 1)) for n in range(4))), cache
    )
    for number, layer in enumerate(layers):
        os.utime(layer.path, (0, layer.path.stat().st_mtime - (10 - number) * DAY))
    count, size = eviction.usage(cache)
    assert count == 4 and size >= sum(layer.size for layer in layers)
    assert eviction.evict(unused_for=11 * DAY, root=cache) == (0, 0, False)
    freed = eviction.evict(unused_for=9.5 * DAY, root=cache)
    assert freed.size >= 100_000 and [layer.path.exists() for layer in layers] == [False, True, True, True]
    eviction.evict(unused_for=30 * DAY, keep_bytes=eviction.usage(cache)[1] - 1, root=cache)
    assert [layer.path.exists() for layer in layers] == [False, False, True, True]
    again = converted(store, store.get("one"), cache)
    assert [layer.path for layer in again] == [layer.path for layer in layers]
    assert all(layer.path.stat().st_mtime > layers[0].path.stat().st_ctime - DAY for layer in again)
    assert eviction.evict(unused_for=DAY, root=cache).files == 0  # using them made them young again
    eviction.evict(root=cache)
    assert eviction.usage(cache) == (0, 0)
    assert not list((cache / "v1/chains").iterdir()) and not list((cache / "v1/lists").iterdir())


def test_a_leased_layer_stays(store: ImageStore, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with store.open(add(store, tmp_path, "one", tar("one"))) as opened:
        (layer,), lease = LayerStore(cache).lease(opened)
    with lease:
        freed = eviction.evict(root=cache)
        assert freed.in_use and layer.path.exists()
    assert eviction.evict(root=cache).files >= 1 and not layer.path.exists()
    assert not files.Lease().add(layer.path)


def test_a_layer_pruned_before_it_could_be_leased_is_made_again(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, whole = tmp_path / "cache", LayerStore.prepare
    rounds = list[int]()

    def prepare(self: LayerStore, *arguments: object) -> list[LayerImage]:
        found = whole(self, *arguments)  # type: ignore[arg-type]
        rounds.append(len(found))
        if len(rounds) == 1:
            eviction.evict(root=cache)
        return found

    monkeypatch.setattr(LayerStore, "prepare", prepare)
    with store.open(add(store, tmp_path, "one", tar("one"))) as opened:
        (layer,), lease = LayerStore(cache).lease(opened)
    with lease:
        assert rounds == [1, 1] and layer.path.exists()


async def test_a_disk_that_is_attached_stays(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_bytes(b"x")

    async def nothing(_: Disk) -> None:
        return None

    table = DiskTable(nothing, nothing)
    disk = await table.attach(path, read_only=True)
    assert files.remove_unless_leased(path) is None
    await table.detach(disk)
    assert files.remove_unless_leased(path) and not path.exists()
    path.write_bytes(b"x")
    await table.attach(path, read_only=True)
    table.end()
    assert files.remove_unless_leased(path)


def test_only_what_no_other_image_has_is_forgotten(store: ImageStore, tmp_path: Path) -> None:
    cache, base = tmp_path / "cache", tar("base")
    stacks = []
    for name in ("one", "two"):
        image = add(store, tmp_path, name, base, tar(name))
        with store.open(image) as opened:
            stacks.append((opened.config.diff_ids, LayerStore(cache).prepare(opened)))
    freed = eviction.forget([stacks[0][0]], [stacks[1][0]], cache)
    assert freed.size >= 50_000
    assert [layer.path.exists() for layer in stacks[0][1]] == [True, False]
    assert [layer.path.exists() for layer in stacks[1][1]] == [True, True]


def test_layers_of_one_content_from_different_tars_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their diff_ids differ, and with them their locks; the image is the same file."""
    tars = []
    for form in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as archive:
            entry = tarfile.TarInfo("folder")
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        tars.append((tmp_path / f"{form}.tar").read_bytes())
    assert tars[0] != tars[1]
    program = tmp_path / "bin/tar2sqfs"
    program.parent.mkdir()
    real = subprocess.run(["which", "tar2sqfs"], capture_output=True, check=True, text=True).stdout.strip()
    program.write_text(f'#!/bin/sh\necho >>{tmp_path}/runs\ncat <{tmp_path}/gate\nexec {real} "$@"\n')
    program.chmod(0o755)
    os.mkfifo(tmp_path / "gate")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    cache, waiting = tmp_path / "cache", threading.Event()

    def prepare(number: int) -> LayerImage:
        with open_image(str(write_layout(tmp_path / f"layout{number}", [tars[number]], {}))) as image:
            (made,) = LayerStore(cache).prepare(image, lambda step: waiting.set() if number else None)
            return made

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare, 0)
        gate = os.open(tmp_path / "gate", os.O_WRONLY)  # the first converts now
        second = pool.submit(prepare, 1)
        assert waiting.wait(30)
        os.close(gate)
        assert first.result(30) == second.result(30)
    assert (tmp_path / "runs").read_text() == "\n"


# -- from Python, and the command ------------------------------------------------------------------------------


def byre(*arguments: object, status: int = 0) -> str:
    command = [sys.executable, "-m", "byre", "image", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_imports_lists_inspects_and_removes(home: Path) -> None:
    write_layout(home / "layout", [tar("one")], {"Cmd": ["sh"]})
    subprocess.run(["skopeo", "copy", "-q", "oci:layout:latest", "docker-archive:app.tar:app:v1"], check=True)
    assert byre("import", "app.tar") == "docker.io/library/app:v1\n"
    assert byre("import", "oci:layout", "localhost/other") == "localhost/other:latest\n"
    lines = byre("ls").splitlines()
    assert lines[0].split() == ["CONTAINER", "IMAGE", "TAG", "DIGEST", "SIZE", "PULLED"]
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["docker.io/library/app", "v1"],
        ["localhost/other", "latest"],
    ]
    assert "0 converted layers in the cache: 0 B" in lines and lines[-1].startswith("GUEST IMAGE")
    (described,) = json.loads(byre("inspect", "app:v1"))
    assert described["Name"] == "docker.io/library/app:v1" and described["Config"] == {"Cmd": ["sh"]}
    assert described["Digest"].startswith(f"sha256:{lines[1].split()[2]}") and len(described["Layers"]) == 1
    out = byre("rm", described["Digest"][7:19], "localhost/other").splitlines()
    assert out[:2] == ["docker.io/library/app:v1", "localhost/other:latest"] and out[2].startswith("freed ")
    error = byre("inspect", "app:v1", status=125)
    assert error.startswith("byre: error: there is no image 'app:v1' here\nhint: fetch it: byre image pull app:v1")
    assert byre("prune") == "freed 0 B\n"


def test_prune_takes_layers_by_age(home: Path) -> None:
    write_layout(home / "layout", [tar("one")], {})
    with open_image("oci:layout") as image:
        (layer,) = LayerStore(home / "XDG_CACHE_HOME/byre/layers").prepare(image)
    assert byre("prune") == "freed 0 B\n" and layer.path.exists()
    assert byre("prune", "--older-than", "0s").startswith("freed ") and not layer.path.exists()


def test_a_guest_image_is_known_by_what_is_in_it(home: Path) -> None:
    with tarfile.open(home / "guest.tar.gz", "w:gz") as archive:
        for name in ("manifest.json", "vmlinux"):
            archive.addfile(tarfile.TarInfo(name))
    assert "has a broken manifest" in byre("import", "guest.tar.gz", status=125)
    (home / "rubbish").write_bytes(os.urandom(5000))
    assert "byre: error: " in byre("import", "rubbish", status=125)
    assert "no image at './none'" in byre("import", "none", status=125)


def test_the_same_from_python(home: Path) -> None:
    write_layout(home / "layout", [tar("one")], {"Cmd": ["sh"]})
    seen = list[object]()
    image = sync.import_image("oci:layout", "app", progress=seen.append)
    assert seen and byre_images.list_images() == [image] and byre_images.inspect("app")["Size"] == image.stored
    with pytest.raises(ImageNotFound):
        byre_images.remove("app", "nosuch")
    assert byre_images.list_images() == [image]
    names, freed = byre_images.remove("app")
    assert names == [image.name] and freed.files == 3
    assert byre_images.prune() == (0, 0, False)
    with pytest.raises(InvalidRequest):
        sync.pull_image("Not a name")


async def test_a_coroutine_that_is_cancelled_leaves_nothing(home: Path) -> None:
    write_layout(home / "layout", [tar("one", 5_000_000)], {"Cmd": ["sh"]})
    held = threading.Event()
    go_on = threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(30)

    task = asyncio.create_task(byre_images.import_image("oci:layout", "app", progress=hold))
    await asyncio.to_thread(held.wait, 30)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert byre_images.list_images() == [] and list((ImageStore().root / "new").iterdir()) == []
