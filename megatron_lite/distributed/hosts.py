"""What this host offers: cores and a loopback interface. Imports no torch, so that a launch need not wait for it."""

from __future__ import annotations

import os
import socket


def num_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_loopback() -> None:
    """Let gloo talk over the loopback interface, unless the user chose one: for ranks that are all on this host.

    By default gloo takes the address that the host's name resolves to, which may be none, or one behind a firewall.
    """
    names = {name for _, name in socket.if_nameindex()}
    interface = next((name for name in ("lo", "lo0") if name in names), None)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
