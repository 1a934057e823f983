"""The `data` section of a training config: which text, what is held out, and how it is cut into batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megalodon.data import CorpusConfig, HeldOutConfig
from megalodon.training.section import Section, changeable


class DataSection(Section):
    """Text to batches of `batch_size` rows of `sequence_length` tokens, one for every step."""

    corpus: CorpusConfig = CorpusConfig(source="stdlib")
    held_out: HeldOutConfig = HeldOutConfig.model_validate({})
    mode: Literal["packed", "streamed"] = Field(
        default="streamed",
        description="streamed: each row reads on from step to step, with its state; packed: it does not",
    )
    isolate: bool = Field(default=True, description="documents in a row do not see each other")
    shuffle: bool = Field(default=True, description="order the documents anew in every epoch")
    sequence_length: int = Field(default=512, ge=1, description="tokens in a row of a step")
    batch_size: int = Field(default=8, ge=1, description="rows in a step, over all its accumulation_steps")
    cache_folder: str | None = changeable(None, description="of tokenised text; null: MEGALODON_CACHE or ~/.cache")
