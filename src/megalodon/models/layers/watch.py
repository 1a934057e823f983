"""Telling whether a model is still what it was when something was made of it: no second copy of a weight is stale.

Weights change in ways that leave a trace (`_version`, another storage, a step of an optimiser) and in ways that leave
none: writes through `.data`, NumPy views, fused kernels. So there are two looks:

- `Watch.unchanged`, at every token, takes microseconds: modules, hooks, attributes, traces, and a few values of every
  weight that was copied;
- `Watch.same_weights`, where a generation starts, and after an optimiser's step, reads every byte that was copied. It
  costs about as much as one token does.

What is left: between two tokens of one generation, a write that leaves no trace and none of the few values changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from operator import attrgetter, call, contains, itemgetter
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext
from transformers import modeling_layers

Module = TypeVar("Module", bound=nn.Module)
Made = TypeVar("Made")

VALUES = 4
"""Values of every copied weight that are looked at between two tokens."""

_CALL, _LINEAR = nn.Module.__call__, F.linear
_steps_taken = 0


def _count_step(*_: Any) -> None:
    global _steps_taken
    if not torch.compiler.is_compiling():  # a compiled step is found by the values that it changes
        _steps_taken += 1


register_optimizer_step_post_hook(_count_step)  # fused optimisers change weights and leave their versions alone


class Watch:
    """Modules and weights as they stood.

    Args:
        root: the module to watch, with all its parts.
        copied: those of its weights whose values were copied, or made into something else.
        values: how many values of each are looked at by `unchanged`.
        exact: remember what every byte was. False spares reading all: then a step of any optimiser is a change.
    """

    def __init__(self, root: nn.Module, copied: Iterable[Tensor], values: int = VALUES, exact: bool = True) -> None:
        self._modules = list(root.modules())
        self._owned = [o for module in self._modules for o in (module._modules, module._parameters, module._buffers)]
        self._places = [dict(owned) for owned in self._owned]
        self._numbers = [
            (owned, name, value) for owned in self._owned for name, value in owned.items() if _is_one(value)
        ]
        self._attributes = [vars(module) for module in self._modules]
        self._constants = [_constants_of(attributes) for attributes in self._attributes]
        self._classes: list[Any] = list(set(map(type, self._modules)))
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._weights = [*root.parameters(), *root.buffers()]
        self._versioned = [weight for weight in self._weights if not weight.is_inference()]
        self._copied = [weight.detach() for weight in copied if weight.numel()]
        self._readable = all(weight.device.type == "cpu" for weight in self._copied)
        self._samples = [_sample(weight, values) for weight in self._copied] if self._readable else []
        self._steps = _steps_taken
        self._seen, self._sampled = self._look(), self._few()
        self._digest = self._hash() if exact and self._readable else None

    def unchanged(self) -> bool:
        """Whether the same modules, attributes, hooks and weights are there, by what is quick to see."""
        try:
            # what is the same object is equal to Python, and several times as quickly found so as by a loop
            there = self._owned == self._places and self._look() == self._seen
            there = there and all(o.get(name) is value for o, name, value in self._numbers)
        except (AttributeError, KeyError, RuntimeError):  # gone; or another tensor, and `==` of two has no one truth
            return False
        if there and self._steps != _steps_taken:
            there, self._steps = self.same_weights(), _steps_taken
        return there and self._few() == self._sampled

    def same_weights(self) -> bool:
        """Whether every byte of the copied weights is as it was; on a GPU, where reading takes long, False."""
        return self._digest is not None and self._hash() == self._digest

    def _look(self) -> tuple[Any, ...]:
        return (
            calls_are_plain(),
            list(map(type, self._modules)),  # `fully_shard` changes the class of what it is given
            [kind.forward for kind in self._classes],
            list(map(call, self._constants, self._attributes)),
            list(map(len, self._hooks)),
            list(map(contains, self._attributes, repeat("forward"))),
            list(map(Tensor.data_ptr, self._weights)),
            list(map(attrgetter("_version"), self._versioned)),
        )

    def _few(self) -> bytes:
        return np.concatenate(self._samples).tobytes() if self._samples else b""

    def _hash(self) -> int:
        digest = xxhash.xxh3_64()
        for weight in self._copied:
            digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.intdigest()


def _is_one(value: object) -> bool:
    """Whether `==` with another of the kind could be true: a tensor of one number."""
    return isinstance(value, Tensor) and value.numel() == 1


def _constants_of(attributes: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """What reads the module's numbers, flags and names, such as `eps` and `training`, from its attributes."""
    plain = (bool, int, float, str, type(None))
    return itemgetter("training", *(name for name, value in attributes.items() if isinstance(value, plain)))


def _sample(weight: Tensor, values: int) -> np.ndarray:
    """int8 [n]: about so many values of a weight, evenly spread, bytes by bytes: a view of where they are."""
    count = weight.numel()
    if not weight.is_contiguous():
        weight = weight[(0,) * (weight.ndim - 1)]  # the last dimension, whatever its stride, is one view
        count = weight.numel()
    step = max(count // (values + 1), 1) | 1  # odd: not always the same column of a matrix
    spread = weight.view(-1)[::step] if weight.is_contiguous() else weight[::step]
    return spread.view(_INTEGERS[spread.element_size()]).numpy()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Kept(Generic[Made]):
    watch: Watch
    made: Made
    starts: bool = False


_all_prepared: WeakSet[Prepared[Any, Any]] = WeakSet()


def let_go(root: nn.Module) -> None:
    """Hold nothing of a module and its parts, so that PyTorch may exchange the tensors that their weights are."""
    for prepared in _all_prepared:
        for module in root.modules():
            prepared.forget(module)


class Prepared(Generic[Module, Made]):
    """What `make` makes of a module, kept until the module changes, is forgotten, or dies.

    Args:
        make: gives what is wanted of a module, and those of its weights whose values went into it.
    """

    def __init__(self, make: Callable[[Module], tuple[Made, Iterable[Tensor]]]) -> None:
        self._make = make
        self._kept: WeakKeyDictionary[Module, _Kept[Made]] = WeakKeyDictionary()
        _all_prepared.add(self)

    def of(self, module: Module) -> Made:
        """It, made anew if need be."""
        kept = self._kept.get(module)
        if kept is None or not kept.watch.unchanged() or (kept.starts and not kept.watch.same_weights()):
            made, copied = self._make(module)
            kept = self._kept[module] = _Kept(Watch(module, copied), made)
        kept.starts = False
        return kept.made

    def start(self, module: Module) -> None:
        """A generation starts: the next `of` reads all weights."""
        if (kept := self._kept.get(module)) is not None:
            kept.starts = True

    def forget(self, module: Module) -> None:
        """Make it anew next time, and hold no memory until then."""
        self._kept.pop(module, None)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def is_forwarded_as_written(module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether calling the module runs the `forward` of one of these classes, as its file has it, and nothing else."""
    kind: Any = type(module)
    if kind not in classes or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if torch.compiler.is_compiling():  # the compiler sees what else there may be where it calls the module
        return True
    return _is_as_written(kind.forward, kind) and calls_are_plain()


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether an operator that is given the module's weights does all that calling the module would, gradients
    included: no hooks, plain parameters, and no compiler at work, which sees more by itself."""
    if torch.compiler.is_compiling() or not is_forwarded_as_written(module, (kind,)):
        return False
    if module._backward_hooks or module._backward_pre_hooks or torch_module._global_backward_hooks:
        return False
    parameters = (value for value in module._parameters.values() if value is not None)
    return not torch_module._global_backward_pre_hooks and all(type(value) is nn.Parameter for value in parameters)


@cache
def _is_as_written(forward: Any, kind: Any) -> bool:
    files = {sys.modules[base.__module__].__file__ for base in kind.__mro__ if "forward" in vars(base)}
    files.add(modeling_layers.__file__)  # Transformers wraps blocks' forward
    while forward is not None:
        code = getattr(forward, "__code__", None)
        if code is None or code.co_filename not in files:
            return False
        forward = getattr(forward, "__wrapped__", None)
    return True


def calls_are_plain() -> bool:
    """Whether calls of modules, and of the functions of torch that they are made of, are seen by nobody else."""
    return (
        not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and nn.Module.__call__ is _CALL
        and F.linear is _LINEAR
        and torch._C._len_torch_dispatch_stack() == 0
        and (torch._C._len_torch_function_stack() == 0 or _only_devices())
    )


def _only_devices() -> bool:
    """Whether all that listens to functions is `with torch.device(...)`, which says where new tensors are."""
    stack = range(torch._C._len_torch_function_stack())
    return all(isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in stack)
