"""Telling, between two tokens, whether a model is still what it was."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Made = TypeVar("Made")


class Watch:
    """A module's parts, hooks and weights as they stood; `unchanged` takes microseconds, for it runs at every token.

    What it cannot see: values written through `.data`, which leave no trace.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._owned = [owned for module in self._modules for owned in (module._modules, module._parameters)]
        self._places = [(owned, name, value) for owned in self._owned for name, value in owned.items()]
        self._attributes = [vars(module) for module in self._modules]
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._weights = list(root.parameters())
        self._versioned = [weight for weight in self._weights if not weight.is_inference()]
        self._seen = self._look()

    def unchanged(self) -> bool:
        """Whether the same modules, hooked or not as before, hold the same weights."""
        return all(owned.get(name) is value for owned, name, value in self._places) and self._look() == self._seen

    def _look(self) -> tuple[list, ...]:
        return (
            list(map(len, self._owned)),
            list(map(type, self._modules)),  # `fully_shard` changes the class of what it is given
            list(map(bool, self._hooks)),
            ["forward" in attributes for attributes in self._attributes],
            list(map(Tensor.data_ptr, self._weights)),
            list(map(attrgetter("_version"), self._versioned)),
        )


class Prepared(Generic[Module, Made]):
    """What `make` makes of a module, kept until the module changes, is forgotten, or dies."""

    def __init__(self, make: Callable[[Module], Made]) -> None:
        self._make = make
        self._kept: WeakKeyDictionary[Module, tuple[Watch, Made]] = WeakKeyDictionary()

    def of(self, module: Module) -> Made:
        """It, made anew if need be."""
        kept = self._kept.get(module)
        if kept is None or not kept[0].unchanged():
            made = self._make(module)
            kept = self._kept[module] = (Watch(module), made)
        return kept[1]

    def forget(self, module: Module) -> None:
        """Make it anew next time, for instance because values may have been written through `.data`."""
        self._kept.pop(module, None)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def is_forwarded_as_written(module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether calling the module runs the `forward` of one of these classes and nothing else."""
    return type(module) in classes and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )
