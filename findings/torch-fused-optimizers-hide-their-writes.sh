#!/usr/bin/env bash
# PyTorch 2.13.0, on a CPU: Adam, AdamW, SGD and Adagrad with fused=True write the weights and leave `Tensor._version` as
# it was; with foreach and the plain loop it grows. So what is kept by version goes stale, and autograd's own check for
# weights changed between forward and backward passes: w*w made before the step gets the gradient of the weights after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "torch==2.13.0" numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
found = True
for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
    for way in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        weight = torch.nn.Parameter(torch.full((4,), 2.0))
        before = (weight * weight).sum()  # its gradient is 4, by the weights it was made from
        weight.grad = torch.ones(4)
        version = weight._version
        optimizer([weight], lr=0.5, **way).step()
        changed, grew = not weight.equal(torch.full((4,), 2.0)), weight._version > version
        weight.grad = None
        try:
            before.backward()
            said = f"backward gives {weight.grad[0]:.2f} where 4 is right"
        except RuntimeError:
            said = "backward refuses"
        print(f"{optimizer.__name__} {way}: written {changed}, version grew {grew}, {said}")
        silent = weight.grad is not None and float(weight.grad[0]) < 3.9
        found &= changed and grew != ("fused" in way) and silent == ("fused" in way)
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
