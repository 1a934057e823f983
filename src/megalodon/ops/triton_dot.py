"""Products of tiles in float32 accumulators, as every kernel makes them."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter cannot multiply bfloat16: there, operands are widened, which changes no product."""


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b. float32 operands take three tf32 products, which are as exact as float32."""
    if INTERPRETED:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    elif a.dtype == tl.float32:
        out = tl.dot(a, b, accumulator, input_precision="tf32x3")
    else:
        out = tl.dot(a, b, accumulator)
    return out
