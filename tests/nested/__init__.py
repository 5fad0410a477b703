"""byre in byre: the VM tests on KVM and vsock, inside an emulated machine that has both.

The outer machine is an ordinary utility VM under the emulator, whose CPU has SVM; a privileged container in it is a
Debian with QEMU and this source tree.  In it byre boots its VMs with `-accel kvm` over vsock and runs the same
tests as on the host, but for those in `exclusions.EXCLUDED`.
"""
