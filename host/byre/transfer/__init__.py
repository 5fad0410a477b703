"""What a copy between here and a guest consists of, without the guest: both directions, as a tree or as a tar.

Rule: blocking code that knows records, and no connection; `byre.files` brings the two together.
"""
