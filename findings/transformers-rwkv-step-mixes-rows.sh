#!/usr/bin/env bash
# Transformers 5.24.0: one token a row from a state mixes the rows of a batch in RwkvForCausalLM. For B rows of one
# token it returns logits [B, B, vocab]: every row's token with every row's past. Batched decoding of it is wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.24.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = RwkvConfig(vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
model = RwkvForCausalLM(config).eval()
ids = torch.randint(3, 97, (3, 13))
with torch.no_grad():
    out = model(ids[:, :12], use_cache=True)
    step = model(ids[:, 12:], state=out.state, use_cache=True)
print("a prompt of 3 rows, then one token a row: logits", list(step.logits.shape), "where [3, 1, 97] was asked for")
expected = list(step.logits.shape) == [3, 3, 97]
print("as found" if expected else "the behaviour has changed")
sys.exit(0 if expected else 1)
PYTHON
