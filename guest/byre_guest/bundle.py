"""What a container needs on disk and in the mount table: scratch, overlay, specs.  All of it in helper children.

    /run/byre/c/ID/scratch      tmpfs of a given size: what the container writes, where it has no disk for that;
                                etc/ in it: see `names`
    /run/byre/c/ID/rootfs       overlay of the layers with it
    /run/byre/c/ID/config.json  the spec for the runtime; config-terminal.json: the same with a terminal
    /run/byre/c/ID/N.*          one call of the runtime: its log, pid file, process object, console socket

Rule: `teardown` undoes `prepare` however far it came, and bears being repeated (B22).  Nothing here knows the
loop; every function may block, and is killed when it takes too long (B47).  Source: overlayfs.rst, tmpfs(5).
"""

from __future__ import annotations

import errno
import os
import stat
from time import monotonic, sleep

from byre_proto.errors import ContainerNotReady, ResourceExhausted, StorageFailed

from . import cgroups, linux, names, oci, rootfs, storage, users, volumes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BASE = "/run/byre/c"

#: What mount(2) takes as options: one page, with the NUL that ends them.
MAX_OPTIONS = 4095

#: A scratch whose size nobody gave may take this share of the VM's memory.
DEFAULT_SCRATCH_SHARE = 2

#: Each inode of a tmpfs takes about 1 KiB of kernel memory that `size` does not count; one per this many bytes
#: of size bounds it to a quarter, and leaves a small scratch enough to start with.
BYTES_PER_INODE = 4096
MIN_INODES = 4096

#: For killed processes to leave the cgroup, in seconds, and between two looks; this is a helper child.
GONE_TIMEOUT = 5.0
GONE_PAUSE = 0.01

#: redirect_dir and metacopy off: a layer's own attributes must not point elsewhere.  No index: the layers are
#: shared by many overlays, and no overlay is mounted twice.
OVERLAY_OPTIONS = "index=off,metacopy=off,redirect_dir=nofollow"

#: A mount that takes over what the image has at its place (crun's "tmpcopyup"): a volume.
COPY_UP = "tmpcopyup"


def path_of(container: str) -> str:
    """The directory of a container's bundle."""
    return f"{BASE}/{container}"


def prepare(
    container: str, cgroup: str, paths: dict[str, str], arguments: dict[str, Any], etc: str, nameserver: str
) -> dict[str, Any]:
    """Mount the root, set the limits, write the specs; returns the process object of the container's init.

    `arguments` are those of `container.create`, `paths` has where the disks that they name are mounted; `etc` is
    where a pod has its `names`, "": the container has its own, with the `nameserver` of its network.  Raises
    `StorageFailed`, `UserNotFound`, `InvalidRequest`, `ProgramNotFound` and `ProgramNotExecutable` (for a format
    that cannot run).
    """
    bundle = path_of(container)
    limits, spec = cgroups.take_limits(arguments["spec"])
    lower = [paths[name] for name in filter(None, [*arguments["layers"], arguments["root_share"]])]
    disk = paths.get(arguments["scratch"], "")
    storage.need("overlay")
    try:
        os.makedirs(bundle, 0o700)
        os.mkdir(cgroup)
        scratch = disk or _mount_scratch(bundle, arguments["scratch_bytes"])
        _mount_root(bundle, lower, scratch)
        if etc:
            names.add(etc, container)
        else:
            etc = f"{scratch}/etc"
            names.write(etc, [str(spec.get("hostname") or container), container], nameserver)
    except OSError as error:
        raise StorageFailed(f"the root of {container} could not be made: {error}", errno=error.errno) from error
    cgroups.apply(cgroup, limits)
    root = f"{bundle}/rootfs"
    root_fd = rootfs.open_root(root)
    try:
        process = _init_process(root_fd, spec["process"], arguments["user"])
        mounts = [_mount(root_fd, mount, paths) for mount in spec.get("mounts", [])] + names.mounts(etc, spec)
        if not _below_a_mount(process, mounts):
            _find_program(root_fd, process)
    finally:
        os.close(root_fd)
    whole = oci.container_spec({**spec, "mounts": mounts}, root, cgroup[len(cgroups.ROOT) :], process)
    _write(f"{bundle}/config.json", oci.to_json(whole))
    _write(f"{bundle}/config-terminal.json", oci.to_json({**whole, "process": {**process, "terminal": True}}))
    return process


def _mount_scratch(bundle: str, scratch_bytes: int) -> str:
    size = scratch_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // DEFAULT_SCRATCH_SHARE
    inodes = max(MIN_INODES, size // BYTES_PER_INODE)
    scratch = f"{bundle}/scratch"
    os.mkdir(scratch)
    linux.mount("scratch", scratch, "tmpfs", 0, f"size={size},nr_inodes={inodes},mode=0700")
    return scratch


def _mount_root(bundle: str, layers: list[str], scratch: str) -> None:
    root = f"{bundle}/rootfs"
    upper, work = f"{scratch}/upper", f"{scratch}/work"
    os.mkdir(root)
    os.mkdir(upper)
    os.mkdir(work)
    top = os.stat(layers[-1])  # the root directory itself is as the highest layer has it
    os.chown(upper, top.st_uid, top.st_gid)
    os.chmod(upper, stat.S_IMODE(top.st_mode))
    lower = ":".join(reversed(layers))
    options = f"lowerdir={lower},upperdir={upper},workdir={work},{OVERLAY_OPTIONS}"
    if len(options) > MAX_OPTIONS:
        raise ResourceExhausted(f"{len(layers)} layers do not fit an overlay's options", hint="squash the image")
    linux.mount("overlay", root, "overlay", 0, options)


def _init_process(root_fd: int, given: dict[str, Any], user: str) -> dict[str, Any]:
    found = users.look_up(root_fd, user) if user else None
    process = oci.init_process(given, found)
    oci.with_home(process, found["home"] if found else home_of(root_fd, process["user"]))
    return process


def home_of(root_fd: int, user: dict[str, Any]) -> str:
    """The home of a process object's user by the container's /etc/passwd."""
    home: str = users.look_up(root_fd, str(user.get("uid", 0)))["home"]
    return home


def _mount(root_fd: int, mount: dict[str, Any], paths: dict[str, str]) -> dict[str, Any]:
    """A mount as the runtime takes it.

    A volume is a directory of its disk.  A tmpfs that copies up gets owner and mode of the directory too, which the
    runtime leaves out; a `mode=` of its own is for an image that does not have the directory.
    """
    if mount.get("type") == volumes.TYPE:
        return volumes.bind(root_fd, mount, paths[mount["source"]])
    options = mount.get("options") or []
    found = rootfs.status(root_fd, mount["destination"]) if COPY_UP in options else None
    if found is None:
        return mount
    others = [option for option in options if not option.startswith(("mode=", "uid=", "gid="))]
    own = [f"mode={stat.S_IMODE(found.st_mode):o}", f"uid={found.st_uid}", f"gid={found.st_gid}"]
    return {**mount, "options": [*others, *own]}


def _below_a_mount(process: dict[str, Any], mounts: list[dict[str, Any]]) -> bool:
    """Whether the program may come from a mount, and so is not in the image: then only the runtime can tell."""
    places = [mount["destination"].rstrip("/") + "/" for mount in mounts]
    search = oci.variable(process, "PATH") or rootfs.DEFAULT_PATH
    paths = rootfs.candidates(process["args"][0], process["cwd"], search)
    return any(os.path.normpath(path).startswith(place) for path in paths for place in places)


def _find_program(root_fd: int, process: dict[str, Any]) -> None:
    """Check the program's format; without a PATH, which the runtime needs, name it by its path."""
    search = oci.variable(process, "PATH")
    program: str = process["args"][0]
    path = rootfs.find_program(root_fd, program, process["cwd"], search or rootfs.DEFAULT_PATH)
    if path and not search and "/" not in program:
        process["args"] = [path, *process["args"][1:]]


def prepare_exec(
    root: str, base: dict[str, Any], arguments: dict[str, Any], process_file: str, leaf: str
) -> dict[str, Any]:
    """Write the process object of an exec and make its cgroup; returns its "args" and "cwd".

    `root` is the container's root as its processes see it, mounts and all.  Raises `UserNotFound`,
    `WorkingDirectoryNotFound`, `ProgramNotFound`, `ProgramNotExecutable`, `InvalidRequest` (B14) and
    `ContainerNotReady`.
    """
    try:
        root_fd = rootfs.open_root(root)
    except OSError as error:
        raise ContainerNotReady("the container has ended meanwhile", errno=error.errno) from error
    try:
        user = None
        if arguments["oci"] is None and arguments["user"]:
            user = users.look_up(root_fd, arguments["user"])
        process = oci.exec_process(base, arguments, user)
        if not oci.variable(process, "HOME"):
            oci.with_home(process, user["home"] if user else home_of(root_fd, process["user"]))
        rootfs.check_directory(root_fd, process["cwd"])
        _find_program(root_fd, process)
    finally:
        os.close(root_fd)
    _write(process_file, oci.to_json(process))
    os.mkdir(leaf)
    return {"args": process["args"], "cwd": process["cwd"]}


def teardown(container: str, cgroup: str) -> None:
    """Unmount and remove all of a container.  What is not there is no error.  Raises `StorageFailed`."""
    bundle = path_of(container)
    try:
        for name in ("rootfs", "scratch"):
            unmount(f"{bundle}/{name}")
        if os.path.isdir(bundle):
            for name in os.listdir(bundle):
                path = f"{bundle}/{name}"
                if os.path.isdir(path):
                    os.rmdir(path)
                else:
                    os.unlink(path)
            os.rmdir(bundle)
    except OSError as error:
        raise StorageFailed(f"{bundle} could not be removed: {error}", errno=error.errno) from error
    end(cgroup)


def end(cgroup: str) -> None:
    """Kill what lives in it, and remove it.  Raises `StorageFailed`."""
    cgroups.kill(cgroup)
    deadline = monotonic() + GONE_TIMEOUT
    while not cgroups.remove(cgroup):
        if monotonic() > deadline:
            raise StorageFailed(f"a killed process still runs in {cgroup}")
        sleep(GONE_PAUSE)


def unmount(path: str) -> None:
    """Unmount what is there, if anything is, be it in use.  Raises OSError."""
    for flags in (linux.UMOUNT_NOFOLLOW, linux.UMOUNT_NOFOLLOW | linux.MNT_DETACH):
        try:
            linux.umount(path, flags)
            return
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # no mount, no directory
                return
            if error.errno != errno.EBUSY or flags & linux.MNT_DETACH:
                raise


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii", opener=_private) as file:
        file.write(text)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
