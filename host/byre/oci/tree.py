"""The merged file tree of an image's layers, names and attributes only, and what each layer adds to it for
overlayfs.

Theory.  An OCI layer is a tar to be unpacked over the layers below it; an overlayfs layer is a directory
that is laid over others.  They differ where a tar leaves something unsaid: a parent directory that is not
in the tar (in an overlay it would cover the one below with other attributes), a path through a symbolic
link of a lower layer, a hard link to a lower layer's file, the same name twice.  So each tar is "unpacked"
here in memory, over a tree of all that is below, and what it touched becomes the overlay's layer:

    tar                                     overlay
    missing parent                          directory with the attributes it has below, or 0755 root
    .wh.NAME, and NAME is below             character device 0:0 named NAME
    .wh..wh..opq                            directory with the xattr trusted.overlay.opaque=y
    directory in the place of a removed one the same
    hard link to a file below               the file again, copied up, and its link: as link(2) in an overlay
    the same name twice                     the last one

Rule: no content passes through here, and nothing touches a file system.  A whiteout is made only where it
hides something: in a directory that is not merged with one below, overlayfs shows it as a broken file.
Sources: OCI image-spec v1.1 `layer.md`; the kernel's `overlayfs.rst`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from byre.errors import ImageInvalid
from byre.oci.tarstream import CHAR, DIRECTORY, FILE, LINK, SYMLINK, Entry, show

WHITEOUT_PREFIX = ".wh."
OPAQUE = ".wh..wh..opq"
OPAQUE_XATTR = ("trusted.overlay.opaque", b"y")
#: Symbolic links followed in one path: the kernel's own limit (ELOOP).
MAX_LINKS = 40
#: Path components that the symbolic links of one layer may add: ends a layer made to burn time.
MAX_LINK_STEPS = 20_000_000
#: Entries of one directory in one layer: tar2sqfs searches a directory from its beginning for each of them, so this
#: many take a minute or two, and ten times as many hours.
MAX_DIRECTORY = 100_000
#: squashfs knows these namespaces of extended attributes; ACLs (system.) it cannot hold.
_XATTRS = ("user.", "trusted.", "security.")
#: overlayfs takes these for its own; a layer that brings them could redirect a directory.
_XATTRS_OVERLAY = ("trusted.overlay.", "user.overlay.")


@dataclass(eq=False, slots=True)
class Node:
    """An inode.  `born` and `touched` are numbers of layers, `source` is where a file's data are: (layer,
    ordinal)."""

    entry: Entry
    born: int
    touched: int
    source: tuple[int, int] = (-1, -1)
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        return self.entry.kind == DIRECTORY


class Item(NamedTuple):
    """One entry of a layer as overlayfs wants it.  `source` of a file: (layer, ordinal); `entry.target` of
    a hard link is the path of an item of the same layer.  `entry.name` is the item's path, empty for the
    root."""

    entry: Entry
    source: tuple[int, int]


def _directory(number: int) -> Node:
    return Node(Entry("", DIRECTORY, 0o755, 0, 0, 0, 0, "", (0, 0), ()), number, number)


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


class Tree:
    """`apply` the layers lowest first; `items` gives what the last one adds."""

    def __init__(self) -> None:
        self._root = _directory(-1)
        self._layer = -1
        self._link_steps = 0
        #: Of this layer: what was removed from a directory that has it below (name → it was a directory), and the
        #: directories below which nothing of the lower layers is seen.
        self._removed: dict[Node, dict[str, bool]] = {}
        self._opaque: set[Node] = set()
        #: Names of extended attributes that the last layer has and its image cannot hold.
        self.dropped: set[str] = set()

    def apply(self, entries: Sequence[Entry]) -> None:
        """Lay the next layer over the tree.  Raises ImageInvalid naming the entry that cannot be."""
        self._layer += 1
        self._link_steps = 0
        self._removed, self._opaque, self.dropped = {}, set(), set()
        self._root.touched = self._layer
        for ordinal, entry in enumerate(entries):
            try:
                self._add(entry, ordinal)
            except _Unfit as reason:
                raise ImageInvalid(f"{entry.label} of layer {self._layer + 1} {reason}") from None

    # -- one entry -----------------------------------------------------------------------------------------

    def _add(self, entry: Entry, ordinal: int) -> None:
        parts = _split(entry.name)
        if not parts:
            if entry.kind != DIRECTORY:
                raise _Unfit("would replace the root directory")
            self._root.entry = self._clean(entry)
            return
        if any(part.startswith(WHITEOUT_PREFIX) for part in parts[:-1]):
            raise _Unfit("is below a whiteout")
        stack, name = self._walk(parts[:-1]), parts[-1]
        if name == OPAQUE:
            self._make_opaque(stack)
        elif name.startswith(WHITEOUT_PREFIX * 2):
            pass  # .wh..wh.plnk and the like: notes that aufs left for itself
        elif name.startswith(WHITEOUT_PREFIX):
            self._whiteout(stack, name.removeprefix(WHITEOUT_PREFIX))
        elif entry.kind == CHAR and entry.device == (0, 0):
            self._whiteout(stack, name)  # what it is in an overlay, and what layers taken from one may hold
        elif entry.kind == LINK:
            self._link(stack, name, entry.target)
        elif entry.kind == DIRECTORY:
            self._enter(stack, name).entry = self._clean(entry)
        else:
            self._put(stack, name, Node(self._clean(entry), self._layer, self._layer, (self._layer, ordinal)))

    def _put(self, stack: list[Node], name: str, node: Node) -> None:
        """Set a name, replacing whatever has it."""
        self._remove(stack[-1], name)
        stack[-1].children[name] = node
        self._touch(stack)

    def _remove(self, parent: Node, name: str) -> None:
        old = parent.children.pop(name, None)
        if old is not None and old.born < self._layer:
            self._removed.setdefault(parent, {})[name] = old.is_dir

    def _enter(self, stack: list[Node], name: str) -> Node:
        """The directory of this name, touched; made where there is none, in the place of anything else."""
        node = stack[-1].children.get(name)
        if node is None or not node.is_dir:
            node = _directory(self._layer)
            self._put(stack, name, node)
            if self._removed.get(stack[-1], {}).get(name):
                self._opaque.add(node)
        self._touch(stack)
        node.touched = self._layer
        return node

    def _touch(self, stack: list[Node]) -> None:
        """Of a touched directory, all above it are touched too: so this stops at the first one."""
        for node in reversed(stack):
            if node.touched == self._layer:
                return
            node.touched = self._layer

    def _walk(self, parts: Sequence[str], *, make: bool = True) -> list[Node]:
        """The directories from the root to `parts`, with symbolic links resolved inside the root; with
        `make`, missing ones are made."""
        stack, todo, links = [self._root], list(reversed(parts)), 0
        while todo:
            part = todo.pop()
            if part == "..":
                if len(stack) > 1:
                    stack.pop()
                continue
            node = stack[-1].children.get(part)
            if node is not None and node.entry.kind == SYMLINK:
                links += 1
                target = _split(node.entry.target)
                self._link_steps += len(target) + 1
                if links > MAX_LINKS or self._link_steps > MAX_LINK_STEPS:
                    raise _Unfit("leads through too many symbolic links")
                if node.entry.target.startswith("/"):
                    stack = [self._root]
                todo.extend(reversed(target))
                continue
            if node is not None and not node.is_dir:
                raise _Unfit("is below something that is not a directory")
            if node is None and not make:
                raise _Unfit("is a hard link to what is not there")
            stack.append(node or self._enter(stack, part))
        return stack

    def _clean(self, entry: Entry) -> Entry:
        """Without its name, which belongs to the directory, and with the attributes that can be kept."""
        kept = tuple((k, v) for k, v in entry.xattrs if k.startswith(_XATTRS) and not k.startswith(_XATTRS_OVERLAY))
        if len(kept) < len(entry.xattrs):
            self.dropped.update({k for k, _ in entry.xattrs} - {k for k, _ in kept})
        return entry._replace(name="", xattrs=kept)

    # -- links and whiteouts -------------------------------------------------------------------------------

    def _link(self, stack: list[Node], name: str, target: str) -> None:
        parts = _split(target)
        if ".." in parts or target.startswith("/") or not parts:
            raise _Unfit("is a hard link out of the archive")
        holders = self._walk(parts[:-1], make=False)
        node = holders[-1].children.get(parts[-1])
        if node is None or node.is_dir:
            raise _Unfit("is a hard link to " + ("a directory" if node else "what is not there"))
        if node.born < self._layer:
            node = Node(node.entry, self._layer, self._layer, node.source)
            self._put(holders, parts[-1], node)
        if stack[-1].children.get(name) is not node:
            self._put(stack, name, node)

    def _whiteout(self, stack: list[Node], name: str) -> None:
        """Hide `name` of the layers below; what this layer has under that name stays, whatever the order."""
        if name in ("", ".", ".."):
            raise _Unfit("is a whiteout of no name")
        node = stack[-1].children.get(name)
        if node is None or node.born == self._layer:
            return
        self._touch(stack)
        if node.is_dir and node.touched == self._layer:
            self._hide_below(node)
        else:
            self._remove(stack[-1], name)

    def _make_opaque(self, stack: list[Node]) -> None:
        self._touch(stack)
        if stack[-1].born < self._layer:
            self._hide_below(stack[-1])

    def _hide_below(self, top: Node) -> None:
        """Make a directory opaque: only what this layer put into it and into its directories remains."""
        self._opaque.add(top)
        todo = [top]
        while todo:
            node = todo.pop()
            self._removed.pop(node, None)
            node.children = {n: c for n, c in node.children.items() if c.touched == self._layer}
            for child in node.children.values():
                if child.is_dir and child.born < self._layer:
                    child.born = self._layer
                    todo.append(child)

    # -- what the layer is ---------------------------------------------------------------------------------

    def items(self) -> Iterator[Item]:
        """The last layer for overlayfs, in an order that depends on its contents alone; the root comes
        first."""
        first: dict[Node, str] = {}
        todo = [("", self._root)]
        while todo:
            path, node = todo.pop()
            yield self._item(path, node, first)
            if not node.is_dir:
                continue
            inside = f"{path}/" if path else ""
            for name in sorted(set(self._removed.get(node, ())) - set(node.children)):
                yield Item(Entry(inside + name, CHAR, 0, 0, 0, 0, 0, "", (0, 0), ()), (-1, -1))
            own = [(inside + name, c) for name, c in sorted(node.children.items()) if c.touched == self._layer]
            if len(own) > MAX_DIRECTORY:
                where = f"{show(path or '/')} of layer {self._layer + 1}"
                raise ImageInvalid(f"{where} has {len(own)} entries, over the limit of {MAX_DIRECTORY}")
            todo.extend(reversed(own))

    def _item(self, path: str, node: Node, first: dict[Node, str]) -> Item:
        entry = node.entry._replace(name=path)
        if node.is_dir:
            return Item(
                entry._replace(xattrs=(*entry.xattrs, OPAQUE_XATTR)) if node in self._opaque else entry, (-1, -1)
            )
        original = first.setdefault(node, path)
        if original != path:
            return Item(entry._replace(kind=LINK, target=original, size=0, xattrs=()), (-1, -1))
        return Item(entry, node.source if entry.kind == FILE else (-1, -1))


class _Unfit(Exception):
    """Why an entry cannot be: the end of a sentence that begins with its name."""
