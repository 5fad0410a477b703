"""Makes every image that the tests use, where it is not in the cache: `python -m tests.images`."""

from . import busybox_layout, debian_layout, hundred_layers, postgres_layout

for make in (busybox_layout, hundred_layers, debian_layout, postgres_layout):
    print(make())
