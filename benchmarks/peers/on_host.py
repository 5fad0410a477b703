"""crun on the host, without a VM: what containers cost where nothing is in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .interface import Cannot, Peer, output_of

ID = "byre-peers"

#: Where the host has version 1 and 2 of cgroups at once crun 1.8 refuses: version 2 is hidden from it, by a mount
#: namespace of each call.
HIDDEN = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec crun --cgroup-manager=disabled --root=$0 "$@"'


class Crun(Peer):
    """Its container has no cgroup: what it may do with the host's depends on the host."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        busybox = shutil.which("busybox")
        if busybox is None:
            raise Cannot("busybox is not installed")
        (directory / "rootfs/bin").mkdir(parents=True)
        (directory / "rootfs/tmp").mkdir()
        shutil.copy(busybox, directory / "rootfs/bin/busybox")
        for name in ("sh", "sleep", "cat", "echo", "true", "seq"):
            (directory / "rootfs/bin" / name).symlink_to("busybox")
        output_of(["crun", "spec", "--bundle", directory])
        config = json.loads((directory / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": ["sleep", "1000"]}
        config["root"]["readonly"] = False
        config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "cgroup"]
        (directory / "config.json").write_text(json.dumps(config))

    def version(self) -> str:
        return output_of(["crun", "--version"]).decode().splitlines()[0]

    def _crun(self, *arguments: str | Path, stdin: bytes = b"") -> bytes:
        return output_of(
            ["unshare", "--mount", "sh", "-c", HIDDEN, self.directory / "state", *arguments], stdin=stdin
        )

    def start(self) -> None:
        # The container's sleep would hold the pipes that are read to their end.
        quiet = 'exec "$@" >/dev/null 2>"$0"'
        said = self.directory / "said"
        command = ["unshare", "--mount", "sh", "-c", HIDDEN, str(self.directory / "state"), "run", "--detach"]
        try:
            output_of(["sh", "-c", quiet, said, *command, "--bundle", self.directory, ID])
        except Cannot as error:
            raise Cannot(f"crun: {said.read_text().strip()}") from error

    def start_warm(self) -> None:
        raise Cannot("a container starts anew each time")

    def run(self, script: str) -> bytes:
        return self._crun("exec", ID, "sh", "-c", script)

    def put(self, data: bytes, path: str) -> None:
        self._crun("exec", ID, "sh", "-c", f"cat >{path}", stdin=data)

    def get(self, path: str) -> bytes:
        return self.run(f"cat {path}")

    def stop(self) -> None:
        self._crun("delete", "--force", ID)
