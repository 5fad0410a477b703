"""Who a user string means where a process is to run: `uid`, `uid:gid`, `name`, `name:group` (B14).

Rule: looked up in the password and group file of the process's own root (a container's, not the VM's); a number
needs no entry.  As container users know it (moby/sys/user, GetExecUser): without a group the user's own is taken,
and those that name the user as a member are added; with one, it is the only group.  Source: passwd(5), group(5).
"""

from __future__ import annotations

from byre_proto.errors import UserNotFound

from . import rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Largest password or group file that is read: thousands of entries fit, a bomb does not.
MAX_FILE = 1024 * 1024

#: Highest user or group id; 2^32-1 is "no id" to the kernel, and what is above 2^31-1 is refused by crun.
MAX_ID = (1 << 31) - 1


def look_up(root_fd: int, user: str) -> dict[str, Any]:
    """`{"uid": int, "gid": int, "gids": [int], "home": str}` for a user string; "" is root.

    Raises `UserNotFound`.  Reads files below the root, so it may block: for helper children.
    """
    name, colon, group = user.partition(":")
    if (user and not name) or (colon and not group):
        raise UserNotFound(f"{user!r} is not a user", hint="use uid, uid:gid, name or name:group", user=user)
    entry = _find(_entries(root_fd, "/etc/passwd", 7), name or "0", 2)
    found: dict[str, Any] = {"uid": 0, "gid": 0, "gids": [], "home": "/"}
    if entry is not None:
        found.update(uid=_id(entry[2]), gid=_id(entry[3]), home=entry[5] or "/")
    else:
        found["uid"] = _number(name or "0", user, "user", "/etc/passwd")
    groups = _entries(root_fd, "/etc/group", 4) if group or entry is not None else []
    if group:
        match = _find(groups, group, 2)
        found["gid"] = _id(match[2]) if match else _number(group, user, "group", "/etc/group")
    elif entry is not None:
        found["gids"] = sorted({_id(g[2]) for g in groups if entry[0] in g[3].split(",")})
    return found


def _entries(root_fd: int, path: str, fields: int) -> list[list[str]]:
    """The lines of a colon-separated file that have `fields` fields and numbers where ids belong."""
    text = rootfs.read(root_fd, path, MAX_FILE).decode("utf-8", "surrogateescape")
    rows = [line.split(":") for line in text.split("\n") if line[:1] not in ("", "#")]
    numeric = (2, 3) if fields == 7 else (2,)
    return [row for row in rows if len(row) >= fields and all(_is_id(row[i]) for i in numeric)]


def _find(rows: list[list[str]], wanted: str, id_field: int) -> list[str] | None:
    """The first row with this name, or else the first with this id (a name may consist of digits)."""
    for row in rows:
        if row[0] == wanted:
            return row
    if _is_id(wanted):
        for row in rows:
            if _id(row[id_field]) == _id(wanted):
                return row
    return None


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID


def _id(text: str) -> int:
    return int(text)


def _number(text: str, user: str, what: str, file: str) -> int:
    if not _is_id(text):
        raise UserNotFound(
            f"the {what} {text!r} is not in {file} where the process would run",
            hint=f"use a {what} of the image, or a number up to {MAX_ID}",
            user=user,
        )
    return int(text)
