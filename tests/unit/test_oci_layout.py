"""Finding an image by its reference; what is wrong with one is a typed error with the next step (B22)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from byre.errors import ByreError, ImageInvalid, ImageNotFound
from byre.oci.image import MAX_DOCUMENT
from byre.oci.layout import ContainerImage, open_image
from examples.busybox_image import Layer, write_layout

pytestmark = pytest.mark.behaviour("B22")

CONFIG = {
    "Entrypoint": ["/entry"],
    "Cmd": ["-x"],
    "Env": ["A=1", "B=2=3"],
    "User": "app:web",
    "WorkingDir": "/srv",
    "StopSignal": "SIGQUIT",
    "Volumes": {"/data": {}, "/var//./lib": {}},
    "Labels": {"a": "b"},
}


def layer(text: str = "text") -> bytes:
    made = Layer()
    made.add("file", text.encode())
    return made.data()


def make(folder: Path, *, tag: str = "latest", text: str = "text") -> Path:
    return write_layout(folder, [layer(text)], CONFIG, tag=tag)


class Editor:
    """Changes the documents of a layout and makes their digests right again."""

    def __init__(self, layout: Path) -> None:
        self.layout, self.blobs = layout, layout / "blobs/sha256"
        self.index = json.loads((layout / "index.json").read_text())
        self.manifest = self._load(self.index["manifests"][0])
        self.config = self._load(self.manifest["config"])

    def _load(self, descriptor: dict[str, Any]) -> Any:
        return json.loads((self.blobs / descriptor["digest"][7:]).read_text())

    def put(self, content: Any) -> dict[str, Any]:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def save(self) -> Path:
        if self.manifest is not None and "config" in self.manifest:
            self.manifest["config"] |= self.put(self.config)
        self.index["manifests"][0] |= self.put(self.manifest)
        return self.save_index()

    def save_index(self) -> Path:
        (self.layout / "index.json").write_text(json.dumps(self.index))
        return self.layout


def opened(reference: str | Path) -> ContainerImage:
    with open_image(str(reference)) as image:
        return image


def first_blob(reference: str | Path) -> bytes:
    with open_image(str(reference)) as image, image.layers[0].open() as blob:
        return blob.read()


# -- what is found -----------------------------------------------------------------------------------------------


def test_a_layout(tmp_path: Path) -> None:
    image = opened(f"oci:{make(tmp_path / 'image')}")
    config = image.config
    assert (config.entrypoint, config.cmd, config.env) == (("/entry",), ("-x",), ("A=1", "B=2=3"))
    assert (config.user, config.working_dir, config.stop_signal) == ("app:web", "/srv", "SIGQUIT")
    assert (config.volumes, config.labels) == (("/data", "/var/lib"), (("a", "b"),))
    assert config.diff_ids == (image.layers[0].diff_id,) == ("sha256:" + hashlib.sha256(layer()).hexdigest(),)
    assert (image.layers[0].media_type, image.layers[0].size) == (
        "application/vnd.oci.image.layer.v1.tar+gzip",
        len(first_blob(tmp_path / "image")),
    )
    assert (
        image.manifest_digest == json.loads((tmp_path / "image/index.json").read_text())["manifests"][0]["digest"]
    )


def test_every_spelling_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "image")
    digest = opened(tmp_path / "image").manifest_digest
    monkeypatch.chdir(tmp_path)
    for reference in (
        "oci:image",
        "oci:image:latest",
        "image",
        "image:latest",
        "./image",
        f"oci:{tmp_path}/image/",
    ):
        assert opened(reference).manifest_digest == digest


def test_colons_in_paths_and_tags(tmp_path: Path) -> None:
    make(tmp_path / "a:b", tag="docker.io/library/x:1.2")
    for tag in ("", ":docker.io/library/x:1.2", ":1.2"):
        assert opened(f"oci:{tmp_path}/a:b{tag}").layers
    with pytest.raises(ImageNotFound, match=r"no tag '2'.*docker\.io/library/x:1\.2"):
        opened(f"oci:{tmp_path}/a:b:2")


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives(tmp_path: Path, kind: str, compression: str) -> None:
    source = make(tmp_path / "image")
    archive = tmp_path / "image.tar"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{source}:latest", f"{kind}:{archive}:name:latest"], check=True)
    if compression:
        packed = subprocess.run([compression, "-c", archive], check=True, capture_output=True).stdout
        archive.write_bytes(packed)
    names = [f"{kind}:{archive}", str(archive), f"{kind}:{archive}:name:latest"]
    names += [f"oci:{archive}"] if kind == "oci-archive" else [f"{kind}:{archive}:name"]
    for reference in names:
        assert opened(reference).config == opened(source).config
    with open_image(names[0]) as image, image.layers[0].open() as blob:
        assert len(blob.read()) == image.layers[0].size


def test_a_docker_archive_of_old_whose_layers_are_links(tmp_path: Path) -> None:
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}, "config": {"Cmd": ["x"]}}
    config["rootfs"] |= {"diff_ids": ["sha256:" + hashlib.sha256(layer()).hexdigest()] * 3}  # type: ignore[operator]
    manifest = [{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["1/layer.tar", "2/layer.tar", "3/layer.tar"]}]
    archive = Layer()
    archive.add("1/layer.tar", layer())
    archive.symlink("2/layer.tar", "../1/layer.tar")
    archive.add("3/layer.tar", kind=tarfile.LNKTYPE, target="1/layer.tar")
    archive.add("c.json", json.dumps(config).encode())
    archive.add("manifest.json", json.dumps(manifest).encode())
    (tmp_path / "old.tar").write_bytes(archive.data())
    with open_image(f"docker-archive:{tmp_path}/old.tar") as image:
        for each in image.layers:
            with each.open() as blob:
                assert blob.read() == layer()
    with pytest.raises(ImageNotFound, match=r"no image 'b'.*'a:1'"):
        opened(f"docker-archive:{tmp_path}/old.tar:b")


def test_an_image_for_several_platforms(tmp_path: Path) -> None:
    editor = Editor(make(tmp_path / "image"))
    native = editor.index["manifests"][0]
    kind = {"mediaType": "application/vnd.oci.image.manifest.v1+json"}
    nested = {
        "manifests": [
            {**kind, **editor.put({"wrong": 1}), "platform": {"os": "linux", "architecture": "arm64"}},
            {**kind, **editor.put({"wrong": 2}), "platform": {"os": "unknown", "architecture": "unknown"}},
            {**native, "platform": {"os": "linux", "architecture": "amd64"}},
            {**kind, **editor.put({"wrong": 3}), "mediaType": "application/vnd.example.signature"},
        ]
    }
    index = {"mediaType": "application/vnd.oci.image.index.v1+json", **editor.put(nested)}
    editor.index["manifests"] = [index]
    assert opened(editor.save_index()).manifest_digest == native["digest"]
    editor.index["manifests"] = nested["manifests"]  # flat, as some tools write it
    assert opened(editor.save_index()).manifest_digest == native["digest"]
    editor.index["manifests"] = nested["manifests"][:2]
    with pytest.raises(ImageNotFound, match=r"for 'linux/arm64', and the guest is linux/amd64.*--override-arch"):
        opened(editor.save_index())


def test_several_images_need_a_tag_and_the_tags_are_listed(tmp_path: Path) -> None:
    one, two = Editor(make(tmp_path / "one", tag="one")), Editor(make(tmp_path / "two", tag="two", text="other"))
    for blob in two.blobs.iterdir():
        (one.blobs / blob.name).write_bytes(blob.read_bytes())
    one.index["manifests"] += two.index["manifests"]
    with pytest.raises(ImageNotFound, match="'one', 'two'") as caught:
        opened(one.save_index())
    assert caught.value.data["tags"] == ["one", "two"]
    assert opened(f"{one.layout}:two").manifest_digest == two.index["manifests"][0]["digest"]


# -- what is not found, or broken --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    ["", "oci:", "none", "oci:none", "oci:none:tag", "docker://debian", "docker-archive:none", "a\0b", "x" * 5000],
)
def test_nothing_there(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageNotFound, match="skopeo copy") as caught:
        opened(reference)
    assert isinstance(caught.value, FileNotFoundError)


def _break_index(content: object) -> Callable[[Editor], object]:
    return lambda e: (e.layout / "index.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


def _edit(part: str, **changes: Any) -> Callable[[Editor], object]:
    def change(editor: Editor) -> None:
        document = getattr(editor, part)
        for key, value in changes.items():
            if value is ...:
                del document[key]
            else:
                document[key] = value
        editor.save()

    return change


def _edit_config(**changes: Any) -> Callable[[Editor], object]:
    return lambda editor: (editor.config["config"].update(changes), editor.save())


def _layers(**changes: Any) -> Callable[[Editor], object]:
    return lambda editor: (editor.manifest["layers"][0].update(changes), editor.save())


def _blob(change: Callable[[Path], object], which: str = "layer") -> Callable[[Editor], object]:
    def apply(editor: Editor) -> None:
        digest = editor.manifest["layers"][0] if which == "layer" else editor.index["manifests"][0]
        change(editor.blobs / digest["digest"][7:])

    return apply


def _replace_with_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _set(**changes: Any) -> Callable[[Editor], object]:
    """Change the first descriptor of the index."""
    return lambda editor: (editor.index["manifests"][0].update(changes), editor.save_index())


def _rootfs(**changes: Any) -> Callable[[Editor], object]:
    return lambda editor: (editor.config["rootfs"].update(changes), editor.save())


def _without_layers(editor: Editor) -> None:
    editor.manifest["layers"] = []
    editor.config["rootfs"]["diff_ids"] = []
    editor.save()


def _unlink(path: Path) -> None:
    path.unlink()


ZERO = "sha256:" + "0" * 64
BROKEN: dict[str, tuple[Callable[[Editor], object], str]] = {
    "index not json": (_break_index("{"), "index.json is not JSON"),
    "index of arrays": (_break_index("[" * 100_000), "index.json is not JSON"),
    "index a list": (_break_index([]), "index.json is not a JSON object"),
    "index empty": (_break_index({"manifests": []}), "layout is empty"),
    "manifests no list": (_break_index({"manifests": {"a": 1}}), "not a list"),
    "descriptor no object": (_break_index({"manifests": [3]}), "not a JSON object"),
    "descriptor no digest": (_break_index({"manifests": [{"size": 3}]}), "has no digest"),
    "digest a list": (_set(digest=["x"]), "digest that is not a str"),
    "digest a path": (_set(digest="sha256:../../../../etc/passwd"), "for a digest"),
    "digest with more": (_set(digest=ZERO + "\n"), "for a digest"),
    "digest unknown": (_set(digest="md5:" + "0" * 32), "sha256 and sha512"),
    "blob missing": (_set(digest=ZERO), "lacks the blob"),
    "size missing": (_set(size=None), "has no size"),
    "size a bool": (_set(size=True), "size that is not a int"),
    "index huge": (_break_index(" " * (MAX_DOCUMENT + 1)), "over the limit"),
    "layout version": (
        lambda e: (e.layout / "oci-layout").write_text('{"imageLayoutVersion": "2"}'),
        "version '2'",
    ),
    "layout file": (lambda e: (e.layout / "oci-layout").unlink(), "has no oci-layout"),
    "index missing": (lambda e: (e.layout / "index.json").unlink(), "lacks its file 'index.json'"),
    "manifest missing": (_blob(_unlink, "manifest"), "lacks the blob"),
    "manifest changed": (
        _blob(lambda p: p.write_bytes(p.read_bytes().replace(b"2", b"3")), "manifest"),
        "its digest",
    ),
    "manifest cut off": (_blob(lambda p: p.write_bytes(p.read_bytes()[:9]), "manifest"), "has 9 bytes instead of"),
    "manifest a fifo": (_blob(_replace_with_fifo, "manifest"), "not a regular file"),
    "manifest a directory": (_blob(lambda p: (p.unlink(), p.mkdir()), "manifest"), "not a regular file"),
    "config missing": (_edit("manifest", config=...), "has no config"),
    "layers missing": (_edit("manifest", layers=...), "has no layers"),
    "no layers": (_without_layers, "no layers"),
    "layer counts": (_rootfs(diff_ids=[ZERO, ZERO]), "1 layers and 2"),
    "layer type": (_layers(mediaType="application/vnd.oci.image.layer.v1.tar+encrypted"), "media type.*encrypted"),
    "layer digest": (_layers(digest="sha256:0"), "for a digest"),
    "layer size": (_layers(size=1), "bytes instead of 1"),
    "layer missing": (_blob(_unlink), "lacks the blob"),
    "layer a fifo": (_blob(_replace_with_fifo), "not a regular file"),
    "rootfs": (_edit("config", rootfs=...), "has no rootfs"),
    "rootfs type": (_rootfs(type="tree"), "unknown type"),
    "diff_id": (_rootfs(diff_ids=["x"]), "'x' for a digest"),
    "architecture": (_edit("config", architecture=...), "has no architecture"),
    "cmd": (_edit_config(Cmd="sh"), "Cmd that is not a list"),
    "cmd of numbers": (_edit_config(Cmd=[1]), "not a list of strings"),
    "entrypoint": (_edit_config(Entrypoint=["a\0b"]), "Entrypoint"),
    "env": (_edit_config(Env=["A"]), "NAME=VALUE"),
    "user": (_edit_config(User=0), "User that is not a str"),
    "user with nul": (_edit_config(User="a\0"), "NUL"),
    "volume": (_edit_config(Volumes={"/a/../../b": {}}), "no absolute path below /"),
    "volume of all": (_edit_config(Volumes={"/": {}}), "no absolute path below /"),
    "volumes a list": (_edit_config(Volumes=["/a"]), "not a dict"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_layouts(tmp_path: Path, case: str) -> None:
    change, reason = BROKEN[case]
    editor = Editor(make(tmp_path / "image"))
    assert opened(editor.layout).layers
    change(editor)
    with pytest.raises(ByreError, match=reason) as caught:
        opened(f"oci:{editor.layout}")
    assert isinstance(caught.value, ImageNotFound if case == "index empty" else ImageInvalid)


def test_another_architecture(tmp_path: Path) -> None:
    editor = Editor(make(tmp_path / "image"))
    editor.config["architecture"] = "riscv64"
    with pytest.raises(ImageNotFound, match=r"for 'linux/riscv64'"):
        opened(editor.save())


def test_indexes_without_end(tmp_path: Path) -> None:
    editor = Editor(make(tmp_path / "image"))
    for _ in range(9):
        nested = editor.put({"manifests": editor.index["manifests"]})
        editor.index["manifests"] = [{"mediaType": "application/vnd.oci.image.index.v1+json", **nested}]
    with pytest.raises(ImageInvalid, match="nested deeper"):
        opened(editor.save_index())


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100, b"\x1f\x8bbroken", bytes(10240)])
def test_a_file_that_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for transport in ("", "oci:", "oci-archive:", "docker-archive:"):
        with pytest.raises(ImageInvalid):
            opened(f"{transport}{tmp_path}/file")


def test_an_archive_that_is_cut_off(tmp_path: Path) -> None:
    source = make(tmp_path / "image")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(source, ".")
    assert len(buffer.getvalue()) > 9000
    for end in (8500, 5000, 700):
        (tmp_path / "cut.tar").write_bytes(buffer.getvalue()[:end])
        with pytest.raises(ImageInvalid):
            opened(f"oci-archive:{tmp_path}/cut.tar")
    (tmp_path / "cut.tar").write_bytes(buffer.getvalue())
    assert opened(f"oci-archive:{tmp_path}/cut.tar").layers


def test_the_other_transport_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = make(tmp_path / "image")
    with pytest.raises(ImageInvalid, match=r"no docker-archive image.*skopeo copy converts"):
        opened(f"docker-archive:{source}")
    with pytest.raises(ImageInvalid, match=r"no oci image.*has no oci-layout"):
        opened(f"oci:{tmp_path}")
