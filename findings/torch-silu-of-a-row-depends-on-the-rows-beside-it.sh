#!/usr/bin/env bash
# PyTorch 2.13.0, on a CPU: silu, sigmoid, softplus and mish of the same row differ in the last bit by how many rows stand
# beside it: whole vectors are computed with one exponential, the last elements of a tensor with another. So a model's
# decoding, a row at a time, is not bit for bit its reading of many rows, even where no matrix product is met. gelu, tanh
# and exp agree, and so do all of them where PyTorch finds neither AVX2 nor AVX512 (capability DEFAULT).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "torch==2.13.0" numpy
cat > "$folder/rows.py" <<'PYTHON'
import sys

import torch
from torch.nn import functional as F

torch.manual_seed(0)
rows = torch.randn(64, 13)
differ = {}
for function in (F.silu, F.sigmoid, F.softplus, F.mish, F.gelu, torch.tanh, torch.exp):
    whole = function(rows)
    differ[function.__name__] = sum(not function(rows[:n].clone()).equal(whole[:n]) for n in range(1, 64))
capability = torch.backends.cpu.get_cpu_capability()
print(f"torch {torch.__version__}, capability {capability}")
print(f"of 63 first parts of 64 rows of 13, these differ from the same rows of the whole: {differ}")
expected = ("silu", "sigmoid", "softplus", "mish") if capability in ("AVX2", "AVX512") else ()
found = all((differ[name] > 0) == (name in expected) for name in differ)
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
"$folder/venv/bin/python" "$folder/rows.py"
