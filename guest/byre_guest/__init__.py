"""The agent inside the virtual machine (its first process), or an ordinary program over a descriptor.

Rule: imports byre_proto, msgpack and the cheap parts of the standard library only; runs on Python 3.9 and later.
"""

VERSION = "0.1.0"
