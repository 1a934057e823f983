#!/usr/bin/env bash
# Transformers 5.24.0: with label_smoothing_factor, `Trainer` shifts the labels only for classes whose name stands in its
# own table of causal language models. Any other class, a subclass or one loaded by trust_remote_code, is trained without
# a word to say the token it has just read. The same weights under two class names get two losses.
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
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class MyLlama(LlamaForCausalLM):
    """The same model, by another name."""


print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)
library = LlamaForCausalLM(config)
own = MyLlama(config)
own.load_state_dict(library.state_dict())
ids = torch.randint(97, (4, 32))
words = TrainingArguments("run", label_smoothing_factor=0.1, report_to=[], use_cpu=True)
with torch.no_grad():
    logits = library(ids).logits
    following = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    same = cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=0.1)
    losses = [Trainer(model, words).compute_loss(model, {"input_ids": ids, "labels": ids.clone()}) for model in (library, own)]
print(f"by hand: {following:.4f} for the following token, {same:.4f} for the token just read")
print(f"Trainer: {losses[0]:.4f} for LlamaForCausalLM, {losses[1]:.4f} for MyLlama with the same weights")
found = abs(losses[0] - following) < 1e-4 and abs(losses[1] - same) < 1e-4 and abs(following - same) > 1e-3
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
