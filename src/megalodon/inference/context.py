"""A saved context: all that is needed to go on with a text later exactly as if it had never been put down.

One safetensors file of constant size: the model's state, the token that has not been fed yet, the last tokens (for the
repetition penalty and for half a character), the random generator, and the fingerprints of model and tokenizer.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.model import MegalodonForCausalLM, MegalodonState

CONTEXT, CHECKSUM = "context", "checksum"
SAMPLED_VALUES = 1 << 16
ARCHITECTURE = (
    *("vocab_size", "num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim"),
    *("chunk_size", "norm_num_groups", "norm_eps", "norm_affine", "norm_prior_count", "rope_base", "swiglu"),
    *("rescale_nffn", "scale_emb", "share_emb", "output_size"),
)


@dataclass(frozen=True)
class Context:
    """Where a sequence stands.

    Attributes:
        state: the model's state after all tokens but the last; one row.
        pending: the last token, which the state has not seen.
        recent: the last tokens, `pending` included, at most `sampling.REPETITION_WINDOW`.
        tokens: how many tokens the sequence has, `pending` included.
        generator: the random generator's state, uint8 [n].
    """

    state: MegalodonState
    pending: int
    recent: tuple[int, ...]
    tokens: int
    generator: Tensor

    def save(self, path: Path, model: MegalodonForCausalLM, tokenizer: Tokenizer) -> None:
        """Write the file under a temporary name, then rename it.

        Raises:
            OSError: if it cannot be written; an earlier file of this name is then as it was.
        """
        context = json.dumps(
            {
                "pending": self.pending,
                "recent": self.recent,
                "tokens": self.tokens,
                "generator": base64.b64encode(self.generator.numpy().tobytes()).decode(),
                "model": model_fingerprint(model),
                "dtype": str(model.dtype),
                "tokenizer": tokenizer.fingerprint,
                "tokenizer_name": tokenizer.name,
            }
        )
        self.state.save(path, {CONTEXT: context, CHECKSUM: _checksum(self.state, context)})

    @staticmethod
    def load(path: Path, model: MegalodonForCausalLM, tokenizer: Tokenizer) -> Context:
        """The context in a file, on the model's device.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or no context, or belongs to another model or tokenizer.
        """
        written, checksum = _read_header(path)
        try:
            state = MegalodonState.load(path, model.config)
        except ValueError as error:
            raise ValueError(f"context {path} cannot be used: {error}") from None
        except (KeyError, TypeError) as error:
            raise ValueError(f"context {path} is damaged: its header lacks {error}") from None
        if _checksum(state, written) != checksum:
            raise ValueError(f"context {path} is damaged: its contents do not have the checksum in its header")
        context = json.loads(written)
        _check_owner(path, context, model, tokenizer)
        generator = torch.frombuffer(bytearray(base64.b64decode(context["generator"])), dtype=torch.uint8)
        return Context(
            state.to(model.device), context["pending"], tuple(context["recent"]), context["tokens"], generator
        )


def model_fingerprint(model: MegalodonForCausalLM) -> str:
    """SHA-256 of the config's fields that matter and of up to `SAMPLED_VALUES` evenly spaced values of every weight.

    Sampling keeps it quick for models of any size; training, or rounding to another dtype, changes values everywhere.
    """
    fields = {name: getattr(model.config, name) for name in ARCHITECTURE}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        _update(digest, name, values[:: max(1, -(-values.numel() // SAMPLED_VALUES))])
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"no context file {path}: --save-context writes one")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"context {path} is damaged or no context: {error}") from None
    if CONTEXT not in header or CHECKSUM not in header:
        raise ValueError(f"{path} is no context file: --save-context writes one")
    return header[CONTEXT], header[CHECKSUM]


def _check_owner(path: Path, context: dict[str, Any], model: MegalodonForCausalLM, tokenizer: Tokenizer) -> None:
    if context["dtype"] != str(model.dtype):
        saved, now = (dtype.removeprefix("torch.") for dtype in (context["dtype"], str(model.dtype)))
        raise ValueError(f"context {path} was saved in {saved}, the model runs in {now}: choose --dtype {saved}")
    if context["model"] != model_fingerprint(model):
        raise ValueError(f"context {path} was saved by a model with other weights: use the model that saved it")
    if context["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"context {path} was saved with tokenizer {context['tokenizer_name']!r}, not with {tokenizer.name!r}"
        )


def _checksum(state: MegalodonState, context: str) -> str:
    digest = hashlib.sha256(context.encode())
    for name, tensor in sorted(state.state_dict().items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
