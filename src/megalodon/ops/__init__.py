"""The mathematics: sequence-first operators, each with a definition and fast forms that are tested against it."""

from __future__ import annotations

import torch

from megalodon.ops.backend import ENVIRONMENT_VARIABLE, default_backend
from megalodon.ops.cema import IMPLEMENTATIONS as _CEMA
from megalodon.ops.cema import KeptTables, cema
from megalodon.ops.chunk_attention import IMPLEMENTATIONS as _CHUNK_ATTENTION
from megalodon.ops.chunk_attention import causal_attention, chunk_attention
from megalodon.ops.feed_forward import feed_forward
from megalodon.ops.gate import gated_linear, silu, silu_product
from megalodon.ops.gated_norm import gated_rms_norm
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.linear_attention import IMPLEMENTATIONS as _LINEAR_ATTENTION
from megalodon.ops.linear_attention import (
    LinearState,
    Window,
    cross_linear_attention,
    linear_attention,
    two_way_linear_attention,
)
from megalodon.ops.long_convolution import IMPLEMENTATIONS as _LONG_CONVOLUTION
from megalodon.ops.long_convolution import long_convolution
from megalodon.ops.queries import queries_and_keys
from megalodon.ops.rms_norm import rms_norm
from megalodon.ops.rotary import rotate, rotate_halves, rotations, rotations_of, turns_of
from megalodon.ops.segments import Segments, segmented
from megalodon.ops.selective_scan import IMPLEMENTATIONS as _SELECTIVE_SCAN
from megalodon.ops.selective_scan import selective_scan
from megalodon.ops.short_convolution import short_convolution
from megalodon.ops.sliding_chunk_attention import IMPLEMENTATIONS as _SLIDING_CHUNK_ATTENTION
from megalodon.ops.sliding_chunk_attention import Visible, sliding_chunk_attention, two_chunk_attention
from megalodon.ops.sparse_attention import IMPLEMENTATIONS as _SPARSE_ATTENTION
from megalodon.ops.sparse_attention import sparse_attention
from megalodon.ops.tiles import move_rows
from megalodon.ops.timestep_decay_norm import IMPLEMENTATIONS as _TIMESTEP_DECAY_NORM
from megalodon.ops.timestep_decay_norm import timestep_decay_norm
from megalodon.ops.timestep_norm import IMPLEMENTATIONS as _TIMESTEP_NORM
from megalodon.ops.timestep_norm import Prior, Statistics, timestep_norm
from megalodon.ops.window_attention import IMPLEMENTATIONS as _WINDOW_ATTENTION
from megalodon.ops.window_attention import (
    RecentKeys,
    WindowSums,
    two_way_window_attention,
    window_attention,
    window_sums,
)
from megalodon.ops.working_memory import IMPLEMENTATIONS as _WORKING_MEMORY
from megalodon.ops.working_memory import absorb, working_memory

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "KeptTables",
    "Layout",
    "LinearState",
    "Prior",
    "RecentKeys",
    "Segments",
    "Statistics",
    "Visible",
    "Window",
    "WindowSums",
    "absorb",
    "backends",
    "causal_attention",
    "cema",
    "chunk_attention",
    "cross_linear_attention",
    "default_backend",
    "feed_forward",
    "gated_linear",
    "gated_rms_norm",
    "layout_of",
    "linear_attention",
    "long_convolution",
    "move_rows",
    "queries_and_keys",
    "rms_norm",
    "rotate",
    "rotate_halves",
    "rotations",
    "rotations_of",
    "segmented",
    "selective_scan",
    "short_convolution",
    "silu",
    "silu_product",
    "sliding_chunk_attention",
    "sparse_attention",
    "timestep_decay_norm",
    "timestep_norm",
    "turns_of",
    "two_chunk_attention",
    "two_way_linear_attention",
    "two_way_window_attention",
    "window_attention",
    "window_sums",
    "working_memory",
]

OPERATORS = {
    "cema": _CEMA,
    "timestep_norm": _TIMESTEP_NORM,
    "timestep_decay_norm": _TIMESTEP_DECAY_NORM,
    "chunk_attention": _CHUNK_ATTENTION,
    "sliding_chunk_attention": _SLIDING_CHUNK_ATTENTION,
    "linear_attention": _LINEAR_ATTENTION,
    "window_attention": _WINDOW_ATTENTION,
    "selective_scan": _SELECTIVE_SCAN,
    "long_convolution": _LONG_CONVOLUTION,
    "sparse_attention": _SPARSE_ATTENTION,
    "working_memory": _WORKING_MEMORY,
}


def backends(device: torch.device | str = "cpu") -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each operator: the back end that runs on `device` unless one is named, and all that there are."""
    chosen = default_backend(torch.device(device))
    return {
        name: (chosen if chosen in implementations else "blocked", tuple(implementations))
        for name, implementations in OPERATORS.items()
    }
