"""The `data` section of a training config: which text, what is held out, and how it is cut into batches."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from megalodon.data import CorpusConfig, HeldOutConfig
from megalodon.data.loader import Mode
from megalodon.training.section import Section, changeable

SOURCE_NAME = re.compile(r"[\w.-]+")
DEFAULT_CORPUS = CorpusConfig(source="stdlib")
DEFAULT_HELD_OUT = HeldOutConfig.model_validate({})


class MixtureSource(Section):
    """One source of a mixture."""

    corpus: CorpusConfig
    weight: float = Field(default=1.0, gt=0, description="its share of the tokens, relative to the other weights")
    held_out: HeldOutConfig = DEFAULT_HELD_OUT


class DataSection(Section):
    """Text to batches of `batch_size` rows of `sequence_length` tokens, one for every step."""

    corpus: CorpusConfig = DEFAULT_CORPUS
    held_out: HeldOutConfig = DEFAULT_HELD_OUT
    mixture: dict[str, MixtureSource] | None = Field(
        default=None, description="instead of corpus and held_out: several sources by name, each with its weight"
    )
    mode: Mode = Field(
        default="streamed",
        description=(
            "streamed: each row reads on from step to step, with its state; packed: it does not; reset: it reads on "
            "without its state, and so does the held-out text"
        ),
    )
    isolate: bool = Field(default=True, description="documents in a row do not see each other")
    shuffle: bool = Field(default=True, description="order the documents anew in every epoch")
    sequence_length: int = Field(default=512, ge=1, description="tokens in a row of a step")
    batch_size: int = Field(default=8, ge=1, description="rows in a step, over all its accumulation_steps")
    cache_folder: str | None = changeable(None, description="of tokenised text; null: MEGALODON_CACHE or ~/.cache")

    @field_validator("mixture")
    @classmethod
    def _names(cls, mixture: dict[str, MixtureSource] | None) -> dict[str, MixtureSource] | None:
        if mixture is not None and not mixture:
            raise ValueError("name one source or more")
        for name in mixture or {}:
            if not SOURCE_NAME.fullmatch(name):
                raise ValueError(f"a source's name, {name!r}, is made of letters, digits, dots and dashes")
        return mixture


def data_problems(data: DataSection) -> list[str]:
    """What is wrong with the values taken together, one sentence each, naming the key; empty when all is well."""
    if data.mixture is None:
        return []
    defaults = {"corpus": DEFAULT_CORPUS, "held_out": DEFAULT_HELD_OUT}
    return [
        f"data.{key}: contradicts data.mixture, each source of which has its own; give one of them"
        for key, default in defaults.items()
        if getattr(data, key) != default
    ]
