"""CTranslate2's decoding of the Llama that `_workloads` builds, in float32 or int8; where the package is installed.

It is no PyTorch model: a context is read and decoded by one call of its own, of which the tokens after the first are
timed as they come.
"""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any

import torch
from _measure import Seconds, Timed
from _workloads import DECODED_TOKENS, random_tokens
from transformers import PreTrainedModel

INSTALLED = find_spec("ctranslate2") is not None


class Engine:
    """A model that decodes, and nothing else."""

    def __init__(self, name: str, model: PreTrainedModel, quantization: str | None) -> None:
        import ctranslate2
        from ctranslate2.converters.transformers import LlamaLoader

        self.name, self.parameters = name, sum(p.numel() for p in model.parameters())
        self.description = f"CTranslate2 {ctranslate2.__version__}, {quantization or 'float32'}, of the Llama above"
        loader = LlamaLoader()
        with torch.no_grad():
            spec = loader.get_model_spec(copy.deepcopy(model).requires_grad_(False))  # it takes the model apart
        loader.set_vocabulary(spec, [str(token) for token in range(model.config.vocab_size)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.config.layer_norm_epsilon = model.config.rms_norm_eps
        spec.validate()
        spec.optimize(quantization)
        folder = Path(mkdtemp(prefix="ctranslate2-"))
        spec.save(str(folder))
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=quantization or "float32", intra_threads=torch.get_num_threads()
        )

    def prepare(self, length: int) -> Timed:
        """As `_workloads.prepare_decoding`: the tokens that end at `length`."""
        prompt = [str(token) for token in random_tokens(max(1, length - DECODED_TOKENS))[0].tolist()]
        return partial(self._decode, prompt)

    def _decode(self, prompt: list[str]) -> Seconds:
        steps: Any = self.generator.generate_tokens(
            prompt, max_length=DECODED_TOKENS + 1, min_length=DECODED_TOKENS + 1, sampling_topk=1, end_token=[]
        )
        times = [perf_counter() for _ in steps]
        per_token = (times[-1] - times[0]) / (len(times) - 1)
        return {"decode": per_token * DECODED_TOKENS}
