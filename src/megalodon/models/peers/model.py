"""A causal language model of Transformers behind the interface that training, evaluation and generation know.

Documents stay apart and states are values, in whatever way its class computes that rightly (`probe`). What stands
before our head is the class's logits, because its own head may be more than a product.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from megalodon.models.documents import NAMES, documents_of, targets_of
from megalodon.models.keywords import refuse_unknown
from megalodon.models.loss import mean_of
from megalodon.models.output import LanguageModelOutput, ModelOutput, the_state
from megalodon.models.peers import caches
from megalodon.models.peers.config import PeerConfig
from megalodon.models.peers.state import PeerState
from megalodon.models.peers.ways import Ways
from megalodon.models.state import Dimensions

FULL = 0.75
"""Documents share rows of a call down to this part of the longest one's length."""


class Run(NamedTuple):
    """Logits [k, n, V] of k documents, and where their tokens stand in the batch: places int64 [k, n], flat."""

    logits: Tensor
    places: np.ndarray


class PeerForCausalLM(nn.Module):
    """The language model; its parameters are those of the class of Transformers, under `peer`."""

    slots_class: ClassVar[Any] = None
    static_step_class: ClassVar[Any] = None
    has_int8: ClassVar[bool] = False

    def __init__(self, config: PeerConfig, peer: PreTrainedModel | None = None, ways: Ways | None = None) -> None:
        """`peer`: the model, where there is one already; `ways`: known ones."""
        super().__init__()
        self.config = config
        self.peer: Any = AutoModelForCausalLM.from_config(config.inner()) if peer is None else peer
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Identity()
        self._ways = ways

    # --- what the rooms above ask of a model -----------------------------------------------------------------------

    @property
    def ways(self) -> Ways:
        """How this class computes documents and pieces, found out on this device."""
        if self._ways is None:
            from megalodon.models.peers.probe import ways_of

            self._ways = ways_of(self.config, self.device.type)
        return self._ways

    @property
    def note(self) -> str | None:
        """One line for the user of what this class does not do as it should."""
        return self.ways.told or None

    @property
    def model(self) -> PeerModel:
        """The network up to its logits."""
        return PeerModel(self)

    @property
    def device(self) -> torch.device:
        return next(self.peer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.peer.parameters()).dtype

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        tied = getattr(self.peer, "all_tied_weights_keys", {})
        return {f"peer.{name}": f"peer.{of}" for name, of in tied.items()}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        return int(self.peer.num_parameters(only_trainable, exclude_embeddings))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.peer.gradient_checkpointing_enable(*args, **kwargs)

    def keep_tables(self) -> None:
        """Nothing: a class of Transformers keeps no tables."""

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """The folder that `AutoModelForCausalLM` loads as its own class."""
        self.peer.save_pretrained(folder, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The model of a folder that Transformers wrote; arguments as there."""
        found = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        peer, *report = found if isinstance(found, tuple) else (found,)
        model = cls(PeerConfig.from_pretrained(folder), peer)
        return (model, *report) if report else model

    def read_weights(self, folder: Path) -> tuple[list[str], list[str]]:
        """Take the weights of a folder of `save_pretrained`, which may hold them under other names than a state dict:
        (those that are missing, those that are not known)."""
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, local_files_only=True)
        missing, unexpected = self.peer.load_state_dict(loaded.state_dict(), strict=False)
        return [f"peer.{name}" for name in missing], [f"peer.{name}" for name in unexpected]

    def read_state(self, tensors: dict[str, Tensor]) -> PeerState:
        """The state of a `state_dict`."""
        form: Any = None
        if self.ways.pieces != "text":
            training = self.training
            self.eval()
            with torch.no_grad():
                form = self._read(torch.zeros(1, 2, dtype=torch.long, device=self.device), keep=True)[1]
            self.train(training)
        return PeerState.read(tensors, self.config, form).to(self.device)

    # --- running ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PeerState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        cache: PeerState | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput | tuple[Any, ...]:
        """Predict the next token at every position; arguments as those of `CausalLM.forward`.

        Raises:
            ValueError: the arguments do not fit each other or the model; the message names the argument.
        """
        state = the_state(past_key_values, cache, kwargs)
        shift_labels = kwargs.pop("shift_labels", None)
        given = labels if shift_labels is None else shift_labels
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"labels have shape {tuple(given.shape)}: they must be {tuple(input_ids.shape)}")
        keep = not self.training if use_cache is None else use_cache
        told = {"segment_ids": segment_ids, **{name: kwargs.pop(name) for name in NAMES if name in kwargs}}
        refuse_unknown(type(self).forward, kwargs)
        if labels is not None and shift_labels is None:
            seen = None if state is None else state.position
            shift_labels = targets_of(labels, told, attention_mask, seen)
        runs, after = self.run(input_ids, told, attention_mask, state, keep)
        loss = logits = None
        if shift_labels is not None:
            total = torch.zeros((), device=input_ids.device)
            flat = shift_labels.flatten()
            for run in runs:
                targets = flat[torch.from_numpy(np.maximum(run.places, 0)).to(flat.device)]
                targets = targets.masked_fill(torch.from_numpy(run.places < 0).to(flat.device), -100)
                total = total + F.cross_entropy(run.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            loss = mean_of(total, shift_labels, num_items_in_batch)
        if return_logits or shift_labels is None:
            logits = self.joined(runs, input_ids).float()
            logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        kept: Any = after
        output = LanguageModelOutput(loss, logits, kept)
        return output if return_dict is not False else output.to_tuple()

    def run(
        self, input_ids: Tensor, told: dict[str, Any], attention_mask: Tensor | None, state: Any, keep: bool
    ) -> tuple[list[Run], PeerState | None]:
        """Logits of all documents of a batch, and the state after them where it is kept."""
        batch, length = input_ids.shape
        self._check(input_ids, state)
        seen = None if state is None else state.position
        segment_ids, fresh = documents_of(batch, length, input_ids.device, told, attention_mask, seen)
        if state is not None and fresh is not None:
            state = state.reset(fresh)
        real = np.ones((batch, length), dtype=bool)
        if attention_mask is not None and length:
            real = attention_mask[:, -length:].detach().cpu().numpy().astype(bool)
        ids = np.zeros((batch, length), dtype=np.int64) if segment_ids is None else segment_ids.cpu().numpy()
        documents = [_documents(ids[row], real[row], row * length) for row in range(batch)]
        if state is None and not keep:
            return self._packed(input_ids, [places for own in documents for places in own]), None
        state = PeerState.empty(self.config, batch, self.device, self.dtype) if state is None else state
        return self._streamed(input_ids, documents, state, keep)

    def joined(self, runs: list[Run], input_ids: Tensor) -> Tensor:
        """Logits [B, L, V] of the runs of a batch, zeros at padding."""
        batch, length = input_ids.shape
        if len(runs) == 1 and runs[0].places.size == input_ids.numel() == int(runs[0].places.max(initial=-1)) + 1:
            return runs[0].logits.reshape(batch, length, -1)
        dtype = runs[0].logits.dtype if runs else self.dtype
        found = torch.zeros(batch * length, self.vocab_size, dtype=dtype, device=input_ids.device)
        for run in runs:
            there = run.places >= 0
            places = torch.from_numpy(run.places[there]).to(found.device)
            found = found.index_copy(0, places, run.logits[torch.from_numpy(there).to(found.device)])
        return found.unflatten(0, (batch, length))

    def _packed(self, input_ids: Tensor, documents: list[np.ndarray]) -> list[Run]:
        """Runs of documents that carry nothing; each given by the places of its tokens."""
        batch, length = input_ids.shape
        if not documents:
            return []
        whole = len(documents) == batch and all(len(places) == length for places in documents)
        if self.ways.documents == "positions" and sum(map(len, documents)) == input_ids.numel() and not whole:
            positions = np.concatenate([np.arange(len(places)) for places in documents]).reshape(batch, length)
            given = torch.from_numpy(positions).to(input_ids.device)
            logits, _ = self._read(input_ids, position_ids=given)
            return [Run(logits, np.arange(batch * length).reshape(batch, length))]
        alone = self.ways.documents == "alone"
        return [self._side_by_side(input_ids, group) for group in _groups(documents, alone)]

    def _side_by_side(self, input_ids: Tensor, documents: list[np.ndarray]) -> Run:
        """One call of documents, one a row, padded at the right: what follows a token changes nothing of it."""
        places = np.full((len(documents), max(map(len, documents))), -1)
        for row, own in enumerate(documents):
            places[row, : len(own)] = own
        index = torch.from_numpy(np.maximum(places, 0)).to(input_ids.device)
        ids = input_ids.flatten()[index].masked_fill(torch.from_numpy(places < 0).to(input_ids.device), 0)
        return Run(self._read(ids)[0], places)

    def _streamed(
        self, input_ids: Tensor, documents: list[list[np.ndarray]], state: PeerState, keep: bool
    ) -> tuple[list[Run], PeerState | None]:
        """Runs of rows that go on from a state or leave one: those documents alone, the others as packed ones."""
        rows, position, runs = list(state.rows), state.position.clone(), []
        between: list[np.ndarray] = []
        flat = input_ids.flatten()
        for row, own in enumerate(documents):
            for number, places in enumerate(own):
                last = number == len(own) - 1
                going_on = number == 0 and rows[row] is not None
                if not going_on and not (last and keep):
                    between.append(places)
                    continue
                tokens = flat[torch.from_numpy(places).to(flat.device)][None]
                logits, after = self._go_on(tokens, rows[row] if number == 0 else None, keep and last)
                runs.append(Run(logits, places[None]))
                if last:
                    position[row] = len(places) + (int(position[row]) if number == 0 else 0)
                    rows[row] = after
        runs += self._packed(input_ids, between)
        return runs, PeerState(rows, position, state.dimensions) if keep else None

    def _go_on(self, tokens: Tensor, before: Any, keep: bool) -> tuple[Tensor, Any]:
        """(logits [1, n, V], what the row remembers then) of tokens [1, n] after what it remembers."""
        match self.ways.pieces:
            case "text":
                whole = tokens if before is None else torch.cat([before[None].to(tokens.device), tokens], dim=1)
                return self._read(whole)[0][:, -tokens.shape[1] :], whole[0] if keep else None
            case "tokens" if before is not None:
                memory, found = before, []
                for token in tokens.split(1, dim=1):
                    logits, memory = self._read(token, memory, keep=True)
                    found.append(logits)
                return torch.cat(found, dim=1), memory if keep else None
            case _:
                return self._read(tokens, before, keep)

    def _read(
        self, ids: Tensor, before: Any = None, keep: bool = False, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """One call of the class: (logits [k, n, V], its cache after it). A cache that is given is not changed."""
        given: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        name = self.ways.cache
        if before is not None:
            given[str(name)] = caches.mapped(before, torch.clone)
        elif keep and not self.ways.makes_cache:
            given[str(name)] = DynamicCache(config=self.peer.config)
        out = self.peer(ids, use_cache=keep, **given)
        if not keep:
            return out.logits, None
        after = given[str(name)] if not self.ways.makes_cache else getattr(out, str(name), None)
        if after is None:
            raise ValueError(
                f"{type(self.peer).__name__} returned no cache to go on from"
                + (": with gradient checkpointing it has none" if self.peer.is_gradient_checkpointing else "")
            )
        return out.logits, after

    def _check(self, input_ids: Tensor, state: Any) -> None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: it must be [B, L]")
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"input_ids has values from {low} to {high}: they must lie in 0 to {self.vocab_size - 1}"
                )
        if state is None:
            return
        if not isinstance(state, PeerState):
            raise ValueError(f"past_key_values is a {type(state).__name__}: it must be a PeerState or None")
        state.dimensions.check(PeerState.dimensions_class.of(self.config))
        if state.batch_size != len(input_ids):
            raise ValueError(f"past_key_values has {state.batch_size} rows: input_ids has {len(input_ids)}")


class PeerModel:
    """The network of a `PeerForCausalLM`, whose last hidden state is its logits."""

    state_class = PeerState

    def __init__(self, whole: PeerForCausalLM) -> None:
        self._whole = whole

    @property
    def dimensions(self) -> Dimensions:
        return PeerState.dimensions_class.of(self._whole.config)

    @property
    def layers(self) -> Iterator[nn.Module]:
        """The blocks: the longest list of modules that the class has."""
        lists = [module for module in self._whole.peer.modules() if isinstance(module, nn.ModuleList)]
        return iter(max(lists, key=lambda each: len(list(each)), default=nn.ModuleList()))

    def empty_state(self, batch: int) -> PeerState:
        """The state of rows that have read nothing."""
        return PeerState.empty(self._whole.config, batch, self._whole.device, self._whole.dtype)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PeerState | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
    ) -> ModelOutput:
        """As `StatefulModel.forward`."""
        keep = not self._whole.training if use_cache is None else use_cache
        runs, after = self._whole.run(input_ids, {"segment_ids": segment_ids}, attention_mask, past_key_values, keep)
        kept: Any = after
        return ModelOutput(self._whole.joined(runs, input_ids), kept)


def _documents(ids: np.ndarray, real: np.ndarray, first: int) -> list[np.ndarray]:
    """The places of the tokens of each document of a row, whose first token stands at `first`; padding is left out."""
    places = np.flatnonzero(real)
    if not len(places):
        return []
    ends = np.flatnonzero(np.diff(ids[places])) + 1
    return [part + first for part in np.split(places, ends)]


def _groups(documents: list[np.ndarray], alone: bool) -> list[list[np.ndarray]]:
    """The documents in calls, the longest first; those of a call are about equally long."""
    groups: list[list[np.ndarray]] = []
    for places in sorted(documents, key=len, reverse=True):
        if not groups or alone or len(places) < FULL * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(places)
    return groups
