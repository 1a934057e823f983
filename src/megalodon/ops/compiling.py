"""What torch.compile sees of an operator: kernels on plain batches, as PyTorch operators. It leaves the rest alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megalodon.ops.backend import backend_for
from megalodon.ops.exported import EXPORTED
from megalodon.ops.layout import PlainLayout

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def one_break_at_most(operator: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Has torch.compile run an operator as written wherever it could not turn the whole of it into a graph.

    Without a plain layout, tables are made in NumPy from the lengths of documents, which the compiler would break into
    many graphs and compile again for every new packing; and the blocked forms write into strided memory. Either way
    there is one break, what stands around it is fused, and nothing is compiled twice.
    """
    as_written = torch.compiler.disable(operator)

    @wraps(operator)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if torch.compiler.is_exporting() and (opaque := EXPORTED.get(operator.__name__)) is not None:
            exported: Result = opaque(*arguments, **named)
            return exported
        if torch.compiler.is_compiling() and not _traceable(arguments, named):
            return as_written(*arguments, **named)
        return operator(*arguments, **named)

    return run


def _traceable(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    x = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
    backend = named.get("backend") or backend_for(x.device, x.dtype)[0]
    layout = named.get("layout")
    plain = layout is None or isinstance(layout, PlainLayout)
    return backend.startswith("triton") and plain and named.get("segment_ids") is None
