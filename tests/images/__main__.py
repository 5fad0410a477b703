"""Makes every image that the tests use, where it is not in the cache: `python -m tests.images`."""

from . import busybox_layout, debian_layout, hundred_layers

for make in (busybox_layout, hundred_layers, debian_layout):
    print(make())
