"""Run one virtual CPU for three instructions and say what happened: the only honest test of /dev/kvm.

Opening the device, its API version and even a new VM prove nothing: there are hosts where all that works and no
guest ever runs.  A program of its own (``python -I kvm_probe.py``), because KVM_RUN may never return: whoever
starts it kills it at a deadline.  Standard library only; prints "ok" or the reason why not.

Source: Linux, Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct

DEVICE = "/dev/kvm"

API_VERSION = 12
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84

EXIT_IO, EXIT_HLT = 2, 5
EXIT_REASON = 8  # struct kvm_run: after request_interrupt_window, immediate_exit and padding
IO_DATA_OFFSET = 32 + 8

#: Guest physical address of the code; page 0 is left alone.
CODE_ADDRESS = 0x1000
#: Three pages below 4 GiB that Intel CPUs without "unrestricted guest" need for real mode.
TSS_ADDRESS = 0xFFFBD000
PORT = 0x80
#: add al, bl; out 0x80, al; hlt
CODE = bytes((0x00, 0xD8, 0xE6, PORT, 0xF4))
AL, BL = 40, 2


def main() -> None:
    """Print the outcome."""
    try:
        print(run(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)))  # noqa: T201
    except OSError as error:
        print(f"{DEVICE}: {error.strerror}")  # noqa: T201


def run(kvm: int) -> str:
    """ "ok" if a guest added two numbers, wrote the sum to a port and halted; else what it did instead."""
    version = fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0)
    if version != API_VERSION:
        return f"KVM has API version {version}, not {API_VERSION}"
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    _try(vm, KVM_SET_TSS_ADDR, TSS_ADDRESS)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory.write(CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = struct.pack("=IIQQQ", 0, 0, CODE_ADDRESS, mmap.PAGESIZE, address)
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    shared = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    _set_registers(vcpu)
    return _expect(vcpu, shared, memory)


def _try(fd: int, request: int, argument: int) -> None:
    """An ioctl whose argument is a number that does not fit fcntl.ioctl's C int."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(argument)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _set_registers(vcpu: int) -> None:
    sregs = bytearray(312)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
    # struct kvm_segment cs is first: base (u64), limit (u32), selector (u16).  The code is at 0:CODE_ADDRESS.
    struct.pack_into("=Q", sregs, 0, 0)
    struct.pack_into("=H", sregs, 12, 0)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
    # rax rbx rcx rdx rsi rdi rsp rbp, r8 to r15, rip, rflags (bit 1 is always set)
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("=18Q", AL, BL, *([0] * 14), CODE_ADDRESS, 2))


def _expect(vcpu: int, shared: mmap.mmap, memory: mmap.mmap) -> str:
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    (reason,) = struct.unpack_from("=I", shared, EXIT_REASON)
    if reason != EXIT_IO:
        return f"a virtual CPU stopped for reason {reason} at its first instructions"
    (offset,) = struct.unpack_from("=Q", shared, IO_DATA_OFFSET)
    if shared[offset] != AL + BL:
        return "a virtual CPU computed a wrong sum"
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    (reason,) = struct.unpack_from("=I", shared, EXIT_REASON)
    return "ok" if reason == EXIT_HLT else f"a virtual CPU did not halt (reason {reason})"


if __name__ == "__main__":
    main()
