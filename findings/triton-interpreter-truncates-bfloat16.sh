#!/usr/bin/env bash
# Triton 3.7.1 with TRITON_INTERPRET=1: float32 to bfloat16 drops the low bits, with fp_downcast_rounding="rtne" asked for
# too, where a GPU and PyTorch round to nearest even. Half of all values come out one step nearer to zero: sums shrink, and
# a kernel tested against PyTorch needs twice the bound. float16 is rounded rightly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "torch==2.13.0" "triton==3.7.1" numpy
cat > "$folder/cast.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, plain, nearest, half, size: tl.constexpr):
    at = tl.arange(0, size)
    value = tl.load(source + at)
    tl.store(plain + at, value.to(tl.bfloat16))
    tl.store(nearest + at, value.to(tl.bfloat16, fp_downcast_rounding="rtne"))
    tl.store(half + at, value.to(tl.float16))


torch.manual_seed(0)
source = torch.rand(1024)
plain, nearest = torch.empty(2, 1024, dtype=torch.bfloat16)
half = torch.empty(1024, dtype=torch.float16)
cast[(1,)](source, plain, nearest, half, 1024)
right = source.bfloat16()
down = (source.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
print("triton", triton.__version__, "torch", torch.__version__)
print(f"{int((plain != right).sum())} of 1024 numbers differ from PyTorch's bfloat16, {int((half != source.half()).sum())} from its float16")
print(f"mean error {float((plain.double() - source).mean()):.1e}, PyTorch's {float((right.double() - source).mean()):.1e}")
found = plain.equal(down) and nearest.equal(down) and not plain.equal(right) and half.equal(source.half())
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"
