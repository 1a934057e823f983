"""Chunk parallelism sends two summaries a layer, and CEMA's travels while the values are projected, in both passes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Case, build, own_parts
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon.parallel import MeshSizes
from megalodon.parallel.collectives import Exchange

LAYERS = 2
CALLS = {
    torch.ops.c10d._allgather_base_: "send",
    torch.ops.c10d._reduce_scatter_base_: "send back",
    torch.ops.aten.mm: "multiply",
    torch.ops.aten.addmm: "multiply",
}


class Order(TorchDispatchMode):
    """What this rank does, in order: exchanges of one group, waiting for them, and products of matrices."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.seen = group.group_name, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = CALLS.get(function._overloadpacket)
        if name == "multiply" or (name and dist.ProcessGroup.unbox(args[2]).group_name == self.group):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def order_of_a_step(case: Case) -> list[str]:
    mesh, model = build(MeshSizes(chunk=2), case)
    batch = next(iter(case.batches()))
    before = Exchange.wait
    with Order(mesh.group("chunk")) as order:

        def wait(exchange: Exchange) -> None:
            order.seen.append("wait")
            before(exchange)

        Exchange.wait = wait
        try:
            model.accumulate_gradients(own_parts(mesh, case, batch, [None]), 1.0)
        finally:
            Exchange.wait = before
    return order.seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_summaries_a_layer_of_which_one_is_hidden(ranks, precision):
    for seen in ranks.run(2, order_of_a_step, Case(length=64, precision=precision)):
        for send in ("send", "send back"):
            starts = [place for place, what in enumerate(seen) if what == send]
            assert len(starts) == 2 * LAYERS + 1  # and the final norm's
            hidden = ["multiply" in seen[start : seen.index("wait", start)] for start in starts]
            # A layer's norm and CEMA in turn, then the final norm; backwards, the other way round.
            expected = [False, True] * LAYERS + [False]
            assert hidden == (expected if send == "send" else expected[::-1])
