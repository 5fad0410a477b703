"""What strikes: the table, and what may follow.

ENDS     what is struck ends, and all that waits for it with ConnectionLost
HANGS    nothing answers any more until it is ended: calls end by their deadlines
HARMS    calls may fail with an error of byre's, or a command by SIGKILL; the VM lives on
NOTHING  every result is the right one, maybe later
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from . import guest_strikes as guest
from . import host_strikes as host
from .places import Kept, Local, Own, Place
from .world import World

ENDS, HANGS, HARMS, NOTHING = "ends", "hangs", "harms", "nothing"


@dataclass(frozen=True)
class Strike:
    """`deadline` is what calls have where the strike makes them use it up; `by_client`: the work is done by another
    process, a client of the VM's keeper."""

    name: str
    does: Callable[[World], Awaitable[None]]
    follows: str
    deadline: float | None = None
    on: type[Place] = Own
    by_client: bool = False

    @property
    def survived(self) -> bool:
        """Whether what is struck lives on."""
        return self.follows in (HARMS, NOTHING)


STRIKES = (
    Strike("machine killed", guest.kill_machine, ENDS),
    Strike("guest panics", guest.panic, ENDS),
    Strike("channel cut", guest.cut_channel, ENDS),
    Strike("machine stopped", guest.stop_machine, HANGS, deadline=4.0),
    Strike("out of memory", guest.take_memory, HARMS),
    Strike("runtime killed", guest.kill_runtime, HARMS),
    Strike("inits killed", guest.kill_inits, HARMS),
    Strike("scratch full", guest.fill_scratch, HARMS),
    Strike("agent without descriptors", guest.take_descriptors, HARMS),
    Strike("host's descriptors gone", host.take_own_descriptors, HARMS),
    Strike("control channel silent", host.silence_qmp, HANGS, deadline=4.0),
    Strike("machine paused", guest.pause_machine, NOTHING),
    Strike("container out of memory", guest.take_containers_memory, NOTHING),
    Strike("runtime stopped", guest.stop_runtime, NOTHING),
    Strike("inits stopped", guest.stop_inits, NOTHING),
    Strike("time jumps", guest.jump_in_time, NOTHING),
    Strike("output never read", guest.never_read, NOTHING),
    Strike("output read slowly", guest.read_slowly, NOTHING),
    Strike("processor taken", guest.burn, NOTHING),
    Strike("keeper killed", host.kill_keeper, ENDS, on=Kept),
    Strike("keeper stopped", host.stop_keeper, HANGS, deadline=4.0, on=Kept),
    Strike("keeper's descriptors gone", host.take_keepers_descriptors, HARMS, on=Kept),
    Strike("disk full", host.fill_disk, HARMS, on=Kept),
    Strike("directories read-only", host.forbid_writing, HARMS, on=Kept),
    Strike("client's channel cut", guest.cut_channel, NOTHING, on=Kept),
    Strike("client killed", host.kill_client, HARMS, on=Kept, by_client=True),
    Strike("client stopped", host.stop_client, NOTHING, on=Kept, by_client=True),
    Strike("agent killed", host.kill_agent, ENDS, on=Local),
    Strike("agent stopped", host.stop_agent, HANGS, deadline=4.0, on=Local),
)
