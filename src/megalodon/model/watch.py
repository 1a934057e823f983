"""Telling, between two tokens, whether a model is still what it was."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn


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


def is_forwarded_as_written(module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether calling the module runs the `forward` of one of these classes and nothing else."""
    return type(module) in classes and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )
