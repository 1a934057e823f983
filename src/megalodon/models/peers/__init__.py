"""Causal language models of Transformers, any of them, in our trainer: controls beside our own architectures.

`config` names one, `model` gives it the interface that the rooms above know, `state` and `caches` make a value of its
cache, and `probe` finds out what its class can be asked for.
"""

from megalodon.models.peers.config import PeerConfig
from megalodon.models.peers.model import PeerForCausalLM, PeerModel
from megalodon.models.peers.state import PeerState

__all__ = ["PeerConfig", "PeerForCausalLM", "PeerModel", "PeerState"]
