"""Fingerprints: of all that changes outputs and nothing else, and of tensors however they lie in memory."""

from __future__ import annotations

import hashlib

import pytest
import torch

from engine_cases import make_model
from megalodon.inference import model_fingerprint
from megalodon.inference.fingerprint import hash_tensor


def digest_of(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256()
    hash_tensor(digest, "x", tensor)
    return digest.hexdigest()


def test_fingerprint_is_of_config_and_weights() -> None:
    assert model_fingerprint(make_model()) == model_fingerprint(make_model())
    assert model_fingerprint(make_model(dropout=0.1)) == model_fingerprint(make_model()), "dropout changes no output"
    assert model_fingerprint(make_model(rope_base=1e5)) != model_fingerprint(make_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    whole = torch.arange(24).view(4, 6).to(dtype)
    assert digest_of(whole.t().contiguous().t()) == digest_of(whole) != digest_of(whole.t())
    assert digest_of(whole[::2, ::3]) == digest_of(whole[::2, ::3].clone())
    one = torch.ones((), dtype=dtype)
    assert digest_of(one.expand(1)) == digest_of(torch.ones(1, dtype=dtype)), "a single element with stride 0"
    assert digest_of(one.expand(5)) == digest_of(torch.ones(5, dtype=dtype))
    assert digest_of(whole[:0]) == digest_of(torch.empty(0, 6, dtype=dtype)) != digest_of(whole[:, :0])
    assert digest_of(one) != digest_of(one.expand(1)), "the shape is part of it"
