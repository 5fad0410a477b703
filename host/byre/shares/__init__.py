"""Directories of this host in a VM: 9P over two streams of the bridge.

confine     runs a server that sees the directory and nothing else
server      starts one, and ends it
registry    the servers of a VM, in the process that holds it; a client's view of them
share       what a caller has of a share
"""
