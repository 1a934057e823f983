"""What the configs of all architectures share: unknown keys and wrong values are refused, and what other rooms ask.

A config is a Transformers config with the paper's names. The rooms above (training, planning, inference) work with any
architecture, so what they need to know of one stands here as attributes and methods that each architecture fills in.
"""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, Self, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig

OTHER_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "is_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "torch_dtype",
    }
)
"""Keys that Transformers passes or saves although no config has a field for them."""


@strict
class Config(PreTrainedConfig):
    """The base of our configs. Keyword arguments only; a subclass is decorated with `architecture_config`.

    Class attributes that an architecture fills in:
        presets: published sizes by name, each a dict of fields.
        identity_fields: fields that decide what the network computes, by which saved contexts know their model.
        free_in_fine_tuning: fields that a fine-tuned model may have otherwise than the one it starts from, because the
            parameters keep their shapes and meaning.
        width_fields: the sizes that a block's activations are linear in, each with a small value at which planning
            measures them; empty: it cannot be planned.
        calibration_fields: what else a model of such small sizes needs.
        tensor_fields: sizes that the tensor axis of a mesh cuts; empty: the architecture cannot be cut so.
        chunk_axis: whether the sequence can be cut over ranks.
        chunks_before: whole chunks before a token's own that attention sees.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    identity_fields: ClassVar[tuple[str, ...]] = ()
    free_in_fine_tuning: ClassVar[tuple[str, ...]] = ()
    width_fields: ClassVar[dict[str, int]] = {}
    calibration_fields: ClassVar[dict[str, Any]] = {}
    tensor_fields: ClassVar[tuple[str, ...]] = ()
    chunk_axis: ClassVar[bool] = False
    chunks_before: ClassVar[int] = 0

    vocab_size: int = 32000
    num_layers: int = 12
    model_dim: int = 1024
    share_emb: bool = False
    output_size: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The config of a dict, such as that of a saved model.

        Libraries and users set attributes of their own on a config, and they are saved with it. Those of a saved config
        are kept, with a warning that names them; in a dict that a person wrote they are an error, as in construction.
        """
        known = cls.known_keys()
        others = {name: value for name, value in config_dict.items() if name not in known and not name.startswith("_")}
        if not others or "transformers_version" not in config_dict:
            return super().from_dict(config_dict, **options)
        warnings.warn(
            f"the saved config has fields that no {cls.model_type} config has, and which change nothing: "
            f"{', '.join(sorted(others))}",
            stacklevel=2,
        )
        made = super().from_dict({name: x for name, x in config_dict.items() if name not in others}, **options)
        for name, value in others.items():
            setattr(made[0] if isinstance(made, tuple) else made, name, value)
        return made

    @classmethod
    def known_keys(cls) -> set[str]:
        """What a config of this class may be given."""
        names = {field.name for field in fields(cls)} | OTHER_KEYS | cls.attribute_map.keys()
        return names | vars(GenerationConfig()).keys()

    @classmethod
    def hint(cls, name: str) -> str:
        """What to say of a field that there is not, where more is known than the nearest name."""
        return ""

    @property
    def num_outputs(self) -> int:
        """Rows of the output matrix."""
        return self.output_size or self.vocab_size

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the network computes, by name."""
        return {name: getattr(self, name) for name in self.identity_fields}

    def sequence_multiply_adds(self, length: int) -> float:
        """Multiply-adds of one token, in all layers, that belong to no parameter, in rows of `length` tokens: those of
        attention's scores and weighted values, of which a causal window needs half. Averages and scans do not count."""
        raise NotImplementedError

    def span_summary_bytes(self) -> float:
        """Bytes of what a rank of the chunk axis tells the others of a row in a layer, whatever the row's length."""
        raise NotImplementedError

    def streaming_problem(self) -> str | None:
        """Why rows should not be streamed through this model, their states carried from step to step without end; None
        where nothing speaks against it."""
        return None

    def require_positive(self, names: Iterable[str]) -> None:
        """Raise ValueError, naming the field, unless these are at least 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")

    def require_divisible(self, *pairs: tuple[str, str]) -> None:
        """Raise ValueError, naming both fields, unless the first of each pair is a multiple of the second."""
        for whole, part in pairs:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} is not divisible by {part}={getattr(self, part)}")

    def require_probabilities(self, *names: str) -> None:
        """Raise ValueError, naming the field, unless these are probabilities of dropping."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 0 and less than 1")

    def require_positive_finite(self, *names: str) -> None:
        """Raise ValueError, naming the field, unless these are positive and finite."""
        for name in names:
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: it must be positive and finite")

    def require_output_size(self) -> None:
        """Raise ValueError unless the output matrix has rows, as many as the embedding where they are one."""
        if self.output_size is not None and self.output_size < 1:
            raise ValueError(f"output_size={self.output_size}: it must be at least 1, or None for vocab_size")
        if self.share_emb and self.output_size not in (None, self.vocab_size):
            raise ValueError(f"output_size={self.output_size} contradicts share_emb, which makes it {self.vocab_size}")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A published size, with any field overridden.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in cls.presets:
            raise ValueError(f"no preset {name!r}: there are {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})


C = TypeVar("C", bound=Config)


def architecture_config(cls: type[C]) -> type[C]:
    """Make a config class strict: its construction checks types, refuses unknown keys, which Transformers keeps
    silently, and raises ValueErrors of one line."""
    cls = strict(cls)
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Config, **values: Any) -> None:
        known = cls.known_keys()
        for name in values.keys() - known:
            if not name.startswith("_"):
                near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
                near = cls.hint(name) or near
                raise ValueError(f"{name}={values[name]!r}: a {cls.model_type} config has no such field{near}")
        try:
            construct(self, **values)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None

    # A decorator's work, to a type checker an assignment to a method, of other arguments.
    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls
