"""The agent's connection: calls, deadlines, bad input, its end; and what `system.*` says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from byre_proto import errors, frames
from byre_proto.connection import MAGIC

from .agent_client import BOOT, PATIENCE, AgentClient, alive


@pytest.fixture
def agent() -> Iterator[AgentClient]:
    with AgentClient() as client:
        yield client


def ended(client: AgentClient) -> str:
    """Drive until the connection is closed; the reason that the agent gave."""
    while client.closed is None:
        client.pump(PATIENCE)
    return str(client.closed.error)


# -- calls -------------------------------------------------------------------------------------------------


@pytest.mark.behaviour("B46")
def test_a_method_of_the_keeper_is_not_supported_by_the_agent(agent: AgentClient) -> None:
    with pytest.raises(errors.NotSupported, match=re.escape("vm.info")):
        agent.call("vm.info")


def test_containers_are_refused_with_the_reason(agent: AgentClient) -> None:
    with pytest.raises(errors.NotSupported, match=r"cgroup|root|first process"):
        agent.call("container.create", container="c", spec={})


@pytest.mark.behaviour("B47")
def test_replies_come_in_any_order(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "read x", stdio="i")
    slow = agent.request("process.wait", process=process.id)
    assert agent.call("process.list")["processes"]
    process.write(b"\n")
    assert agent.result(slow)["code"] == 0


@pytest.mark.behaviour("B44")
def test_a_deadline_fails_its_call_alone(agent: AgentClient) -> None:
    process = agent.start("sleep", "100")
    late = agent.request("process.wait", timeout=0.01, process=process.id)
    with pytest.raises(errors.DeadlineExceeded, match=r"process\.wait"):
        agent.result(late)
    assert agent.call("process.list")["processes"]


@pytest.mark.behaviour("B45")
def test_a_malformed_frame_closes_the_connection_with_the_reason(agent: AgentClient) -> None:
    agent.out += frames.HEADER.pack(1 << 30, frames.DATA, 0, 0, 1)
    assert "over the limit" in ended(agent)
    assert agent.process.wait(PATIENCE) == 0


def test_a_ping_is_answered_while_a_stream_runs(agent: AgentClient) -> None:
    agent.start("yes", stdio="o")
    for token in range(50):
        agent.connection.session.ping(token)
        agent.wait(lambda t=token: t in agent.pongs)


# -- ends --------------------------------------------------------------------------------------------------


def test_the_end_of_the_channel_ends_the_agent_and_all_that_it_started(agent: AgentClient) -> None:
    process = agent.start("sh", "-c", "trap '' HUP TERM; setsid sleep 1000 & echo $!; wait", stdio="o")
    pids = [process.pid, int(process.read_until(b"\n"))]
    assert agent.close() == 0
    assert not any(map(alive, pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_agent_and_all_that_it_started(agent: AgentClient, number: signal.Signals) -> None:
    process = agent.start("sleep", "1000")
    agent.process.send_signal(number)
    assert agent.process.wait(PATIENCE) == 0
    assert not alive(process.pid)


def test_an_interrupt_is_the_hosts_business(agent: AgentClient) -> None:
    agent.process.send_signal(signal.SIGINT)
    assert agent.call("process.list") == {"processes": []}


def test_stdin_and_stdout_are_a_channel_too() -> None:
    """As over SSH; and the processes do not get hold of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", "-c", BOOT, "--stdio"], stdin=theirs.fileno(), stdout=theirs.fileno()
        )
        theirs.close()
        ours.settimeout(PATIENCE)
        assert ours.recv(len(MAGIC), socket.MSG_WAITALL) == MAGIC
        null = os.stat(os.devnull)
        for fd in (0, 1):
            assert os.path.samestat(os.stat(f"/proc/{agent.pid}/fd/{fd}"), null)
        ours.close()
        assert agent.wait(PATIENCE) == 0


@pytest.mark.parametrize("arguments", [[], ["--fd"], ["--fd", "x"], ["--other"]])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-E", "-c", BOOT, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "usage" in result.stderr


# -- system ------------------------------------------------------------------------------------------------


def test_info_says_what_it_runs_on(agent: AgentClient) -> None:
    info = agent.call("system.info")["info"]
    assert info["kernel"] == os.uname().release
    assert info["pid"] == agent.process.pid
    assert info["cpus"] >= 1
    assert info["memory_bytes"] > 1 << 20
    assert (info["is_vm"], info["boot"]) == (False, [])


@pytest.mark.parametrize(
    "setting", [{"realtime_ns": 1}, {"entropy": b"x"}, {"hostname": "h"}, {"machine_id": "0" * 32}]
)
def test_an_ordinary_program_does_not_change_its_machine(agent: AgentClient, setting: dict[str, object]) -> None:
    with pytest.raises(errors.NotSupported, match="no VM's init"):
        agent.call("system.configure", **setting)


def test_configure_sets_the_level_of_the_log(agent: AgentClient) -> None:
    assert agent.call("system.configure", log_level=40)["info"]["is_vm"] is False


@pytest.mark.behaviour("B49")
def test_stacks_show_the_agent_and_its_processes(agent: AgentClient) -> None:
    process = agent.start("sleep", "100")
    text = ""
    deadline = time.monotonic() + 30
    while f"\n{process.pid} sleep S " not in text:  # it may be on its way there
        assert time.monotonic() < deadline, text
        text = agent.call("system.stacks")["text"]
    assert "in own_stack" in text
    assert "systemd" not in text
    if os.geteuid() == 0:
        assert "nanosleep" in text


@pytest.mark.behaviour("B49")
def test_a_stuck_loop_shows_its_stack() -> None:
    """The watchdog's timer, with another patience, over a handler that never comes back."""
    program = (
        BOOT.replace("\nmain()", "")
        + """
import byre_guest.__main__ as agent, time
agent.WATCHDOG_SECONDS = 0.05
one = agent.Agent()
one.settle()
def stuck_here():
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    one.loop.stop()
one.loop.call_soon(lambda: one.loop.call_soon(stuck_here))
one.run()
"""
    )
    result = subprocess.run([sys.executable, "-I", "-S", "-E", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    assert "stuck_here" in result.stderr
