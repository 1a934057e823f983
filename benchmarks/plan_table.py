"""What `megalodon plan` recommends for the paper's 7B on 8 to 4096 devices, as a table for docs/parallelism.md."""

from __future__ import annotations

from _report import RESULTS

from megalodon import MegalodonConfig
from megalodon.parallel.hardware import HARDWARE
from megalodon.parallel.planning import Job, plans

CONTEXT, TOKENS = 32768, 4 * 2**20


def main() -> None:
    config = MegalodonConfig.from_preset("paper-7b")
    lines = [
        "| devices | rows | replicate | shard | tensor | pipeline | chunk | micro-batches | recompute | GiB a device | "
        "step, s | utilised |",
        "| --: " * 8 + "| --- | --: | --: | --: |",
    ]
    for devices in (8, 64, 256, 1024, 4096):
        job = Job(config, devices, CONTEXT, TOKENS // CONTEXT)
        best = plans(job, HARDWARE["h100"])[0]
        sizes = best.sizes
        cells = [devices, job.batch_size, sizes.replicate, sizes.shard, sizes.tensor, sizes.pipeline, sizes.chunk]
        cells += [best.accumulation_steps, "yes" if best.checkpointing else "no", f"{best.memory.total / 2**30:.1f}"]
        cells += [f"{best.seconds:.2f}", f"{best.utilisation:.1%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "plan_table.md").write_text("# The 7B on H100s, planned\n\n" + text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
