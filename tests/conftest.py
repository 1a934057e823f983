"""Shared fixtures. Tests use one thread each and fixed seeds, so that they give the same answer everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A machine that is busy with other work must not fail a test for being slow.
settings.register_profile("megalodon", deadline=None)
settings.load_profile("megalodon")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which decides then

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared() -> Path:
    """The folder of golden vectors and texts that accompanies the project's own checkout and CI, not a user's clone."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs the golden vectors and texts at {folder}")
        pytest.skip(f"needs the golden vectors and texts at {folder}, which a user's clone does not have")
    return folder


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
