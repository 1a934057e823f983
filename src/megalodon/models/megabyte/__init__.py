"""MEGABYTE (arXiv 2305.07185): bytes in patches, a Transformer over patches and one inside each."""

from megalodon.models.megabyte.config import MegabyteConfig
from megalodon.models.megabyte.model import MegabyteForCausalLM, MegabyteModel
from megalodon.models.megabyte.state import MegabyteState

__all__ = ["MegabyteConfig", "MegabyteForCausalLM", "MegabyteModel", "MegabyteState"]
