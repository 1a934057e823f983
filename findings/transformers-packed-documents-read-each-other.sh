#!/usr/bin/env bash
# Transformers 5.24.0: `position_ids` that restart, with no mask, keep packed documents apart in LlamaForCausalLM (sdpa and
# eager) only if the model makes no cache. By default it makes one, and the second document reads the first, in train()
# and under gradients too. A mask of ones undoes `use_cache=False` again. Nothing is said. `Trainer` turns the cache off;
# a training loop or an evaluation of one's own meets it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "torch==2.13.0" "transformers==5.24.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
model = LlamaForCausalLM(config).train()
first, second = torch.randint(3, 97, (1, 7)), torch.randint(3, 97, (1, 9))
packed = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
ones = torch.ones_like(packed)
apart = []
for implementation in ("sdpa", "eager"):
    model.set_attn_implementation(implementation)
    alone = model(second).logits
    for name, words, right in (
        ("as it is", {}, False),
        ("use_cache=False", {"use_cache": False}, True),
        ("use_cache=False, a mask of ones", {"use_cache": False, "attention_mask": ones}, False),
    ):
        logits = model(packed, position_ids=positions, **words).logits[:, 7:]
        away = float((logits - alone).detach().abs().max())
        print(f"{implementation}, {name}: logits of the second document differ from it alone by {away:.1e}")
        apart.append(away < 1e-5 if right else away > 1e-2)
print("as found" if all(apart) else "the behaviour has changed")
sys.exit(0 if all(apart) else 1)
PYTHON
