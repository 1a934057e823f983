"""What all model classes share below their networks: how weights begin, and how models are loaded and saved."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from megalodon.models.config import Config
from megalodon.models.folder import write_card
from megalodon.models.layers.watch import let_go


class StatefulPreTrainedModel(PreTrainedModel):
    """What all models share: initialisation, loading and saving.

    A module that is neither a linear layer nor an embedding says itself how it begins, in `initialize`.
    """

    config: Any
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        kind = type(self).config_class
        if kind is not None and not isinstance(config, kind):
            raise ValueError(f"config is a {type(config).__name__}: {type(self).__name__} needs a {kind.__name__}")
        refuse_float16(config.dtype, torch.get_default_dtype())
        super().__init__(config, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: a saved folder says by itself where the class is, and needs no copy of its source."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As everywhere; and a model card, unless the folder has a README.md."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(save_directory, self.config, type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to` and its relatives do with every weight. PyTorch may swap tensors, if nobody else holds them."""
        let_go(self)
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As everywhere; here too PyTorch may swap tensors."""
        let_go(self)
        return super().load_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """SPEC: Initialisation."""
        if isinstance(module, nn.Linear):
            self._init_linear(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            self._init_table(module.weight)
        elif callable(initialize := getattr(module, "initialize", None)):
            initialize()

    def _init_linear(self, module: nn.Linear) -> None:
        if module is self.get_output_embeddings():
            self._init_table(module.weight)
            return
        match self.config.init_mode:
            case "he":
                init.kaiming_normal_(module.weight, a=math.sqrt(5.0))
            case "bert":
                init.normal_(module.weight, 0.0, 0.02)
            case "xavier":
                init.xavier_uniform_(module.weight)
            case "gaussian":
                init.normal_(module.weight, 0.0, 1 / math.sqrt(module.in_features))
            case "none":
                init.kaiming_uniform_(module.weight, a=math.sqrt(5.0))

    def _init_table(self, weight: Tensor) -> None:
        std = 1 / math.sqrt(self.config.model_dim)
        init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)


def refuse_float16(*dtypes: torch.dtype | str | None) -> None:
    """Raise ValueError if one of these is float16."""
    if torch.float16 in dtypes:
        raise ValueError("float16 has too little range for Megalodon's memory: use bfloat16 or float32")
