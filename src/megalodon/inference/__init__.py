"""Running a trained model: loading, sampling, generation from prompts of any length, saved contexts, the engine."""

from megalodon.inference.context import Context
from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.fingerprint import model_fingerprint
from megalodon.inference.generation import Session, generate_stream, generate_text
from megalodon.inference.loading import choose_device, load_model, load_tokenizer_for
from megalodon.inference.prefix_cache import PrefixStore
from megalodon.inference.request import Generation, Request
from megalodon.inference.sampling import REPETITION_WINDOW, Sampling, distribution, sample
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.snapshot_file import load_snapshot, save_snapshot
from megalodon.inference.static_decoding import StaticDecoder
from megalodon.inference.stopping import StopStrings

__all__ = [
    "REPETITION_WINDOW",
    "Context",
    "Engine",
    "Generation",
    "PrefixStore",
    "Request",
    "Sampling",
    "Session",
    "Snapshot",
    "StaticDecoder",
    "StopStrings",
    "TokenFeed",
    "choose_device",
    "distribution",
    "generate_stream",
    "generate_text",
    "load_model",
    "load_snapshot",
    "load_tokenizer_for",
    "model_fingerprint",
    "sample",
    "save_snapshot",
]
