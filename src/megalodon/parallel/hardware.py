"""What a planner needs to know of machines: published peaks, and assumptions about how much of them is reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One kind of device and the networks between them. Bandwidths are bytes per second, one way, of one device.

    Attributes:
        peak_flops: dense bfloat16 multiply-adds counted as two, per second, as its maker states it.
        memory: bytes.
        devices_per_node: devices that the fast network joins.
        inside, between: bandwidth inside a node, and from a device to other nodes.
        latency_inside, latency_between: seconds of a collective's step.
        efficiency: assumed part of the peak that a device's own work reaches.
    """

    name: str
    peak_flops: float
    memory: float
    devices_per_node: int
    inside: float
    between: float
    latency_inside: float = 5e-6
    latency_between: float = 15e-6
    efficiency: float = 0.45


HARDWARE = {
    "a100": Hardware("A100 80 GB", 312e12, 80e9, 8, 300e9, 25e9),
    "h100": Hardware("H100 80 GB", 989e12, 80e9, 8, 450e9, 50e9),
    "h200": Hardware("H200 141 GB", 989e12, 141e9, 8, 450e9, 50e9),
}
"""By name. The networks are NVLink of the generation, and 200 (A100) or 400 Gbit/s a device between nodes."""
