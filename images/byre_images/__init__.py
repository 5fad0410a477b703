"""The guest image: kernel, initramfs and root disk that a VM boots from, built from Debian packages without root.

`ensure` gives the image of the sources that run now; the rest looks after what is built.
"""

from .builder import build, current, ensure
from .cache import Image, list_images, verify
from .errors import BuildFailed, HostNotSupported, ImageCorrupt, ImageError, PackagesUnavailable, ToolMissing
from .kernel import KERNEL_ARGUMENTS
from .transfer import export, import_image

__all__ = [
    "KERNEL_ARGUMENTS",
    "BuildFailed",
    "HostNotSupported",
    "Image",
    "ImageCorrupt",
    "ImageError",
    "PackagesUnavailable",
    "ToolMissing",
    "build",
    "current",
    "ensure",
    "export",
    "import_image",
    "list_images",
    "verify",
]
