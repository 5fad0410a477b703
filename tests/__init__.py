"""byre's tests: `unit` needs no VM, `conformance` shows the behaviours, `vm` and `nested` boot real VMs."""
