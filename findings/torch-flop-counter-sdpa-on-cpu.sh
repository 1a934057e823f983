#!/usr/bin/env bash
# PyTorch 2.13.0: `torch.utils.flop_counter.FlopCounterMode` counts nothing for scaled_dot_product_attention on a CPU where
# the flash form runs. The call becomes `aten::_scaled_dot_product_flash_attention_for_cpu`, for which the counter has no
# formula, and it stays silent about what it does not know. The same attention through the math form is counted: for 512
# tokens, 2 heads of 64, two products of 2 x 2 x 512 x 512 x 64 = 134,217,728 operations. So a model's count, and any
# utilisation made from it, depends on the attention implementation, and grows linearly in length where the work does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

q, k, v = torch.randn(3, 1, 2, 512, 64)


def counted(kernel):
    with sdpa_kernel(kernel), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(q, k, v, is_causal=True)
    return counter.get_total_flops()


found = {"flash": counted(SDPBackend.FLASH_ATTENTION), "math": counted(SDPBackend.MATH)}
with FlopCounterMode(display=False) as counter:
    scaled_dot_product_attention(q, k, v, is_causal=True)
found["default"] = counter.get_total_flops()
print(torch.__version__, found)
expected = {"flash": 0, "math": 134_217_728, "default": 0}
if found != expected:
    raise SystemExit(f"this has changed: expected {expected}")
PYTHON
