"""Reading a training config: YAML and `key=value` overrides in, a checked `TrainConfig` or one error out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megalodon.training.config import TrainConfig, contradictions, train_config
from megalodon.training.model_section import architecture_of
from megalodon.training.wording import describe_errors, one_message


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-4 as a number (YAML 1.1 wants a dot in it) and refuses a key that is given twice."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something else."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """YAML's value.

    Raises:
        ValueError: naming `where` and the line at fault.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in a YAML file with `section.key=value` overrides laid over it, checked as a whole.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming every unknown key, wrong value and contradiction at once.
    """
    return check_config(read_values(path, overrides), str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values in a YAML file with `section.key=value` overrides laid over them, unchecked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a mapping in YAML, or an override is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a config is a mapping of sections, not a {type(values).__name__}")
    for override in overrides:
        lay_over(values, override)
    return values


def check_config(values: dict[str, Any], where: str) -> TrainConfig:
    """Plain values as a config.

    Raises:
        ValueError: naming `where` and every problem at once.
    """
    try:
        kind = train_config(architecture_of(values.get("model")))
    except ValueError as error:
        raise ValueError(f"{where}: model.{error}") from None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_message(where, describe_errors(error, kind))) from None
    problems = contradictions(config)
    if problems:
        raise ValueError(one_message(where, problems))
    return config


def lay_over(values: dict[str, Any], override: str) -> None:
    """Lay one `a.b=value` over nested values, in place."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {override!r}: write section.key=value, such as optimizer.learning_rate=3e-4")
    *owners, last = key.split(".")
    for owner in owners:
        if values.get(owner) is None:
            values[owner] = {}
        values = values[owner]
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {owner} is a value, not a section")
    values[last] = parse_yaml(text, f"override {override!r}")


def config_text(config: TrainConfig) -> str:
    """The config as YAML, every key spelled out; `load_config` reads it back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
