"""Which causal language model of Transformers, and of what sizes: the fields of its own config, checked by name."""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import dataclasses
import os
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megalodon.models.config import Config, architecture_config

ENDS = ("pad_token_id", "bos_token_id", "eos_token_id")
NOT_SIZES = frozenset(
    {"model_type", "architectures", "dtype", "transformers_version", "vocab_size", "use_cache", *ENDS}
)
"""What a saved config holds beside the fields that say what the model is, or under a name of ours."""


@architecture_config
class PeerConfig(Config):
    """Configuration of a causal language model of Transformers. Keyword arguments only.

    Attributes:
        kind: its `model_type`: llama, mamba2, qwen3_next and all others that `AutoModelForCausalLM` makes.
        fields: of its own config, by their names there; what is left out is as there.
        vocab_size: number of token ids.

    Raises:
        ValueError: there is no such class or field, or its config refuses a value; the message names it.
    """

    model_type = "transformers"
    free_in_fine_tuning = ()
    identity_fields = ("kind", "fields", "vocab_size")
    on_mesh: ClassVar[bool] = False

    kind: str = "llama"
    fields: dict[str, Any] | None = None
    vocab_size: int = 32000

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        inner = self.inner()
        text = inner.get_text_config()
        self.num_layers = int(getattr(text, "num_hidden_layers", 1))
        self.model_dim = int(getattr(text, "hidden_size", 1))
        self.share_emb = bool(getattr(inner, "tie_word_embeddings", False))

    def inner(self) -> PreTrainedConfig:
        """The config of Transformers, made anew.

        Raises:
            ValueError: as on construction.
        """
        if not isinstance(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.kind), str) or self.kind not in CONFIG_MAPPING:
            near = get_close_matches(self.kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"kind={self.kind!r}: the installed Transformers has no such causal language model{hint}")
        own, given = CONFIG_MAPPING[self.kind], dict(self.fields or {})
        known = {field.name for field in dataclasses.fields(own)} | set(own.attribute_map)
        for name in given:
            if name in ("vocab_size", *ENDS):
                raise ValueError(f"fields: {name} follows from the tokenizer (model.vocab_size makes room for more)")
            if name not in known:
                hint = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
                raise ValueError(f"fields: a {self.kind} config has no field {name!r}{hint}")
        ends = {name: getattr(self, name) for name in ENDS}
        try:
            config = AutoConfig.for_model(self.kind, **given, **ends, vocab_size=self.vocab_size)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise ValueError(f"fields: {self.kind}: {error.__cause__ or error}") from None
        assert isinstance(config, PreTrainedConfig)
        return config

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """The config in a model folder that Transformers wrote.

        Raises:
            ValueError: as on construction.
        """
        inner = AutoConfig.from_pretrained(folder, local_files_only=True)
        saved = inner.to_diff_dict()
        fields = {name: value for name, value in saved.items() if name not in NOT_SIZES and not name.startswith("_")}
        ends: dict[str, Any] = {name: getattr(inner, name, None) for name in ENDS}
        return cls(kind=inner.model_type, fields=fields, vocab_size=inner.vocab_size, **ends)

    def sequence_multiply_adds(self, length: int) -> float:
        """As counted while a row of `length` tokens runs once, less one for each parameter that multiplies; attention's
        scores count where they are computed, whole squares where the class computes whole squares."""
        from megalodon.models.peers.probe import counted_multiply_adds

        return counted_multiply_adds(self, length)

    def streaming_problem(self) -> str | None:
        from megalodon.models.peers.probe import ways_of

        return ways_of(self).streaming_problem

    @classmethod
    def is_kind(cls, name: Any) -> bool:
        """Whether a model folder of this `model_type` holds such a model."""
        return isinstance(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name), str)
