#!/usr/bin/env bash
# Transformers 5.24.0: a Mamba that has read a prompt gives wrong logits for a second piece of several tokens.
# Its plain path forgets the last inputs of the short convolution there; one token at a time it does not.
# A prompt in pieces, a second turn of a chat and speculative decoding meet it. No warning is given.
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
from transformers import MambaConfig, MambaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
model = MambaForCausalLM(config).eval()
ids = torch.randint(3, 97, (1, 24))


def read(sizes):
    cache, logits = None, []
    for piece in ids.split(sizes, 1):
        out = model(piece, use_cache=True, **({} if cache is None else {"cache": cache}))
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, 1)


with torch.no_grad():
    whole = model(ids).logits
    apart = {str(sizes): float((read(sizes) - whole).abs().max() / whole.abs().max()) for sizes in
             ([12, *[1] * 12], [12, 12], [2, 3, 5, 7, 7])}
for sizes, figure in apart.items():
    print(f"pieces of {sizes}: logits differ from one call by {figure:.1e} of the largest")
expected = apart[str([12, *[1] * 12])] < 1e-5 and apart["[12, 12]"] > 1e-4
print("as found" if expected else "the behaviour has changed")
sys.exit(0 if expected else 1)
PYTHON
