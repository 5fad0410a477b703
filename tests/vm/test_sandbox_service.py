"""The example that runs strangers' snippets: with VMs, a container in each, and every limit met."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples import sandbox_service
from examples.sandbox_service import Server, Service, Tenant
from tests.conftest import machine_options

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

SMALL = Tenant("small", "s3cret", concurrency=1, seconds=4.0, output_bytes=1000, memory_mib=32)
LARGE = Tenant("large", "t0ken", concurrency=8, seconds=60.0)

#: Seconds that the test's own client waits for an answer.
PATIENCE = 90.0


@pytest.fixture(scope="module")
def server(busybox: str) -> Iterator[Server]:
    options = {"size": 2, "max_cpus": 2, "wait": 60.0, **machine_options()}
    with Service(busybox, [SMALL, LARGE], **options) as service, Server(service, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(port: int, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body if isinstance(body, str) else json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status in (429, 503):
            assert answer.getheader("Retry-After")
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def run(server: Server, tenant: Tenant, code: str, **more: str) -> dict[str, Any]:
    status, text = ask(server.server_port, "POST", "/run", {"code": code, **more}, tenant.token)
    answer: dict[str, Any] = json.loads(text)
    assert status == 200, answer
    return answer


def metrics(server: Server) -> dict[tuple[str, ...], float]:
    """(name, values of labels...) -> value."""
    status, text = ask(server.server_port, "GET", "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *sample.labels.values()] = sample.value
    return found


def test_a_snippet_runs_as_nobody_in_a_vm_that_nobody_had(server: Server) -> None:
    script = "cat; id -u; cat /proc/sys/kernel/random/boot_id; echo bad >&2; touch /tmp/mine; ls /tmp; exit 3"
    first, second = (run(server, LARGE, script, stdin="in\n") for _ in range(2))
    for answer in (first, second):
        assert (answer["status"], answer["stderr"]) == (3, "bad\n")
        assert (answer["truncated"], answer["timed_out"], answer["out_of_memory"]) == (False, False, False)
        assert answer["stdout"].split()[:2] == ["in", "65534"]
        assert answer["stdout"].split()[3:] == ["mine"]
    assert first["stdout"].split()[2] != second["stdout"].split()[2]


def test_its_time_has_a_limit(server: Server) -> None:
    answer = run(server, SMALL, "echo begun; sleep 1000")
    assert (answer["timed_out"], answer["status"], answer["stdout"]) == (True, None, "begun\n")


def test_its_output_has_a_limit(server: Server) -> None:
    answer = run(server, SMALL, "yes yes yes")
    assert answer["truncated"]
    assert len(answer["stdout"]) == SMALL.output_bytes
    assert not answer["timed_out"]


def test_its_memory_has_a_limit(server: Server) -> None:
    answer = run(server, SMALL, "exec dd if=/dev/zero of=/dev/null bs=100M count=1")
    assert answer["status"] == 128 + signal.SIGKILL, answer
    assert answer["out_of_memory"]


def test_a_tenant_has_its_share_of_the_processors_and_others_theirs(server: Server) -> None:
    with ThreadPoolExecutor() as threads:
        long = threads.submit(run, server, SMALL, "sleep 2; echo done")
        while metrics(server).get(("sandbox_running", "small")) != 1:
            pass
        status, text = ask(server.server_port, "POST", "/run", {"code": "true"}, SMALL.token)
        assert status == 429
        assert "1 of your snippets" in text
        assert run(server, LARGE, "echo mine")["stdout"] == "mine\n"
        assert long.result(PATIENCE)["stdout"] == "done\n"


def test_without_a_vm_in_time_it_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor() as threads:
        both = [threads.submit(run, server, LARGE, "sleep 3") for _ in range(2)]
        while metrics(server)["sandbox_pool_in_use",] != 2:
            pass
        monkeypatch.setattr(server.service, "wait", 0.05)
        status, text = ask(server.server_port, "POST", "/run", {"code": "true"}, LARGE.token)
        assert (status, "2 CPUs may be" in text or "starting" in text) == (503, True)
        assert [each.result(PATIENCE)["status"] for each in both] == [0, 0]


@pytest.mark.parametrize(
    "path, token, body, status",
    [
        ("/run", "", {"code": "true"}, 401),
        ("/run", "s3cre", {"code": "true"}, 401),
        ("/other", LARGE.token, {"code": "true"}, 404),
        ("/run", LARGE.token, "{", 400),
        ("/run", LARGE.token, [], 400),
        ("/run", LARGE.token, {}, 400),
        ("/run", LARGE.token, {"code": "true", "user": "root"}, 400),
        ("/run", LARGE.token, {"code": 1}, 400),
        ("/run", LARGE.token, {"code": "a\0b"}, 400),
        ("/run", LARGE.token, {"code": "true", "language": "cobol"}, 400),
        ("/run", LARGE.token, {"code": "x" * sandbox_service.MAX_BODY}, 413),
    ],
)
def test_what_is_no_request_takes_no_vm(server: Server, path: str, token: str, body: Any, status: int) -> None:
    before = server.service.pool.stats().handed_out
    assert ask(server.server_port, "POST", path, body, token)[0] == status
    assert server.service.pool.stats().handed_out == before


def test_its_metrics_count_by_tenant(server: Server) -> None:
    before = metrics(server)
    run(server, LARGE, "true")
    after = metrics(server)
    key = ("sandbox_runs_total", "ended", "large")  # labels by name
    assert after[key] == before.get(key, 0) + 1
    assert after["sandbox_seconds_count", "large"] == before.get(("sandbox_seconds_count", "large"), 0) + 1
    assert after["sandbox_pool_handed_out",] == before["sandbox_pool_handed_out",] + 1


def test_the_program_ends_when_it_is_told_and_leaves_nothing(tmp_path: Path, busybox: str) -> None:
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps([{"name": "alice", "token": "t"}]))
    command = [sys.executable, "-m", "examples.sandbox_service", "--image", busybox, "--size", "1"]
    with subprocess.Popen([*command, "--tenants", tenants, "--port", "0"], stdout=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            port = int(it.stdout.readline().split()[-1])
            status, text = ask(port, "POST", "/run", {"code": "echo hi"}, "t")
            assert (status, json.loads(text)["stdout"]) == (200, "hi\n")
            it.send_signal(signal.SIGTERM)
            assert it.wait(PATIENCE) == 0
        finally:
            it.kill()
