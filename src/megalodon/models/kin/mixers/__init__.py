"""The one list of mixers. A new one is a file here, a line in `MIXERS`, and a row in the tests' table."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from megalodon.models.kin.mixers.base import Memory, Mixer, MixerParameters, Reference

__all__ = ["MIXERS", "Memory", "Mixer", "MixerParameters", "Reference", "mixer_class"]

MIXERS: dict[str, str] = {
    "attention": "attention.Attention",
    "based": "based.Based",
    "feedforward_kernel": "feedforward_kernel.FeedForwardKernel",
    "gated_delta": "gated_delta.GatedDelta",
    "gla": "gla.GLA",
    "hedgehog": "hedgehog.Hedgehog",
    "lizard": "lizard.Lizard",
    "lolcats": "lolcats.LoLCATs",
    "megalodon": "megalodon.MegalodonMixer",
    "retention": "retention.Retention",
    "sliding_attention": "sliding_attention.SlidingAttention",
}
"""Name -> module of this folder and class, imported when it is first asked for."""


def mixer_class(name: str) -> type[Mixer]:
    """The class of a mixer.

    Raises:
        ValueError: there is none of this name; the nearest is named.
    """
    if name not in MIXERS:
        near = "".join(f"; did you mean {other}?" for other in get_close_matches(str(name), MIXERS, 1))
        raise ValueError(f"mixers: there is no mixer {name!r}{near} (there are {', '.join(sorted(MIXERS))})")
    module, class_name = MIXERS[name].split(".")
    return getattr(import_module(f"{__name__}.{module}"), class_name)
