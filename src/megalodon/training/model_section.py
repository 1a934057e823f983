"""The `model` section of a training config: a preset, fields of the architecture's config, or a folder to fine-tune."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, create_model

from megalodon.data import Tokenizer, check_vocabulary
from megalodon.inference.loading import load_model, model_folder
from megalodon.models import (
    ARCHITECTURES,
    TRAINABLE,
    CausalLM,
    Config,
    all_presets,
    architecture,
    build_model,
    load_config,
)
from megalodon.training.section import Section
from megalodon.training.wording import nearest

DEFAULT_ARCHITECTURE = next(iter(ARCHITECTURES))
# Follow from the tokenizer, and are no affair of a training config.
NOT_IN_CONFIG = ("use_cache", "pad_token_id", "eos_token_id")


class _Origin(Section):
    architecture: str = Field(default=DEFAULT_ARCHITECTURE, description=", ".join(TRAINABLE))
    preset: str | None = Field(default=None, description="a published size, by name")
    init_from: str | None = Field(default=None, description="a model folder whose weights training starts from")


def _architecture_fields(kind: type[Config]) -> dict[str, Any]:
    """Name -> (type, default) of the fields that an architecture's config has of its own."""
    types = kind.architecture_fields()
    fields = (field for field in dataclasses.fields(kind) if field.name in types)
    return {field.name: (types[field.name], field.default) for field in fields if field.name not in NOT_IN_CONFIG}


@cache
def model_section(name: str) -> Any:
    """The section of an architecture, built from its config class: so it knows its fields, types and defaults, and
    checks them alike.

    Raises:
        ValueError: there is no such architecture.
    """
    fields = _architecture_fields(architecture(name).config)
    origin = (str, Field(default=name, description=_Origin.model_fields["architecture"].description))
    return create_model("ModelSection", __base__=_Origin, architecture=origin, **fields)


ModelSection: Any = model_section(DEFAULT_ARCHITECTURE)


def architecture_of(values: Any) -> str:
    """The architecture that a `model` section asks for: by its name, its preset, or the model it starts from.

    Args:
        values: the section's plain values, unchecked.

    Raises:
        ValueError: it names none that there is, or contradicts itself.
    """
    values = values if isinstance(values, dict) else {}
    named, preset, start = (values.get(key) for key in ("architecture", "preset", "init_from"))
    implied = None
    if isinstance(preset, str) and preset in all_presets():
        implied = all_presets()[preset].model_type
    elif isinstance(start, str):
        try:
            implied = load_config(model_folder(Path(start))).model_type
        except FileNotFoundError as error:
            raise ValueError(f"init_from: {error}") from None
        except ValueError as error:
            raise ValueError(f"init_from: {error}") from None
    if named is None:
        return implied or DEFAULT_ARCHITECTURE
    try:
        architecture(named)
    except ValueError as error:
        raise ValueError(f"architecture: {error}") from None
    if implied not in (None, named):
        source = "preset" if isinstance(preset, str) else "init_from"
        raise ValueError(f"architecture: {named} contradicts {source}, which is of {implied}")
    return str(named)


def given_fields(section: Any) -> dict[str, Any]:
    """The architecture's fields that were given, as opposed to defaulted."""
    return {name: getattr(section, name) for name in sorted(section.model_fields_set - set(_Origin.model_fields))}


def _config_class(section: Any) -> type[Config]:
    return architecture(section.architecture).config


def model_problems(section: Any) -> list[str]:
    """What is wrong with the section, one sentence each, known before the tokenizer is; empty when all is well."""
    if section.preset is not None and section.init_from is not None:
        return ["model.preset: contradicts model.init_from, whose model has its own sizes; give one of them"]
    if section.preset is not None and section.preset not in all_presets():
        return [f"model.preset: no preset {section.preset!r}; {nearest(section.preset, all_presets())}"]
    try:
        if section.init_from is not None:
            _config_to_fine_tune(section)
        else:
            _config_class(section)(**_fields_of(section))
    except StrictDataclassError as error:  # Transformers' wrapping of what `validate_architecture` raised
        return [f"model.{error.__cause__ or error}"]
    except (ValueError, OSError) as error:
        return [f"model.{error}"]
    return []


def streaming_problems(section: Any, mode: str) -> list[str]:
    """What speaks against streaming rows through the section's model; empty where they are packed, or all is well."""
    if mode != "streamed" or model_problems(section):
        return []
    fine_tuned = section.init_from is not None
    config = _config_to_fine_tune(section) if fine_tuned else _config_class(section)(**_fields_of(section))
    problem = config.streaming_problem()
    return [] if problem is None else [f"data.mode: {problem}"]


def _fields_of(section: Any) -> dict[str, Any]:
    """The section's fields over those of its preset."""
    preset = _config_class(section).presets.get(section.preset or "", {})
    return {**preset, **given_fields(section)}


def resolve_model(section: Any, tokenizer: Tokenizer) -> Config:
    """The model's config: the section's fields over its preset or `init_from`, the vocabulary as the tokenizer's.

    Raises:
        ValueError: if a size is wrong, or the vocabulary has no room for the tokenizer's ids.
    """
    if section.init_from is not None:
        config = _config_to_fine_tune(section)
    else:
        fields = {**_fields_of(section), "vocab_size": section.vocab_size, "eos_token_id": tokenizer.eos_token_id}
        if "vocab_size" not in section.model_fields_set:
            fields["vocab_size"] = tokenizer.vocab_size
        config = _config_class(section)(**fields)
    check_vocabulary(tokenizer, min(config.vocab_size, config.num_outputs))
    return config


def _config_to_fine_tune(section: Any) -> Config:
    try:
        folder = model_folder(Path(section.init_from))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init_from: {error}") from None
    config = load_config(folder)
    for name, value in given_fields(section).items():
        if name in config.free_in_fine_tuning:
            setattr(config, name, value)
        elif value != getattr(config, name):
            raise ValueError(f"{name}: {value} contradicts the model of init_from, which has {getattr(config, name)}")
    config.validate_architecture()
    return config


def resolved_section(section: Any, config: Config) -> Any:
    """The section with every field spelled out."""
    fields = {name: getattr(config, name) for name in _architecture_fields(type(config))}
    return model_section(config.model_type)(
        architecture=config.model_type, preset=section.preset, init_from=section.init_from, **fields
    )


def make_model(section: Any, config: Config) -> CausalLM:
    """The model in float32, new from the global generator, or with the weights of `init_from`."""
    model = build_model(config)
    if section.init_from is not None:
        model.load_state_dict(load_model(Path(section.init_from), "cpu", torch.float32).state_dict())
    return model


def count_parameters(config: Config) -> int:
    """Trainable parameters of a model of this config, without making their values."""
    with torch.device("meta"):
        return build_model(config).num_parameters(only_trainable=True)
