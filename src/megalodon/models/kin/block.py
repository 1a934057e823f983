"""One block of a kin model: x + mixer(norm x), then x + feed-forward(norm x); or both at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from megalodon import ops
from megalodon.models.implicit import Path
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.exported import Opaque
from megalodon.models.kin.mixers import Memory, mixer_class
from megalodon.ops.layout import Layout

NORMS: dict[str, type[nn.RMSNorm] | type[nn.LayerNorm]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class FinalNorm(nn.RMSNorm):
    """An RMS norm, called as the shell calls a final norm: it remembers nothing."""

    # narrower than a mixer's: there is no memory
    def forward(self, x: Tensor, memory: None, layout: Layout) -> tuple[Tensor, None]:  # type: ignore[override]
        """[B, L, D] -> ([B, L, D], None)."""
        return super().forward(x), None


class FinalLayerNorm(nn.LayerNorm):
    """A layer norm, called so."""

    # narrower than a mixer's: there is no memory
    def forward(self, x: Tensor, memory: None, layout: Layout) -> tuple[Tensor, None]:  # type: ignore[override]
        """[B, L, D] -> ([B, L, D], None)."""
        return super().forward(x), None


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`, without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.down_proj(ops.silu_product(self.gate_proj(x), self.up_proj(x)))


class GELU(nn.Module):
    """`down(gelu(up x))` with biases; GELU by its tanh approximation, as GPT-2 and Phi have it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class KinBlock(GradientCheckpointingLayer):
    """Block number `layer` of a model; `feed_forward` is None where the config asks for none, and its norm where there
    is one norm for both branches."""

    _can_checkpoint_with_cache = True  # the state is a value, not a store: computing it again changes nothing

    def __init__(self, config: KinConfig, layer: int) -> None:
        super().__init__()
        name, parameters = config.mixer_of(layer)
        kind, norm = mixer_class(name), NORMS[config.norm]
        self.mixer_norm = None if kind.takes_residual else norm(config.model_dim, config.norm_eps)
        self.mixer = kind(config, layer, parameters)
        self.opaque = Opaque(self.mixer, config, layer)
        hidden, self.parallel = config.ffn_hidden_dim, config.parallel
        own = hidden and not config.parallel
        self.feed_forward_norm = norm(config.model_dim, config.norm_eps) if own else None
        made = {"swiglu": SwiGLU, "gelu": GELU}[config.feed_forward]
        self.feed_forward = made(config.model_dim, hidden) if hidden else None
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, memory: Memory | None, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, Memory | None]:
        """x [B, L, D] and this layer's memory of what came before -> (out [B, L, D], the memory after it or None)."""
        n = self.normalised(x)
        if torch.compiler.is_exporting():
            y = self.opaque(self.mixer, n, memory, layout, use_cache)
        else:
            y, memory = self.mixer(n, memory, layout)
        x = self.after_mixer(x, n, y)
        if memory is None or not use_cache:
            return x, None
        return x, memory if torch.compiler.is_compiling() else memory.own()

    def normalised(self, x: Tensor) -> Tensor:
        """What the mixer reads of a block's input x [B, L, D]."""
        return x if self.mixer_norm is None else self.mixer_norm(x)

    def after_mixer(self, x: Tensor, n: Tensor, y: Tensor) -> Tensor:
        """The block's output, of its input x, the norm n of it and the mixer's output y, [B, L, D] each."""
        x = x + F.dropout(y, self.dropout, self.training)
        if self.feed_forward is None:
            return x
        inside = n if self.feed_forward_norm is None else self.feed_forward_norm(x)
        return x + F.dropout(self.feed_forward(inside), self.dropout, self.training)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        """The implicit attention of the mixer for the block's input x [B, L, D]."""
        return self.mixer.paths(self.normalised(x), layout)
