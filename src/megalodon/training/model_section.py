"""The `model` section of a training config: a preset, fields of `MegalodonConfig`, or a folder to fine-tune."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, create_model

from megalodon import PRESETS, MegalodonConfig, MegalodonForCausalLM
from megalodon.data import Tokenizer, check_vocabulary
from megalodon.inference.loading import load_model, model_folder
from megalodon.training.section import Section
from megalodon.training.wording import nearest

# What a fine-tuned model may have otherwise than the one it starts from: the parameters keep their shapes and meaning.
FREE_IN_FINE_TUNING = (
    "chunk_size",
    "rope_base",
    "dropout",
    "hidden_dropout",
    "attention_dropout",
    "attention_dropout_mode",
)
# Follow from the tokenizer, and are no affair of a training config.
NOT_IN_CONFIG = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")


class _Origin(Section):
    preset: str | None = Field(default=None, description="a published size, by name")
    init_from: str | None = Field(default=None, description="a model folder whose weights training starts from")


def _architecture_fields() -> dict[str, Any]:
    """Name -> (type, default) of the fields that `MegalodonConfig` itself declares."""
    types = inspect.get_annotations(MegalodonConfig, eval_str=True)
    fields = (field for field in dataclasses.fields(MegalodonConfig) if field.name in types)
    return {field.name: (types[field.name], field.default) for field in fields if field.name not in NOT_IN_CONFIG}


ModelSection: Any = create_model("ModelSection", __base__=_Origin, **_architecture_fields())
"""Sections are built from `MegalodonConfig`, so that they know its fields, types and defaults, and check them alike."""


def given_fields(section: Any) -> dict[str, Any]:
    """The architecture's fields that were given, as opposed to defaulted."""
    return {name: getattr(section, name) for name in sorted(section.model_fields_set - set(_Origin.model_fields))}


def model_problems(section: Any) -> list[str]:
    """What is wrong with the section, one sentence each, known before the tokenizer is; empty when all is well."""
    if section.preset is not None and section.init_from is not None:
        return ["model.preset: contradicts model.init_from, whose model has its own sizes; give one of them"]
    if section.preset is not None and section.preset not in PRESETS:
        return [f"model.preset: no preset {section.preset!r}; {nearest(section.preset, PRESETS)}"]
    try:
        if section.init_from is not None:
            _config_to_fine_tune(section)
        else:
            MegalodonConfig(**{**PRESETS.get(section.preset or "", {}), **given_fields(section)})
    except StrictDataclassError as error:  # Transformers' wrapping of what `validate_architecture` raised
        return [f"model.{error.__cause__ or error}"]
    except (ValueError, OSError) as error:
        return [f"model.{error}"]
    return []


def resolve_model(section: Any, tokenizer: Tokenizer) -> MegalodonConfig:
    """The model's config: the section's fields over its preset or `init_from`, the vocabulary as the tokenizer's.

    Raises:
        ValueError: if a size is wrong, or the vocabulary has no room for the tokenizer's ids.
    """
    if section.init_from is not None:
        config = _config_to_fine_tune(section)
    else:
        fields = {**PRESETS.get(section.preset or "", {}), "vocab_size": tokenizer.vocab_size, **given_fields(section)}
        config = MegalodonConfig(**fields, eos_token_id=tokenizer.eos_token_id)
    check_vocabulary(tokenizer, min(config.vocab_size, config.output_size or config.vocab_size))
    return config


def _config_to_fine_tune(section: Any) -> MegalodonConfig:
    try:
        folder = model_folder(Path(section.init_from))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init_from: {error}") from None
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != MegalodonConfig.model_type:
        raise ValueError(f"init_from: {folder} holds a model of type {kind!r}, not {MegalodonConfig.model_type!r}")
    config = MegalodonConfig.from_pretrained(folder)
    for name, value in given_fields(section).items():
        if name in FREE_IN_FINE_TUNING:
            setattr(config, name, value)
        elif value != getattr(config, name):
            raise ValueError(f"{name}: {value} contradicts the model of init_from, which has {getattr(config, name)}")
    config.validate_architecture()
    return config


def resolved_section(section: Any, config: MegalodonConfig) -> Any:
    """The section with every field spelled out."""
    fields = {name: getattr(config, name) for name in _architecture_fields()}
    return ModelSection(preset=section.preset, init_from=section.init_from, **fields)


def build_model(section: Any, config: MegalodonConfig) -> MegalodonForCausalLM:
    """The model in float32, new from the global generator, or with the weights of `init_from`."""
    model = MegalodonForCausalLM(config)
    if section.init_from is not None:
        model.load_state_dict(load_model(Path(section.init_from), "cpu", torch.float32).state_dict())
    return model


def count_parameters(config: MegalodonConfig) -> int:
    """Trainable parameters of a model of this config, without making their values."""
    with torch.device("meta"):
        return MegalodonForCausalLM(config).num_parameters(only_trainable=True)
