"""What namespaces this host lets the tests make, for those that need some.

A kernel, a container's seccomp filter or a chroot may forbid them (user_namespaces(7), mount_namespaces(7)).
Without user namespaces byre refuses to share a directory and says so, which is tested everywhere.
"""

from __future__ import annotations

import os
import subprocess

import pytest


def _refusal(*kinds: str) -> str:
    return subprocess.run(["unshare", *kinds, "true"], stderr=subprocess.PIPE, text=True).stderr.strip()


#: unshare(1)'s flags for a namespace in which the tests may mount.
OWN_MOUNTS = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]

#: Why there are no user namespaces; "" where there are.
REFUSAL = _refusal("--user")

needs_user_namespaces = pytest.mark.skipif(bool(REFUSAL), reason=f"no user namespaces on this host: {REFUSAL}")

_NO_MOUNTS = _refusal(*OWN_MOUNTS)

needs_own_mounts = pytest.mark.skipif(bool(_NO_MOUNTS), reason=f"no mounts of one's own on this host: {_NO_MOUNTS}")
