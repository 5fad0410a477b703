"""Things that go wrong while something goes on, and what must be left of it: nothing wrong, and nothing at all.

    python -m tests.faults --rounds N --seed S

A round is a VM, a keeper or an agent (`places`) in which a *phase* goes on (`phases`), a *strike* that comes at
some moment of it (`strikes`), and a look at what is there afterwards (`leftovers`).  Which phase meets which
strike, and when, follows from the seed.  Beside all rounds one other VM is up, which must not notice.
"""
