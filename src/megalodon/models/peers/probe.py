"""What a class of Transformers does with documents and with pieces of a text, found out by running it.

A model of the config, its parameters drawn and moved from their initial values, reads the same text in two ways. Where
the logits differ by less than `KEPT` of the largest, the way is good. Nothing is known of any class beforehand.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megalodon.models.peers import caches
from megalodon.models.peers.config import PeerConfig
from megalodon.models.peers.model import PeerForCausalLM
from megalodon.models.peers.state import PeerState
from megalodon.models.peers.ways import Ways

KEPT = 1e-4
CACHES = ("cache", "past_key_values", "state", "cache_params", "rnn_state")
VOCABULARY = 256
LARGE = 100_000_000
"""Parameters above which a model is cut to fewer layers, if they are still of every kind."""
PIECES: tuple[int, ...] = (2, 3, 5, 7, 7, 64, 130, 257)
DOCUMENTS = ((10, 45, 3, 60, 2), (5, 9, 3, 6, 1))
"""Lengths of documents in a row; the second where a class reads less than `PIECES` take."""
LENGTHS = ((256, 512), (2048, 4096))
"""Pairs of lengths of which a cache that does not grow is equally large."""
STEP, GRADIENT_KEPT = 3e-3, 0.03
"""How far the parameters go along the gradient, relative to the loss, and how wrong the loss may say that it is."""


def ways_of(config: PeerConfig, device: str = "cpu") -> Ways:
    """How the class of a config computes documents and pieces.

    Raises:
        ValueError: a later token changes what it says of an earlier one.
    """
    identity = {"kind": config.kind, "fields": config.fields, "vocab_size": min(config.vocab_size, VOCABULARY)}
    return _ways_of(json.dumps(identity, sort_keys=True), device)


@lru_cache(maxsize=8)
def _ways_of(identity: str, device: str) -> Ways:
    config = PeerConfig(**json.loads(identity))
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        model = _moved(config).to(device)
        return _Probe(model).ways()


def counted_multiply_adds(config: PeerConfig, length: int) -> float:
    """See `PeerConfig.sequence_multiply_adds`."""
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        # Fused attention on a CPU is none of the operations that are counted.
        model = PeerForCausalLM(config, AutoModelForCausalLM.from_config(config.inner(), attn_implementation="eager"))
        model.eval().peer(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    multiplying = model.num_parameters() - (0 if config.share_emb else config.vocab_size * config.model_dim)
    return counter.get_total_flops() / 2 / length - multiplying


@torch.no_grad()
def _moved(config: PeerConfig) -> PeerForCausalLM:
    """A model without dropout, every parameter away from its initial value."""
    inner = _cut(config)
    for name, value in inner.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(inner, name, 0.0)
    torch.manual_seed(0)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = PeerForCausalLM(config, _made(inner)).eval()
    finally:
        logging.set_verbosity(verbosity)
    for parameter in model.peer.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1:
            spread = float(parameter.std())
            parameter.add_(torch.randn_like(parameter) * (0.5 * spread if spread > 0 else 0.05))
    return model


def _cut(config: PeerConfig) -> Any:
    """The config, of a large model with the fewest layers that have all kinds of modules."""
    inner = config.inner()
    modules, size = _anatomy(inner)
    if size <= LARGE:
        return inner
    for layers in range(1, config.num_layers):
        fewer = config.inner()
        for name, value in list(vars(fewer).items()):
            if isinstance(value, list) and len(value) == config.num_layers:
                setattr(fewer, name, value[:layers])
        fewer.num_hidden_layers = layers
        try:
            if _anatomy(fewer)[0] == modules:
                return fewer
        except Exception:  # a class may need more layers than these
            continue
    return inner


def _anatomy(inner: Any) -> tuple[set[str], int]:
    """The names of all classes of modules in a model, and how many parameters it has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(inner)
    return {type(module).__name__ for module in model.modules()}, model.num_parameters()


def _made(inner: Any) -> Any:
    return AutoModelForCausalLM.from_config(inner).float()


class _Probe:
    """A model, and what is found out of it."""

    def __init__(self, model: PeerForCausalLM) -> None:
        self.model, self.name = model, type(model.peer).__name__
        self.pieces = PIECES
        layers = getattr(model.peer.config.get_text_config(), "num_hidden_layers", model.config.num_layers)
        self._of = "" if layers == model.config.num_layers else f" in {layers} of {model.config.num_layers} layers"
        self.text = torch.randint(0, model.vocab_size, (2, sum(PIECES)), device=model.device)

    def ways(self) -> Ways:
        with torch.no_grad():
            self._fit()
            self._require_causal()
            found = self._cache()
            found = self._documents(found)
            found = self._pieces(found)
        return replace(found, streaming_problem=self._streaming_problem(found))

    def _alone(self, ids: Tensor) -> Tensor:
        """Logits of one text, by the class itself."""
        return torch.as_tensor(self.model.peer(ids[None], use_cache=False).logits[0])

    def _fit(self) -> None:
        """Take as many pieces as the class reads tokens; some have a longest text."""
        while True:
            try:
                self._alone(self.text[0])
                return
            except Exception as error:
                if len(self.pieces) <= 5:
                    raise ValueError(
                        f"kind={self.model.config.kind!r}: {self.name} does not read {sum(self.pieces)} tokens "
                        f"({_shown(error)})"
                    ) from None
            self.pieces = self.pieces[:-1]
            self.text = self.text[:, : sum(self.pieces)]

    def _require_causal(self) -> None:
        first = self.text[0, :64]
        other = first.clone()
        other[-1] = (other[-1] + 1) % self.model.vocab_size
        changed = _apart(self._alone(other)[:-1], self._alone(first)[:-1])
        if changed >= KEPT:
            raise ValueError(
                f"kind={self.model.config.kind!r}: {self.name} is no causal model: a token changes what is said of "
                f"those before it, by {changed:.1e} of the largest logit"
            )

    def _cache(self) -> Ways:
        """The name of the cache, and who makes it."""
        out = self.model.peer(self.text[:1, :4], use_cache=True)
        name = next((name for name in CACHES if getattr(out, name, None) is not None), None)
        if name is not None:
            return Ways(cache=name)
        takes = inspect.signature(self.model.peer.forward).parameters
        return Ways(cache=next((name for name in CACHES[:2] if name in takes), None), makes_cache=False)

    def _with(self, ways: Ways) -> PeerForCausalLM:
        return PeerForCausalLM(self.model.config, self.model.peer, ways).train(self.model.training)

    def _documents(self, ways: Ways) -> Ways:
        documents = next(sizes for sizes in DOCUMENTS if sum(sizes) <= self.text.shape[1])
        ids = self.text[:, : sum(documents)]
        orders = (documents, documents[::-1])
        expected = [
            torch.cat([self._alone(part) for part in row.split(list(sizes))])
            for row, sizes in zip(ids, orders, strict=True)
        ]
        numbers = torch.arange(len(documents))
        segments = torch.stack([numbers.repeat_interleave(torch.tensor(sizes)) for sizes in orders])
        reasons: list[str] = []
        trials = (
            (replace(ways, documents="positions"), "told by position ids"),
            (replace(ways, documents="rows"), "one a row"),
        )
        for trial, words in trials:

            def difference(trial: Ways = trial) -> float:
                logits = self._with(trial)(ids, segment_ids=segments.to(ids.device), use_cache=False).logits
                return max(_apart(one, other) for one, other in zip(logits, expected, strict=True))

            wrong = _wrong(difference)
            if wrong is None:
                return replace(trial, documents_because="; ".join(reasons))
            reasons.append(f"{self.name} mixes documents {words} ({wrong})")
        return replace(ways, documents="alone", documents_because="; ".join(reasons))

    def _pieces(self, ways: Ways) -> Ways:
        expected = self._alone(self.text[0])
        reasons: list[str] = []
        trials = ((replace(ways, pieces="pieces"), "in pieces"), (replace(ways, pieces="tokens"), "token by token"))
        for trial, words in trials:

            def difference(trial: Ways = trial) -> float:
                return _apart(self._in_pieces(self._with(trial)), expected)

            wrong = "no cache" if ways.cache is None else _wrong(difference)
            if wrong is None:
                return replace(trial, pieces_because="; ".join(reasons))
            reasons.append(f"{self.name} reads otherwise {words} than whole ({wrong})")
        return replace(ways, pieces="text", pieces_because="; ".join(reasons))

    def _in_pieces(self, model: PeerForCausalLM) -> Tensor:
        """Logits of the first text read in pieces; another goes on from each of its states, which must not matter."""
        state, logits = None, []
        for piece, other in zip(*(self.text[row : row + 1].split(list(self.pieces), 1) for row in (0, 1)), strict=True):
            out = model(piece, past_key_values=state, use_cache=True)
            logits.append(out.logits[0])
            state = out.past_key_values
            model(other[:, :2], past_key_values=state, use_cache=True)
        return torch.cat(logits)

    def _streaming_problem(self, ways: Ways) -> str | None:
        if ways.pieces != "pieces":
            return f"{ways.pieces_because}: use packed batches"
        try:
            with torch.no_grad():
                growth = self._growth(ways)
        except Exception as error:
            return f"{self.name} has a longest text ({_shown(error)}): use packed batches"
        if growth:
            return (
                f"the cache of {self.name} grows by {growth:,.0f} bytes with each token of each row{self._of}, without "
                "end: use "
                "packed batches, or a config whose attention has a window"
            )
        wrong = _wrong(lambda: self._gradient_error(self._with(ways)), GRADIENT_KEPT)
        if wrong is None:
            return None
        return f"{self.name} has no right gradients where rows go on from its cache ({wrong}): use packed batches"

    def _growth(self, ways: Ways) -> float:
        """Bytes that each token adds to a row's cache in the long run."""
        more = 0.0
        for lengths in LENGTHS:
            ids = torch.zeros(1, max(lengths), dtype=torch.long, device=self.model.device)
            sizes = [
                caches.bytes_of(self._with(ways)(ids[:, :n], use_cache=True).past_key_values.rows) for n in lengths
            ]
            more = (sizes[1] - sizes[0]) / (lengths[1] - lengths[0])
            if not more:
                return 0.0
        return more

    def _gradient_error(self, model: PeerForCausalLM) -> float:
        """Of the loss of a piece that goes on, in training mode: how wrong its gradient is along itself, relative."""
        model.train()
        try:
            half = min(40, self.text.shape[1] // 2)
            first, second = self.text[:1, :half], self.text[:1, half : 2 * half]
            state = model(first, use_cache=True).past_key_values.detach()

            def loss() -> Tensor:
                out = model(second[:, :-1], shift_labels=second[:, 1:], past_key_values=state, use_cache=True)
                return torch.as_tensor(out.loss)

            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            value = loss()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
            square = sum(float(g.double().square().sum()) for _, g in pairs)
            step = STEP * float(value.detach()) / square
            with torch.no_grad():
                found = []
                for by in (step, -2 * step):
                    for parameter, gradient in pairs:
                        parameter.add_(gradient, alpha=by)
                    found.append(float(loss()))
                for parameter, gradient in pairs:
                    parameter.add_(gradient, alpha=step)
            return abs((found[0] - found[1]) / (2 * step * square) - 1)
        finally:
            model.eval()


def _apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where it is not a number."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).abs().max()
    value = float(difference / expected.double().abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def _wrong(difference: Callable[[], float], kept: float = KEPT) -> str | None:
    """What speaks against a way: how far off it is, or what stopped it; None where it is good."""
    try:
        value = difference()
    except Exception as error:  # whatever a class of another library raises
        return _shown(error)
    return None if value < kept else f"off by {value:.1e}"


def _shown(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:80] if lines else ''}"


__all__ = ["PeerState", "Ways", "counted_multiply_adds", "ways_of"]
