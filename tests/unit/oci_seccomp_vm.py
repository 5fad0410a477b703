"""What a seccomp filter answers, without installing it: libseccomp compiles it as crun does, and the BPF is
run here.

So a test can ask for system calls of any architecture, and tells the filter's refusal from the kernel's own.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
X86_64, X86 = 0xC000003E, 0x40000003
_ARCHES = {"SCMP_ARCH_X86_64": X86_64, "SCMP_ARCH_X86": X86, "SCMP_ARCH_X32": 0x4000003E}
_OPS = ("", "NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")


class _Arg(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def compiled(profile: dict[str, Any]) -> bytes:
    """The BPF program of an OCI `linux.seccomp`.  Raises OSError where libseccomp refuses a rule, as crun
    would."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    for name in ("seccomp_arch_add", "seccomp_rule_add_array", "seccomp_export_bpf", "seccomp_release"):
        getattr(lib, name).restype = ctypes.c_int
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(default)))
    for arch in profile["architectures"]:
        lib.seccomp_arch_add(context, ctypes.c_uint32(_ARCHES[arch]))
    for rule in profile["syscalls"]:
        action = _action(rule["action"], rule.get("errnoRet"))
        for name in rule["names"] if action != default else ():
            number = lib.seccomp_syscall_resolve_name(name.encode())
            args = [_argument(arg) for arg in rule.get("args", ())]
            array = (_Arg * max(1, len(args)))(*args)
            result = lib.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(args), array)
            if number != -1 and result < 0:
                raise OSError(-result, f"{name}: {os.strerror(-result)}")
    fd = os.memfd_create("bpf")
    try:
        assert lib.seccomp_export_bpf(context, fd) == 0
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)
        lib.seccomp_release(context)


def _action(name: str, code: int | None) -> int:
    return {"SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_ERRNO": ERRNO | (code or 1), "SCMP_ACT_LOG": 0x7FFC0000}[name]


def _argument(arg: dict[str, Any]) -> _Arg:
    return _Arg(arg["index"], _OPS.index(arg["op"].removeprefix("SCMP_CMP_")), arg["value"], arg.get("valueTwo", 0))


def verdict(program: bytes, arch: int, number: int, *args: int) -> int:
    """The filter's answer: ALLOW, or ERRNO with the number below.  Implements what libseccomp emits of
    classic BPF."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *[*args, 0, 0, 0, 0, 0, 0][:6])
    at = accumulator = 0
    while True:
        code, yes, no, k = struct.unpack_from("<HBBI", program, at * 8)
        at += 1
        if code == 0x20:  # ld [k]
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:  # and #k
            accumulator &= k
        elif code == 0x05:  # ja
            at += k
        elif code == 0x06:  # ret #k
            return int(k)
        else:
            test = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: accumulator & k}[
                code
            ]
            at += yes if test else no
