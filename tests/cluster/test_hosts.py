"""The hosts of these tests: apart as machines are, slowed down, unplugged, killed, and gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, network

pytestmark = pytest.mark.cluster("ip", "tc", "nsenter", "setpriv", "sshd", "ssh-keygen", "ping", "iperf3")


def traces() -> list[str]:
    """Where a host could leave something on the machine: interfaces, mounts, names."""
    interfaces = sorted(path.name for path in Path("/sys/class/net").iterdir())
    return [*interfaces, os.uname().nodename, Path("/proc/self/mounts").read_text(), Path("/etc/hosts").read_text()]


def processes_in(network_namespace: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            if os.readlink(entry) == network_namespace:
                found.append(entry.parts[2])
    return found


def answers(host: Host, name: str) -> bool:
    return host.run(["ping", "-c", "1", "-W", "1", name]).code == 0


def megabits_per_s(sender: Host, receiver: Host, log: Path) -> float:
    with receiver.command(["iperf3", "--server", "--one-off", "--forceflush"], log=log, timeout_s=20) as server:
        server.wait_for(lambda: bool(server.lines("Server listening")), "the server")
        ended = sender.run(["iperf3", "--client", receiver.name, "--time", "1", "--json"])
    assert ended.code == 0, ended.said
    return float(json.loads(ended.said)["end"]["sum_received"]["bits_per_second"]) / 1e6


def test_hosts_are_apart_and_leave_nothing(tmp_path: Path) -> None:
    before = traces()
    with pytest.raises(ZeroDivisionError), network(2, name="h", sshd=True) as (first, second):
        assert first.run(["hostname"]).said == "h1\n" and second.run(["hostname"]).said == "h2\n"
        assert first.run(["getent", "hosts", "h2"]).said.split() == ["10.77.0.2", "h2"]
        assert second.run(["ls", "/sys/class/net"]).said.split() == ["eth0", "lo"]
        seen = first.run(["sh", "-c", "ls -d /proc/[0-9]*; ls -A /dev/shm"]).said.split()
        assert len(seen) < 10 and "/proc/1" in seen, "its own processes and shared memory"
        assert first.run(["pwd"], cwd=tmp_path).said == f"{tmp_path}\n"
        assert first.run(["sh", "-c", "exit 7"]).code == 7
        assert first.run(["ssh", "h2", "hostname"]).said == "h2\n"

        first.limit("100mbit")
        slow, fast = megabits_per_s(first, second, tmp_path / "to"), megabits_per_s(second, first, tmp_path / "from")
        assert 60 < slow < 110 and fast > 2 * slow, (slow, fast)

        assert answers(first, "h2")
        second.cut()
        assert not answers(first, "h2")
        second.mend()
        assert answers(first, "h2")
        with second.command(["sleep", "600"], log=tmp_path / "sleep") as sleep:
            assert sleep.process.poll() is None
            second.kill()
            started = time.monotonic()
            assert sleep.wait_for_all() != 0 and time.monotonic() - started < 5
        assert not answers(first, "h2")
        second.start()
        assert answers(first, "h2") and first.run(["ssh", "h2", "hostname"]).said == "h2\n"
        namespaces = [host.run(["readlink", "/proc/self/ns/net"]).said.strip() for host in (first, second)]
        assert all(len(processes_in(namespace)) >= 3 for namespace in namespaces), "holder, sleep, sshd"
        raise ZeroDivisionError
    assert traces() == before
    assert not any(processes_in(namespace) for namespace in namespaces)


def test_two_networks_do_not_meet() -> None:
    with network(1) as (one,), network(2) as (_, other):
        assert answers(other, "host1")
        assert not answers(one, other.address)


def test_a_name_at_127_0_1_1() -> None:
    with network(2, own_name_at="127.0.1.1") as (first, second):
        assert first.run(["getent", "hosts", "host1"]).said.split() == ["127.0.1.1", "host1"]
        assert second.run(["getent", "hosts", "host1"]).said.split() == ["10.77.0.1", "host1"]
