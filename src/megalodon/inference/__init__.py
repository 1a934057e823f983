"""Running a trained model: loading, sampling, generation from prompts of any length, saved contexts."""

from megalodon.inference.context import Context, model_fingerprint
from megalodon.inference.generation import Session, generate_stream, generate_text
from megalodon.inference.loading import choose_device, load_model, load_tokenizer_for
from megalodon.inference.sampling import REPETITION_WINDOW, Sampling, distribution, sample
from megalodon.inference.static_decoding import StaticDecoder
from megalodon.inference.stopping import StopStrings

__all__ = [
    "REPETITION_WINDOW",
    "Context",
    "Sampling",
    "Session",
    "StaticDecoder",
    "StopStrings",
    "choose_device",
    "distribution",
    "generate_stream",
    "generate_text",
    "load_model",
    "load_tokenizer_for",
    "model_fingerprint",
    "sample",
]
