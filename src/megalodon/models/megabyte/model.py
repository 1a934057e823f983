"""MEGABYTE as Transformers classes: the shell with stages in place of blocks.

The coarsest stage reads a start and whole patches, and remembers them. What it says of the patches before goes to the
finer stages, which read one patch from its start each time: a few elements, so that a piece of text may end anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon.models.causal_lm import CausalLM, StatefulModel
from megalodon.models.megabyte.config import MegabyteConfig
from megalodon.models.megabyte.stage import LayerMemory, StageFrame, StageLayer
from megalodon.models.megabyte.state import MegabyteState, OpenPatch
from megalodon.models.pretrained import StatefulPreTrainedModel
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.tiles import move_rows


class MegabytePreTrainedModel(StatefulPreTrainedModel):
    """What all MEGABYTE models share."""

    config_class = MegabyteConfig
    config: MegabyteConfig
    _no_split_modules = ["StageLayer"]  # noqa: RUF012

    def _init_linear(self, module: nn.Linear) -> None:
        init.normal_(module.weight, 0.0, self.config.init_std)

    def _init_table(self, weight: Tensor) -> None:
        init.normal_(weight, 0.0, self.config.init_std)


class _Cut(NamedTuple):
    """How the bytes of each row, those of its open patch first, fall into M patches. Arrays are int64 or bool [R].

    Attributes:
        opened: bytes of the open patch that were read before; total: with those of this call.
        complete: patches that this call completes; before: that were complete before it.
        fresh: whether the coarsest stage reads its start in this call.
        patches: M.
    """

    opened: np.ndarray
    total: np.ndarray
    complete: np.ndarray
    before: np.ndarray
    fresh: np.ndarray
    patches: int

    @staticmethod
    def of(position: np.ndarray, lengths: np.ndarray, size: int) -> _Cut:
        opened = position % size
        total = opened + lengths
        patches = int((-(-total // size)).max(initial=1))
        return _Cut(opened, total, total // size, position // size, (position == 0) & (lengths > 0), patches)


class MegabyteModel(MegabytePreTrainedModel, StatefulModel):
    """Byte ids -> the hidden states of the finest stage, and the state of the sequences (`MegabyteState`)."""

    state_class = MegabyteState

    def __init__(self, config: MegabyteConfig) -> None:
        super().__init__(config)
        stages = len(config.widths)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, stages * config.model_dim
        )  # one table a stage, side by side
        self.stages = nn.ModuleList(StageFrame(config, stage) for stage in range(stages))
        self.finer_layers = nn.ModuleList(
            nn.ModuleList(StageLayer(config, config.widths[stage]) for _ in range(config.layers_of[stage]))
            for stage in range(1, stages)
        )
        self.post_init()

    def make_block(self, layer: int) -> StageLayer:
        return StageLayer(self.config, self.config.widths[0])

    def make_final_norm(self) -> nn.Module:
        return nn.Identity()  # every stage has a norm of its own

    def _run(
        self,
        x: Tensor,
        state: Any,
        use_cache: bool,
        segment_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        bos: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, MegabyteState | None]:
        """See `StatefulModel._run`; documents of one row are read as rows of their own."""
        if torch.compiler.is_exporting():
            raise NotImplementedError("torch.export: how MEGABYTE cuts a text into patches depends on its length")
        if state is None:
            state = MegabyteState.empty(self.config, len(x), x.device, x.dtype)
        layout = layout_of(x.shape[0], x.shape[1], x.device, segment_ids=segment_ids, lengths=lengths)
        if hidden is not None:
            hidden.append(x)
        if layout.starts is None:
            y, state = self._read(x, layout.lengths, state)
        else:
            y, state = self._read_documents(x, layout, state)
        if hidden is not None:
            hidden.append(y)
        return y, state if use_cache else None

    def _read_documents(self, x: Tensor, layout: Layout, state: MegabyteState) -> tuple[Tensor, MegabyteState]:
        assert layout.starts is not None
        begins = layout.starts.copy()
        begins[:, 0] = True
        row, first = np.nonzero(begins)
        last = np.append(row[1:] != row[:-1], True)
        count = np.where(last, layout.lengths[row], np.append(first[1:], 0)) - first
        longest, width = int(count.max()), layout.length
        place = np.arange(longest)
        real = place < count[:, None]
        source = torch.from_numpy((row[:, None] * width + first[:, None] + place)[real]).to(x.device)
        target = torch.from_numpy(np.flatnonzero(real)).to(x.device)
        documents = move_rows(x.flatten(0, 1), source, target, len(row) * longest).unflatten(0, (len(row), longest))
        own = state[torch.from_numpy(row)].reset(torch.from_numpy(first > 0))
        y, after = self._read(documents, count, own)
        y = move_rows(y.flatten(0, 1), target, source, len(x) * width).unflatten(0, (len(x), width))
        return y, after[torch.from_numpy(last)]

    def _read(self, x: Tensor, lengths: np.ndarray, state: MegabyteState) -> tuple[Tensor, MegabyteState]:
        """Rows of one document each: embeddings [R, L, .] of `lengths` real bytes -> (hidden states, the state)."""
        size, open_patch = self.config.patch_bytes, state.final
        cut = _Cut.of(state.position.numpy(), lengths, size)
        inside = np.arange(x.shape[1]) < lengths[:, None]
        places = np.arange(x.shape[1]) + cut.opened[:, None] + (np.arange(len(x)) * cut.patches * size)[:, None]
        source = torch.from_numpy(np.flatnonzero(inside)).to(x.device)
        target = torch.from_numpy(places[inside]).to(x.device)
        joined = move_rows(x.flatten(0, 1), source, target, len(x) * cut.patches * size)
        joined = joined.unflatten(0, (len(x), cut.patches, size))
        first = joined[:, :1] + open_patch.embeddings[:, None].to(x.dtype)
        joined = torch.cat([first, joined[:, 1:]], dim=1)

        parts = joined.split(self.config.model_dim, dim=-1)
        context, layers, after = self._coarsest(parts[0].flatten(-2), cut, state)
        y = self._finer([part.flatten(0, 1) for part in parts[1:]], context.flatten(0, 1)).flatten(0, 1)
        y = move_rows(y, target, source, x.shape[0] * x.shape[1]).unflatten(0, x.shape[:2])
        position = state.position + torch.from_numpy(lengths)
        final = OpenPatch(self._left_open(joined, cut), after)
        return y, MegabyteState(layers, final, position, state.dimensions)

    def _coarsest(self, patches: Tensor, cut: _Cut, state: MegabyteState) -> tuple[Tensor, list[LayerMemory], Tensor]:
        """(what is said before each of the M patches [R, M, D], memories of the layers, what is said after the last
        complete patch [R, D]) for the bytes of patches [R, M, .]."""
        frame = self.stages[0]
        assert isinstance(frame, StageFrame) and frame.embed is not None
        e = self._placed(frame, frame.embed(patches), cut.before)
        fresh = torch.from_numpy(cut.fresh).long().to(e.device)[:, None]
        counts = np.where(cut.total > cut.opened, cut.complete + cut.fresh, 0)
        rows = torch.arange(len(e), device=e.device)[:, None]
        layers: list[Any] = list(state.layers)
        said = state.final.context[:, None].to(e.dtype)
        if (longest := int(counts.max(initial=0))) > 0:
            read = torch.cat([frame.start.to(e.dtype).expand(len(e), 1, -1), e], dim=1)
            columns = torch.arange(longest, device=e.device) + 1 - fresh
            x = read[rows, columns.clamp(max=read.shape[1] - 1)]  # beyond a row's own count it is padding
            layout = layout_of(
                len(x),
                longest,
                x.device,
                lengths=None if (counts == longest).all() else counts,
                positions=np.where(state.position.numpy() > 0, 1 + cut.before, 0),
            )
            for i, layer in enumerate(self.layers):
                x, layers[i] = layer(x, layers[i], layout)
            said = torch.cat([said, frame.final_norm(x)], dim=1)
        number = torch.arange(cut.patches, device=e.device) + fresh
        last = torch.from_numpy(counts).to(e.device)[:, None]
        return said[rows, number.clamp(max=said.shape[1] - 1)], layers, said[rows, last][:, 0]

    def _placed(self, frame: StageFrame, e: Tensor, before: np.ndarray | None) -> Tensor:
        """Elements [R, n, D] with their learned positions, `before` of them read before (None: none)."""
        if frame.positions is None:
            return e
        index = np.arange(e.shape[1])[None] + (0 if before is None else before[:, None])
        if index.max(initial=0) >= len(frame.positions):
            raise ValueError(
                f"max_patches={len(frame.positions)}, but a document has {int(index.max()) + 1} patches of "
                f"{self.config.patch_bytes} bytes: there are no positions beyond"
            )
        return e + frame.positions[torch.from_numpy(index).to(e.device)].to(e.dtype)

    def _finer(self, parts: list[Tensor], context: Tensor) -> Tensor:
        """Hidden states of the finest stage [N, S, D], from what is said before each of N patches [N, D] and their
        bytes in the tables of the finer stages, [N, S, D] each."""
        patches = self.config.patches
        project = self.stages[0].project
        assert isinstance(project, nn.Module)  # an adapter may stand around the linear layer
        told = project(context)
        for stage in range(1, len(self.config.widths)):
            frame = self.stages[stage]
            assert isinstance(frame, StageFrame)
            x = parts[stage - 1].reshape(-1, patches[stage - 1], self.config.model_dim * int(np.prod(patches[stage:])))
            x = self._placed(frame, x if frame.embed is None else frame.embed(x), None)
            x = self._attended(stage, x + told.view_as(x))
            if frame.project is not None:
                told = frame.project(x[:, :-1])
        return x[:, 1:].reshape(len(context), -1, self.config.model_dim)

    def _attended(self, stage: int, x: Tensor) -> Tensor:
        """The layers of a finer stage on its start and elements x [N, n, D]: [N, n + 1, D]."""
        frame, layers = self.stages[stage], self.finer_layers[stage - 1]
        assert isinstance(frame, StageFrame) and isinstance(layers, nn.ModuleList)
        x = torch.cat([frame.start.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        layout = layout_of(len(x), x.shape[1], x.device)
        for layer in layers:
            x, _ = layer(x, None, layout)
        return frame.final_norm(x)

    def _left_open(self, joined: Tensor, cut: _Cut) -> Tensor:
        """[R, S, .]: the bytes of each row's open patch, zeros after them."""
        rows = torch.arange(len(joined), device=joined.device)
        which = torch.from_numpy(np.minimum(cut.complete, cut.patches - 1)).to(joined.device)
        left = np.where(cut.complete < cut.patches, cut.total % joined.shape[2], 0)
        kept = torch.from_numpy(np.arange(joined.shape[2]) < left[:, None]).to(joined.device)
        return joined[rows, which].masked_fill(~kept[..., None], 0)

    def before_everything(self) -> Tensor:
        """[D]: the hidden state that a document's first byte is predicted from, as in training: the start alone."""
        stage = len(self.stages) - 1
        return self._attended(stage, self.embed_tokens.weight.new_zeros(1, 0, self.config.model_dim))[0, 0]


class MegabyteForCausalLM(MegabytePreTrainedModel, CausalLM):
    """The language model: `MegabyteModel` and a linear head with bias; logits in float32."""

    _tied_weights_keys = {}  # noqa: RUF012
    model_class = MegabyteModel

    def __init__(self, config: MegabyteConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size)
        self.post_init()

    def start_logits(self) -> Tensor:
        """[vocab]: of the first byte of a document, before any is read."""
        return F.linear(self.model.before_everything(), self.lm_head.weight, self.lm_head.bias).float()
