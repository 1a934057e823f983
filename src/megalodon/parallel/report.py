"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from megalodon.parallel.hardware import Hardware
from megalodon.parallel.planning import RESERVED, Job, Plan

GIB = 2**30


def report(job: Job, hardware: Hardware, plans: Sequence[Plan], top: int) -> str:
    """The `top` best plans as a table, the best one's memory and traffic, and its config."""
    best = plans[0]
    lines = [
        f"{hardware.name}: {hardware.peak_flops / 1e12:.0f} TFLOP/s at {hardware.efficiency:.0%} assumed, "
        f"{hardware.inside / 1e9:.0f} GB/s in a node of {hardware.devices_per_node}, {hardware.between / 1e9:.0f} GB/s "
        f"between nodes; {RESERVED:.0%} of the memory kept free",
        f"{job.batch_size} rows of {job.context:,} tokens a step, {job.precision}, {best.flops / 1e15:,.0f} PFLOP",
        "",
        _row(("replicate", "shard", "tensor", "pipeline", "chunk", "parts", "recompute", "GiB", "step s", "utilised")),
        *(_row(_cells(plan)) for plan in plans[:top]),
        "",
        "the first one's memory in GiB: "
        + ", ".join(f"{name} {value / GIB:.1f}" for name, value in vars(best.memory).items() if value),
        "bytes a rank sends in a step: "
        + (", ".join(f"{axis} {value / 1e9:.2f} GB" for axis, value in best.wire.items() if value) or "none"),
        f"of {best.seconds:.2f} s: computing {best.compute:.2f}, the pipeline's waiting {best.idle:.2f}, "
        + ", ".join(f"{axis} {value:.3f}" for axis, value in best.exposed.items() if value),
        "",
        config_section(job, best),
    ]
    return "\n".join(lines)


def config_section(job: Job, plan: Plan) -> str:
    """What to put into a training config."""
    sizes = ", ".join(f"{name}: {value}" for name, value in vars(plan.sizes).items())
    checkpointing = str(plan.checkpointing).lower()
    return (
        f"mesh: {{{sizes}}}\n"
        f"data: {{sequence_length: {job.context}, batch_size: {job.batch_size}}}\n"
        f"run: {{precision: {job.precision}, accumulation_steps: {plan.accumulation_steps}, "
        f"gradient_checkpointing: {checkpointing}}}"
    )


def _cells(plan: Plan) -> tuple[str, ...]:
    sizes = plan.sizes
    return (
        *map(str, (sizes.replicate, sizes.shard, sizes.tensor, sizes.pipeline, sizes.chunk, plan.accumulation_steps)),
        "yes" if plan.checkpointing else "no",
        f"{plan.memory.total / GIB:.1f}",
        f"{plan.seconds:.2f}",
        f"{plan.utilisation:.1%}",
    )


def _row(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>9}" for cell in cells)
