"""How fast the ranks of a world reach one another: what was measured, beside what the cluster file promises."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.doctor.report import Section, Verdict

if TYPE_CHECKING:
    from megatron_lite.config.cluster import ClusterConfig
    from megatron_lite.distributed.probe import GroupSpeed, LinkSpeed

# Shares of what is promised, or of what other links reach, below which a line is no longer green, and is red.
YELLOW_BELOW, RED_BELOW = 0.7, 0.3
# How many times the latency that is promised, which is that of the wire alone: gloo and NCCL add their own.
SLOW_ANSWER = 50
MOST_LINKS_SHOWN = 8
# With fewer links there is nothing to compare one with.
ENOUGH_LINKS = 4
GB = 1e9


def judged(share: float) -> Verdict:
    return Verdict.red if share < RED_BELOW else Verdict.yellow if share < YELLOW_BELOW else Verdict.green


def axes_section(
    speeds: Mapping[str, Sequence[GroupSpeed]], host_of_rank: Sequence[str], cluster: ClusterConfig | None
) -> Section:
    """The slowest group of each axis. speeds: name of the axis -> its groups, all measured at the same time."""
    rows, problems = [], []
    for axis, groups in speeds.items():
        slowest = min(groups, key=lambda group: group.bus_bytes_per_s)
        hosts = list(dict.fromkeys(host_of_rank[rank] for rank in slowest.ranks))
        promised = _promised_to(slowest, host_of_rank, cluster)
        verdict, remedy = Verdict.green, ""
        if promised is not None:
            verdict = judged(slowest.bus_bytes_per_s / (promised * GB))
        if verdict is not Verdict.green:
            remedy = _remedy_of_axis(hosts, cluster)
            if verdict is Verdict.red:
                problems.append(
                    f"{axis}: {_gb_s(slowest.bus_bytes_per_s)} GB/s over {_named(slowest.ranks, hosts)}, of "
                    f"{promised:g} GB/s that {cluster.name if cluster else ''} promises: {remedy}"
                )
        rows.append(
            {
                "axis": axis,
                "verdict": verdict.value,
                "GB/s": _gb_s(slowest.bus_bytes_per_s),
                "promised": "not judged" if promised is None else float(f"{promised:.3g}"),
                "latency us": round(max(group.latency_s for group in groups) * 1e6),
                "groups": f"{len(groups)} of {len(slowest.ranks)}",
                "slowest": _named(slowest.ranks, hosts),
                "remedy": remedy,
            }
        )
    return Section("all-reduce", rows, problems)


def links_section(speeds: Sequence[LinkSpeed], cluster: ClusterConfig | None) -> Section:
    """The slowest links, or all of few. One is judged by what the cluster promises, and by the median of all.

    Where all links from or to a host are slow, it is that host; else it is what lies between the two.
    """
    promised = None if cluster is None else cluster.link_gb_s * GB
    median = statistics.median(speed.bytes_per_s for speed in speeds)
    shares = {speed: _share(speed, promised, median if len(speeds) >= ENOUGH_LINKS else None) for speed in speeds}
    slow = [speed for speed in speeds if judged(shares[speed]) is not Verdict.green]
    rows, problems = [], []
    for speed in sorted(speeds, key=lambda speed: speed.bytes_per_s)[:MOST_LINKS_SHOWN]:
        verdict = judged(shares[speed])
        link = f"{speed.sender} -> {speed.receiver}"
        remedy = "" if verdict is Verdict.green else _remedy_of_link(speed, slow, speeds)
        if verdict is Verdict.green and cluster is not None and _answers_late(speed, cluster):
            verdict, remedy = Verdict.yellow, _remedy_of_late_answers(cluster)
        rows.append(
            {
                "link": link,
                "verdict": verdict.value,
                "GB/s": _gb_s(speed.bytes_per_s),
                "promised": "not known" if promised is None else _gb_s(promised),
                "median": _gb_s(median),
                "latency us": round(speed.latency_s * 1e6),
                "remedy": remedy,
            }
        )
        if verdict is Verdict.red:
            problems.append(
                f"{link}: {_gb_s(speed.bytes_per_s)} GB/s, {shares[speed]:.0%} of what it should be: {remedy}"
            )
    return Section("links between hosts", rows, problems)


def _share(speed: LinkSpeed, promised: float | None, median: float | None) -> float:
    return min([1.0, *(speed.bytes_per_s / bound for bound in (promised, median) if bound)])


def _answers_late(speed: LinkSpeed, cluster: ClusterConfig) -> bool:
    return speed.latency_s * 1e6 > SLOW_ANSWER * cluster.network_latency_us


def _remedy_of_late_answers(cluster: ClusterConfig) -> str:
    return (
        f"a message takes more than {SLOW_ANSWER} times the {cluster.network_latency_us:g} us of {cluster.name}: look "
        "at which interface ranks use (run.network_interface), and at power saving of cores and cards"
    )


def _remedy_of_link(speed: LinkSpeed, slow: Sequence[LinkSpeed], speeds: Sequence[LinkSpeed]) -> str:
    if len({host for one in speeds for host in (one.sender, one.receiver)}) > 2 and len(slow) < len(speeds):
        for host, what, end in ((speed.sender, "sends", "sender"), (speed.receiver, "receives", "receiver")):
            of_host = [one for one in speeds if getattr(one, end) == host]
            if all(one in slow for one in of_host):
                return f"all that {host} {what} is slow: look at its network card, cable and interface"
    return f"look at the cable, the port and the interface between {speed.sender} and {speed.receiver}"


def _remedy_of_axis(hosts: Sequence[str], cluster: ClusterConfig | None) -> str:
    if len(hosts) > 1:
        return "look at the links between hosts below, and at the interface that ranks use (run.network_interface)"
    name = "the cluster's file" if cluster is None else cluster.name
    return f"look at nvidia-smi topo -m and nvidia-smi nvlink -s: the GPUs do not reach one another as {name} says"


def _promised_to(group: GroupSpeed, host_of_rank: Sequence[str], cluster: ClusterConfig | None) -> float | None:
    """GB/s; None where the cluster is not known, or says nothing of it."""
    if cluster is None:
        return None
    on_host = [host_of_rank[rank] for rank in group.ranks]
    fullest = max(set(on_host), key=on_host.count)
    return cluster.bandwidth_gb_s(
        group_on_node=on_host.count(fullest),
        all_on_node=host_of_rank.count(fullest),
        crosses_nodes=len(set(on_host)) > 1,
    )


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    shown = ",".join(map(str, ranks[:4])) + (f",..{ranks[-1]}" if len(ranks) > 4 else "")
    return f"ranks {shown} on {', '.join(hosts[:3])}" + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")


def _gb_s(bytes_per_s: float) -> Any:
    """Three digits."""
    return float(f"{bytes_per_s / GB:.3g}")
