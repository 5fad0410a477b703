"""The store of templates: what is found, what is not believed, who may make one, what a killed maker leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.errors import PermissionRefused, TemplateBroken
from byre.machines.base import Identity
from byre.template_files import memory_digest
from byre.templates import FORMAT, KEEP, Store, Template, key_of, room_problem

LIKE = Identity(facts={"command": ["qemu"], "files": [1, 2]}, tsc_khz=2_600_000)
SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "templates")


def make(store: Store, like: Identity = LIKE) -> Template:
    claim = store.claim(like)
    assert claim is not None
    with claim:
        with (claim.new / "memory").open("wb") as file:
            file.truncate(SIZE)
            file.seek(300_000)
            file.write(b"written by the guest")
        (claim.new / "state").write_bytes(b"registers")
        return store.finish(claim, like, "7.2.0")


def test_what_was_made_is_found_and_nothing_else_is_left(store: Store) -> None:
    assert store.find(LIKE) is None
    made = make(store)
    found = store.find(LIKE)
    assert found is not None
    assert (found.directory, found.manifest) == (made.directory, json.loads(json.dumps(made.manifest)))
    assert found.memory.read_bytes()[300_000:300_020] == b"written by the guest"
    assert os.listdir(store.root) == [key_of(LIKE)]
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in (found.directory, *found.directory.iterdir())} == {0}
    store.verify(found)


def test_the_memory_takes_no_more_room_than_was_written(store: Store) -> None:
    assert make(store).disk_bytes < SIZE / 2


@pytest.mark.parametrize(
    "like",
    [
        Identity(facts={"command": ["qemu", "-m"], "files": [1, 2]}, tsc_khz=LIKE.tsc_khz),
        Identity(facts={"command": ["qemu"], "files": [1, 3]}, tsc_khz=LIKE.tsc_khz),
    ],
)
def test_another_machine_has_another_template(store: Store, like: Identity) -> None:
    make(store)
    assert store.find(like) is None
    assert store.find(LIKE) is not None


def overwrite(template: Template) -> None:
    """As an emulator that was broken out of would: it has the file open, and sets its times back."""
    before = template.memory.stat()
    with template.memory.open("r+b") as file:
        file.seek(4096)
        file.write(b"poison")
    os.utime(template.memory, ns=(before.st_atime_ns, before.st_mtime_ns))


def manifest(**changes: object) -> Callable[[Template], None]:
    def change(template: Template) -> None:
        file = template.directory / "manifest.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


BROKEN: dict[str, Callable[[Template], object]] = {
    "its memory was written to": overwrite,
    "its memory was replaced": lambda t: (t.memory.rename(t.directory / "old"), t.memory.write_bytes(bytes(SIZE))),
    "its memory is shorter": lambda t: os.truncate(t.memory, SIZE // 2),
    "its memory is gone": lambda t: t.memory.unlink(),
    "its state has changed": lambda t: t.state.write_bytes(b"registerz"),
    "its manifest is garbage": lambda t: (t.directory / "manifest.json").write_text("{"),
    "its manifest is of another kind": lambda t: (t.directory / "manifest.json").write_text("[]"),
    "its manifest says nothing of the memory": manifest(memory=None),
    "it has another format": manifest(format=FORMAT + 1),
    "others may write its memory": lambda t: t.memory.chmod(0o666),
    "others may look into it": lambda t: t.directory.chmod(0o755),
    "its memory is a link": lambda t: (t.memory.rename(t.directory / "old"), t.memory.symlink_to("old")),
    "its memory is a directory": lambda t: (t.memory.unlink(), t.memory.mkdir()),
    "it is a file": lambda t: (t.directory.rename(t.directory.with_suffix(".old")), t.directory.write_text("x")),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_not_as_it_was_made_is_removed(store: Store, how: str) -> None:
    BROKEN[how](make(store))
    assert store.find(LIKE) is None
    assert not (store.root / key_of(LIKE)).exists()
    make(store)
    assert store.find(LIKE) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_somebody_else_is_not_used(store: Store) -> None:
    os.chown(make(store).memory, 1, 1)
    assert store.find(LIKE) is None


def test_a_directory_that_others_can_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates").chmod(0o755)
    with pytest.raises(PermissionRefused):
        Store(tmp_path / "templates")


@pytest.mark.parametrize(("khz", "same"), [(2_600_900, True), (2_610_000, False), (None, False)])
def test_the_counters_rate_must_be_about_the_same(store: Store, khz: int | None, same: bool) -> None:
    make(store)
    assert (store.find(Identity(facts=LIKE.facts, tsc_khz=khz)) is not None) == same


def test_verify_looks_at_all_of_the_memory(store: Store) -> None:
    made = make(store)
    overwrite(made)
    look = made.memory.stat()
    said = json.loads((made.directory / "manifest.json").read_text())
    said["memory"].update(mtime_ns=look.st_mtime_ns, ctime_ns=look.st_ctime_ns)
    (made.directory / "manifest.json").write_text(json.dumps(said))
    found = store.find(LIKE)  # which looks at the outside only
    assert found is not None
    with pytest.raises(TemplateBroken):
        store.verify(found)


def test_the_digest_does_not_depend_on_holes(tmp_path: Path) -> None:
    sparse, full, other = (tmp_path / name for name in ("sparse", "full", "other"))
    content = bytes(200_000) + b"x" + bytes(99_999)
    full.write_bytes(content)
    with sparse.open("wb") as file:
        file.seek(200_000)
        file.write(b"x")
        file.truncate(len(content))
    other.write_bytes(bytes(200_001) + b"x" + bytes(99_998))
    assert memory_digest(full) == memory_digest(sparse) != memory_digest(other)


def test_one_makes_it_at_a_time(store: Store) -> None:
    claim = store.claim(LIKE)
    assert claim is not None
    with claim:
        assert store.claim(LIKE) is None
        assert Store(store.root).claim(LIKE) is None
        other = store.claim(Identity(facts={}, tsc_khz=None))
        assert other is not None
        with other:
            pass
    assert os.listdir(store.root) == []
    make(store)


MAKER = """
import sys
from pathlib import Path
from byre.machines.base import Identity
from byre.templates import Store
store = Store(Path(sys.argv[1]))
with store.claim(Identity(facts=eval(sys.argv[2]), tsc_khz=2_600_000)) as claim:
    (claim.new / "memory").write_bytes(b"half")
    print("making", flush=True)
    sys.stdin.read()
"""


def test_a_maker_that_is_killed_leaves_nothing_that_confuses(store: Store) -> None:
    script = [sys.executable, "-c", MAKER, str(store.root), repr(LIKE.facts)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"making\n"
        assert store.claim(LIKE) is None
        assert store.find(LIKE) is None
        maker.send_signal(signal.SIGKILL)
    assert store.find(LIKE) is None
    assert len(os.listdir(store.root)) == 2  # a directory and a lock, of nobody
    assert store.prune(KEEP) == [f"{key_of(LIKE)}.new"]
    assert os.listdir(store.root) == []
    make(store)
    assert store.find(LIKE) is not None


def test_the_last_used_are_kept(store: Store) -> None:
    likes = [Identity(facts={"number": number}, tsc_khz=None) for number in range(KEEP + 2)]
    for number, like in enumerate(likes):
        os.utime(make(store, like).directory, (number, number))
    assert {template.key for template in store.templates()} == {key_of(like) for like in likes[2:]}
    assert store.find(likes[3]) is not None
    assert store.templates()[0].key == key_of(likes[3])
    assert sorted(store.prune(1)) == sorted(key_of(like) for like in likes[2:] if like is not likes[3])
    assert [template.key for template in store.templates()] == [key_of(likes[3])]
    assert store.prune() == [key_of(likes[3])]
    assert os.listdir(store.root) == []


def test_without_room_none_is_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_problem(store.root) is None
    monkeypatch.setattr("byre.templates.MIN_FREE", 1 << 62)
    assert "MiB are free" in str(room_problem(store.root))
