"""The kin: one pre-norm decoder around any of the mixers that the papers name, exact and causal, with one kind of
state."""

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.model import KinForCausalLM, KinModel
from megalodon.models.kin.state import KinState

__all__ = ["KinConfig", "KinForCausalLM", "KinModel", "KinState"]
