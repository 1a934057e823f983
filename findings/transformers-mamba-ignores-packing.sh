#!/usr/bin/env bash
# Transformers 5.24.0, without the packages mamba_ssm and causal_conv1d (on any CPU): MambaForCausalLM and
# Mamba2ForCausalLM take everything `DataCollatorWithFlattening` can give for packed documents (position_ids, seq_idx,
# cu_seq_lens_q ...) and ignore it: the second document reads the first. What is said of the plain path is that it "is
# correct but much slower". BambaForCausalLM, Mamba-2 layers beside attention, refuses seq_idx there; with position_ids
# alone, what the collator gives by default, it leaks as well.
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
from transformers import BambaConfig, BambaForCausalLM, DataCollatorWithFlattening, Mamba2Config, Mamba2ForCausalLM
from transformers import MambaConfig, MambaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, use_cache=False)
models = [
    MambaForCausalLM(MambaConfig(**sizes, state_size=8)),
    Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)),
    BambaForCausalLM(
        BambaConfig(
            **sizes, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, attn_layer_indices=[1],
            mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
        )
    ),
]
documents = [torch.randint(3, 97, (length,)) for length in (7, 9)]
rows = [{"input_ids": document.tolist()} for document in documents]
batches = {
    "position_ids": DataCollatorWithFlattening()(rows),
    "all it can give": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows),
}
found = True
for model in models:
    name = type(model).__name__
    for given, batch in batches.items():
        words = {key: value for key, value in batch.items() if key != "labels"}
        try:
            with torch.no_grad():
                alone = model.eval()(documents[1][None]).logits
                leak = float((model(**words).logits[:, 7:] - alone).abs().max() / alone.abs().max())
            print(f"{name}, {given}: the second document's logits differ from it alone by {leak:.2f} of the largest")
            found &= leak > 0.01 and (name != "BambaForCausalLM" or given == "position_ids")
        except ValueError as error:
            print(f"{name}, {given}: refused, {error}")
            found &= name == "BambaForCausalLM" and given != "position_ids"
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
