"""Memory of attention transfer with one block at a time, beside all of them and beside training one block alone; and
of the stage that trains the whole model.

Draws a Llama of each depth, runs two steps of a recipe's stage in a process of its own, and samples the process's
anonymous memory, which mapped weights are no part of. What a process holds before the stage's model is made is taken
off. Beside it stands what `megalodon linearize --dry-run` predicts.

    python benchmarks/linearize_memory.py --width 1024 --layers 1 6
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon.data import ByteTokenizer
from megalodon.linearize import plan, read_config, recipe_of
from megalodon.linearize.memory import predicted

WORKER = """
import sys, threading, time
from pathlib import Path
import torch, matplotlib.pyplot, peft, torch.utils.tensorboard
from megalodon.linearize import linearize, plan, read_config, recipe_of, run
from megalodon.linearize.finetune import FineTuner
from megalodon.linearize.transfer import TransferTrainer

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

class Stop(Exception): pass
peak, base, done = 0, 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
run.measure_peak_flops = lambda device, dtype: 1e9
teacher, out, stage, recipe, *keys = sys.argv[1:]
trainer, maker = {"transfer": (TransferTrainer, "pupils"), "finetune": (FineTuner, "load_model")}[stage]
inside = trainer.train
def train(self, stop):
    inside(self, stop)
    raise Stop
trainer.train = train
make = getattr(run, maker)
def made(*arguments):
    global base
    base = anonymous()
    thread.start()
    return make(*arguments)
setattr(run, maker, made)
thread = threading.Thread(target=watch, daemon=True)
recipe = recipe_of(recipe)
try:
    linearize(plan(Path(teacher), Path(out), recipe, read_config(recipe.config, None, keys)))
except Stop:
    done = True
print(peak - base)
"""


def peak_of(teacher: Path, out: Path, stage: str, recipe: str, keys: list[str]) -> int:
    """Bytes above what the process held before what trains in the stage was made."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(teacher), str(out), stage, recipe, *keys],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 6])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, found = [], []
    with tempfile.TemporaryDirectory() as name:
        place, tokenizer = Path(name), ByteTokenizer()
        (place / "text.txt").write_text("All work and no play. " * 4000)
        for layers in options.layers:
            torch.manual_seed(0)
            sizes: dict[str, Any] = {
                "hidden_size": options.width,
                "intermediate_size": 3 * options.width,
                "num_attention_heads": options.width // 64,
                "num_hidden_layers": layers,
            }
            teacher = place / f"teacher-{layers}"
            LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(teacher)
            tokenizer.save(teacher)
            activations = options.rows * options.length * options.width * 4
            for stage, held in (("transfer", "1"), ("transfer", "null"), ("finetune", "null")):
                keys = [
                    f"data.corpus.source={place / 'text.txt'}",
                    f"data.cache_folder={place / 'cache'}",
                    f"data.sequence_length={options.length}",
                    f"data.batch_size={options.rows}",
                    *(f"{name}.tokens={2 * options.rows * options.length}" for name in ("transfer", "finetune")),
                    f"memory.layers_at_once={held}",
                    "evaluation.every=null",
                ]
                out, recipe = place / f"out-{layers}-{stage}-{held}", recipe_of(options.recipe)
                job = plan(teacher, out, recipe, read_config(recipe.config, None, keys))
                said = next(each for each in predicted(job) if each.stage == stage)
                peak, foretold = peak_of(teacher, out, stage, options.recipe, keys), said.weights + said.step
                found.append({"stage": stage, "layers": layers, "layers_at_once": held, "peak": peak})
                found[-1] |= {"predicted": foretold, "activations": activations}
                sizes = [f"{x / 1e6:.0f}" for x in (peak, foretold)]
                rows.append([stage, str(layers), held, *sizes, f"{activations / 1e6:.1f}"])
                print(rows[-1], flush=True)
    header = ["stage ", "layers", "layers_at_once", "peak, MB", "predicted, MB", "one batch of activations, MB"]
    settings = {key: value for key, value in vars(options).items() if key != "results"}
    result = new_run("linearize_memory", describe_machine(), settings)
    result["rows"] = found
    page = document("Memory of linearisation", result, [markdown_table(header, rows)], False)
    save(result, page, options.results, "linearize-memory")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
