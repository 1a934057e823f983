"""The one list of mixers. A new one is a file here, a line in `MIXERS`, and a row in the tests' table."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from megalodon.models.kin.mixers.base import Memory, Mixer, MixerParameters, Reference

__all__ = ["MIXERS", "Memory", "Mixer", "MixerParameters", "Reference", "mixer_class"]

MIXERS: dict[str, str] = {
    "attention": "attention.Attention",
    "attamba": "attamba.Attamba",
    "base_conv": "base_conv.BaseConv",
    "based": "based.Based",
    "feedforward_kernel": "feedforward_kernel.FeedForwardKernel",
    "gated_delta": "gated_delta.GatedDelta",
    "gecko": "gecko.GeckoMixer",
    "gla": "gla.GLA",
    "h3": "h3.H3",
    "hax": "hax.Hax",
    "hip": "hip.Hip",
    "hedgehog": "hedgehog.Hedgehog",
    "hydra": "hydra.Hydra",
    "hyena": "hyena.Hyena",
    "lizard": "lizard.Lizard",
    "lolcats": "lolcats.LoLCATs",
    "mamba": "mamba.Mamba",
    "mamba2": "mamba2.Mamba2",
    "megalodon": "megalodon.MegalodonMixer",
    "phi_mamba": "phi_mamba.PhiMamba",
    "retention": "retention.Retention",
    "scout": "scout.Scout",
    "sliding_attention": "sliding_attention.SlidingAttention",
    "window_memory": "window_memory.WindowMemory",
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
