"""A snapshot as one safetensors file: state, tail and fingerprints, with a checksum over all of it.

The file is complete in itself. It names the model (architecture and weights), the dtype, the tokenizer and the text it
belongs to, and is refused by any other. Nothing in it is executed: tensors, and JSON of known fields.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.files import save_tensors, write_file
from megalodon.inference.context import model_fingerprint
from megalodon.inference.sampling import REPETITION_WINDOW
from megalodon.inference.snapshot import Segment, Snapshot
from megalodon.model import MegalodonConfig, MegalodonForCausalLM, MegalodonState

FORMAT = "megalodon-context-2"
KINDS = ("read", "generated")


@dataclass(frozen=True)
class ModelIdentity:
    """What a snapshot must have been made by.

    Attributes:
        model: `model_fingerprint`.
        dtype: such as `float32`.
        tokenizer: its fingerprint; tokenizer_name: for people.
        block: tokens between two boundaries, and piece: tokens read at once; both shape the last bits.
        config: the model's.
        device: where states are loaded to.
    """

    model: str
    dtype: str
    tokenizer: str
    tokenizer_name: str
    block: int
    piece: int
    config: MegalodonConfig
    device: torch.device

    @staticmethod
    def of(model: MegalodonForCausalLM, tokenizer: Tokenizer, block: int, piece: int) -> ModelIdentity:
        """That of a model and a tokenizer."""
        return ModelIdentity(
            model_fingerprint(model),
            str(model.dtype).removeprefix("torch."),
            tokenizer.fingerprint,
            tokenizer.name,
            block,
            piece,
            model.config,
            model.device,
        )


@dataclass(frozen=True)
class _Header:
    """What a file says about its tensors."""

    model: str
    dtype: str
    tokenizer: str
    tokenizer_name: str
    block: int
    piece: int
    position: int
    tokens: int
    digest: str
    text: str
    read_only: bool
    recent: list[int]
    generator: bool


def save_snapshot(path: Path, snapshot: Snapshot, identity: ModelIdentity) -> None:
    """Write the file under a temporary name, then rename it.

    Raises:
        OSError: if it cannot be written; an earlier file of this name is then as it was.
    """
    tail = [segment.tokens for segment in snapshot.tail]
    kinds = [np.full(len(segment.tokens), KINDS.index(segment.kind), np.uint8) for segment in snapshot.tail]
    tensors = {f"state.{name}": tensor.cpu() for name, tensor in snapshot.state.state_dict().items()}
    tensors["tail.tokens"] = torch.from_numpy(np.concatenate([np.array([], np.int64), *tail]))
    tensors["tail.kinds"] = torch.from_numpy(np.concatenate([np.array([], np.uint8), *kinds]))
    if snapshot.generator is not None:
        tensors["generator"] = snapshot.generator
    header = _Header(
        identity.model,
        identity.dtype,
        identity.tokenizer,
        identity.tokenizer_name,
        identity.block,
        identity.piece,
        snapshot.position,
        snapshot.tokens,
        snapshot.digest.hex(),
        snapshot.text_fingerprint,
        snapshot.read_only,
        list(snapshot.recent),
        snapshot.generator is not None,
    )
    written = json.dumps(asdict(header), sort_keys=True)
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
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a context file: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    written = metadata.get("context", "")
    if metadata.get("checksum") != _checksum(written, tensors):
        raise ValueError("the context file is damaged: its contents do not have the checksum in its header")
    header = _parse(written)
    _check_identity(header, identity)
    try:
        return _snapshot(header, tensors, identity)
    except (KeyError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"the context file is damaged: {error}") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"the context file is damaged, or no context file: {error}") from None


def _parse(written: str) -> _Header:
    try:
        values: dict[str, Any] = json.loads(written)
        return _Header(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the context file is damaged: its header cannot be read ({error})") from None


def _check_identity(header: _Header, identity: ModelIdentity) -> None:
    if header.model != identity.model:
        raise ValueError("the context was made by another model (other sizes or weights): use the model that made it")
    if header.dtype != identity.dtype:
        raise ValueError(f"the context was made in {header.dtype}; this model runs in {identity.dtype}")
    if header.tokenizer != identity.tokenizer:
        raise ValueError(
            f"the context was made with tokenizer {header.tokenizer_name!r}, not with {identity.tokenizer_name!r}"
        )
    if (header.block, header.piece) != (identity.block, identity.piece):
        raise ValueError(
            f"the context was made reading {header.piece} tokens at once; this server reads {identity.piece}: "
            "start it with the same number"
        )


def _snapshot(header: _Header, tensors: dict[str, Tensor], identity: ModelIdentity) -> Snapshot:
    parts = {name.removeprefix("state."): x for name, x in tensors.items() if name.startswith("state.")}
    state = MegalodonState.from_state_dict(parts, identity.config)
    _check_contents(parts, tensors, header, identity.dtype)
    tokens, kinds = tensors["tail.tokens"].numpy(), tensors["tail.kinds"].numpy()
    snapshot = Snapshot(
        state.to(identity.device),
        header.position,
        bytes.fromhex(header.digest),
        header.read_only,
        tuple(header.recent),
        _segments(tokens, kinds),
        tensors["generator"] if header.generator else None,
    )
    vocabulary = identity.config.vocab_size
    ids = np.concatenate([tokens, np.asarray(header.recent, dtype=np.int64)])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"the context file is damaged: it has token ids outside 0 to {vocabulary - 1}")
    if state.position.tolist() != [header.position] or header.position % identity.block:
        raise ValueError("the context file is damaged: its position is not that of its state")
    if tokens.dtype != np.int64 or kinds.max(initial=0) >= len(KINDS):
        raise ValueError("the context file is damaged: its tail is not made of tokens")
    if len(tokens) != len(kinds) or snapshot.text_fingerprint != header.text or snapshot.tokens != header.tokens:
        raise ValueError("the context file is damaged: its tail is not that of its header")
    return snapshot


def _check_contents(parts: dict[str, Tensor], tensors: dict[str, Tensor], header: _Header, dtype: str) -> None:
    """Refuse what a file with a right checksum may still hold: it may have been made by anybody."""
    for name, tensor in parts.items():
        kind = name.rsplit(".", 1)[-1]
        floating = {"keys": (getattr(torch, dtype),), "values": (getattr(torch, dtype),), "cema": (torch.float32,)}
        wanted = floating.get(kind, (torch.float64, torch.float32)) if kind != "position" else (torch.int64,)
        if tensor.dtype not in wanted:
            raise ValueError(f"the context file is damaged: its {name} is {tensor.dtype}")
        if kind in ("keys", "values") and tensor.numel():
            raise ValueError(f"the context file is damaged: its {name} is not empty")
        if not tensor.isfinite().all() or (kind == "var" and (tensor < 0).any()):
            raise ValueError(f"the context file is damaged: its {name} has values that no state has")
    if len(header.recent) > REPETITION_WINDOW:
        raise ValueError(f"the context file is damaged: it has {len(header.recent)} recent tokens")
    if header.generator:
        torch.Generator().set_state(tensors["generator"])


def _segments(tokens: np.ndarray, kinds: np.ndarray) -> tuple[Segment, ...]:
    if not len(tokens):
        return ()
    cuts = np.flatnonzero(np.diff(kinds)) + 1
    parts = zip(np.split(tokens, cuts), np.split(kinds, cuts), strict=True)
    return tuple(Segment(KINDS[int(kind[0])], part) for part, kind in parts)  # type: ignore[arg-type]


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
