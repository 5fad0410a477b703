"""Whether this host lets its users make user namespaces, for the tests that need one.

A kernel, a container's seccomp filter or a chroot may forbid it (user_namespaces(7)); then byre refuses to share a
directory and says so, which is tested everywhere.
"""

from __future__ import annotations

import os
import subprocess

import pytest

REFUSAL = subprocess.run(["unshare", "--user", "true"], stderr=subprocess.PIPE, text=True).stderr.strip()

needs_user_namespaces = pytest.mark.skipif(bool(REFUSAL), reason=f"no user namespaces on this host: {REFUSAL}")

#: For what root does without one.
needs_root_or_user_namespaces = pytest.mark.skipif(
    bool(REFUSAL) and os.geteuid() != 0, reason=f"neither root nor user namespaces: {REFUSAL}"
)
