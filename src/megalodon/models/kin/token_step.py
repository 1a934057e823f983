"""One token of each of several sequences through all blocks of a kin model in one compiled call: what decoding runs.

For blocks whose mixers are among `WAYS`; they make queries, keys and values as Llama does. As with Gecko's step, the
kernel reads the weights where they lie, and a module whose forward pass is not ours alone is never bypassed:
`TokenStep.of` says None, and the caller takes the long way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from megalodon.models.causal_lm import StatefulModel
from megalodon.models.kin.block import GELU, FinalLayerNorm, FinalNorm, KinBlock, SwiGLU
from megalodon.models.kin.mixers.feature_maps import HeadwiseMap
from megalodon.models.kin.mixers.projected import Projected
from megalodon.models.kin.mixers.rotary import Rotary
from megalodon.models.kin.state import KinDimensions, KinState
from megalodon.models.kin.ways import WAYS, Opened, Way, way_of
from megalodon.models.layers.few_rows import can_fuse
from megalodon.models.layers.step_tables import StepTables
from megalodon.models.layers.watch import Prepared, is_forwarded_as_written
from megalodon.ops.backend import backend_for
from megalodon.ops.compiled import tables
from megalodon.ops.compiled.tables import KinMemory

KERNEL = "kin_step.blocks"


class TokenStep:
    """A model's blocks and final norm for one token a row; made anew when a weight has changed."""

    @torch.no_grad()
    def __init__(self, model: StatefulModel) -> None:
        """Of what `_step_of` has looked at."""
        config, blocks = model.config, list(_blocks(model))
        self.sizes = cast(KinDimensions, model.dimensions)
        self.ways = [way_of(block.mixer) for block in blocks]
        heads, size = config.num_heads, config.head_size
        self._rotary = Rotary.of(config)
        self._frequencies = _frequencies(self._rotary)
        self._eps = np.array([_only(norms) for norms in _norms(model)])
        self._features = max(way.features() for way in self.ways)
        self._tables = StepTables(
            KERNEL,
            len(blocks),
            _linear_layers(model),
            (config.model_dim, heads * size, config.key_value_heads * size, config.ffn_hidden_dim, heads),
            pairs=len(self._frequencies),
            eps=self._eps.ctypes.data,
            layer_norms=int(config.norm == "layer"),
            parallel=int(config.parallel),
            gelu=int(config.feed_forward == "gelu"),
            most_features=self._features,
        )
        for number, (block, way) in enumerate(zip(blocks, self.ways, strict=True)):
            self._write_block(number, block, way)
        self._write_norm(-1, "norm", model.final_norm)

    def _write_block(self, number: int, block: KinBlock, way: Way) -> None:
        mixer, numbers, weights = cast(Projected, block.mixer), {"mixer": way.mixer}, way.weights()
        self._tables.write_layers(number, dict(_layers_of(block)))
        self._write_norm(number, "norm", block.mixer_norm)
        self._write_norm(number, "ffn", block.feed_forward_norm)
        if mixer.head_norms is not None:
            numbers["head_norm"] = 1 if isinstance(mixer.head_norms["q"], nn.RMSNorm) else 2
            for name in "qk":
                self._write_norm(number, f"head_{name}", mixer.head_norms[name])
        if "map_q" in weights:
            numbers["columns"] = weights["map_q"].shape[-1]
        self._tables.write(number, **weights)
        self._tables.set(number, **numbers)

    def _write_norm(self, number: int, name: str, norm: Any) -> None:
        if norm is not None:
            self._tables.write(number, **{f"{name}_scale": norm.weight, f"{name}_bias": getattr(norm, "bias", None)})

    @staticmethod
    def of(model: StatefulModel, x: Tensor, state: KinState | None) -> TokenStep | None:
        """The step of the model's weights as they are now, for embeddings x [B, L, D]; None where it is not for them.

        It is for one token of rows that stand at the same places of what their layers remember (the same number of
        tokens where a layer keeps all, the same place of a chunk where there are chunks) and not at the start of a
        document, without gradients, autocast or a compiler at work, on a CPU that has kernels.
        """
        step = _STEPS.while_decoding(model, lambda: _is_next_token(x, state))
        return step if step is not None and state is not None and step._is_even(state) else None

    def _is_even(self, state: KinState) -> bool:
        positions = set(state.position.tolist())
        return len(positions) == 1 or all(len({way.place(p) for p in positions}) == 1 for way in self.ways)

    def advance(self, x: Tensor, state: KinState) -> tuple[Tensor, KinState]:
        """Embeddings x [M, D] and the state before them, which `of` has looked at.

        Returns:
            (the final hidden states [M, D] in the dtype of x, the state after them).
        """
        position = int(state.position[0])
        opened = [way.open(memory, position, x.dtype) for way, memory in zip(self.ways, state.layers, strict=True)]
        out = self._run(x, opened, state.position)
        layers = [
            way.close(memory, each, position) for way, memory, each in zip(self.ways, state.layers, opened, strict=True)
        ]
        return out, KinState(layers, None, state.position + 1, self.sizes)

    def _run(self, x: Tensor, opened: list[Opened], position: Tensor) -> Tensor:
        rows, memory = len(x), np.zeros((len(opened), len(KinMemory)), np.int64)
        for row, each in zip(memory, opened, strict=True):
            for name, value in each.row.items():
                row[getattr(KinMemory, name)] = value
        wide = x.to(torch.float32, copy=True).contiguous()
        out, offsets = torch.empty_like(wide), position.contiguous()
        amplitude = 1.0 if self._rotary is None else self._rotary.amplitude
        angles = offsets[:, None].double() * self._frequencies
        turns = torch.polar(torch.full_like(angles, amplitude), angles).to(torch.complex64)
        seen = max(each.row.get("before", 0) + each.row.get("places", 0) for each in opened)
        capacity = -(-seen // 16) * 16
        scratch = torch.empty(tables.kin_scratch_size(rows, *self._tables.widths, capacity, self._features))
        self._tables.run(
            rows,
            capacity=capacity,
            memory=memory.ctypes.data,
            key_kind=tables.KINDS[x.dtype],
            x=wide.data_ptr(),
            out=out.data_ptr(),
            offsets=offsets.data_ptr(),
            turns=turns.data_ptr(),
            scratch=scratch.data_ptr(),
        )
        return out.to(x.dtype)


def _frequencies(rotary: Rotary | None) -> Tensor:
    """float64 [pairs]: radians a token."""
    if rotary is None:
        return torch.zeros(0, dtype=torch.float64)
    if rotary.frequencies is not None:
        return torch.tensor(rotary.frequencies, dtype=torch.float64)
    return rotary.base ** (-torch.arange(0, rotary.size, 2, dtype=torch.float64) / rotary.size)


_PARTS = KinBlock, SwiGLU, GELU, HeadwiseMap, nn.RMSNorm, nn.LayerNorm, FinalNorm, FinalLayerNorm, nn.Linear
_OURS = (*_PARTS, *WAYS)


def _blocks(model: StatefulModel) -> Iterator[KinBlock]:
    return iter(cast(Any, model.layers))


def _layers_of(block: KinBlock) -> Iterator[tuple[str, nn.Module]]:
    """The block's large linear layers, by their names in `Weights`."""
    mixer, inner = cast(Projected, block.mixer), block.feed_forward
    yield from (("query", mixer.q_proj), ("key", mixer.k_proj), ("v", mixer.v_proj), ("o", mixer.o_proj))
    yield from way_of(mixer).layers().items()
    if isinstance(inner, SwiGLU):  # what passes silu is `up` to the kernel
        yield from (("up", inner.gate_proj), ("gate", inner.up_proj), ("down", inner.down_proj))
    elif isinstance(inner, GELU):
        yield from (("up", inner.up_proj), ("down", inner.down_proj))


def _linear_layers(model: StatefulModel) -> list[nn.Module]:
    return [layer for block in _blocks(model) for _, layer in _layers_of(block)]


def _norms(model: StatefulModel) -> list[list[Any]]:
    """The norms of each kind, as `Call.eps` has them: before mixers, the last one, of heads, before feed-forward."""
    blocks = list(_blocks(model))
    heads = [norm for b in blocks for norm in (cast(Any, b.mixer).head_norms or {}).values()]
    before = [[getattr(b, name) for b in blocks] for name in ("mixer_norm", "feed_forward_norm")]
    mixer, feed_forward = ([norm for norm in norms if norm is not None] for norms in before)
    return [mixer, [model.final_norm], heads, feed_forward]


def _only(norms: list[Any]) -> float:
    return float(norms[0].eps) if norms else 0.0


def _bypassed(model: StatefulModel) -> Iterator[nn.Module]:
    """The modules that a step does not call."""
    yield model.final_norm
    for block in _blocks(model):
        linear = {id(layer) for _, layer in _layers_of(block)}
        yield from (module for module in block.modules() if id(module) not in linear)


def _is_next_token(x: Tensor, state: KinState | None) -> bool:
    """Whether x [B, 1, D] is one token of rows that go on, where a step can run."""
    if x.shape[1] != 1 or state is None or torch.is_autocast_enabled(x.device.type):
        return False
    if backend_for(x.device, x.dtype)[0] != "numba":
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and min(state.position.tolist(), default=0) > 0


def _copied_weights(model: StatefulModel) -> list[Tensor]:
    """The weights that a step takes copies of, or makes into something else."""
    weights: list[Tensor] = [weight for module in _bypassed(model) for weight in module.parameters(recurse=False)]
    return weights + [bias for layer in _linear_layers(model) if (bias := cast(Any, layer).bias) is not None]


def _step_of(model: StatefulModel) -> tuple[TokenStep | None, list[Tensor]]:
    for block in _blocks(model):
        way = WAYS.get(cast(Any, type(block.mixer)))
        if type(block) is not KinBlock or way is None or not way.fits(block.mixer) or block.feed_forward is None:
            return None, []
    if model.config.two_way or any(len({norm.eps for norm in norms}) > 1 for norms in _norms(model)):
        return None, []
    if not all(_is_ours(module) for module in _bypassed(model)):
        return None, []
    if not can_fuse(_linear_layers(model), model.dtype, KERNEL):
        return None, []
    return TokenStep(model), _copied_weights(model)


def _is_ours(module: nn.Module) -> bool:
    if type(module) is nn.ModuleDict:  # never called
        return True
    return not module.training and is_forwarded_as_written(module, _OURS)


_STEPS: Prepared[StatefulModel, TokenStep | None] = Prepared(_step_of)


def generation_starts(model: StatefulModel) -> None:
    """Before the next token, look at every weight: it may have changed without a trace."""
    _STEPS.start(model)
