# What a newcomer types.  `make demo` and `make test` install what is missing (with sudo where needed), into
# .venv/ for Python; both share the set-up, so the second is quick.

PYTHON   ?= /usr/bin/python3
# Two tests at once: under the emulator a VM takes a processor.
PYTEST_FLAGS ?= --numprocesses=2
VENV     := .venv
BIN      := $(VENV)/bin
RESULTS  := test-results

# System packages, each with its reason:
#   qemu-system-x86         the virtual machine
#   squashfs-tools-ng       tar2sqfs: layers and the guest's root, straight from tar streams
#   golang-github-containers-common   the default seccomp profile that Debian ships for podman
#   util-linux, dpkg, apt   setpriv, unshare; the packages from which the guest image is built
#   e2fsprogs               mke2fs: scratch disks and volumes
#   busybox-static          the demo's and the tests' small container image
#   skopeo                  images from registries
#   diod                    directories of this host in a VM: the 9P server
#   slirp4netns             networks that lead out (--net user)
#   mmdebstrap, umoci, …    tests: a real Debian userland, independent tools to compare with
#   docker-registry         tests: a real registry; the package starts one of its own on port 5000, which is not used
#   openssl                 tests: a certificate that nobody vouches for
#   vagrant                 tests: `vagrant validate`
#   libseccomp2             tests: the seccomp profile is compiled as a runtime would
#   iproute2                tests: networks of their own, to reach and to be kept from
RUN_PACKAGES  := python3 python3-venv qemu-system-x86 squashfs-tools-ng golang-github-containers-common \
                 util-linux ca-certificates busybox-static zstd skopeo e2fsprogs diod slirp4netns
TEST_PACKAGES := vagrant mmdebstrap squashfs-tools umoci docker-registry openssl xz-utils libseccomp2 procps git \
                 iproute2

# What byre is measured beside, in a Python of its own; no test needs any of it:
#   python3-guestfs   libguestfs; its appliance uses the kernel of byre's guest (and wants /lib/modules to exist)
#   crun, openssh-client, kmod   containers without a VM; a client; depmod for that kernel
PEER_PACKAGES := python3-guestfs crun openssh-client kmod
# Unpacked for a guest and not installed: on this host they would start servers.
GUEST_PACKAGES := openssh-server openssh-sftp-server qemu-guest-agent libwrap0
PEER_PYTHON    := 'quick-sandbox[alpine]' virtme-ng paramiko

.PHONY: demo test nested behaviours bench peers performance lint image setup setup-test clean

demo: setup
	$(BIN)/byre doctor
	$(BIN)/python -m examples.demo

test: setup-test
	@rm -rf $(RESULTS)
	@$(BIN)/python -c 'import byre_images; byre_images.ensure(progress=print)'
	@$(BIN)/python -m tests.images
	$(BIN)/python -m pytest $(PYTEST_FLAGS)
	BYRE_TEST_VEHICLES=serial $(BIN)/python -m pytest -m vm $(PYTEST_FLAGS) tests/conformance tests/vm/test_vm.py
	$(BIN)/python -m tests.user $(PYTEST_FLAGS)

# KVM and vsock for real, inside an emulated machine that has both.
nested: setup-test
	$(BIN)/python -m tests.nested

# The table of behaviours that the last test runs gave; fails when one of them failed.
behaviours: setup-test
	$(BIN)/python -m tests.behaviours

bench: setup
	for name in boot clone echo cli pool snapshot exec exec-container container stdio ping growth layers serial shares; do $(BIN)/python -m benchmarks $$name --json || exit 1; done

# The peers of docs/performance.md, and the page with its plot.
peers: .venv-peers/.installed

performance: peers
	.venv-peers/bin/python -m benchmarks peers --runs 3 --json >peers.json
	.venv-peers/bin/python -m benchmarks.performance peers.json

.venv-peers/.installed: Makefile pyproject.toml | $(VENV)/.run-packages
	@./.ci/packages $(PEER_PACKAGES)
	$(PYTHON) -m venv --system-site-packages .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --editable . $(PEER_PYTHON)
	@mkdir -p .venv-peers/debs .venv-peers/guest
	cd .venv-peers/debs && apt-get download -q $(GUEST_PACKAGES) && for deb in *.deb; do dpkg-deb -x $$deb ../guest || exit 1; done
	@touch $@

lint: setup-test
	$(BIN)/python -m pytest tests/unit/test_linters.py tests/unit/test_layering.py

image: setup
	$(BIN)/byre image build

setup: $(VENV)/.run-packages $(VENV)/.installed

setup-test: setup $(VENV)/.test-packages $(VENV)/.test-installed

$(VENV)/.run-packages: Makefile
	@./.ci/packages $(RUN_PACKAGES)
	@mkdir -p $(VENV) && touch $@

$(VENV)/.test-packages: Makefile
	@./.ci/packages $(TEST_PACKAGES)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.run-packages
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test-installed: pyproject.toml | $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,lint,fuzz]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers $(RESULTS) .mypy_cache .ruff_cache .pytest_cache .hypothesis
