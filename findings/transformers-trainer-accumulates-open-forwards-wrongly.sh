#!/usr/bin/env bash
# Transformers 5.24.0: `Trainer` takes a model whose forward has **kwargs to divide its loss by `num_items_in_batch`. One
# that returns the mean of its batch and hands **kwargs on, as wrappers do, gets gradients gradient_accumulation_steps
# times too large, without a word; without **kwargs the same model gets them right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "torch==2.13.0" "transformers==5.24.0" "accelerate==1.15.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments


class Plain(torch.nn.Module):
    """A weight whose gradient is 1 in the mean of any batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, labels=None):
        return {"loss": (self.weight + 0 * labels.float()).mean()}


class Open(Plain):
    """The same, with **kwargs."""

    def forward(self, input_ids, labels=None, **kwargs):
        return super().forward(input_ids, labels)


print("transformers", transformers.__version__, "torch", torch.__version__)
rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
moved = {}
for model in (Plain(), Open()):
    words = TrainingArguments(
        "run", per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )
    Trainer(model, words, train_dataset=rows).train()
    moved[type(model).__name__] = -model.weight.item()
print(f"one step of four batches, gradient 1, rate 1: without **kwargs by {moved['Plain']}, with them by {moved['Open']}")
found = moved == {"Plain": 1.0, "Open": 4.0}
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
