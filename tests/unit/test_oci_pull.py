"""Pulling from a real registry, whole, cut off, refused, cancelled and killed; and taking in archives."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from byre.errors import (
    ByreError,
    ImageInvalid,
    ImageNotFound,
    InvalidRequest,
    RegistryFailed,
    RegistryRefused,
    RegistryUnreachable,
    StorageFailed,
    ToolMissing,
)
from byre.oci import registry as registry_module
from byre.oci.images import ImageStore
from byre.oci.pull import PullProgress, obtained, pull, take_in
from byre.oci.registry import Registry
from byre.oci.store import LayerStore
from examples.busybox_image import Layer, write_layout

from . import oci_registry
from .oci_registry import Proxy
from .test_oci_layout import Editor

PLAIN = Registry(tls_verify=False)
SMALL, LARGE = 200_000, 3_000_000


def layer(name: str, size: int) -> bytes:
    made = Layer()
    made.add(name, random.Random(name).randbytes(size))
    return made.data()


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, the last of them large."""
    layers = [layer("one", SMALL), layer("two", SMALL), layer("large", LARGE)]
    return write_layout(tmp_path_factory.mktemp("image") / "layout", layers, {"Cmd": ["true"]})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[str]:
    """``host:port`` of a registry that has app:latest."""
    with oci_registry.registry(tmp_path_factory.mktemp("registry")) as address:
        oci_registry.push(f"oci:{layout}:latest", f"{address}/app:latest")
        yield address


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def _no_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)


def digest_of(layout: Path) -> str:
    digest: str = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    return digest


def contents(store: ImageStore, name: str, cache: Path) -> list[str]:
    """The names of what its layers have, after they were read whole and converted."""
    with store.open(store.get(name)) as image:
        made = LayerStore(cache).prepare(image)
    listed = [subprocess.run(["rdsquashfs", "-d", each.path], capture_output=True, check=True) for each in made]
    return [line.split()[1] for done in listed for line in done.stdout.decode().splitlines() if line[0] == "f"]


def assert_nothing_left(store: ImageStore) -> None:
    assert store.images() == []
    assert list((store.root / "new").iterdir()) == []
    for blob in (store.blobs / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


# -- what works ------------------------------------------------------------------------------------------------


def test_a_pulled_image_is_the_one_that_was_pushed(
    server: str, layout: Path, store: ImageStore, tmp_path: Path
) -> None:
    seen = list[PullProgress]()
    image = pull(store, f"{server}/app", PLAIN, seen.append)
    assert (image.name, image.digest, image.source) == (
        f"{server}/app:latest",
        digest_of(layout),
        digest_of(layout),
    )
    assert store.images() == [image]
    assert contents(store, f"{server}/app:latest", tmp_path / "cache") == ["one", "two", "large"]
    assert seen[0] == (image.name, 0, 0, 0) and seen[-1] == (image.name, image.stored, image.stored, 3)
    assert image.stored > LARGE + 2 * SMALL
    documents = (store.blob(image.digest), *(store.blobs / "sha256").iterdir())
    assert {path.stat().st_mode & 0o777 for path in documents} == {0o400}  # nobody but us wrote there
    assert store.find(image.digest) == store.find(image.digest[7:19]) == image
    assert list((store.root / "new").iterdir()) == []


def test_a_second_pull_fetches_nothing_and_repairs_what_is_damaged(server: str, store: ImageStore) -> None:
    with Proxy(server) as proxy:
        name = f"{proxy.address}/app"
        image = pull(store, name, PLAIN)
        with store.open(image) as opened:
            large = store.blob(opened.layers[2].digest)
        before = proxy.count
        seen = list[PullProgress]()
        assert pull(store, name, PLAIN, seen.append).digest == image.digest
        assert proxy.count - before < 10_000
        assert seen[-1].done == seen[-1].total
        large.chmod(0o600)
        large.write_bytes(b"damaged" + large.read_bytes()[7:])
        with store.open(image) as opened, pytest.raises(ImageInvalid, match="copy it anew"):
            LayerStore().prepare(opened)
        before = proxy.count
        pull(store, name, PLAIN)
        assert LARGE < proxy.count - before < LARGE + SMALL
        with store.open(image) as opened:
            assert len(LayerStore().prepare(opened)) == 3


def test_of_an_index_the_guests_architecture_is_taken(server: str, store: ImageStore, tmp_path: Path) -> None:
    ours = write_layout(tmp_path / "amd64", [layer("ours", 1000)], {})
    theirs = write_layout(tmp_path / "arm64", [layer("theirs", 1000)], {})
    digest = oci_registry.write_index(tmp_path / "both", [(theirs, "arm64"), (ours, "amd64")])
    oci_registry.push(f"oci:{tmp_path}/both:latest", f"{server}/both:latest", "--multi-arch=all")
    image = pull(store, f"{server}/both", PLAIN)
    assert (image.digest, image.source, image.indexes) == (digest_of(ours), digest, (digest,))
    assert contents(store, image.name, tmp_path / "cache") == ["ours"]
    pinned = pull(store, f"{server}/both@{digest}", PLAIN)
    assert (pinned.name, pinned.digest) == (f"{server}/both@{digest}", image.digest)
    only = oci_registry.write_index(tmp_path / "foreign", [(theirs, "arm64")])
    oci_registry.push(f"oci:{tmp_path}/foreign:latest", f"{server}/foreign:latest", "--multi-arch=all")
    with pytest.raises(ImageNotFound, match=r"for 'linux/arm64', and the guest is linux/amd64"):
        pull(store, f"{server}/foreign@{only}", PLAIN)


def test_a_foreign_image_without_an_index_is_refused_before_its_layers_are_fetched(
    server: str, store: ImageStore, tmp_path: Path
) -> None:
    theirs = Editor(write_layout(tmp_path / "arm64", [layer("theirs", LARGE)], {}))
    theirs.config["architecture"] = "arm64"
    source = theirs.save()
    oci_registry.push(f"oci:{source}:latest", f"{server}/arm:latest")
    with Proxy(server) as proxy:
        with pytest.raises(ImageNotFound, match="linux/arm64"):
            pull(store, f"{proxy.address}/arm", PLAIN)
        assert proxy.count < 20_000
    assert_nothing_left(store)


def test_dockers_own_formats_keep_their_digests(
    server: str, layout: Path, store: ImageStore, tmp_path: Path
) -> None:
    oci_registry.push(f"oci:{layout}:latest", f"{server}/docker:latest", "--format=v2s2")
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{server}/docker:latest"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert b"application/vnd.docker.distribution.manifest.v2+json" in raw
    image = pull(store, f"{server}/docker", PLAIN)
    assert store.blob(image.digest).read_bytes() == raw
    assert contents(store, image.name, tmp_path / "cache") == ["one", "two", "large"]
    assert pull(store, f"{server}/docker@{image.digest}", PLAIN).digest == image.digest


def test_layers_of_all_compressions_and_none(server: str, store: ImageStore, tmp_path: Path) -> None:
    for name, kind, options in (
        ("plain", "tar", ["--preserve-digests"]),
        ("gzip", "tar+gzip", []),
        ("zstd", "tar+zstd", ["--dest-compress-format=zstd"]),
    ):
        source = write_layout(tmp_path / name, [layer(name, 5000)], {}, compress=False)
        oci_registry.push(f"oci:{source}:latest", f"{server}/{name}:latest", *options)
        image = pull(store, f"{server}/{name}", PLAIN)
        with store.open(image) as opened:
            assert opened.layers[0].media_type == f"application/vnd.oci.image.layer.v1.{kind}"
        assert contents(store, image.name, tmp_path / "cache") == [name]


def test_a_registry_that_wants_a_login(
    layout: Path, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with oci_registry.registry(tmp_path / "registry", login=True) as address:
        login = f"{oci_registry.USER}:{oci_registry.PASSWORD}"
        oci_registry.push(f"oci:{layout}:latest", f"{address}/app:latest", f"--dest-creds={login}")
        with pytest.raises(RegistryRefused, match="not logged in") as caught:
            pull(store, f"{address}/app", PLAIN)
        assert f"skopeo login {address}" in caught.value.hint and isinstance(caught.value, PermissionError)
        logins = tmp_path / "auth.json"
        for password, works in (("wrong", False), (oci_registry.PASSWORD, True)):
            auth = base64.b64encode(f"{oci_registry.USER}:{password}".encode()).decode()
            logins.write_text(json.dumps({"auths": {address: {"auth": auth}}}))
            with contextlib.nullcontext() if works else pytest.raises(RegistryRefused):
                pull(store, f"{address}/app", Registry(authfile=logins, tls_verify=False))
        store.untag(store.get(f"{address}/app"))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(logins))  # as skopeo login leaves it
        assert pull(store, f"{address}/app", PLAIN).digest == digest_of(layout)


def test_tls_with_a_certificate_that_nobody_vouches_for(layout: Path, store: ImageStore, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with oci_registry.registry(tmp_path / "registry", certificate=(certificate, key)) as address:
        oci_registry.push(f"oci:{layout}:latest", f"{address}/app:latest")
        with pytest.raises(RegistryUnreachable, match="not trusted") as caught:
            pull(store, f"{address}/app")
        assert f"certs.d/{address}" in caught.value.hint
        assert pull(store, f"{address}/app", PLAIN).digest == digest_of(layout)


# -- what is cut off -------------------------------------------------------------------------------------------


def test_a_connection_cut_within_a_layer_is_made_again(server: str, store: ImageStore, layout: Path) -> None:
    with Proxy(server, limit=LARGE // 2, cuts=1) as proxy:
        assert pull(store, f"{proxy.address}/app", PLAIN).digest == digest_of(layout)
        assert proxy.cuts == 0


def test_a_pull_cut_off_for_good_goes_on_where_it_was(server: str, store: ImageStore) -> None:
    with Proxy(server, limit=LARGE // 2, cuts=1000) as proxy:
        with pytest.raises(RegistryUnreachable, match="connection to 127") as caught:
            pull(store, f"{proxy.address}/app", PLAIN)
        assert "try again" in caught.value.hint and isinstance(caught.value, ConnectionError)
        assert_nothing_left(store)
        assert len(list((store.blobs / "sha256").iterdir())) == 4  # manifest, configuration, two small layers
        proxy.cuts, proxy.count = 0, 0
        seen = list[PullProgress]()
        pull(store, f"{proxy.address}/app", PLAIN, seen.append)
        assert proxy.count < LARGE + SMALL
        assert next(step.done for step in seen if step.total) >= 2 * SMALL


def test_a_registry_that_stops_in_the_middle(
    server: str, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "STALL", 0.5)
    with Proxy(server, limit=LARGE // 2, hold=True) as proxy:
        with pytest.raises(RegistryUnreachable, match="sent nothing for"):
            pull(store, f"{proxy.address}/app", PLAIN)
        assert_nothing_left(store)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_cancelled_pull_ends_skopeo_and_leaves_nothing(server: str, store: ImageStore) -> None:
    with Proxy(server, limit=LARGE // 2, hold=True) as proxy:

        def cancel(step: PullProgress) -> None:
            if proxy.holding.is_set():
                raise KeyboardInterrupt

        before = children()
        with pytest.raises(KeyboardInterrupt):
            pull(store, f"{proxy.address}/app", PLAIN, cancel)
        assert children() == before
        assert_nothing_left(store)


# -- several at once -------------------------------------------------------------------------------------------


def test_pulls_of_one_image_share_the_work(server: str, store: ImageStore) -> None:
    with Proxy(server) as proxy, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pull(store, f"{proxy.address}/app", PLAIN), range(4)))
        assert len(set(found)) == 1  # pulled at one time
        assert proxy.count < LARGE + 3 * SMALL


def test_nothing_is_collected_from_under_a_pull(server: str, store: ImageStore) -> None:
    with Proxy(server, limit=LARGE // 2, hold=True) as proxy, ThreadPoolExecutor(1) as pool:
        stop = threading.Event()

        def until_stopped(_: PullProgress) -> None:
            if stop.is_set():
                raise KeyboardInterrupt

        running = pool.submit(pull, store, f"{proxy.address}/app", PLAIN, until_stopped)
        assert proxy.holding.wait(30)
        assert store.collect() == (0, 0, True)
        stop.set()
        with pytest.raises(KeyboardInterrupt):
            running.result(30)
    freed = store.collect()
    assert freed.files >= 2 and freed.size > 0 and not freed.in_use  # manifest, configuration, and what was whole
    assert list((store.blobs / "sha256").iterdir()) == []


# -- what is not there, or wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "registry", "error", "text"),
    [
        ("{server}/nosuch", PLAIN, ImageNotFound, r"has no 127.*/nosuch:latest"),
        ("{server}/app:nosuch", PLAIN, ImageNotFound, r"has no 127.*/app:nosuch"),
        ("{server}/app@sha256:" + "0" * 64, PLAIN, ImageNotFound, "has no 127"),
        ("{server}/app", Registry(), RegistryUnreachable, "does not speak TLS"),
        ("127.0.0.1:1/app", PLAIN, RegistryUnreachable, "connection refused"),
        ("nosuch.invalid/app", PLAIN, RegistryUnreachable, "no host nosuch.invalid"),
        ("{server}/App", PLAIN, InvalidRequest, "lower case"),
    ],
)
def test_each_failure_is_an_error_of_its_own_with_the_next_step(
    server: str, store: ImageStore, name: str, registry: Registry, error: type[ByreError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        pull(store, name.format(server=server), registry)
    assert caught.value.hint
    assert store.images() == []


def test_a_missing_skopeo_names_its_package(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ToolMissing) as caught:
        pull(store, "debian")
    assert caught.value.hint == "apt install skopeo"


SAID = [
    ("toomanyrequests: You have reached your pull rate limit", RegistryFailed, "log in for a higher limit"),
    ("requested access to the resource is denied", RegistryRefused, "skopeo login"),
    ("reading manifest x in localhost/denied: manifest unknown", ImageNotFound, "tag"),
    ("write /x: no space left on device", StorageFailed, "make room"),
    ("open /x/blobs/sha256/1: permission denied", StorageFailed, "look at the permissions"),
    ("denied: Permission denied on resource", RegistryRefused, "skopeo login"),
    ("Get https://x/v2/: EOF", RegistryUnreachable, "try again"),
    ("something new", RegistryFailed, "skopeo inspect docker://localhost/denied:latest"),
    ("\x1b[31mred", RegistryFailed, "skopeo inspect"),
]


@pytest.mark.parametrize(("said", "error", "hint"), SAID)
def test_what_skopeo_says_becomes_an_error(
    store: ImageStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    error: type[ByreError],
    hint: str,
) -> None:
    fake = tmp_path / "bin/skopeo"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\ncat >&2 <<\'E\'\nwarning\ntime="x" level=fatal msg="{said}"\nE\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(error) as caught:
        pull(store, "localhost/denied")
    assert hint in caught.value.hint
    assert "\x1b" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root")
def test_a_full_disk(server: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        with pytest.raises(StorageFailed, match="left") as caught:
            pull(ImageStore(small), f"{server}/app", PLAIN)
        assert "byre image prune" in caught.value.hint
        with contextlib.suppress(OSError), open(small / "fill", "wb", buffering=0) as fill:
            while True:
                fill.write(bytes(4096))
        with pytest.raises(StorageFailed, match="left"):
            pull(ImageStore(small), f"{server}/app", PLAIN)
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_a_registry_sends_is_not_believed(
    server: str, layout: Path, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skopeo that is deceived: the digest of the reference decides."""
    fake = tmp_path / "bin/skopeo"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "{}"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(ImageInvalid, match=r"sent sha256:.* as " + digest_of(layout)):
        pull(store, f"{server}/app@{digest_of(layout)}", PLAIN)
    for document, text in (
        ("{}", "neither an image's manifest nor"),
        ('{"manifests": [], "layers": []}', "or both"),
        ('{"schemaVersion": 1}', "no longer"),
        ("[]", "not known"),
        ("rubbish", "not JSON"),
        ('{"config": {"digest": "../../x"}, "layers": []}', "digest"),
        ('{"config": {}, "layers": [{"digest": "sha256:/", "size": 1}]}', "digest"),
    ):
        fake.write_text(f"#!/bin/sh\ncat <<'E'\n{document}\nE\n")
        with pytest.raises(ImageInvalid, match=text):
            pull(store, f"{server}/app", PLAIN)
    assert store.images() == []


# -- killed ----------------------------------------------------------------------------------------------------


def _killed(root: Path, name: str, point: int) -> None:
    """Pull and convert; at the audit event (open, rename, mkdir, Popen, …) of this number die by SIGKILL."""
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event.startswith(("os.", "open", "subprocess.", "shutil.", "fcntl.")):
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

    store = ImageStore(root / "store")
    sys.addaudithook(hook)
    image = pull(store, name, PLAIN)
    with store.open(image) as opened:
        LayerStore(root / "cache").prepare(opened)
    (root / "count").write_text(str(count))


def _run(root: Path, name: str, point: int) -> int | None:
    worker = multiprocessing.get_context("spawn").Process(target=_killed, args=(root, name, point))
    worker.start()
    worker.join(60)
    return worker.exitcode


def test_killed_at_any_point_nothing_torn_is_used(server: str, tmp_path: Path) -> None:
    name = f"{server}/app:latest"
    (tmp_path / "whole").mkdir()
    assert _run(tmp_path / "whole", name, -1) == 0
    points = int((tmp_path / "whole/count").read_text())
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole/cache/v1/images").iterdir()}
    for point in sorted(random.Random(4).sample(range(1, points), 20)):
        root = tmp_path / str(point)
        root.mkdir()
        assert _run(root, name, point) == -signal.SIGKILL, point
        for path in (root / "store/v1/blobs/sha256").glob("*"):  # whatever has its final name is whole
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, point
        for path in (root / "cache/v1/images").glob("*"):
            assert path.read_bytes() == expected[path.name], point
        store = ImageStore(root / "store")
        with store.open(pull(store, name, PLAIN)) as opened:
            made = LayerStore(root / "cache").prepare(opened)
        assert {layer.path.name: layer.path.read_bytes() for layer in made} == expected, point
        assert list((store.root / "new").iterdir()) == list((root / "cache/v1/new").iterdir()) == [], point


# -- files, and what users name --------------------------------------------------------------------------------


def test_archives_and_layouts_are_taken_in(layout: Path, store: ImageStore, tmp_path: Path) -> None:
    for kind, own in (("docker-archive", "docker.io/some/app:v1"), ("oci-archive", "docker.io/some/app:v1")):
        archive = tmp_path / f"{kind}.tar"
        subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:latest", f"{kind}:{archive}:{own}"], check=True)
        image = take_in(store, f"{kind}:{archive}")
        assert image.name == own and image.source == ""
        assert (image.digest == digest_of(layout)) == (kind == "oci-archive")
        assert contents(store, "some/app:v1", tmp_path / "cache") == ["one", "two", "large"]
    seen = list[PullProgress]()
    image = take_in(store, f"oci:{layout}", "mine", seen.append)
    assert image.name == "docker.io/library/mine:latest" and image.digest == digest_of(layout)
    assert seen[-1].done == seen[-1].total == image.stored
    with pytest.raises(InvalidRequest, match="does not say its image's name") as caught:
        take_in(store, f"oci:{layout}")
    assert "give a name" in caught.value.hint
    with pytest.raises(InvalidRequest, match="by a tag"):
        take_in(store, f"oci:{layout}", f"mine@{digest_of(layout)}")


def test_a_damaged_archive_is_not_taken_in(layout: Path, store: ImageStore, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(layout, damaged)
    large = max((damaged / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    large.write_bytes(b"damaged" + large.read_bytes()[7:])
    with pytest.raises(ImageInvalid, match="has the digest"):
        take_in(store, str(damaged), "mine")
    assert_nothing_left(store)


def test_what_is_obtained_follows_the_policy(
    server: str, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app").mkdir()  # of no importance
    with Proxy(server) as proxy:
        name = f"{proxy.address}/app"
        with pytest.raises(ImageNotFound, match="no image") as caught, obtained(name, "never"):
            pass
        assert caught.value.hint == f"fetch it: byre image pull {name}"
        for policy, fetches in (("missing", True), ("missing", False), ("never", False), ("always", True)):
            before = proxy.count
            with obtained(name, policy, PLAIN) as image:
                assert image.manifest_digest == digest_of(layout) and len(image.layers) == 3
            assert (proxy.count > before) == fetches, policy
    with obtained(digest_of(layout), "never") as image:
        assert image.reference == f"{name}:latest"
    with obtained(f"oci:{layout}", "never") as image:
        assert image.manifest_digest == digest_of(layout)
    with pytest.raises(InvalidRequest, match="one of missing, always, never"), obtained(name, "sometimes"):
        pass


def test_a_file_that_was_meant_is_named(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(server).mkdir()
    Path(server, "image.tar").touch()
    with pytest.raises(ImageNotFound) as caught, obtained(f"{server}/image.tar", registry=PLAIN):
        pass
    assert caught.value.hint == f"for the file that is here give ./{server}/image.tar"


# -- the command -----------------------------------------------------------------------------------------------


def byre(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "byre", "image", *arguments]
    streams: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, **{**streams, **options})  # type: ignore[call-overload, no-any-return]


def test_the_command_prints_the_digest_and_says_the_rest_in_plain_lines(server: str, layout: Path) -> None:
    with byre("pull", "--tls-verify=false", f"{server}/app") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.decode() == f"{server}/app:latest@{digest_of(layout)}\n"
    lines = err.decode().splitlines()
    assert lines[0] == f"byre: pulling {server}/app:latest"
    assert lines[1].startswith("byre: 3.2 MiB in 3 layers, ") and lines[1].endswith("/s") and len(lines) == 2
    with byre("pull", f"{server}/nosuch") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (125, b"")
    assert b"\nhint: if it is your own: --tls-verify=false" in err


def test_on_a_terminal_there_is_a_bar_that_goes_away(server: str) -> None:
    with Proxy(server, limit=LARGE // 2, hold=True) as proxy:
        near, far = pty.openpty()
        termios.tcsetwinsize(far, (24, 70))
        with byre("pull", "--tls-verify=false", f"{proxy.address}/app", stderr=far) as process:
            os.close(far)
            shown = b""
            while not (found := re.search(rb"\[(=+ *)\] [\d.]+ MiB of 3.2 MiB, [\d.]+ [KM]iB/s", shown)):
                shown += os.read(near, 4096)
            assert len(found[1]) == 24
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        with contextlib.suppress(OSError):
            while data := os.read(near, 4096):
                shown += data
        os.close(near)
    assert shown.endswith(b"\r\x1b[K")
    assert_nothing_left(ImageStore())


def test_a_signal_ends_the_command_and_its_skopeo(server: str) -> None:
    with Proxy(server, limit=LARGE // 2, hold=True) as proxy:
        with byre("pull", "--tls-verify=false", f"{proxy.address}/app") as process:
            assert proxy.holding.wait(60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        assert proxy.dropped.wait(60)
    assert_nothing_left(ImageStore())


def test_a_pull_that_is_killed_takes_skopeo_with_it(server: str) -> None:
    with Proxy(server, limit=LARGE // 2, hold=True) as proxy:
        with byre("pull", "--tls-verify=false", f"{proxy.address}/app") as process:
            assert proxy.holding.wait(60)
            process.kill()
        assert proxy.dropped.wait(60)
        proxy.release()
        pull(ImageStore(), f"{proxy.address}/app", PLAIN)
    assert list((ImageStore().root / "new").iterdir()) == []
