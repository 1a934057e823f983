"""Who is measured and what is timed: the 16 M-parameter contestants; a training step, a prefill and a decoded token.

Every contestant is a Transformers causal language model and is called in the same way; what lies between two readings
of the clock in `training_step`, `prefill` and `decode` is what the tables report.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

import torch
from _measure import Seconds, Timed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_mambapy_available

Precision = Literal["float32", "bf16-autocast", "bf16-weights"]

OURS = "megalodon"
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # the first since Transformers 5.24
VOCABULARY, WIDTH, DEPTH = 256, 384, 8
CHUNK = 512
DECODED_TOKENS = 16  # per timed call; they end at the stated context, which for us is the full chunk: the dearest place
PREFILL_PIECE = 16384  # a longer context is fed in pieces of this many tokens, with the cache


@dataclass
class Contestant:
    """A model under measurement.

    Attributes:
        name: how tables call it.
        model: a Transformers causal language model in float32.
        description: size and origin, for the head of the table.
        cache_argument: the keyword under which its forward takes, and its output returns, the cache. None: the first of
            Transformers' names for it that the forward has, else `past_key_values`.
    """

    name: str
    model: PreTrainedModel
    description: str
    cache_argument: str | None = None
    _bf16: PreTrainedModel | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.cache_argument is None:
            known = inspect.signature(self.model.forward).parameters
            self.cache_argument = next((name for name in CACHE_ARGUMENTS if name in known), "past_key_values")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def in_precision(self, precision: Precision) -> PreTrainedModel:
        """The model itself, or for bf16 weights a converted copy, made once."""
        if precision != "bf16-weights":
            return self.model
        if self._bf16 is None:
            self._bf16 = copy.deepcopy(self.model).bfloat16()
        return self._bf16


# What is timed -----------------------------------------------------------------------------------------------------


def training_step(
    contestant: Contestant,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    batch: dict[str, Tensor],
    checkpointed: bool = False,
) -> Seconds:
    """One step: forward with its loss and backward, then AdamW and clearing the gradients."""
    set_checkpointing(contestant.model.train(), checkpointed)
    start = perf_counter()
    with autocast(precision):
        loss = contestant.model(**batch, use_cache=False).loss
    loss.backward()
    gradients_ready = perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    return {"forward_backward": gradients_ready - start, "optimizer": perf_counter() - gradients_ready}


@torch.no_grad()
def prefill(contestant: Contestant, precision: Precision, tokens: Tensor) -> Seconds:
    """One forward over the prompt that builds the cache and gives the logits of the last token."""
    model = contestant.in_precision(precision).eval()
    start = perf_counter()
    with autocast(precision):
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return {"prefill": perf_counter() - start}


@torch.no_grad()
def decode(contestant: Contestant, precision: Precision, cache: Any, token: Tensor) -> Seconds:
    """DECODED_TOKENS greedy tokens one by one from a copy of the cache (copying is not timed)."""
    model, cache = contestant.in_precision(precision).eval(), copy.deepcopy(cache)
    start = perf_counter()
    with autocast(precision):
        for _ in range(DECODED_TOKENS):
            output = model(input_ids=token, **{contestant.cache_argument: cache}, use_cache=True, logits_to_keep=1)
            cache = getattr(output, contestant.cache_argument)
            token = output.logits[:, -1:].argmax(-1)
    return {"decode": perf_counter() - start}


# Preparing it, untimed ---------------------------------------------------------------------------------------------


def prepare_training(
    contestant: Contestant,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    length: int,
    checkpointed: bool = False,
    segment_ids: Tensor | None = None,
) -> Timed:
    """A training step on random tokens [1, length] (labels: the same, shifted by the model)."""
    tokens = random_tokens(length)
    batch = {"input_ids": tokens, "labels": tokens} | ({} if segment_ids is None else {"segment_ids": segment_ids})
    return partial(training_step, contestant, optimizer, precision, batch, checkpointed)


def prepare_prefill(contestant: Contestant, precision: Precision, length: int) -> Timed:
    """A prefill of random tokens [1, length]."""
    return partial(prefill, contestant, precision, random_tokens(length))


@torch.no_grad()
def prepare_decoding(contestant: Contestant, precision: Precision, length: int) -> Timed:
    """Really feeds all but the last DECODED_TOKENS of a context of `length` tokens; the timed call decodes up to it."""
    model = contestant.in_precision(precision).eval()
    tokens = random_tokens(max(1, length - DECODED_TOKENS))
    cache = None
    with autocast(precision):
        for piece in tokens.split(PREFILL_PIECE, dim=1):
            given: dict[str, Any] = {} if cache is None else {contestant.cache_argument: cache}
            output = model(input_ids=piece, **given, use_cache=True, logits_to_keep=1)
            cache = getattr(output, contestant.cache_argument)
    token = output.logits[:, -1:].argmax(-1)
    return partial(decode, contestant, precision, cache, token)


def autocast(precision: Precision) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-autocast" else nullcontext()


def random_tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Turns Transformers' activation checkpointing on or off (nothing happens if it is so already)."""
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if on and not is_on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif is_on and not on:
        model.gradient_checkpointing_disable()


def adamw(contestant: Contestant) -> torch.optim.Optimizer:
    """The optimiser of every training step: fused AdamW, with a rate that leaves the weights nearly where they are."""
    return torch.optim.AdamW(contestant.model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)


# The contestants ---------------------------------------------------------------------------------------------------


def build_megalodon() -> Contestant:
    """Ours: 8 layers, D=384, Z=96, V=768, F=768 swiglu, H=1, N=16, C=512, 256 tokens."""
    from megalodon import MegalodonConfig, MegalodonForCausalLM

    config = MegalodonConfig(
        vocab_size=VOCABULARY,
        num_layers=DEPTH,
        model_dim=WIDTH,
        z_dim=96,
        value_dim=768,
        num_heads=1,
        ffn_hidden_dim=768,
        swiglu=True,
        cema_ndim=16,
        chunk_size=CHUNK,
        norm_num_groups=32,
    )
    return Contestant(OURS, MegalodonForCausalLM(config), f"{DEPTH} layers, D={WIDTH}, C={CHUNK}")


def build_llama(parameters: int) -> Contestant:
    """Transformers' Llama of our width and depth; a feed-forward width (a multiple of 32) brings its count to ours."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": WIDTH // 64,
        "max_position_embeddings": 2**20,
        "attn_implementation": "sdpa",
    }

    def build(intermediate: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=intermediate, **shape))

    intermediate = 32 * nearest_size(parameters, lambda units: count_parameters(partial(build, 32 * units)))
    model = build(intermediate)
    return Contestant(
        "llama", model, f"{DEPTH} layers, hidden {WIDTH}, intermediate {intermediate}, {WIDTH // 64} heads, SDPA"
    )


def build_mamba(parameters: int) -> Contestant:
    """Transformers' Mamba of our width; its depth brings the count to ours.

    It scans with mambapy where that is installed and else token by token, as Transformers does without CUDA kernels.
    """
    mambapy = is_mambapy_available()
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "tie_word_embeddings": False}

    def build(layers: int) -> MambaForCausalLM:
        return MambaForCausalLM(MambaConfig(num_hidden_layers=layers, use_mambapy=mambapy, **shape))

    layers = nearest_size(parameters, lambda units: count_parameters(partial(build, units)))
    scan = "mambapy's scan" if mambapy else "Transformers' own scan, token by token"
    model = build(layers)
    return Contestant("mamba", model, f"{layers} layers, hidden {WIDTH}, {scan}")


def build_also(source: str, parameters: int) -> Contestant:
    """Another implementation the user has: a Python file or module with `build(vocab_size, width, depth, parameters)`.

    It returns a model called like a Transformers causal language model; optional module constants are NAME, DESCRIPTION
    and CACHE_ARGUMENT.

    Raises:
        ValueError: there is no such file or module, or it has no `build`.
    """
    module = load_module(source)
    if not callable(getattr(module, "build", None)):
        raise ValueError(f"--also {source}: it must define build(vocab_size, width, depth, parameters) -> model")
    return Contestant(
        getattr(module, "NAME", Path(source).stem),
        module.build(vocab_size=VOCABULARY, width=WIDTH, depth=DEPTH, parameters=parameters),
        getattr(module, "DESCRIPTION", source),
        getattr(module, "CACHE_ARGUMENT", None),
    )


def load_module(source: str) -> ModuleType:
    """Imports a module by name, or a file by its path if it ends in .py."""
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(f"--also {source}: {error}; give an installed module or the path of a .py file") from error
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    if spec is None or spec.loader is None or not Path(source).is_file():
        raise ValueError(f"--also {source}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count_parameters(build: Callable[[], PreTrainedModel]) -> int:
    """Parameters of a model that is built without memory for its weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def nearest_size(target: int, count: Callable[[int], int]) -> int:
    """The size >= 1 whose count is nearest to the target, where the count grows linearly with the size."""
    one, two = count(1), count(2)
    return max(1, round(1 + (target - one) / (two - one)))
