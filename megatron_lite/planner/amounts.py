"""Bytes by the place where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.offload import Place


@dataclass(frozen=True)
class Amount:
    """Bytes on the device, in main memory beside it, and in files. On a CPU the device is main memory: host is 0."""

    device: int = 0
    host: int = 0
    disk: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.device + other.device, self.host + other.host, self.disk + other.disk)


def placed(num_bytes: int, place: Place, device: str) -> Amount:
    """``num_bytes`` where `megatron_lite.config.offload` puts them. device: 'cpu' or 'cuda'."""
    if place == "nvme":
        return Amount(disk=num_bytes)
    if place == "cpu" and device != "cpu":
        return Amount(host=num_bytes)
    return Amount(device=num_bytes)
