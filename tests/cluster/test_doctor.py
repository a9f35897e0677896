"""The doctor over two hosts: a name that leads nowhere, the remedy it gives for it, and a link that is slow one way."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import INTERFACE, Host, network
from tests.cluster.runs import write_run

pytestmark = pytest.mark.cluster("ip", "tc", "nsenter", "setpriv")

PORT = 29511
# Half of what two idle namespaces reach on two cores. A link of 1 Gb/s is a quarter of it.
PROMISED_GB_S = 0.5
CLUSTER = f"""
gpus_per_node: 0
memory_bandwidth_gb_s: 10
network_gb_s: {PROMISED_GB_S}
network_latency_us: 100
cores_per_node: 1
host_memory_gib: 1
network_interface: {INTERFACE}
"""


def doctor(hosts: list[Host], folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """A rank on each host: the exit code of the first one, and its report."""
    place = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT), "WORLD_SIZE": str(len(hosts))}
    program = [sys.executable, "-m", "megatron_lite", "doctor", "--json", "--timeout", 60, *arguments]
    with contextlib.ExitStack() as stack:
        first, *others = (
            stack.enter_context(
                host.command(
                    program,
                    log=folder / f"{host.name}.log",
                    environment={**place, "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                )
            )
            for rank, host in enumerate(hosts)
        )
        code = first.wait()
        assert [other.wait() for other in others] == [0 for _ in others], "what the first says is not said again"
        return code, json.loads(first.said()[first.said().index("{\n") :])


def test_a_name_that_leads_nowhere_and_a_slow_link(corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    cluster = tmp_path / "wire.yaml"
    cluster.write_text(CLUSTER)
    with network(2, name="doc", subnet="10.78.0", own_name_at="127.0.1.1") as hosts:
        code, report = doctor(hosts, tmp_path)
        assert code == 2
        names = [row for row in report["network"]["rows"] if row["check"] == "host name"]
        assert [(row["hosts"], row["verdict"]) for row in names] == [("doc1", "red"), ("doc2", "red")]
        assert f"set run.network_interface={INTERFACE}" in names[0]["remedy"]
        assert f"doc1 the address {hosts[0].address} in /etc/hosts" in names[0]["remedy"]
        assert "127.0.1.1" in report["world"]["problems"][0] and "all-reduce" not in report

        remedy = f"run.network_interface={INTERFACE}"
        arguments = ("--config", config, remedy, "parallel.tp=2", "parallel.dp=1", "--cluster", cluster)
        # Whether the all-reduce is quick enough is a matter of the cores that this machine has left for it.
        _, report = doctor(hosts, tmp_path, *arguments)
        assert not any(report[name]["problems"] for name in ("environment", "host", "network")), report
        (name,) = (row for row in report["network"]["rows"] if row["check"] == "host name" and row["hosts"] == "doc1")
        assert name["verdict"] == "green" and f"ranks use {INTERFACE}" in name["found"]
        assert {row["promised"] for row in report["all-reduce"]["rows"]} == {PROMISED_GB_S}
        rows = report["links between hosts"]["rows"]
        assert {row["link"] for row in rows} == {"doc1 -> doc2", "doc2 -> doc1"}
        assert all(row["verdict"] != "red" for row in rows), "the control: nothing slows them down"

        hosts[1].limit("1gbit")
        code, report = doctor(hosts, tmp_path, *arguments)
        assert code == 2
        by_link = {row["link"]: row for row in report["links between hosts"]["rows"]}
        assert by_link["doc2 -> doc1"]["verdict"] == "red" and 0.08 < by_link["doc2 -> doc1"]["GB/s"] < 0.13
        assert by_link["doc1 -> doc2"]["verdict"] != "red"
        (problem,) = report["links between hosts"]["problems"]
        assert problem.startswith("doc2 -> doc1: ") and "between doc2 and doc1" in problem
