"""Sockets of a VM, of a container or of the agent's own host, from here; and sockets of this host, from there.

    connection   one connection to a socket there
    forward      what connects here is connected there, and the other way round
    methods      `forward`, `expose`, `connect` and `wait_for_port` of every host of processes
    registry     forwards that belong to a VM and not to a caller: `vm.publish`

Rule: there is no network card.  Every byte is a stream's of the bridge, with its credit and its ends, and every
connection was asked for by this side: a guest reaches nothing but what this program's user named.
"""
