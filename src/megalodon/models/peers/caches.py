"""Caches of Transformers as values: copied, detached, moved and kept on disk, whatever class they are of.

A cache is a tree of objects, lists and dicts with tensors, numbers and names at its ends. No class is named here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

Plain: TypeAlias = "int | float | bool | str | None"


def mapped(value: Any, function: Callable[[Tensor], Tensor], known: dict[int, Any] | None = None) -> Any:
    """The same tree with `function` of each tensor; nothing of it is shared but modules, configs and classes."""
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    made: Any
    if isinstance(value, Tensor):
        made = function(value)
    elif isinstance(value, list | tuple | dict):
        made = _rebuilt(value, [(name, mapped(child, function, known)) for name, child in _children(value)])
    elif _has_parts(value):
        made = copy.copy(value)
        known[id(value)] = made
        for name, child in _children(value):
            setattr(made, name, mapped(child, function, known))
    else:
        made = value
    known[id(value)] = made
    return made


def ends(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor | Plain]]:
    """(path, what stands there) of every tensor, number and name."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor) or _is_plain(value):
        yield path, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for name, child in _children(value):
        yield from ends(child, f"{path}/{name}", seen)


def filled(value: Any, found: Mapping[str, Tensor | Plain], path: str = "", known: dict[int, Any] | None = None) -> Any:
    """The tree with what `ends` gave of another of the same form in place of its own ends."""
    known = {} if known is None else known
    if path in found and (isinstance(value, Tensor) or _is_plain(value)):
        return found[path]
    if id(value) in known:
        return known[id(value)]
    made = value
    if isinstance(value, list | tuple | dict):
        made = _rebuilt(
            value, [(name, filled(child, found, f"{path}/{name}", known)) for name, child in _children(value)]
        )
    elif _has_parts(value):
        made = copy.copy(value)
        known[id(value)] = made
        for name, child in _children(value):
            setattr(made, name, filled(child, found, f"{path}/{name}", known))
    known[id(value)] = made
    return made


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors, each once."""
    found = {id(end): end for _, end in ends(value) if isinstance(end, Tensor)}
    return list(found.values())


def bytes_of(value: Any) -> int:
    """Bytes of the numbers that are remembered."""
    return sum(tensor.nbytes for tensor in tensors_of(value))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | bool | str)


def _has_parts(value: Any) -> bool:
    shared = (nn.Module, type, PreTrainedConfig, torch.device, torch.dtype, torch.Size)
    return hasattr(value, "__dict__") and not isinstance(value, shared) and not callable(value)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return list(vars(value).items()) if _has_parts(value) else []


def _rebuilt(value: Any, children: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update(children)
        return made
    values = [child for _, child in children]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*values)
    return type(value)(values)
