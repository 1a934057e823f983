"""Fingerprints of models and tensors: what a saved context must match, and what shows damage."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from megalodon.models import CausalLM

SAMPLED_VALUES = 1 << 16


def model_fingerprint(model: CausalLM) -> str:
    """SHA-256 of the config's fields that matter and of up to `SAMPLED_VALUES` evenly spaced values of every weight.

    Sampling keeps it quick for models of any size; training, or rounding to another dtype, changes values everywhere.
    """
    digest = hashlib.sha256(json.dumps(model.config.identity(), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        hash_tensor(digest, name, values[:: max(1, -(-values.numel() // SAMPLED_VALUES))])
    return digest.hexdigest()


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, shape, dtype and bytes to a hash, whatever its strides and device."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    # A copy: `contiguous` leaves the stride of a single element as it is, and a view as bytes minds it.
    packed = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    digest.update(packed.view(torch.uint8).numpy().data)
