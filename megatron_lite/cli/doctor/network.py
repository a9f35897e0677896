"""What a host has of networks: interfaces, InfiniBand ports, and whether its name leads others to it."""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.cli.doctor.report import Line, Verdict
from megatron_lite.distributed import hosts

NETWORK, IPV6 = Path("/sys/class/net"), Path("/proc/net/if_inet6")
INFINIBAND = Path("/sys/class/infiniband")
SLOW_MBIT_S = 1000


@dataclass(frozen=True)
class Interface:
    """speed_mbit_s: as its driver states it, which virtual ones do not."""

    name: str
    is_up: bool
    addresses: tuple[str, ...] = ()
    speed_mbit_s: int | None = None

    @property
    def reaches_others(self) -> bool:
        """Whether a host on the same network can find this one by it."""
        return self.is_up and any(_is_reachable(address) for address in self.addresses)

    def __str__(self) -> str:
        speed = [] if self.speed_mbit_s is None else [f"{self.speed_mbit_s / 1000:g} Gb/s"]
        return ", ".join(["up" if self.is_up else "down", *self.addresses, *speed])


@dataclass(frozen=True)
class Connected:
    """What the network is to be judged by.

    chosen: the interface that the user named, empty for none. pattern: names of the interfaces between nodes, of the
    cluster. has_peers: whether ranks on other hosts are to reach this one.
    """

    chosen: str = ""
    pattern: str = ""
    has_peers: bool = False


def network_lines(connected: Connected) -> list[Line]:
    found = find_interfaces()
    name = socket.gethostname()
    return [
        host_name(name, hosts.addresses_of(name), found, connected),
        *interface_lines(found, connected),
        *infiniband_lines(INFINIBAND),
    ]


def find_interfaces() -> list[Interface]:
    """Those of this host. On systems other than Linux without what only Linux tells."""
    return [
        Interface(name, _is_up(name), tuple(_addresses(name)), _number(NETWORK / name / "speed"))
        for name in hosts.interfaces()
    ]


def chosen_of(choice: str, names: Sequence[str]) -> str:
    """The interface of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME: names, or for NCCL how they begin, unless '=' is
    before them; '^' is before those to leave out, which chooses none. Where none is there, what was asked for."""
    if not choice or choice.startswith("^"):
        return ""
    wanted = choice.removeprefix("=").split(",")
    exact = (name for name in wanted if name in names)
    begins = (name for start in wanted for name in names if name.startswith(start))
    return next(exact, None) or next(begins, wanted[0])


def host_name(name: str, addresses: Sequence[str], found: Sequence[Interface], connected: Connected) -> Line:
    """Whether what the host's name resolves to leads others to it: gloo tells them that, unless it is given an
    interface. `addresses` are those that the name resolves to, the first one counts."""
    chosen = next((one for one in found if one.name == connected.chosen), None)
    says = f"{name} resolves to {', '.join(dict.fromkeys(addresses)) or 'no address'}"
    if chosen is not None and chosen.reaches_others:
        return Line("host name", f"{says}; ranks use {chosen.name}")
    owners = {address: one for one in found for address in one.addresses}
    reason = ""
    if not addresses:
        reason = "which gloo needs"
    elif ipaddress.ip_address(addresses[0]).is_loopback:
        reason = "where no other host finds it"
    elif owners and addresses[0] not in owners:
        reason = "which no interface of this host has"
    if not reason:
        return Line("host name", says)
    best = next((one for one in found if one.reaches_others), None)
    interface, address = (best.name, best.addresses[0]) if best is not None else ("INTERFACE", "ADDRESS")
    remedy = f"set run.network_interface={interface}, or give {name} the address {address} in /etc/hosts"
    if connected.has_peers:
        return Line("host name", f"{says}, {reason}", Verdict.red, remedy)
    return Line("host name", f"{says}, {reason}", Verdict.yellow, f"for runs on several hosts {remedy}")


def interface_lines(found: Sequence[Interface], connected: Connected) -> Iterator[Line]:
    """A line each, and one for a name or a pattern that fits none."""
    usable = [one.name for one in found if one.reaches_others]
    if connected.chosen and connected.chosen not in [one.name for one in found]:
        remedy = f"set run.network_interface to one that is there: {', '.join(usable) or 'none is up'}"
        yield Line(f"interface {connected.chosen}", "is not there", Verdict.red, remedy)
    for one in found:
        check, is_chosen = f"interface {one.name}", one.name == connected.chosen
        if is_chosen and not one.is_up:
            yield Line(check, f"{one}, and ranks are to use it", Verdict.red, f"ip link set {one.name} up")
        elif is_chosen and not one.addresses:
            yield Line(check, f"{one}, no address, and ranks are to use it", Verdict.red, "give it an address")
        elif one.speed_mbit_s is not None and one.speed_mbit_s < SLOW_MBIT_S and one.reaches_others:
            remedy = "look at the cable and the port of the switch (ethtool), or name another in run.network_interface"
            yield Line(check, str(one), Verdict.yellow, remedy)
        else:
            yield Line(check, str(one))
    if connected.pattern and not connected.chosen and not any(fnmatch.filter(usable, connected.pattern)):
        remedy = "bring one up, or set run.network_interface to the one between the nodes"
        yield Line(f"interface {connected.pattern}", "none of the cluster's that is up", Verdict.yellow, remedy)


def infiniband_lines(folder: Path) -> Iterator[Line]:
    """A line for each port: state and rate as the driver gives them ('4: ACTIVE', '200 Gb/sec (4X HDR)')."""
    for port in sorted(folder.glob("*/ports/*")):
        check = f"InfiniBand {port.parents[1].name} port {port.name}"
        state = _text(port / "state").partition(": ")[2] or "state unknown"
        found = f"{state}, {_text(port / 'rate') or 'rate unknown'}"
        if state == "ACTIVE":
            yield Line(check, found)
        else:
            remedy = "look at cable and subnet manager (ibstat), or leave it out with NCCL_IB_HCA"
            yield Line(check, found, Verdict.yellow, remedy)


def _is_up(name: str) -> bool:
    """The loopback says 'unknown', as do tunnels: whether it is down is all that counts."""
    return _text(NETWORK / name / "operstate") not in ("down", "lowerlayerdown", "notpresent")


def _addresses(name: str) -> Iterator[str]:
    if address := hosts.address_of_interface(name):
        yield address
    for line in _text(IPV6).splitlines():
        digits, *_, owner = line.split()
        found = ipaddress.IPv6Address(int(digits, 16))
        if owner == name and not found.is_link_local:
            yield str(found)


def _is_reachable(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return not (found.is_loopback or found.is_link_local or found.is_unspecified)


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() and int(text) > 0 else None


def _text(path: Path) -> str:
    """Empty where the system has no answer."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
