"""The shell that all architectures share: embeddings, blocks, final norm and head, as Transformers classes.

Padding is taken out before the first block and put back after the last: inside, every row begins with its first real
token, which is where its chunks are counted from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon.files import load_tensors
from megalodon.models import documents, implicit
from megalodon.models.config import Config
from megalodon.models.generation import StateGenerationMixin
from megalodon.models.keywords import refuse_unknown
from megalodon.models.layers.head import apply_head
from megalodon.models.layers.watch import is_forwarded_as_written
from megalodon.models.loss import mean_of, summed_loss
from megalodon.models.output import LanguageModelOutput, ModelOutput, the_state
from megalodon.models.padding import RealTokens
from megalodon.models.pretrained import StatefulPreTrainedModel, refuse_float16
from megalodon.models.state import Dimensions, State
from megalodon.ops.exported import WHOLE_TEXTS
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.segments import Segments

READ_AT_ONCE = 4096
"""Tokens that a CPU runs through a layer at a time. Activations of more outgrow its caches, and tensors of more than
32 MiB are taken from the system anew each time, page by page; a token of a long text would cost 1.4 times as much."""


class SingleToken(Protocol):
    """How an architecture moves one token a row on, in as few operations as it needs."""

    def advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Embeddings x [B, D] and the state before them -> (the final hidden states [B, D], the state after them)."""
        ...


class StatefulModel(StatefulPreTrainedModel):
    """Token ids -> normalised hidden states, and the state of the sequences.

    An architecture says what its state, its blocks and its final norm are, and what of a layout each block is given.
    """

    state_class: ClassVar[type[State]]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(self.make_block(i) for i in range(config.num_layers))
        self.final_norm = self.make_final_norm()
        self.embedding_scale = math.sqrt(config.model_dim) if getattr(config, "scale_emb", False) else 1.0
        self.gradient_checkpointing = False
        self._sizes: list[tuple[dict[str, Any], Dimensions]] = []
        self.post_init()

    def make_block(self, layer: int) -> nn.Module:
        """Block number `layer`: called as `(x, memory, *layer_arguments, layout, use_cache) -> (x, memory or None)`."""
        raise NotImplementedError

    def make_final_norm(self) -> nn.Module:
        """The norm before the head: called as `(x, memory, layout) -> (x, memory)`."""
        raise NotImplementedError

    @staticmethod
    def layer_arguments(config: Any, layout: Layout) -> tuple[Any, ...]:
        """What every block of a model of this config is given of where tokens stand, besides the layout: made once."""
        return ()

    @staticmethod
    def segment_starts(config: Any, input_ids: Tensor | None) -> Tensor | None:
        """bool [B, L]: tokens that start a segment (`megalodon.ops.Segments`); None where the model knows none."""
        return None

    def single_token(self, x: Tensor, state: State | None) -> SingleToken | None:
        """A shorter way for one token a row, where it is good for these embeddings x [B, L, D] and this state."""
        return None

    def generation_starts(self) -> None:
        """Told where a generation begins: whatever was prepared of weights must be looked at again."""

    @property
    def reads_in_pieces(self) -> bool:
        """Whether a long text may go through a layer piece by piece, at no cost and with the same result."""
        return True

    @property
    def chunk_size(self) -> int | None:
        """Tokens of a chunk, where the architecture has chunks."""
        return getattr(self.config, "chunk_size", None)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    # Narrower than Transformers' nn.Module: the model reads num_embeddings.
    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: State | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Run the network.

        Args:
            input_ids: int64 [B, L]; or inputs_embeds [B, L, D] in its place.
            attention_mask: [B, L], or [B, P + L] of which the last L columns count; 0 where a token is padding, which
                may stand anywhere. Padding gives zeros and leaves the state alone.
            past_key_values: the state before the first token; None for new sequences. It is not changed. `cache` is the
                same by the name that Transformers uses since 5.24.
            use_cache: return the state after the last token. None: the config's value, or False in training.
            segment_ids: int [B, L]; a change along L starts a document, isolated from what came before. The first
                document of a row continues its state.
            output_hidden_states: return the input of each block and the final hidden states.
            position_ids: int [B, L] or [1, L]; where they start over, a document starts. Otherwise they change nothing.
            seq_idx: `segment_ids` by another name.
            kwargs: `cu_seq_lens_q` and the others of `megalodon.models.documents`, which tell documents as well and
                must agree; and what changes nothing (`megalodon.models.keywords.NEUTRAL`).

        Returns:
            last_hidden_state [B, L, D] and past_key_values (a `State`).

        Raises:
            ValueError: the arguments do not fit each other or the model; the message names the argument.
            UnknownKeyword: there is no such argument.
        """
        found = self.read(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            segment_ids,
            output_hidden_states,
            cache,
            position_ids,
            seq_idx,
            kwargs,
        )
        output = ModelOutput(*found)
        return output if return_dict is not False else output.to_tuple()

    def read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: State | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        segment_ids: Tensor | None,
        output_hidden_states: bool | None,
        cache: State | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Any, tuple[Tensor, ...] | None]:
        """What `forward` does, without Transformers' output around it: (last_hidden_state, the state or None, hidden
        states or None)."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        state = the_state(past_key_values, cache, kwargs)
        told = {"segment_ids": segment_ids, "position_ids": position_ids, "seq_idx": seq_idx}
        told |= {name: kwargs.pop(name) for name in documents.NAMES if name in kwargs}
        if segment_ids is not None and not isinstance(segment_ids, Tensor):
            told["segment_ids"] = segment_ids = torch.as_tensor(segment_ids)
        refuse_unknown(type(self).forward, kwargs)
        x = self._embed(input_ids, inputs_embeds)
        bos = self.segment_starts(self.config, input_ids)
        if bos is not None and torch.compiler.is_exporting():
            raise NotImplementedError(WHOLE_TEXTS)
        length = x.shape[1]
        self._check(x, attention_mask, state, segment_ids)
        segment_ids, fresh = documents.documents_of(
            x.shape[0], length, x.device, told, attention_mask, None if state is None else state.position
        )
        if state is not None and fresh is not None:
            state = state.reset(fresh)
        plain = attention_mask is None and segment_ids is None and bos is None and not output_hidden_states
        step = self.single_token(x, state if plain and use_cache else None)
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        if step is not None and state is not None:
            x, state = step.advance(x[:, 0], state)
            x = x[:, None]
        else:
            rows = None
            if attention_mask is not None:
                rows = RealTokens.of(attention_mask[:, -length:] if length else attention_mask)
            if rows is not None:
                x = rows.pack(x)
                segment_ids = None if segment_ids is None else rows.pack(segment_ids)
                bos = None if bos is None else rows.pack(bos)
            lengths = None if rows is None else rows.lengths
            x, state = self._run(x, state, use_cache, segment_ids, lengths, bos, hidden)
            if rows is not None:
                x, hidden = rows.unpack(x, length), hidden and [rows.unpack(h, length) for h in hidden]
        return x, state if use_cache else None, None if hidden is None else tuple(hidden)

    def _run(
        self,
        x: Tensor,
        state: State | None,
        use_cache: bool,
        segment_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        bos: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """Embeddings [B, L, D] of `lengths` real tokens each through all layers: (hidden states, the state after them).

        `bos` tells where segments start. `hidden` collects the input of each block and the final hidden states.
        """
        if 0 in x.shape[:2]:  # layers that others have put in place of ours need not take nothing
            if hidden is not None:
                hidden += [x] * (len(self.layers) + 1)
            return x, (state or self.empty_state(len(x))) if use_cache else None
        layouts = self._layouts(x, state, segment_ids, lengths, bos)
        places = [
            (*self.layer_arguments(self.config, layout), layout, use_cache or layout is not layouts[-1])
            for layout in layouts
        ]
        layers = []
        for i, block in enumerate(self.layers):
            if hidden is not None:
                hidden.append(x)
            x, memory = _in_turn(block, x, None if state is None else state.layers[i], layouts, places)
            layers.append(memory)
        final = None if state is None else state.final
        x, final = _in_turn(self.final_norm, x, final, layouts, [(layout,) for layout in layouts])
        if hidden is not None:
            hidden.append(x)
        if not use_cache:
            return x, None
        positions = torch.from_numpy(layouts[-1].end_positions)
        return x, self.new_state(layers, final, positions)

    def implicit_attention(self, input_ids: Tensor) -> list[list[implicit.Path]]:
        """What moves information along a text in each layer, as matrices (`megalodon.models.implicit`).

        Args:
            input_ids: int64 [B, L], read from the beginning. Memory grows with L squared times the channels.

        Raises:
            ValueError: a layer is not written as an implicit attention matrix.
        """
        bos = self.segment_starts(self.config, input_ids)
        hidden = self(input_ids, use_cache=False, output_hidden_states=True).hidden_states
        layers: list[Any] = list(self.layers)
        if hidden is None or not all(callable(getattr(block, "paths", None)) for block in layers):
            raise ValueError(f"{self.config.model_type} models are not written as implicit attention matrices")
        batch, length = input_ids.shape
        layout = layout_of(batch, length, input_ids.device, chunk_size=self.chunk_size)
        if bos is not None:
            layout.segments = Segments(bos, layout, None)
        arguments = self.layer_arguments(self.config, layout)
        return [block.paths(x, *arguments, layout) for block, x in zip(layers, hidden, strict=False)]

    @property
    def dimensions(self) -> Dimensions:
        """The sizes that a state must share with this model, made anew when its config has changed."""
        make = self.state_class.dimensions_class.of
        if torch.compiler.is_compiling():
            return make(self.config)
        fields = vars(self.config)
        if not self._sizes or self._sizes[0][0] != fields:
            self._sizes[:] = [(dict(fields), make(self.config))]
        return self._sizes[0][1]

    def empty_state(self, batch: int) -> State:
        """The state of rows that have read nothing; the network is not run, whatever its layers have become."""
        here = [weight.device for weight in self.parameters() if weight.device.type != "meta"]  # others are offloaded
        return self.state_class.empty(self.config, batch, here[0] if here else self.device, self.dtype)

    def new_state(self, layers: Sequence[Any], final: Any, position: Tensor) -> State:
        """A state of this model."""
        return self.state_class(layers, final, position, self.dimensions)

    def _layouts(
        self,
        x: Tensor,
        state: State | None,
        segment_ids: Tensor | None,
        lengths: Tensor | None,
        bos: Tensor | None,
    ) -> list[Layout]:
        """Where the tokens of each piece of x stand that goes through a layer at a time."""
        whole = segment_ids is not None or lengths is not None or not self.reads_in_pieces
        positions: Tensor | np.ndarray | None = None if state is None else state.position
        places = None if state is None else state.bos_places
        layouts: list[Layout] = []
        start = 0
        for size in [x.shape[1]] if whole else self._pieces(x, state):
            if layouts:
                positions = layouts[-1].end_positions
            layout = layout_of(
                x.shape[0],
                size,
                x.device,
                segment_ids=segment_ids,
                lengths=lengths,
                positions=positions,
                chunk_size=self.chunk_size,
            )
            if bos is not None:
                layout.segments = Segments(bos[:, start : start + size], layout, places)
                places = layout.segments.after
            layouts.append(layout)
            start += size
        return layouts

    def _pieces(self, x: Tensor, state: State | None) -> list[int]:
        """How many tokens go through a layer at a time: all, unless on a CPU `READ_AT_ONCE` are quicker unseen.

        Pieces end where the first row's chunks do.
        """
        length, chunk = x.shape[1], self.chunk_size or 1
        if torch.compiler.is_compiling() or length <= max(READ_AT_ONCE, chunk) or x.device.type != "cpu":
            return [length]
        called_often = (*self.layers.modules(), self.final_norm)
        if any(module._forward_hooks or module._forward_pre_hooks for module in called_often):
            return [length]
        piece = max(READ_AT_ONCE // chunk, 1) * chunk
        first = piece if state is None else piece - int(state.position[0]) % chunk
        ends = [*range(min(first, length), length, piece), length]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            assert input_ids is not None
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: it must be [B, L]")
            looks = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
            if looks and input_ids.numel():  # on a GPU the look would wait for the device, in a compiled graph break it
                low, high = _ends(input_ids)
                rows = getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)  # an adapter has no number
                if low < 0 or high >= rows:
                    raise ValueError(
                        f"input_ids has values from {low} to {high}: they must lie in 0 to {rows - 1} (vocab_size)"
                    )
            x = self.embed_tokens(input_ids)
            x = x if self.embedding_scale == 1 else x * self.embedding_scale
        else:
            x = inputs_embeds * self.embedding_scale  # a copy in any case: the caller's stays as it is
        return F.dropout(x, self.config.dropout) if self.training else x

    def _check(self, x: Tensor, attention_mask: Tensor | None, state: State | None, segment_ids: Tensor | None) -> None:
        batch, length = x.shape[:2]
        autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        refuse_float16(x.dtype, autocast)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise ValueError(f"attention_mask is a {type(attention_mask).__name__}: it must be a tensor [B, L]")
        if attention_mask is not None and (
            attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length
        ):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [{batch}, {length}] "
                "(or longer, with what was read before at its start)"
            )
        if segment_ids is not None and segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}: it must be {(batch, length)}")
        if state is None:
            return
        kind = self.state_class
        if not isinstance(state, kind):
            raise ValueError(f"past_key_values is a {type(state).__name__}: it must be a {kind.__name__} or None")
        state.dimensions.check(self.dimensions)
        if state.batch_size != batch:
            raise ValueError(f"past_key_values has {state.batch_size} rows: input_ids has {batch}")
        if state.device != x.device:
            raise ValueError(f"past_key_values is on {state.device}: the model is on {x.device} (use .to)")


def _ends(ids: Tensor) -> tuple[int, int]:
    """The least and the greatest; a single id is had quicker without an operator."""
    if ids.numel() == 1:
        only = int(ids)
        return only, only
    low, high = ids.aminmax()
    return int(low), int(high)


class CausalLM(StatefulPreTrainedModel, StateGenerationMixin):
    """The language model: a `StatefulModel` and a linear head without bias; logits in float32."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    model_class: ClassVar[type[StatefulModel]]
    slots_class: ClassVar[Any] = None
    """A decoder of many sequences at once, `(model, slots, buckets)`, with `choose_buckets(model, candidates)`."""
    has_int8: ClassVar[bool] = False
    """Whether its linear layers may be put in int8 for decoding (`layers.int8.quantize`)."""
    static_step_class: ClassVar[Any] = None
    """A step of one token whose tensors stay at their addresses, `(model, state, places, compiled)`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.output_size or config.vocab_size
        self.lm_head = nn.Linear(config.model_dim, self.vocab_size, bias=getattr(config, "head_bias", False))
        self.post_init()

    @property
    def note(self) -> str | None:
        """One line for the user before training, of what this model does otherwise than others; None: nothing."""
        return None

    def _may_read(self) -> bool:
        """Whether the network's `read` does all that calling it would, which decoding has no time for."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # hooks of backward passes are not looked for
            return False
        written = is_forwarded_as_written(self.model, (self.model_class,))
        return written and type(self.model).forward is StatefulModel.forward

    def read_weights(self, folder: Path) -> tuple[list[str], list[str]]:
        """Take the weights of a folder of `save_pretrained`: (those that are missing, those that are not known)."""
        missing, unexpected = self.load_state_dict(load_tensors(folder / "model.safetensors"), strict=False)
        return missing, unexpected

    def read_state(self, tensors: dict[str, Tensor]) -> State:
        """The state of a `state_dict`, where the model is."""
        return self.model.state_class.from_state_dict(tensors, self.config).to(self.device)

    def keep_tables(self) -> None:
        """Keep what operators make of coefficients alone, for whoever reads many pieces and has the memory."""
        for module in self.modules():
            if callable(keep := getattr(module, "keep_tables", None)) and module is not self:
                keep()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: State | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput | tuple[Any, ...]:
        """Predict the next token at every position. Arguments that `StatefulModel.forward` has mean the same.

        Args:
            labels: int64 [B, L]; token ids as they stand in the text: shifted here; -100 is ignored, and so is a token
                that starts a document after another, which nothing before it could tell.
            logits_to_keep: give logits for the last so many positions (0: all), or for these positions.
            return_logits: False with labels or shift_labels: logits are None and the loss is computed in slices.
            num_items_in_batch: what the summed loss is divided by. None: the number of targets.
            shift_labels: in place of labels, int64 [B, L], already shifted: `shift_labels[:, t]` follows token t; -100
                is ignored. By keyword only and unnamed in the signature, as in Transformers: its Trainer takes every
                parameter with "label" in its name for one that each batch brings.

        Returns:
            loss (scalar, nats per target), logits float32 [B, L, vocab], past_key_values (a `State`).
        """
        state = the_state(past_key_values, cache, kwargs)
        shift_labels = kwargs.pop("shift_labels", None)
        if self._may_read():
            x, after, hidden_states = self.model.read(
                input_ids,
                attention_mask,
                state,
                inputs_embeds,
                use_cache,
                segment_ids,
                output_hidden_states,
                None,
                position_ids,
                seq_idx,
                dict(kwargs),  # it takes what tells documents out of them
            )
        else:
            outputs = self.model(
                input_ids,
                attention_mask,
                state,
                inputs_embeds,
                use_cache,
                segment_ids,
                output_hidden_states,
                return_dict=True,
                position_ids=position_ids,
                seq_idx=seq_idx,
                **kwargs,
            )
            x, after, hidden_states = outputs.last_hidden_state, outputs.past_key_values, outputs.hidden_states
        given = labels if shift_labels is None else shift_labels
        if given is not None and given.shape != x.shape[:2]:
            raise ValueError(f"labels have shape {tuple(given.shape)}: they must be {tuple(x.shape[:2])}")
        if labels is not None and shift_labels is None:
            told = {"segment_ids": segment_ids, "position_ids": position_ids, "seq_idx": seq_idx, **kwargs}
            seen = None if state is None else state.position
            shift_labels = documents.targets_of(labels, told, attention_mask, seen)
        loss = logits = None
        if return_logits or shift_labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            goes_on = state is not None and bool((state.position > 0).all())
            decoding = goes_on and x.shape[1] == 1 and not self.training
            few = x[:, kept]
            if few.numel():
                logits = apply_head(self.lm_head, few, decoding).float()
            else:  # layers that others have put in place of ours need not take nothing
                logits = few.new_zeros(*few.shape[:-1], self.vocab_size, dtype=torch.float32)
            if shift_labels is not None:
                total = F.cross_entropy(
                    logits.flatten(0, 1), shift_labels[:, kept].flatten().to(x.device), reduction="sum"
                )
                loss = mean_of(total, shift_labels[:, kept], num_items_in_batch)
        else:
            total = summed_loss(self.lm_head, x, shift_labels.to(x.device))
            loss = mean_of(total, shift_labels, num_items_in_batch)
        output = LanguageModelOutput(loss, logits, after, hidden_states)
        return output if return_dict is not False else output.to_tuple()


def _in_turn(
    module: nn.Module, x: Tensor, memory: Any, layouts: Sequence[Layout], arguments: Iterable[tuple[Any, ...]]
) -> tuple[Tensor, Any]:
    """What `module` makes of x, piece by piece: each has its own arguments, and the memory that the last one left."""
    pieces = (x,) if len(layouts) == 1 else x.split([layout.length for layout in layouts], dim=1)
    outs = []
    for piece, given in zip(pieces, arguments, strict=True):
        out, memory = module(piece, memory, *given)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), memory
