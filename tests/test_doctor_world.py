"""What the doctor measures between ranks, and what it makes of the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from megatron_lite.cli.doctor.nodes import command_on_nodes, run_on_nodes
from megatron_lite.cli.doctor.ranks import parse_layout
from megatron_lite.cli.doctor.request import Request
from megatron_lite.cli.doctor.world import axes_section, judged, links_section
from megatron_lite.config.cluster import load_cluster
from megatron_lite.distributed import probe
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.probe import GroupSpeed, LinkSpeed, axis_speeds, link_speeds, tournament
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool

ROOT = Path(__file__).parents[1]

GB = 1e9
A100 = load_cluster("dgx-a100")


@pytest.mark.parametrize("num_players", range(9))
def test_everyone_meets_everyone_once(num_players: int) -> None:
    rounds = tournament(num_players)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(combinations(range(num_players), 2))
    for pairs in rounds:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players)), "one at two places"
    assert len(rounds) == max(0, num_players - 1 + num_players % 2)


def measure() -> tuple[list[GroupSpeed], list[GroupSpeed], list[LinkSpeed]]:
    mesh = build_mesh(Layout(pp=2, tp=2), device=torch.device("cpu"))
    probe.ALL_REDUCE_BYTES["cpu"] = probe.MESSAGE_BYTES["cpu"] = 1 << 20
    return axis_speeds(mesh, mesh.tp), axis_speeds(mesh, mesh.dp), link_speeds(mesh, ["a", "b", "a", "c"])


def test_every_rank_has_the_figures_of_all(pool: WorkerPool) -> None:
    answers = pool.run(measure, 4)
    assert all(answer == answers[0] for answer in answers)
    along_tp, along_dp, links = answers[0]
    assert [group.ranks for group in along_tp] == [(0, 1), (2, 3)] and along_dp == []
    for group in along_tp:
        assert 1e-6 < group.latency_s < 1 and 1e6 < group.bus_bytes_per_s < 1e12
    assert {(link.sender, link.receiver) for link in links} == {
        (a, b) for a in "abc" for b in "abc" if a != b
    }  # fmt: skip
    assert all(1e-6 < link.latency_s < 1 and 1e6 < link.bytes_per_s < 1e12 for link in links)


def test_the_bus_bandwidth_is_what_a_rank_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 ranks the buffer over the seconds; the quickest round counts, which is over with its last member."""
    from types import SimpleNamespace
    from typing import Any

    seconds = {0: [[9.0, 1.0], [5.0, 2.0]], 1: [[9.0, 3.0], [1.0, 2.0]]}
    axis: Any = SimpleNamespace(size=2, ranks=range(2))
    mesh: Any = SimpleNamespace(device=torch.device("cpu"), world=None)
    monkeypatch.setattr(probe, "_timed", lambda action, mesh, rounds: [])
    monkeypatch.setattr(
        probe.collectives, "gather_objects", lambda value, axis: [((0, 1), *seconds[rank]) for rank in (0, 1)]
    )
    (group,) = axis_speeds(mesh, axis)
    assert group.latency_s == 3.0
    assert group.bus_bytes_per_s == probe.ALL_REDUCE_BYTES["cpu"] / 2.0


@pytest.mark.parametrize(("share", "verdict"), [(0.29, "red"), (0.31, "yellow"), (0.69, "yellow"), (0.71, "green")])
def test_limits(share: float, verdict: str) -> None:
    assert judged(share) == verdict


def test_an_axis_is_judged_by_its_slowest_group() -> None:
    """Two nodes of eight: tp inside a node over NVLink, dp across with an eighth of the ports for each GPU."""
    host_of_rank = ["n1"] * 8 + ["n2"] * 8
    tp = [GroupSpeed(tuple(range(8)), 2e-5, 250 * GB), GroupSpeed(tuple(range(8, 16)), 3e-5, 80 * GB)]
    dp = [GroupSpeed((rank, rank + 8), 1e-5, 24 * GB) for rank in range(8)]
    section = axes_section({"tp": tp, "dp": dp}, host_of_rank, A100)
    by_axis = {row["axis"]: row for row in section.rows}
    assert by_axis["tp"]["verdict"] == "red" and by_axis["tp"]["promised"] == 300
    assert by_axis["tp"]["slowest"] == "ranks 8,9,10,11,..15 on n2" and "nvlink" in by_axis["tp"]["remedy"]
    assert by_axis["tp"]["latency us"] == 30
    assert by_axis["dp"]["verdict"] == "green" and by_axis["dp"]["promised"] == 25
    (problem,) = section.problems
    assert problem.startswith("tp: 80.0 GB/s over ranks 8,9,10,11,..15 on n2, of 300 GB/s that dgx-a100 promises")
    slower = axes_section({"dp": [GroupSpeed((0, 8), 1e-5, 10 * GB)]}, host_of_rank, A100)
    assert slower.rows[0]["verdict"] == "yellow" and slower.problems == []
    unknown = axes_section({"tp": tp}, host_of_rank, None)
    assert unknown.rows[0]["verdict"] == "green" and unknown.rows[0]["promised"] == "not judged"


def links(slow: dict[tuple[str, str], float], hosts: str = "abcd") -> list[LinkSpeed]:
    """Of 20 GB/s each, but for those that are slow."""
    pairs = [(a, b) for a in hosts for b in hosts if a != b]
    return [LinkSpeed(a, b, 1e-5, slow.get((a, b), 20) * GB) for a, b in pairs]


def test_one_slow_link_is_named() -> None:
    section = links_section(links({("b", "c"): 2}), None)
    assert section.rows[0]["link"] == "b -> c" and section.rows[0]["verdict"] == "red"
    assert all(row["verdict"] == "green" for row in section.rows[1:])
    (problem,) = section.problems
    assert problem.startswith("b -> c: 2.0 GB/s, 10% of what it should be") and "between b and c" in problem


def test_a_host_whose_links_are_all_slow_is_named() -> None:
    section = links_section(links({("b", other): 2 for other in "acd"}), None)
    assert len(section.problems) == 3
    assert all("all that b sends is slow" in problem for problem in section.problems)


def test_links_are_judged_by_the_cluster_where_there_is_nothing_to_compare() -> None:
    one_way = links({("a", "b"): 2}, "ab")
    assert not links_section(one_way, None).problems, "of two figures neither is the usual one"
    (problem,) = links_section(one_way, A100).problems
    assert problem.startswith("a -> b: 2.0 GB/s, 8%")
    everywhere = links_section([LinkSpeed(s.sender, s.receiver, 1e-5, GB) for s in links({})], A100)
    assert len(everywhere.problems) == len(everywhere.rows) == 8
    assert all("between" in problem for problem in everywhere.problems), "no host is worse than another"
    assert not links_section(links({}), A100).problems


def test_late_answers_are_told() -> None:
    late = [LinkSpeed("a", "b", 5e-3, 25 * GB), LinkSpeed("b", "a", 5e-5, 25 * GB)]
    rows = {row["link"]: row for row in links_section(late, A100).rows}
    assert rows["a -> b"]["verdict"] == "yellow" and "50 times the 2 us of dgx-a100" in rows["a -> b"]["remedy"]
    assert rows["b -> a"]["verdict"] == "green"
    assert {row["verdict"] for row in links_section(late, None).rows} == {"green"}


def test_layouts() -> None:
    assert parse_layout("tp=2,pp=2,dp=2", 8) == Layout(tp=2, pp=2, dp=2)
    assert parse_layout(" tp=2, pp=2", 8) == Layout(tp=2, pp=2, dp=2)
    with pytest.raises(ValueError, match="needs 4 processes, and there are 8"):
        parse_layout("tp=2,dp=2", 8)


def test_processes_of_one_host() -> None:
    """The command itself: no judgement of loopback."""
    program = [sys.executable, "-m", "megatron_lite", "doctor", "--nproc", "2", "--layout", "tp=2", "--json"]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [row["axis"] for row in report["all-reduce"]["rows"]] == ["world"]
    assert all(row["promised"] == "not judged" and row["GB/s"] > 0 for row in report["all-reduce"]["rows"])
    assert "links between hosts" not in report
    assert "hosts" not in report["host"]["rows"][0]


def test_nodes_are_started_by_srun() -> None:
    """The command line that it gives is the one that asks for the same on each rank."""
    request = Request(["cpu"], Path("run.yaml"), ["parallel.tp=8"], True, True, "dgx-a100", "tp=8,dp=2", 30.0)
    words = command_on_nodes(request, 2, None)
    assert words[:5] == ["srun", "--nodes=2", "--ntasks-per-node=8", "--kill-on-bad-exit=0", "--gpus-per-node=8"]
    assert words[5] == "--cpus-per-task=16", "of 128 cores"
    assert words[6:11] == ["env", "MEGATRON_LITE_WORLD_SIZE=16", sys.executable, "-m", "megatron_lite"]
    said = "doctor parallel.tp=8 --config run.yaml --cluster dgx-a100 --layout tp=8,dp=2 --timeout 30 --device cpu"
    assert " ".join(words[11:]) == f"{said} --verbose --json"
    assert command_on_nodes(Request([], None, [], False), 3, 2)[1:3] == ["--nodes=3", "--ntasks-per-node=2"]


def test_without_slurm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="without --nodes by your launcher"):
        run_on_nodes(Request([], None, [], False), 2, None)
    program = tmp_path / "srun"
    program.write_text("#!/bin/sh\nexit 5\n")
    program.chmod(0o755)
    words = [sys.executable, "-m", "megatron_lite", "doctor", "--nodes", "2"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 5 and ended.stderr.startswith("+ srun --nodes=2 "), ended.stderr
