"""Other implementations' checkpoints, in and out. One file per implementation; `reference` is the authors' own."""

from megalodon.convert.checkpoint import read_checkpoint, write_checkpoint
from megalodon.convert.megabyte import megabyte_from_reference
from megalodon.convert.mixers import mixer_from_reference
from megalodon.convert.peers import kin_from_transformers, kin_to_transformers
from megalodon.convert.pretrained import read_pretrained, write_pretrained
from megalodon.convert.reference import (
    config_from_reference,
    config_to_reference,
    state_dict_from_reference,
    state_dict_to_reference,
)

__all__ = [
    "config_from_reference",
    "config_to_reference",
    "kin_from_transformers",
    "kin_to_transformers",
    "megabyte_from_reference",
    "mixer_from_reference",
    "read_checkpoint",
    "read_pretrained",
    "state_dict_from_reference",
    "state_dict_to_reference",
    "write_checkpoint",
    "write_pretrained",
]
