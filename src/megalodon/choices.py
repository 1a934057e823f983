"""What options and configs choose among, apart from what it means, so that a command's help needs no PyTorch."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, TypeAlias


class DtypeName(StrEnum):
    """The dtypes that weights are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class RunDtype(StrEnum):
    """The dtypes that a model runs in. In int8 are the weights of linear layers alone, on a CPU."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


CorpusKind: TypeAlias = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "arrow", "huggingface", "stdlib"]
"""What a source of text is."""
EntryWeights: TypeAlias = Literal["none", "gradient"]
"""What entries of implicit attention matrices are taken times: nothing, or what each does to a log probability."""
CUTS = (256, 1024, 4096, 16384, 65536)
"""Tokens between two places where a model forgets, for measuring what its memory is worth."""
