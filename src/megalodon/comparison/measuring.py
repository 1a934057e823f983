"""What is measured beside training: memory and speed by length, scores on whole texts, general compressors."""

from __future__ import annotations

import gzip
import lzma
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megalodon.data import Corpus, CorpusConfig
from megalodon.evaluation import evaluate_perplexity
from megalodon.inference import choose_device, load_model, load_tokenizer_for
from megalodon.inference.generation import default_piece_length
from megalodon.models import CausalLM
from megalodon.training import launch
from megalodon.training.config import TrainConfig
from megalodon.training.corpora import prepare
from megalodon.training.progress import LineDisplay
from megalodon.training.step import split_batch, train_step

PPMD_ORDER = 16
PPMD_MEMORY = 256 << 20


def measure_speed(config: TrainConfig, lengths: list[int], steps: int, decode: int) -> dict[str, Any]:
    """Seconds, state and peak memory of reading texts of these lengths, tokens decoded after them, and training steps.

    Time on a CPU is that of the processor where one thread computes, so that other programs count little; else that of
    a clock.
    """
    device = choose_device(None if config.run.device == "auto" else config.run.device)
    clock = Clock(device)
    resolved = launch.resolve(config, "speed")
    texts = prepare(config, resolved.tokenizer, LineDisplay(0))
    parts = launch.build_parts(resolved, texts, device)
    _read(parts.model, min(lengths), decode, clock, 0)  # what is done once is neither timed nor counted
    before = clock.peak()
    reading = [_read(parts.model, length, decode, clock, before) for length in sorted(lengths)]
    states: Any = [None] * config.run.accumulation_steps
    seconds = []
    parts.model.train()
    for _ in range(steps + 2):
        begin = clock()
        result = train_step(
            parts.model,
            parts.optimizer,
            split_batch(next(parts.loader), config.run.accumulation_steps),
            states,
            max_grad_norm=config.optimizer.max_grad_norm,
            device=device,
            precision=config.run.precision,
        )
        states = result.states
        seconds.append(clock() - begin)
    step = statistics.median(seconds[2:])
    tokens = config.data.batch_size * config.data.sequence_length
    return {
        "clock": clock.name,
        "reading": reading,
        "training": {"seconds_a_step": step, "tokens_a_second": tokens / step, "flops_a_token": parts.flops_per_token},
    }


class Clock:
    """Seconds, of the kind that says most on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.name == "processor" else time.perf_counter()

    def peak(self) -> int:
        """Bytes of memory that this process has used at most."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def _read(model: CausalLM, length: int, decode: int, clock: Clock, before: int) -> dict[str, Any]:
    """Read one row of `length` tokens in pieces, as evaluation does, then decode. `before`: bytes not to be counted."""
    model.eval()
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length + 1), generator=generator).to(clock.device)
    piece = default_piece_length(model.model.dimensions.alignment)
    begin, state = clock(), None
    for start in range(0, length, piece):
        output = model.model(ids[:, start : min(start + piece, length)], past_key_values=state, use_cache=True)
        state = output.past_key_values
    seconds = clock() - begin
    size = 0 if state is None else state.nbytes
    token, times = ids[:, -1:], []
    for _ in range(decode):
        begin = clock()
        out = model(token, past_key_values=state, use_cache=True)
        state, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        times.append(clock() - begin)
    return {
        "length": length,
        "seconds": seconds,
        "tokens_a_second": length / max(seconds, 1e-9),
        "state_bytes": size,
        "peak_bytes": clock.peak() - before,
        "decoded_a_second": 1 / max(statistics.median(times), 1e-9),
    }


def score_model(folder: Path, test: dict[str, Any], cut: int | None) -> dict[str, Any]:
    """Scores of a model on the test texts: `whole`, each from its beginning to its end, and by the tokens since
    everything was forgotten (`context`)."""
    model = load_model(folder)
    tokenizer = load_tokenizer_for(model, folder)

    def scored(max_tokens: int | None, reset_every: int | None) -> dict[str, Any]:
        documents = Corpus(CorpusConfig.model_validate(test["corpus"])).documents()
        return evaluate_perplexity(model, tokenizer, documents, max_tokens=max_tokens, reset_every=reset_every)

    whole = scored(test["max_tokens"], cut)
    limits = [limit for limit in (test["max_tokens"], test["context_tokens"]) if limit is not None]
    context = scored(min(limits, default=None), test["context"])
    return {
        "cut": cut,
        "whole": {
            "overall": whole["overall"],
            "by_position": whole["by_position"],
            "by_chunk_place": whole["by_chunk_place"],
            "documents": [
                {key: d[key] for key in ("name", "tokens", "loss", "bits_per_byte")} for d in whole["documents"]
            ],
        },
        "context": {"every": test["context"], "overall": context["overall"], "by_distance": context["by_distance"]},
    }


def compress_texts(corpus: dict[str, Any], max_bytes: int | None) -> dict[str, Any]:
    """Bits a byte of general compressors on each text alone: gzip -9, xz -9, and PPMd where pyppmd is installed."""
    methods: dict[str, Any] = {
        "gzip -9": lambda data: len(gzip.compress(data, 9, mtime=0)),
        "xz -9": lambda data: len(lzma.compress(data, preset=9)),
    }
    try:
        import pyppmd
    except ImportError:
        print("note: PPMd is left out: pip install pyppmd", flush=True)
    else:
        options = {"max_order": PPMD_ORDER, "mem_size": PPMD_MEMORY, "variant": "H"}
        methods[f"PPMd, order {PPMD_ORDER}"] = lambda data: len(pyppmd.compress(data, **options))
    documents: list[dict[str, Any]] = []
    for document in Corpus(CorpusConfig.model_validate(corpus)).documents():
        data = document.text.encode()[:max_bytes]
        sizes = {name: compress(data) for name, compress in methods.items()}
        documents.append({"name": document.name, "bytes": len(data), "compressed": sizes})
    total = sum(document["bytes"] for document in documents)
    return {
        "documents": documents,
        "bits_per_byte": {
            name: 8 * sum(document["compressed"][name] for document in documents) / total for name in methods
        },
    }
