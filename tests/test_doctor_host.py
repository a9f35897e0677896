"""What the doctor makes of a host: every judgement on both sides of its limit, and how hosts are merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.cli.doctor import host, network
from megatron_lite.cli.doctor.here import from_json, lines_here, to_json
from megatron_lite.cli.doctor.host import GIB, Wanted
from megatron_lite.cli.doctor.network import Connected, Interface
from megatron_lite.cli.doctor.report import Line, Verdict, of_hosts, of_lines
from megatron_lite.cli.doctor.request import Request
from megatron_lite.config.cluster import load_cluster

ROOT = Path(__file__).parents[1]
A100 = load_cluster("dgx-a100")
LOOPBACK = Interface("lo", True, ("127.0.0.1", "::1"))
ETHERNET = Interface("eth0", True, ("10.0.0.7",), 10_000)
DOWN = Interface("eth1", False)
GREEN, YELLOW, RED = Verdict


def doctor(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "250"})
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("line", "verdict", "mentions"),
    [
        (host.cores(8, 8, Wanted()), GREEN, "8 of 8"),
        (host.cores(2, 8, Wanted(ranks_here=4)), YELLOW, "--cpus-per-task"),
        (host.cores(16, 256, Wanted(A100)), YELLOW, "--exclusive"),
        (host.cores(128, 256, Wanted(A100)), GREEN, ""),
        (host.main_memory(2000 * GIB, A100), GREEN, "1.95 TiB"),
        (host.main_memory(500 * GIB, A100), YELLOW, "--mem=0"),
        (host.gpus(["NVIDIA A100-SXM4-80GB"] * 8, [80 * GIB] * 8, A100), GREEN, "8 x NVIDIA A100-SXM4-80GB"),
        (host.gpus(["NVIDIA A100-SXM4-80GB"] * 4, [80 * GIB] * 4, A100), YELLOW, "dgx-a100 has 8 x A100"),
        (host.gpus(["NVIDIA A100-SXM4-40GB"] * 8, [40 * GIB] * 8, A100), YELLOW, "79.1 GiB"),
        (host.gpus(["Tesla V100"] * 8, [80 * GIB] * 8, A100), YELLOW, "another kind of node"),
        (host.gpus([], [], A100), RED, "--gpus all"),
        (host.shared_memory(64 << 20, 64 << 20), RED, "--shm-size=16g"),
        (host.shared_memory(512 << 20, 512 << 20), YELLOW, "--shm-size=16g"),
        (host.shared_memory(64 * GIB, 1 << 20), RED, "remove what ended processes"),
        (host.shared_memory(64 * GIB, 60 * GIB), GREEN, "60.0 GiB free"),
        (host.disk_space("run.dir", "runs", 100 << 20), RED, "run.dir"),
        (host.disk_space("run.dir", "runs", 3 * GIB), YELLOW, "16 bytes a parameter"),
        (host.disk_space("run.dir", "runs", 300 * GIB), GREEN, "runs: 300 GiB free"),
        (host.open_files(1024, 2), GREEN, "1,024"),
        (host.open_files(1024, 512), RED, "ulimit -n 4096"),
        (host.open_files(4096, 512), GREEN, ""),
        (host.open_files(256, 1), YELLOW, "nofile"),
        (host.open_files(None, 10**6), GREEN, "no limit"),
        (host.locked_memory(64 << 10, has_infiniband=False), GREEN, "64.0 KiB"),
        (host.locked_memory(64 << 10, has_infiniband=True), RED, "LimitMEMLOCK=infinity"),
        (host.locked_memory(8 * GIB, has_infiniband=True), YELLOW, "--ulimit memlock=-1"),
        (host.locked_memory(None, has_infiniband=True), GREEN, "no limit"),
        (host.stack(8 << 20), GREEN, "8.00 MiB"),
        (host.stack(64 << 10), YELLOW, "ulimit -s 8192"),
        (host.core_files(0, 8), GREEN, ""),
        (host.core_files(None, 8), YELLOW, "ulimit -c 0"),
        (host.core_files(None, 1), GREEN, ""),
    ],
)
def test_judgements(line: Line, verdict: Verdict, mentions: str) -> None:
    assert line.verdict is verdict, line
    assert mentions in f"{line.found} {line.remedy}"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = host.disk("run.dir", tmp_path / "file" / "runs")
    assert line.verdict is RED and "is a file" in line.found and "run.dir" in line.remedy
    assert host.disk("run.dir", tmp_path / "not" / "yet").verdict is not RED


@pytest.mark.parametrize(
    ("addresses", "found", "connected", "verdict", "mentions"),
    [
        (["10.0.0.7"], [LOOPBACK, ETHERNET], Connected(has_peers=True), GREEN, "node7 resolves to 10.0.0.7"),
        (["127.0.1.1"], [LOOPBACK, ETHERNET], Connected(has_peers=True), RED, "set run.network_interface=eth0"),
        (
            ["127.0.1.1"],
            [LOOPBACK, ETHERNET],
            Connected(has_peers=True),
            RED,
            "node7 the address 10.0.0.7 in /etc/hosts",
        ),
        (["127.0.1.1"], [LOOPBACK, ETHERNET], Connected(), YELLOW, "for runs on several hosts"),
        (["127.0.1.1"], [LOOPBACK, ETHERNET], Connected("eth0", has_peers=True), GREEN, "ranks use eth0"),
        (["127.0.1.1"], [LOOPBACK, ETHERNET], Connected("lo", has_peers=True), RED, "where no other host finds it"),
        (["127.0.1.1"], [LOOPBACK, DOWN], Connected("eth1", has_peers=True), RED, "INTERFACE"),
        (["::1"], [LOOPBACK, ETHERNET], Connected(has_peers=True), RED, "::1"),
        ([], [LOOPBACK, ETHERNET], Connected(has_peers=True), RED, "no address"),
        (["10.9.9.9"], [LOOPBACK, ETHERNET], Connected(has_peers=True), RED, "which no interface of this host has"),
    ],
)
def test_where_a_host_name_leads(
    addresses: list[str], found: list[Interface], connected: Connected, verdict: Verdict, mentions: str
) -> None:
    line = network.host_name("node7", addresses, found, connected)
    assert line.verdict is verdict and mentions in f"{line.found} {line.remedy}", line


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ("", ""),
        ("eth0", "eth0"),
        ("=eth0", "eth0"),
        ("ib", "ib0"),
        ("wlan0,eth0", "eth0"),
        ("^docker,lo", ""),
        ("wire9", "wire9"),
        ("eth", "eth0"),
        ("eth01", "eth01"),
    ],
)
def test_what_the_environment_chooses(choice: str, chosen: str) -> None:
    assert network.chosen_of(choice, ["lo", "eth0", "ib0", "eth01"]) == chosen


@pytest.mark.parametrize(
    ("found", "connected", "verdicts", "mentions"),
    [
        ([LOOPBACK, ETHERNET, DOWN], Connected(), [GREEN, GREEN, GREEN], "up, 10.0.0.7, 10 Gb/s"),
        ([ETHERNET], Connected("ib0"), [RED, GREEN], "set run.network_interface to one that is there: eth0"),
        ([ETHERNET, DOWN], Connected("eth1"), [GREEN, RED], "ip link set eth1 up"),
        ([Interface("ib0", True)], Connected("ib0"), [RED], "give it an address"),
        ([Interface("eth0", True, ("10.0.0.7",), 100)], Connected(), [YELLOW], "ethtool"),
        ([ETHERNET], Connected(pattern="ib*"), [GREEN, YELLOW], "run.network_interface"),
        ([ETHERNET], Connected(pattern="e*"), [GREEN], ""),
        (
            [Interface("eth0", True, ("169.254.3.4",))],
            Connected(pattern="e*"),
            [GREEN, YELLOW],
            "none of the cluster's",
        ),
    ],
)
def test_interfaces(found: list[Interface], connected: Connected, verdicts: list[Verdict], mentions: str) -> None:
    lines = list(network.interface_lines(found, connected))
    assert [line.verdict for line in lines] == verdicts, lines
    assert mentions in " ".join(f"{line.found} {line.remedy}" for line in lines)


def test_infiniband_ports(tmp_path: Path) -> None:
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / card / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    lines = list(network.infiniband_lines(tmp_path))
    assert [(line.check, line.verdict) for line in lines] == [
        ("InfiniBand mlx5_0 port 1", GREEN),
        ("InfiniBand mlx5_1 port 1", YELLOW),
    ]
    assert "200 Gb/sec" in lines[0].found and "ibstat" in lines[1].remedy
    assert list(network.infiniband_lines(tmp_path / "none")) == []


def test_this_host() -> None:
    """What is found is what the system says elsewhere, and goes to another rank and back unchanged."""
    found = {one.name: one for one in network.find_interfaces()}
    assert any("127.0.0.1" in one.addresses for one in found.values())
    lines = lines_here(Request([], None, [], False), ranks_here=2, world_size=8)
    assert from_json(to_json(lines)) == {name: list(of_name) for name, of_name in lines.items()}
    checks = {line.check for of_name in lines.values() for line in of_name}
    assert {
        "torch",
        "NCCL",
        "C++ compiler",
        "cores",
        "disk of run.dir",
        "open files (ulimit -n)",
        "host name",
    } <= checks


def of_two(first: Sequence[Line], second: Sequence[Line]) -> tuple[list[dict[str, str]], Sequence[str]]:
    section = of_hosts("host", {"h1": first, "h2": second})
    return list(section.rows), section.problems


def test_hosts_are_merged() -> None:
    """What is the same on all stands there once; what differs names its host, beside the other of its kind."""
    same, old, new = Line("cores", "8 of 8"), Line("torch", "2.11"), Line("torch", "2.13")
    rows, problems = of_two([old, same], [new, same])
    assert [(row["hosts"], row["check"], row["found"]) for row in rows] == [
        ("h1", "torch", "2.11"),
        ("h2", "torch", "2.13"),
        ("all 2", "cores", "8 of 8"),
    ]
    assert problems == []
    red = Line("host name", "127.0.1.1", RED, "mend it")
    assert of_two([red], [red])[1] == ["host name: 127.0.1.1: mend it (on all 2)"]
    assert of_two([red], [same])[1] == ["host name: 127.0.1.1: mend it (on h1)"]
    many = of_hosts("host", {f"h{n}": [red if n < 6 else same] for n in range(9)})
    assert many.rows[0]["hosts"] == "h0, h1, h2, h3 and 2 more"


def test_only_red_is_to_mend() -> None:
    yellow = Line("stack", "small", YELLOW, "more")
    assert of_lines("host", [yellow]).problems == []
    assert of_lines("host", [yellow, Line("disk", "full", RED, "make room")]).problems == ["disk: full: make room"]


def test_red_ends_with_2(tmp_path: Path) -> None:
    quickstart = ROOT / "configs/runs/quickstart.yaml"
    code, output = doctor("--config", quickstart, f"run.dir={tmp_path}")
    assert code == 0 and f"{tmp_path}: " in output
    (tmp_path / "file").write_text("x")
    code, output = doctor("--config", quickstart, f"run.dir={tmp_path}/file/runs")
    assert code == 2 and "to mend: disk of run.dir" in output
    code, output = doctor("--config", quickstart, "run.network_interface=wire9", "--json")
    (problem,) = json.loads(output)["network"]["problems"]
    assert code == 2 and problem.startswith("interface wire9: is not there: set run.network_interface to one that")
    code, output = doctor("--config", quickstart, "offload.optimizer=nvme", f"offload.dir={tmp_path}")
    assert code == 0 and "disk of offload.dir" in output


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (("--cluster", "dgx-a10"), "did you mean dgx-a100?"),
        (("--layout", "tp=2"), "start them with --nproc"),
        (("--nproc", "2", "--nodes", "2"), "takes --nproc-per-node"),
        (("--nproc", "2", "--layout", "tp=3"), "needs 3 processes, and there are 2"),
        (("--nproc", "2", "--layout", "qq=2"), "'qq=2' is not understood"),
        (("--nproc", "2", "--layout", "tp=1,tp=2"), "each axis once"),
        (("--nproc", "0"), "must be at least 1"),
    ],
)
def test_what_it_refuses(arguments: tuple[str, ...], mentions: str) -> None:
    code, output = doctor(*arguments)
    assert code == 2 and mentions in output and output.count("\n") <= 5
