"""What a mixer is, and what it remembers: the interface that every file of this folder fills in.

A mixer is one module in one file with one line in `MIXERS`. It moves information along time; all else (norms, residual,
feed-forward layer) is the block's. To write one:

- `Parameters`: the fields that users may set, with defaults that fit any width (None: worked out from the config).
- a `Memory` of its own: a frozen dataclass of tensors with the row first. Zeros are the memory of a row that has read
  nothing, so that resetting a row is filling it with zeros.
- `empty`: that memory for a batch; `forward`: x and the memory before it -> y and the memory after it.
- `kind`: "constant", "growing" (say so: it costs) or "none" (the mixer cannot be read in pieces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from megalodon.models.implicit import Path
from megalodon.ops.layout import Layout

if TYPE_CHECKING:
    from megalodon.models.kin.config import KinConfig

ALIVE = 1.2
"""So many times the bytes that it remembers may a memory keep alive."""

Kind = Literal["constant", "growing", "none"]


@dataclass(frozen=True)
class Memory:
    """What a mixer remembers: fields are tensors [B, ...] or memories in turn. A value: nothing changes it.

    Subclasses are frozen dataclasses too.

    Attributes:
        GROWING: fields whose second dimension is time: place p holds what token p of the row's document left. It is as
            wide as the row that has read most needs; a row's places beyond its own tokens mean nothing.
        ASIDE: fields that are no part of what is remembered, None in every memory made from another.
        PARTS: name -> fields which, zeros together, have read nothing whatever the row's position.
    """

    GROWING: ClassVar[frozenset[str]] = frozenset()
    ASIDE: ClassVar[frozenset[str]] = frozenset()
    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType({})

    def forget(self, part: str) -> Self:
        """The memory without one of its `PARTS`; as it is where it has none of this name."""
        fields = self.PARTS.get(part, frozenset())
        return replace(self, **{name: torch.zeros_like(getattr(self, name)) for name in fields})

    def children(self) -> Iterator[tuple[str, Tensor | Memory, bool]]:
        """(name, value, whether its second dimension grows) of each field."""
        for item in fields(self):
            if item.name not in self.ASIDE:
                yield item.name, getattr(self, item.name), item.name in self.GROWING

    def _made(self, changed: Mapping[str, Any]) -> Self:
        return replace(self, **dict.fromkeys(self.ASIDE), **changed)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed = {n: x._each(function) if isinstance(x, Memory) else function(x) for n, x, _ in self.children()}
        return self._made(changed)

    def made_of(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A memory of this form, of what `function` makes of each tensor."""
        return self._each(function)

    def own(self) -> Self:
        """This memory, or, where it is a small part of larger tensors, a copy that does not keep those alive."""
        tensors = list(self.named().values())
        alive = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        if sum(alive.values()) <= ALIVE * sum(x.nbytes for x in tensors):
            return self
        return self._each(lambda x: x.clone() if x.untyped_storage().nbytes() > ALIVE * x.nbytes else x)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A memory with copies of what `function` makes of each tensor."""
        return self._each(lambda x: function(x).clone())

    def detach(self) -> Self:
        """The same memory without its history."""
        return self._each(lambda x: x.detach())

    def cast(self, dtype: torch.dtype) -> Self:
        """The memory with tensors of less than float32 in `dtype`; sums keep their precision."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() and (x.element_size() < 4 or dtype.itemsize >= 4) else x

        return self._each(cast)

    def reset(self, rows: Tensor) -> Self:
        """The memory in which the rows of a bool mask [B] have read nothing."""
        return self._each(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0))

    def fitted(self, position: Tensor, sizes: Any) -> Self:
        """As it is: growing fields are as wide as the batch needs."""
        return self

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, by name."""
        return self.named()

    def named(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors by name; those of a memory inside are called `name.theirs`."""
        found: dict[str, Tensor] = {}
        for name, value, _ in self.children():
            if isinstance(value, Memory):
                found |= value.named(f"{prefix}{name}.")
            else:
                found[prefix + name] = value
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Self:
        """This memory's form, filled with the tensors of `named()`.

        Raises:
            ValueError: one is missing or has another shape (rows and growing places aside); the message names it.
        """
        filled: dict[str, Any] = {}
        for name, value, grows in self.children():
            if isinstance(value, Memory):
                filled[name] = value.with_tensors(tensors, f"{prefix}{name}.")
                continue
            if prefix + name not in tensors:
                raise ValueError(f"the state lacks {prefix + name}: it is damaged or of another model")
            given = tensors[prefix + name]
            fixed = 2 if grows else 1
            if given.ndim != value.ndim or given.shape[fixed:] != value.shape[fixed:]:
                wanted = ["B", "n"][:fixed] + [str(size) for size in value.shape[fixed:]]
                raise ValueError(
                    f"the state's {prefix + name} has shape {tuple(given.shape)}: "
                    f"a state of this model has [{', '.join(wanted)}]"
                )
            filled[name] = given
        return self._made(filled)

    def shapes(self, prefix: str = "") -> dict[str, tuple[int | None, ...]]:
        """The shape of each tensor of `named`; None stands for the batch, -1 for any length."""
        found: dict[str, tuple[int | None, ...]] = {}
        for name, value, grows in self.children():
            if isinstance(value, Memory):
                found |= value.shapes(f"{prefix}{name}.")
            else:
                sizes = value.shape[2:] if grows else value.shape[1:]
                found[prefix + name] = (None, -1, *sizes) if grows else (None, *sizes)
        return found

    def dtypes(self, prefix: str = "") -> dict[str, torch.dtype]:
        """The dtype of each tensor of `named`."""
        return {name: tensor.dtype for name, tensor in self.named(prefix).items()}

    @staticmethod
    def concatenate(memories: Sequence[Memory]) -> Memory:
        """One batch of the rows of several memories of one form, in order."""
        first = memories[0]
        joined: dict[str, Any] = {}
        for name, value, grows in first.children():
            parts = [getattr(memory, name) for memory in memories]
            if isinstance(value, Memory):
                joined[name] = Memory.concatenate(parts)
            else:
                joined[name] = torch.cat(_equally_wide(parts) if grows else parts)
        return first._made(joined)


def _equally_wide(parts: Sequence[Tensor]) -> list[Tensor]:
    width = max(part.shape[1] for part in parts)
    return [
        torch.cat([part, part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])], dim=1) for part in parts
    ]


class Reference(NamedTuple):
    """What a mixer's authors call by other names, as ours.

    Attributes:
        fields: of `KinConfig` (`model_dim`, `num_heads`, ...).
        parameters: of the mixer.
        state_dict: of the mixer.
    """

    fields: dict[str, Any]
    parameters: dict[str, Any]
    state_dict: dict[str, Tensor]


AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]


class MixerParameters(BaseModel):
    """What users may set of a mixer; subclasses add fields. Unknown names, wrong types and numbers that are not finite
    are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def check(self, config: KinConfig) -> None:
        """Raise ValueError, naming the field, unless these parameters fit a model of this config."""


class Mixer(nn.Module):
    """A module that mixes along time.

    Attributes:
        kind: how its memory grows with what was read.
        two_way_mode: whether it has a noncausal form, used where `config.two_way`.
        causal_mode: whether it has a causal form.
        turns_heads: whether it turns the heads of the config, of `head_dim`, in pairs.
        own_rotary: whether it turns heads by powers of rope_base and in no other way.
        takes_residual: whether it is given the residual stream itself, not its norm, to bring norms of its own.
    """

    kind: ClassVar[Kind]
    two_way_mode: ClassVar[bool] = False
    causal_mode: ClassVar[bool] = True
    turns_heads: ClassVar[bool] = False
    own_rotary: ClassVar[bool] = False
    takes_residual: ClassVar[bool] = False

    class Parameters(MixerParameters):
        pass

    def __init__(self, config: KinConfig, layer_index: int, parameters: Any) -> None:
        super().__init__()
        self.two_way = config.two_way

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> Memory | None:
        """The memory of `batch` rows that have read nothing: zeros, growing fields of no width. None: there is none.

        `dtype` is that of the activations; sums are kept in `full_precision(dtype)`.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Any]:
        """Mix.

        Args:
            x: [B, L, D]; the normalised input.
            memory: what the rows' first documents have left; None for rows that have read nothing.
            layout: where the tokens stand: packed documents, padding at the end of rows, and how many tokens of its
                document each row has read before (`layout.positions`).

        Returns:
            (y [B, L, D], the memory after each row's last real token, of its last document). What stands in y at
            padding is ignored.
        """
        raise NotImplementedError

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        """`forward` before the output projection, of mixers that have heads and one: (each head's output
        [B, L, H, e], the memory after it)."""
        raise NotImplementedError(f"{type(self).__name__} has no heads before an output projection")

    def mixing_matrix(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, H, L, L]: how much each token reads of each, of mixers that are written so."""
        raise NotImplementedError(f"{type(self).__name__} has no mixing matrix")

    @classmethod
    def kind_with(cls, parameters: MixerParameters) -> Kind:
        """`kind`, where it depends on the parameters."""
        return cls.kind

    @classmethod
    def turns_with(cls, parameters: Any) -> bool:
        """`turns_heads`, where it depends on the parameters."""
        return cls.turns_heads

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' config and parameters, under the names of their code, as ours.

        Raises:
            ValueError: there is no published code, or it has an option that is not reproduced; the message names it.
        """
        raise ValueError(f"{cls.__name__} has no published code whose parameters could be read")

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        """Multiply-adds of one token in rows of `length` that belong to no parameter: of scores, weighted values, and
        products with a state. Averages and scans do not count."""
        return 0.0

    def cross(self, x: Tensor, source: Tensor, padding: Tensor | None = None) -> Tensor:
        """Read another sequence, of which every token sees all: x [B, L, D] and source [B, M, D], both normalised ->
        [B, L, D]. `padding` bool [B, M]: True where the source has no token.

        Raises:
            ValueError: this mixer has no such form.
        """
        raise ValueError(f"{type(self).__name__} has no form that reads another sequence")

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        """The implicit attention (`megalodon.models.implicit`) of rows that have read nothing: x [B, L, D] as for
        `forward`, whose result is the sum of the paths'.

        Raises:
            ValueError: this mixer is not written as one.
        """
        raise ValueError(f"{type(self).__name__} is not written as an implicit attention matrix")

    def initialise(self, std: float) -> None:
        """Set what is not a plain linear layer (those are drawn from N(0, std) before), through
        `transformers.initialization`, which leaves loaded parameters alone."""
