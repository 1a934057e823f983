"""What the configs of all architectures share: unknown keys and wrong values are refused, and what other rooms ask.

A config is a Transformers config with the paper's names. The rooms above (training, planning, inference) work with any
architecture, so what they need to know of one stands here as attributes and methods that each architecture fills in.
"""

# No `from __future__ import annotations` here: `strict` checks values against annotations that are types, not strings.
import functools
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import get_annotations
from typing import Any, ClassVar, Self, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig

from megalodon.models.folder import write_loader

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
        on_mesh: whether several processes can train one model of it.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    max_position_embeddings: ClassVar[int] = 1 << 30
    """What tools that ask for a longest text are told: texts of any length are read as one."""
    auto_map: ClassVar[dict[str, str]] = {}
    """Of which file of a model folder the classes are, for `trust_remote_code` (`megalodon.models.folder`)."""
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    identity_fields: ClassVar[tuple[str, ...]] = ()
    free_in_fine_tuning: ClassVar[tuple[str, ...]] = ()
    width_fields: ClassVar[dict[str, int]] = {}
    calibration_fields: ClassVar[dict[str, Any]] = {}
    tensor_fields: ClassVar[tuple[str, ...]] = ()
    chunk_axis: ClassVar[bool] = False
    chunks_before: ClassVar[int] = 0
    on_mesh: ClassVar[bool] = True

    vocab_size: int = 32000
    num_layers: int = 12
    model_dim: int = 1024
    share_emb: bool = False
    output_size: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None

    # --- folders that others open and write ------------------------------------------------------------------------

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a saved folder says by itself where the class is, and needs no copy of its source."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and beside it what `trust_remote_code=True` asks for."""
        write_loader(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields; other libraries find them by the names that they have in Transformers."""
        return Fields(super().to_dict(), self.attribute_map)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: the fields, and where the classes are."""
        return {**super().to_diff_dict(), "auto_map": dict(self.auto_map)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The config that a program wrote, with whatever else was set on it; what a person wrote must be right.

        Programs say which version of Transformers they used. Anything may be set as an attribute of a config, and is
        saved: so it comes back, with a warning that names it.

        Raises:
            ValueError: the dict is of another architecture (`model_type`); or it says no `transformers_version`, and
                has a field that there is not.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"model_type={kind!r}: this config is not of a {cls.model_type} model, whose classes read no other"
            )
        extra: dict[str, Any] = {}
        if "transformers_version" in config_dict:
            extra = {name: config_dict[name] for name in config_dict if not cls.knows(name)}
        known = {name: value for name, value in config_dict.items() if name not in extra}
        found = super().from_dict(known, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        for name, value in extra.items():
            setattr(config, name, value)
            warnings.warn(
                f"{name}={value!r} in a saved config is no field of a {cls.model_type} config: it changes nothing",
                stacklevel=3,
            )
        return found

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether a key is a field, or one that Transformers passes or saves for every model."""
        return name in _known_names(cls) or name.startswith("_")

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
    def architecture_fields(cls) -> dict[str, Any]:
        """Name -> type of the fields that say what a model is, in order: what the architecture and the configs that it
        builds on declare, without what any config has only because it is one of Transformers'."""
        types: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Config) and base is not Config:
                types |= get_annotations(base, eval_str=True)
        return {field.name: types[field.name] for field in fields(cls) if field.name in types}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A published size, with any field overridden.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in cls.presets:
            raise ValueError(f"no preset {name!r}: there are {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})


def _known_names(cls: type[Config]) -> set[str]:
    names = {field.name for field in fields(cls)} | OTHER_KEYS | cls.attribute_map.keys()
    return names | vars(GenerationConfig()).keys()


class Fields(dict[str, Any]):
    """A config's fields, which answer to their names in Transformers too, and are listed once."""

    def __init__(self, values: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
        super().__init__(values)
        self._aliases = aliases

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name in self._aliases and super().__contains__(self._aliases[str(name)]))

    def __missing__(self, name: str) -> Any:
        if name in self._aliases:
            return self[self._aliases[name]]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of any dict."""
        return super().get(name if super().__contains__(name) else self._aliases.get(name, name), default)


C = TypeVar("C", bound=Config)


def architecture_config(cls: type[C]) -> type[C]:
    """Make a config class strict: its construction checks types, refuses unknown keys, which Transformers keeps
    silently, and raises ValueErrors of one line."""
    cls = strict(cls)
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Config, **values: Any) -> None:
        known = _known_names(cls)
        for name in values.keys() - known:
            if not name.startswith("_"):
                near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
                near = cls.hint(name) or near
                raise ValueError(f"{name}={values[name]!r}: a {cls.model_type} config has no such field{near}")
        values.pop("auto_map", None)  # the class's own, wherever the folder comes from
        try:
            construct(self, **values)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None

    # A decorator's work, to a type checker an assignment to a method, of other arguments.
    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls
