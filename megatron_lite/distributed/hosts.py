"""What this host offers: cores and network interfaces. Imports no torch, so that a launch need not wait for it."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct

# The network interface that gloo and NCCL use, in the environment: they read it when the first group is made.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def num_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_loopback() -> None:
    """Let gloo talk over the loopback interface, unless the user chose one: for ranks that are all on this host.

    By default gloo takes the address that the host's name resolves to, which may be none, or one behind a firewall.
    """
    interface = next((name for name in ("lo", "lo0") if name in interfaces()), None)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def use_interface(name: str) -> None:
    """Let gloo and NCCL talk over the interface of that name. Raises ValueError, with those there are."""
    if name not in interfaces():
        raise ValueError(
            f"run.network_interface={name}: {socket.gethostname()} has no such interface; it has "
            f"{', '.join(interfaces())}"
        )
    os.environ.update(dict.fromkeys(INTERFACE_VARIABLES, name))


def interfaces() -> list[str]:
    """The names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def chosen_interface(backend: str) -> str:
    """The interface that was chosen for a backend; empty for none."""
    return os.environ.get(f"{backend.upper()}_SOCKET_IFNAME", "")


def interface_in_use(backend: str) -> str:
    """The interface that the backend talks over: the one that was chosen, or for gloo the one of the host's name; empty
    where that cannot be told."""
    chosen = chosen_interface(backend)
    if chosen or backend != "gloo":
        return chosen
    addresses = addresses_of(socket.gethostname())
    return next((name for name in interfaces() if address_of_interface(name) in addresses), "")


def loopback_name() -> str:
    """The address that gloo would tell the other hosts, where it is one that leads back to whoever uses it; else empty.

    It takes what this host's name resolves to, unless an interface was chosen, and the loopback where it does not.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    addresses = addresses_of(socket.gethostname())
    if not addresses:
        return "no address"
    return addresses[0] if ipaddress.ip_address(addresses[0]).is_loopback else ""


def addresses_of(name: str) -> list[str]:
    """What a host's name resolves to, the first one first; none if it does not."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(address[0]).partition("%")[0] for *_, address in found]


def address_of_interface(name: str) -> str:
    """Its IPv4 address, empty where it has none, or on a system other than Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])
