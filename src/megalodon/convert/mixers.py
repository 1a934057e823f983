"""Single mixers with the parameters of their authors' code: trained layers brought over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers import Mixer, mixer_class

ALSO_CALLED = {
    "supra": "retention",
    "mohawk": "phi_mamba",
    "sliding": "sliding_attention",
    "slide": "sliding_attention",
}
"""Names of systems -> the mixer that they use."""


def mixer_from_reference(name: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Mixer:
    """A mixer that computes what its authors' code does with these parameters.

    Args:
        name: of the mixer, or of the system that it comes from.
        config: the options of the authors' layer under their names.
        state_dict: the layer's parameters under their names.

    Returns:
        the mixer, in evaluation mode, in the dtype of the parameters.

    Raises:
        ValueError: there is no such mixer or no published code of it, an option is not reproduced, or a parameter is
            missing, unknown or of another shape; the message names it.
    """
    name = ALSO_CALLED.get(name, name)
    kind = mixer_class(name)
    try:
        fields, parameters, ours = kind.reference(config, state_dict)
    except KeyError as error:
        raise ValueError(f"{name}: the config or the parameters lack {error.args[0]!r}") from None
    model = KinConfig(**{"num_layers": 1, "mixers": name, "mixer_parameters": {name: parameters}, **fields})
    mixer = kind(model, 0, model.mixer_of(0)[1]).eval()
    dtypes = {tensor.dtype for tensor in ours.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        mixer.to(dtypes.pop())
    try:
        mixer.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    return mixer
