"""What building, checking and moving an image raises: `ByreError`s, each with the step that comes next."""

from __future__ import annotations

from byre_proto.errors import ByreError

#: The one way to an image for hosts that cannot build one.
IMPORT_HINT = "export one on a Debian host by `byre image export FILE` and take it in by `byre image import FILE`"


class ImageError(ByreError):
    """Root of what goes wrong with a guest image."""

    code = "image-failed"


class HostNotSupported(ImageError, NotImplementedError):
    """The builder needs a Debian-family x86-64 host; this one is something else."""

    code = "image-host-not-supported"


class ToolMissing(ImageError, FileNotFoundError):
    """A program that the builder runs is not installed; the hint names its Debian package."""

    code = "tool-missing"


class PackagesUnavailable(ImageError, OSError):
    """apt could not resolve or fetch the packages; its own words are in the message."""

    code = "packages-unavailable"


class BuildFailed(ImageError, OSError):
    """A step of the build failed; the command and its words are in the message."""

    code = "image-build-failed"


class ImageCorrupt(ImageError, ValueError):
    """A file of an image, or of an archive to import, is not what its manifest says."""

    code = "image-corrupt"
