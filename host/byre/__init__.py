"""byre: Linux containers inside a utility virtual machine, on any host.

The public names are here, and each is imported when it is first used: ``import byre`` costs next to nothing.
Errors are in `byre.errors`, containers' images in `byre.images`, volumes in `byre.volumes`, the blocking façade is
`byre.sync`, fakes for tests are in `byre.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, images, sync, testing, volumes
    from .container import GuestContainer
    from .copies import Copied
    from .cow import Container, ExitStatus, Process, ProcessHost, Stdio
    from .errors import ByreError
    from .file_operation import FileStatus
    from .files import Files
    from .local import LocalHost
    from .mounts import HostDirectory, Volume
    from .networks.network import Network
    from .parameters import (
        AddDisk,
        AddMount,
        AddPort,
        ProcessParameters,
        RemoveMount,
        RemovePort,
        Resources,
        UpdateResources,
    )
    from .pod import Pod
    from .pool import Pool, PoolStats
    from .ports.address import Address
    from .ports.connection import Connection
    from .ports.forward import Exposure, Forward
    from .ports.registry import PublishedPort
    from .process import GuestProcess
    from .run import DEVNULL, PIPE, STDOUT, CompletedProcess
    from .serialhost import SerialHost
    from .shares.share import Share
    from .snapshots import Snapshot
    from .sockethost import SocketHost
    from .vm import UtilityVM

_MODULES = {
    "Address": "ports.address",
    "ByreError": "errors",
    "CompletedProcess": "run",
    "Connection": "ports.connection",
    "Container": "cow",
    "Copied": "copies",
    "DEVNULL": "run",
    "ExitStatus": "cow",
    "Exposure": "ports.forward",
    "FileStatus": "file_operation",
    "Files": "files",
    "Forward": "ports.forward",
    "GuestContainer": "container",
    "GuestProcess": "process",
    "HostDirectory": "mounts",
    "LocalHost": "local",
    "Network": "networks.network",
    "PIPE": "run",
    "Pod": "pod",
    "Pool": "pool",
    "PoolStats": "pool",
    "Process": "cow",
    "ProcessHost": "cow",
    "ProcessParameters": "parameters",
    "PublishedPort": "ports.registry",
    "Resources": "parameters",
    "STDOUT": "run",
    "SerialHost": "serialhost",
    "Share": "shares.share",
    "Snapshot": "snapshots",
    "SocketHost": "sockethost",
    "Stdio": "cow",
    "AddDisk": "parameters",
    "AddMount": "parameters",
    "AddPort": "parameters",
    "RemoveMount": "parameters",
    "RemovePort": "parameters",
    "UpdateResources": "parameters",
    "UtilityVM": "vm",
    "Volume": "mounts",
}

_SUBMODULES = ("errors", "images", "sync", "testing", "volumes")

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "AddDisk",
    "AddMount",
    "AddPort",
    "Address",
    "ByreError",
    "CompletedProcess",
    "Connection",
    "Container",
    "Copied",
    "ExitStatus",
    "Exposure",
    "FileStatus",
    "Files",
    "Forward",
    "GuestContainer",
    "GuestProcess",
    "HostDirectory",
    "LocalHost",
    "Network",
    "Pod",
    "Pool",
    "PoolStats",
    "Process",
    "ProcessHost",
    "ProcessParameters",
    "PublishedPort",
    "RemoveMount",
    "RemovePort",
    "Resources",
    "SerialHost",
    "Share",
    "Snapshot",
    "SocketHost",
    "Stdio",
    "UpdateResources",
    "UtilityVM",
    "Volume",
    "errors",
    "images",
    "sync",
    "testing",
    "volumes",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
