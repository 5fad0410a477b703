"""What is cheap to see is seen before anything starts, with the next step in the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byre.errors import InvalidRequest, MachineFailed
from byre.machines.command_line import choose_machine, kernel_command_line, qemu_command
from byre.machines.config import MAX_COMMAND_LINE, MIN_MEMORY_MIB, MachineConfig


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("kernel", "initramfs", "root")}
    for path in paths.values():
        path.write_bytes(b"x")
    return paths


def test_a_good_config_passes(files: dict[str, Path]) -> None:
    MachineConfig(**files).check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_mib": MIN_MEMORY_MIB - 1},
        {"cpus": 0},
        {"cpus": 65},
        {"accelerator": "hvf"},
        {"machine": "virt"},
        {"transport": "tcp"},
    ],
    ids=str,
)
def test_wrong_values_are_invalid_requests_with_a_hint(files: dict[str, Path], wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MachineConfig(**files, **wrong).check()
    assert caught.value.hint


@pytest.mark.parametrize("name", ["kernel", "initramfs", "root"])
@pytest.mark.parametrize("how", ["missing", "empty", "directory"])
def test_files_that_cannot_be_booted_from(files: dict[str, Path], name: str, how: str) -> None:
    files[name].unlink()
    if how == "empty":
        files[name].touch()
    elif how == "directory":
        files[name].mkdir()
    with pytest.raises(MachineFailed, match=f"the guest's {name}") as caught:
        MachineConfig(**files).check()
    assert "byre image build" in caught.value.hint


def command(config: MachineConfig, accelerator: str = "tcg", machine: str = "auto") -> list[str]:
    choices, _ = choose_machine(machine, accelerator, 2_596_126)
    return qemu_command(
        config, choices, name="n", qmp_fd=3, console_fd=4, transport=("-device", "x"), channel="byre.channel=x"
    )


def test_a_path_with_a_comma_stays_one_value(tmp_path: Path) -> None:
    strange = tmp_path / 'a,b=c"d'
    words = command(MachineConfig(kernel=strange, initramfs=strange, root=strange))
    assert words.count(str(strange)) == 2  # the kernel and the initramfs, arguments of their own
    root = words[words.index("-blockdev") + 1]
    assert str(strange).replace('"', '\\"') in root
    assert not any(str(strange) in word for word in words if word not in (root, str(strange)))


@pytest.mark.parametrize("machine", ["microvm", "pc", "q35"])
def test_an_emulated_guest_is_told_the_counters_rate(files: dict[str, Path], machine: str) -> None:
    words = command(MachineConfig(**files), "tcg", machine)
    assert {"tsc_early_khz=2596126", "tsc=reliable"} <= set(words[words.index("-append") + 1].split())
    assert "tsc" not in " ".join(command(MachineConfig(**files), "kvm", machine))


@pytest.mark.parametrize("machine", ["microvm", "pc", "q35"])
def test_only_a_machine_without_pci_is_not_searched_for_it(files: dict[str, Path], machine: str) -> None:
    words = command(MachineConfig(**files), "kvm", machine)
    assert ("pci=off" in words[words.index("-append") + 1].split()) == (machine == "microvm")


def test_an_emulated_microvm_needs_the_counters_rate(files: dict[str, Path]) -> None:
    words = command(MachineConfig(**files))
    assert words[words.index("-machine") + 1].startswith("microvm,rtc=on,pit=on,pic=on,")
    assert choose_machine("auto", "tcg", None)[0].machine == "pc"
    with pytest.raises(InvalidRequest):
        choose_machine("microvm", "tcg", None)


def test_what_the_user_adds_for_the_kernel_comes_last(files: dict[str, Path]) -> None:
    config = MachineConfig(**files, kernel_arguments=("loglevel=7", "quiet"))
    choices, _ = choose_machine("pc", "tcg", None)
    assert kernel_command_line(config, choices, "c").endswith(" c loglevel=7 quiet")


def test_a_command_line_that_the_kernel_would_cut_is_refused(files: dict[str, Path]) -> None:
    choices, _ = choose_machine("pc", "tcg", None)
    free = MAX_COMMAND_LINE - len(kernel_command_line(MachineConfig(**files), choices, "c")) - 2
    fits = MachineConfig(**files, kernel_arguments=("x" * free,))
    assert len(kernel_command_line(fits, choices, "c")) == MAX_COMMAND_LINE - 1
    with pytest.raises(InvalidRequest):
        kernel_command_line(MachineConfig(**files, kernel_arguments=("x" * (free + 1),)), choices, "c")


def test_qemu_may_start_no_program_and_reads_no_configuration(files: dict[str, Path]) -> None:
    words = command(MachineConfig(**files))
    assert "spawn=deny" in words[words.index("-sandbox") + 1]
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
