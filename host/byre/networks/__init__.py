"""Networks for a VM, its containers and pods, that lead out through this host's: user-mode, and asked for by name.

filter      which frames of a guest pass: what is this host's own is not reached
slirp       the program that speaks for the guest on this host's networks
registry    the networks of a VM, in the process that holds it; a client's view of them
network     what a caller has of a network

Rule: there is no network card of the emulator's.  Frames are carried by streams of the bridge, so it is the same on
every transport, in clones, and while the VM runs.
"""
