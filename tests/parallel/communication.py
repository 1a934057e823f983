"""Every collective and message that this rank starts: what it is, over how many ranks, and the bytes that it sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = torch.ops.c10d
NAMES = {
    OPERATIONS._allgather_base_: "all_gather",
    OPERATIONS._reduce_scatter_base_: "reduce_scatter",
    OPERATIONS.allreduce_: "all_reduce",
    OPERATIONS.alltoall_base_: "all_to_all",
    OPERATIONS.send: "send",
}
SILENT = {OPERATIONS.recv_, OPERATIONS.recv_any_source_, OPERATIONS.barrier}
SCALAR = 64
"""Bytes below which a tensor is a loss, a norm or a largest logit, not what the formulas count."""


class Communication(TorchDispatchMode):
    """Counts calls by (operation, ranks), and bytes by the name of the group, as rings would send them.

    Raises:
        AssertionError: something is sent by an operation that is not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes_: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function._overloadpacket
        if packet in NAMES:
            self.see(NAMES[packet], args)
        else:
            assert not str(packet).startswith("c10d.") or packet in SILENT, packet
        return function(*args, **(kwargs or {}))

    def see(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("send", "all_reduce"):
            ((tensor, *_), group, *_) = arguments
            size = tensor.nbytes
        else:
            (out, given, group, *_) = arguments
            size = max(out.nbytes, given.nbytes)
        group = dist.ProcessGroup.unbox(group)
        ranks = group.size()
        if size <= SCALAR or ranks == 1:
            return
        share = {"send": 1.0, "all_reduce": 2 * (ranks - 1) / ranks}.get(name, (ranks - 1) / ranks)
        self.calls[name, ranks] += 1
        self.bytes_[group.group_name] += share * size
