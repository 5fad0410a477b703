"""What a layer becomes for overlayfs: each rule of `byre.oci.tree` on layers written out by hand (B63)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.errors import ImageInvalid
from byre.oci import tree as tree_module
from byre.oci.tarstream import Entry
from byre.oci.tree import OPAQUE_XATTR, Tree

pytestmark = pytest.mark.behaviour("B63")


def entry(name: str, kind: str = "file", target: str = "", mode: int = 0o644, **more: object) -> Entry:
    return Entry(name, kind, mode, 0, 0, 0, 0, target, (0, 0), ())._replace(**more)  # type: ignore[arg-type]


def folder(name: str, mode: int = 0o755) -> Entry:
    return entry(name, "dir", mode=mode)


def link(name: str, target: str) -> Entry:
    return entry(name, "link", target)


def symlink(name: str, target: str) -> Entry:
    return entry(name, "symlink", target)


def apply(*layers: list[Entry]) -> dict[str, str]:
    """The last of `layers` for overlayfs: path → kind, a directory's mode, and where a file's data come from."""
    tree = Tree()
    for layer in layers:
        tree.apply(layer)
    found = {}
    for item, (layer_number, ordinal) in tree.items():
        text = item.kind
        if item.kind == "dir":
            text += f" {item.mode:o}" + (" opaque" if OPAQUE_XATTR in item.xattrs else "")
        elif item.kind == "file":
            text += f" {layer_number}.{ordinal}"
        elif item.kind == "char" and item.device == (0, 0):
            text = "whiteout"
        elif item.target:
            text += f" {item.target}"
        found[item.name] = text
    del found[""]
    return found


BASE = [
    *(folder("d", 0o1777), entry("d/a"), entry("d/b"), symlink("s", "d"), symlink("abs", "/d/sub")),
    *(folder("d/sub", 0o700), entry("d/sub/x"), entry("f")),
]


def test_a_missing_parent_keeps_its_attributes_from_below() -> None:
    assert apply(BASE, [entry("d/sub/new")]) == {"d": "dir 1777", "d/sub": "dir 700", "d/sub/new": "file 1.0"}


def test_a_parent_that_is_nowhere_is_0755() -> None:
    assert apply([entry("a/b/c")]) == {"a": "dir 755", "a/b": "dir 755", "a/b/c": "file 0.0"}


def test_a_directory_of_the_layer_overrides_the_one_below() -> None:
    assert apply(BASE, [folder("d", 0o711)]) == {"d": "dir 711"}
    assert apply(BASE, [entry("d/n"), folder("./d/", 0o711)]) == {"d": "dir 711", "d/n": "file 1.0"}


def test_the_last_of_equal_names_wins() -> None:
    assert apply([entry("a"), symlink("a", "x"), entry("./a")]) == {"a": "file 0.2"}
    assert apply([folder("a"), entry("a/b"), entry("a")]) == {"a": "file 0.2"}
    assert apply([entry("a"), link("b", "a"), entry("a")]) == {"a": "file 0.2", "b": "file 0.0"}


def test_paths_through_symbolic_links_stay_inside() -> None:
    assert apply(BASE, [entry("s/n")]) == {"d": "dir 1777", "d/n": "file 1.0"}
    assert apply(BASE, [entry("abs/n")]) == {"d": "dir 1777", "d/sub": "dir 700", "d/sub/n": "file 1.0"}
    absolute = [folder("e"), symlink("e/root", "/d")]
    assert apply(BASE, absolute, [entry("e/root/n")]) == {"d": "dir 1777", "d/n": "file 2.0"}
    up = [symlink("up", "../../../d")]
    assert apply(BASE, up, [entry("up/n")]) == {"d": "dir 1777", "d/n": "file 2.0"}
    assert apply([symlink("l", "/etc"), entry("l/passwd")])["etc/passwd"] == "file 0.1"


def test_a_directory_takes_the_place_of_a_symbolic_link() -> None:
    assert apply(BASE, [folder("s"), entry("s/n")]) == {"s": "dir 755", "s/n": "file 1.1"}


def test_whiteouts() -> None:
    assert apply(BASE, [entry("d/.wh.a")]) == {"d": "dir 1777", "d/a": "whiteout"}
    assert apply(BASE, [entry(".wh.d")]) == {"d": "whiteout"}
    assert apply(BASE, [entry("d/.wh.a"), entry("d/a")]) == {"d": "dir 1777", "d/a": "file 1.1"}
    assert apply(BASE, [entry("d/a"), entry("d/.wh.a")]) == {"d": "dir 1777", "d/a": "file 1.0"}


def test_a_whiteout_of_nothing_is_nothing() -> None:
    """overlayfs would show it, as a broken file, in a directory that is not merged."""
    assert apply(BASE, [entry("d/.wh.none")]) == {}
    assert apply(BASE, [folder("new"), entry("new/.wh.x")]) == {"new": "dir 755"}
    assert apply(BASE, [entry("d/.wh..wh..opq"), entry("d/.wh.a")]) == {"d": "dir 1777 opaque"}
    assert apply(BASE, [entry("d/.wh.a"), entry("d/.wh..wh..opq")]) == {"d": "dir 1777 opaque"}


def test_an_opaque_directory_keeps_what_its_layer_has() -> None:
    expected = {"d": "dir 1777 opaque", "d/n": "file 1.1"}
    assert apply(BASE, [entry("d/.wh..wh..opq"), entry("d/n")]) == expected
    assert apply(BASE, [entry("d/.wh..wh..opq"), entry("d/n"), entry("d/.wh..wh..opq")]) == expected
    deep = apply(BASE, [entry("d/sub/n"), entry("d/.wh..wh..opq")])
    assert deep == {"d": "dir 1777 opaque", "d/sub": "dir 700", "d/sub/n": "file 1.0"}


def test_an_opaque_directory_in_two_layers() -> None:
    first, second = [entry("d/.wh..wh..opq"), entry("d/n")], [entry("d/.wh..wh..opq"), entry("d/m")]
    assert apply(BASE, first, second) == {"d": "dir 1777 opaque", "d/m": "file 2.1"}
    assert apply(BASE, first, [entry("d/.wh.n")]) == {"d": "dir 1777", "d/n": "whiteout"}
    assert apply(BASE, first, [entry("d/.wh.a")]) == {}


def test_a_directory_that_replaces_a_removed_one_is_opaque() -> None:
    assert apply(BASE, [entry(".wh.d"), entry("d/n")]) == {"d": "dir 755 opaque", "d/n": "file 1.1"}
    assert apply(BASE, [entry(".wh.d"), folder("d", 0o700)]) == {"d": "dir 700 opaque"}
    assert apply(BASE, [folder("d", 0o700), entry(".wh.d")]) == {"d": "dir 700 opaque"}
    assert apply(BASE, [entry("d"), folder("d")]) == {"d": "dir 755 opaque"}
    assert apply(BASE, [entry(".wh.f"), folder("f")]) == {"f": "dir 755"}
    assert apply(BASE, [entry(".wh.d")], [folder("d")]) == {"d": "dir 755"}  # the whiteout between ends the merge


def test_a_device_0_0_is_a_whiteout() -> None:
    assert apply(BASE, [entry("f", "char")]) == {"f": "whiteout"}


def test_what_aufs_left_is_dropped() -> None:
    assert apply(BASE, [entry(".wh..wh.aufs"), folder(".wh..wh.plnk")]) == {}


def test_hard_links_of_one_layer() -> None:
    assert apply([entry("z"), link("a", "z"), link("m", "./a")]) == {"a": "file 0.0", "m": "link a", "z": "link a"}
    assert apply([symlink("z", "t"), link("a", "z")]) == {"a": "symlink t", "z": "link a"}
    assert apply([entry("a"), link("a", "a")]) == {"a": "file 0.0"}


def test_a_hard_link_to_a_lower_file_copies_it_up() -> None:
    assert apply(BASE, [link("n", "s/a")]) == {"d": "dir 1777", "d/a": "file 0.1", "n": "link d/a"}
    after = apply(BASE, [link("n", "f")], [link("m", "n")])
    assert after == {"m": "file 0.7", "n": "link m"}


def test_attributes_that_an_image_cannot_hold_are_dropped_and_told() -> None:
    tree = Tree()
    names = (
        "security.capability",
        "system.posix_acl_access",
        "trusted.overlay.redirect",
        "user.overlay.opaque",
        "user.x",
    )
    tree.apply([entry("a", xattrs=tuple((name, b"1") for name in names))])
    assert [item.xattrs for item, _ in tree.items()][1] == (("security.capability", b"1"), ("user.x", b"1"))
    assert tree.dropped == {"system.posix_acl_access", "trusted.overlay.redirect", "user.overlay.opaque"}


def test_the_root() -> None:
    tree = Tree()
    tree.apply([folder("./", 0o700)])
    tree.apply([entry("a")])
    assert [(item.name, item.mode) for item, _ in tree.items()] == [("", 0o700), ("a", 0o644)]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ([entry("a"), entry("a/b")], "'a/b' of layer 2 is below something that is not a directory"),
        ([entry("f/b")], "not a directory"),
        ([link("a", "/etc/passwd")], "out of the archive"),
        ([link("a", "../etc/passwd")], "out of the archive"),
        ([link("a", "none")], "to what is not there"),
        ([link("a", "none/none")], "to what is not there"),
        ([link("a", "d")], "to a directory"),
        ([entry(".wh.f"), link("a", "f")], "to what is not there"),
        ([entry(".wh...")], "whiteout of no name"),
        ([entry(".wh..")], "whiteout of no name"),
        ([entry(".wh.")], "whiteout of no name"),
        ([entry(".wh.a/b")], "below a whiteout"),
        ([symlink("l", "l"), entry("l/a")], "too many symbolic links"),
        ([symlink("l", "m"), symlink("m", "l"), entry("l/a")], "too many symbolic links"),
        ([entry("./")], "replace the root"),
        ([symlink(".", "/etc")], "replace the root"),
    ],
)
def test_what_cannot_be_is_refused_by_name(layer: list[Entry], reason: str) -> None:
    with pytest.raises(ImageInvalid, match=reason):
        apply(BASE, layer)


def test_symbolic_links_made_to_burn_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_LINK_STEPS", 10_000)
    layer = [symlink("l", "d/../" * 800), *(entry(f"l/{number}") for number in range(100))]
    with pytest.raises(ImageInvalid, match="too many symbolic links"):
        apply(BASE, layer)


def test_deep_paths() -> None:
    name = "/".join(["d"] * 2040)
    layer = [entry(f"{name}/{number}") for number in range(50)]
    assert len(apply(layer)) == 2090
    assert len(apply(layer, [entry(f"{name[: -len('/d')]}/.wh.d")])) == 2040


NAMES = st.lists(st.sampled_from(["a", "b", "s", ".wh.a", ".wh.b", ".wh..wh..opq"]), min_size=1, max_size=3).map(
    "/".join
)
ENTRIES = st.builds(
    entry,
    NAMES,
    st.sampled_from(["file", "dir", "dir", "symlink", "link"]),
    st.sampled_from(["a", "b", "a/b", "b/a"]),
)


@given(st.lists(st.lists(ENTRIES, max_size=8), max_size=4))
def test_any_layers_make_a_tree_that_holds_together(layers: list[list[Entry]]) -> None:
    tree = Tree()
    for layer in layers:
        try:
            tree.apply(layer)
        except ImageInvalid:
            return
        names = [item.name for item, _ in tree.items()]
        kinds = {item.name: item for item, _ in tree.items()}
        assert len(names) == len(kinds)
        for name, item in kinds.items():
            assert not name or kinds[name.rpartition("/")[0]].kind == "dir"  # every parent is there
            assert item.kind != "link" or kinds[item.target].kind not in ("link", "dir")
            assert not name.rpartition("/")[2].startswith(".wh.")
