"""A snapshot as one safetensors file: state, tail and fingerprints, with a checksum over all of it.

The file is complete in itself. It names the model (architecture and weights), the dtype, the tokenizer and the text it
belongs to, and is refused by any other. Nothing in it is executed: tensors, and JSON of known fields. The command line
and the server write the same files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.files import save_tensors, write_file
from megalodon.inference.fingerprint import hash_tensor, model_fingerprint
from megalodon.inference.sampling import REPETITION_WINDOW
from megalodon.inference.snapshot import Segment, Snapshot
from megalodon.models import CausalLM, Config, State
from megalodon.models.storage import BLOCK, SCALE, Storage, compressed, restored

FORMAT = "megalodon-context-1"
KINDS = ("read", "generated")
MOST_HEADER = 1 << 20
"""Bytes of a file's header: names, shapes and fingerprints of a thousand layers have room."""
MOST_GENERATOR = 1 << 14
"""Bytes of a random generator's state."""
MOST_VALUE = 1e12
"""No number in a state is larger: products of such numbers stay finite in float32."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a snapshot must have been made by.

    Attributes:
        model: `model_fingerprint`.
        dtype: such as `float32`.
        tokenizer: its fingerprint; tokenizer_name: for people.
        block: tokens between two boundaries, and piece: tokens read at once; both shape the last bits. None for a
            `Session`, which takes up anybody's snapshots, and whose snapshots, with a tail of one token, anybody can.
        config: the model's; state_class: that of its states.
        device: where states are loaded to.
        storage: how states are written; any is read.
    """

    model: str
    dtype: str
    tokenizer: str
    tokenizer_name: str
    block: int | None
    piece: int | None
    config: Config
    state_class: type[State]
    device: torch.device
    storage: Storage = "exact"

    @staticmethod
    def of(
        model: CausalLM,
        tokenizer: Tokenizer,
        block: int | None = None,
        piece: int | None = None,
        storage: Storage = "exact",
    ) -> ModelIdentity:
        """That of a model and a tokenizer."""
        return ModelIdentity(
            model_fingerprint(model),
            str(model.dtype).removeprefix("torch."),
            tokenizer.fingerprint,
            tokenizer.name,
            block,
            piece,
            model.config,
            model.model.state_class,
            model.device,
            storage,
        )


Count = Annotated[int, Field(ge=0, lt=2**53)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Header(BaseModel):
    """What a file says about its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str
    dtype: str
    tokenizer: str
    tokenizer_name: str
    block: Annotated[int, Field(ge=1)] | None
    piece: Annotated[int, Field(ge=1)] | None
    position: Count
    tokens: Count
    digest: Digest | None
    text: Digest | None
    read_only: bool
    recent: Annotated[list[Count], Field(max_length=REPETITION_WINDOW)]
    generator: bool
    storage: Storage = "exact"


def save_snapshot(path: Path, snapshot: Snapshot, identity: ModelIdentity) -> None:
    """Write the file under a temporary name, then rename it.

    Raises:
        OSError: if it cannot be written; an earlier file of this name is then as it was.
    """
    tail = [segment.tokens for segment in snapshot.tail]
    kinds = [np.full(len(segment.tokens), KINDS.index(segment.kind), np.uint8) for segment in snapshot.tail]
    state = compressed(snapshot.state.state_dict(), identity.storage, identity.state_class.compressible)
    tensors = {f"state.{name}": tensor.cpu() for name, tensor in state.items()}
    tensors["tail.tokens"] = torch.from_numpy(np.concatenate([np.array([], np.int64), *tail]))
    tensors["tail.kinds"] = torch.from_numpy(np.concatenate([np.array([], np.uint8), *kinds]))
    if snapshot.generator is not None:
        tensors["generator"] = snapshot.generator
    header = _Header(
        model=identity.model,
        dtype=identity.dtype,
        tokenizer=identity.tokenizer,
        tokenizer_name=identity.tokenizer_name,
        block=identity.block,
        piece=identity.piece,
        position=snapshot.position,
        tokens=snapshot.tokens,
        digest=None if snapshot.digest is None else snapshot.digest.hex(),
        text=snapshot.text_fingerprint,
        read_only=snapshot.read_only,
        recent=list(snapshot.recent),
        generator=snapshot.generator is not None,
        storage=identity.storage,
    )
    written = header.model_dump_json(exclude={"storage"} if header.storage == "exact" else None)
    metadata = {"format": FORMAT, "context": written, "checksum": _checksum(written, tensors)}
    write_file(path, lambda temporary: save_tensors(temporary, tensors, metadata))


def load_snapshot(path: Path, identity: ModelIdentity) -> Snapshot:
    """The snapshot in a file, on the model's device.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no context, or belongs to another model, dtype or tokenizer; says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no context file {path}")
    entries, metadata = _first_look(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a context file: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    written = metadata.get("context", "")
    try:
        header = _Header.model_validate_json(written)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ValueError(f"the context file is damaged: its header's {where}: {first['msg']}") from None
    _check_identity(header, identity)
    _check_sizes(entries, header, identity)
    tensors = _read(path)
    if metadata.get("checksum") != _checksum(written, tensors):
        raise ValueError("the context file is damaged: its contents do not have the checksum in its header")
    try:
        return _snapshot(header, tensors, identity)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the context file is damaged: {error}") from None


def _first_look(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(what the file says of its tensors, its metadata), without reading any tensor."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MOST_HEADER:
                raise ValueError(f"its header would have {length:,} bytes, more than {MOST_HEADER:,}")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are none")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"the context file is damaged, or no context file: {str(error)[:200]}") from None
    return entries, metadata


def _check_sizes(entries: dict[str, Any], header: _Header, identity: ModelIdentity) -> None:
    """Refuse a file with other tensors than a context of this model has, or larger ones, before one is read."""
    kind = identity.state_class
    sizes = kind.dimensions_class.of(identity.config)
    most: dict[str, list[int]] = {"tail.tokens": [header.block or 1], "tail.kinds": [header.block or 1]}
    if header.generator:
        most["generator"] = [MOST_GENERATOR]
    for name, shape in kind.shapes(sizes).items():
        places = kind.places(sizes, name, header.position) if -1 in shape else 0
        own = most[f"state.{name}"] = [1 if size is None else places if size == -1 else size for size in shape]
        if header.storage != "exact" and name.rsplit(".", 1)[-1] in kind.compressible:
            most[f"state.{name}{SCALE}"] = [*own[:-1], -(-own[-1] // BLOCK)]
    for name, entry in entries.items():
        stated = entry.get("shape") if isinstance(entry, dict) else None
        if name not in most or not isinstance(stated, list) or len(stated) != len(most[name]):
            raise ValueError(f"the context file is damaged: no context of this model has a {name[:80]} like its own")
        if any(type(size) is not int or not 0 <= size <= bound for size, bound in zip(stated, most[name], strict=True)):
            raise ValueError(f"the context file is damaged: its {name} is larger than that of {header.position} tokens")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"the context file is damaged, or no context file: {error}") from None


def _check_identity(header: _Header, identity: ModelIdentity) -> None:
    if header.dtype != identity.dtype:
        raise ValueError(f"the context was made in {header.dtype}; this model runs in {identity.dtype}")
    if header.model != identity.model:
        raise ValueError("the context was made by another model (other sizes or weights): use the model that made it")
    if header.tokenizer != identity.tokenizer:
        raise ValueError(
            f"the context was made with tokenizer {header.tokenizer_name!r}, not with {identity.tokenizer_name!r}"
        )
    ways = (header.block, header.piece), (identity.block, identity.piece)
    if (None, None) not in ways and ways[0] != ways[1]:
        raise ValueError(
            f"the context was made reading {header.piece} tokens at once; this server reads {identity.piece}: "
            "start it with the same number"
        )


def _snapshot(header: _Header, tensors: dict[str, Tensor], identity: ModelIdentity) -> Snapshot:
    parts = {name.removeprefix("state."): x for name, x in tensors.items() if name.startswith("state.")}
    if header.storage != "exact":
        parts = restored(parts, getattr(torch, identity.dtype), identity.state_class.wide)
    state = identity.state_class.from_state_dict(parts, identity.config)
    _check_state(parts, header, identity)
    tokens, kinds = tensors["tail.tokens"].numpy(), tensors["tail.kinds"].numpy()
    _check_tail(tokens, kinds, header, identity.config.vocab_size)
    if header.generator:
        torch.Generator().set_state(tensors["generator"])
    snapshot = Snapshot(
        state.to(identity.device),
        header.position,
        None if header.digest is None else bytes.fromhex(header.digest),
        header.read_only and header.storage == "exact",  # else it is not, to the bit, what reading the text gives
        tuple(header.recent),
        _segments(tokens, kinds),
        tensors["generator"] if header.generator else None,
    )
    if snapshot.text_fingerprint != header.text or snapshot.tokens != header.tokens:
        raise ValueError("the context file is damaged: its tail is not that of its header")
    return snapshot


def _check_state(parts: dict[str, Tensor], header: _Header, identity: ModelIdentity) -> None:
    """Refuse what a file with a right checksum may still hold: it may have been made by anybody."""
    if parts["position"].tolist() != [header.position]:
        raise ValueError("the context file is damaged: its position is not that of its state")
    if header.read_only and (header.digest is None or header.block is None or header.position % header.block):
        raise ValueError("the context file is damaged: its state is not one that reading a known text leaves")
    kind = identity.state_class
    sizes = kind.dimensions_class.of(identity.config)
    shapes = kind.shapes(sizes)
    for name, tensor in parts.items():
        own = getattr(torch, identity.dtype)
        right = {kind.tensor_dtype(name, own, wide) for wide in (torch.float32, torch.float64)}
        if tensor.dtype not in right:
            raise ValueError(f"the context file is damaged: its {name} is {tensor.dtype}")
        if name not in shapes:
            raise ValueError(f"the context file is damaged: no state of this model has a {name}")
        if tensor.ndim != len(shapes[name]):
            raise ValueError(f"the context file is damaged: its {name} has {tensor.ndim} dimensions")
        count = tensor.shape[shapes[name].index(-1)] if -1 in shapes[name] else None
        if count is not None and not kind.could_have(sizes, name, header.position, count):
            raise ValueError(f"the context file is damaged: its {name} is not that of {header.position} tokens")
        told = tensor.masked_fill(tensor == kind.nothing(name), 0)  # such as the -inf of a memory that is empty
        large = told.is_floating_point() and told.numel() and float(told.abs().amax()) > MOST_VALUE
        if large or not kind.is_possible(name, told):
            raise ValueError(f"the context file is damaged: its {name} has values that no state has")


def _check_tail(tokens: np.ndarray, kinds: np.ndarray, header: _Header, vocabulary: int) -> None:
    if tokens.dtype != np.int64 or tokens.ndim != 1 or kinds.shape != tokens.shape or kinds.dtype != np.uint8:
        raise ValueError("the context file is damaged: its tail is not made of tokens")
    if len(tokens) > (header.block or 1) or kinds.max(initial=0) >= len(KINDS):
        raise ValueError(f"the context file is damaged: its tail of {len(tokens)} tokens is none that is ever written")
    ids = np.concatenate([tokens, np.array(header.recent, dtype=np.int64)])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"the context file is damaged: it has token ids outside 0 to {vocabulary - 1}")


def _segments(tokens: np.ndarray, kinds: np.ndarray) -> tuple[Segment, ...]:
    if not len(tokens):
        return ()
    cuts = np.flatnonzero(np.diff(kinds)) + 1
    parts = zip(np.split(tokens, cuts), np.split(kinds, cuts), strict=True)
    return tuple(Segment(KINDS[int(kind[0])], part) for part, kind in parts)  # type: ignore[arg-type]


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{header}\n".encode())
    for name, tensor in sorted(tensors.items()):
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()
