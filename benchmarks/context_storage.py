"""What contexts in int8 or fp8 cost: the loss of a text whose state is stored and taken up again and again, and bytes.

Every 1,000 tokens the state is stored in the given way and read back, at places inside a chunk, where there is
something to lose. The loss is of all tokens, each predicted with a state that has been through it many times.

    python benchmarks/context_storage.py runs/demo/model runs/demo-gecko/model --text war-and-peace.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from torch.nn import functional as F

from megalodon.inference import load_model, load_tokenizer_for
from megalodon.models import CausalLM, State
from megalodon.models.storage import Storage, compressed, restored

EVERY = 1000


def stored(state: State, storage: Storage) -> tuple[State, int]:
    """(the state as it comes back, bytes of it where it was)."""
    tensors = compressed(state.state_dict(), storage, state.compressible)
    size = sum(tensor.nbytes for tensor in tensors.values())
    if storage == "exact":
        return state, size
    return type(state).from_state_dict(restored(tensors, torch.float32, state.wide), state.dimensions), size


@torch.inference_mode()
def measure(model: CausalLM, ids: torch.Tensor, storage: Storage) -> dict[str, Any]:
    """Nats a token, and the mean bytes of a stored state."""
    state, nats, sizes = None, 0.0, []
    for start in range(0, ids.shape[1] - 1, EVERY):
        piece = ids[:, start : start + EVERY]
        output = model(piece, past_key_values=state, use_cache=True)
        targets = ids[:, start + 1 : start + 1 + piece.shape[1]]
        logits = output.logits[:, : targets.shape[1]]
        nats += float(F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum"))
        state, size = stored(output.past_key_values, storage)
        sizes.append(size)
    return {"loss": nats / (ids.shape[1] - 1), "bytes": sum(sizes) / len(sizes)}


def main() -> None:
    """Measure each model in each way, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40_000)
    arguments = parser.parse_args()
    result = new_run("context_storage", describe_machine(), {"text": arguments.text.name, "tokens": arguments.tokens})
    rows = []
    for folder in arguments.models:
        model = load_model(folder)
        text = arguments.text.read_text(encoding="utf-8")[: 8 * arguments.tokens]
        ids = torch.tensor([load_tokenizer_for(model, folder).encode(text)[: arguments.tokens]])
        found: dict[str, dict[str, Any]] = {way: measure(model, ids, way) for way in ("exact", "int8", "fp8")}
        result.setdefault("models", []).append({"kind": model.config.model_type, **found})
        for way, one in found.items():
            more, less = one["loss"] - found["exact"]["loss"], found["exact"]["bytes"] / one["bytes"]
            rows.append(
                [
                    model.config.model_type,
                    way,
                    f"{one['loss']:.5f}",
                    f"{more:+.5f}",
                    f"{one['bytes']:,.0f}",
                    f"{less:.2f}",
                ]
            )
    header = ["model ", "stored as ", "loss, nats", "more than exact", "bytes of a state", "times smaller"]
    page = document("Contexts in fewer bytes", result, [markdown_table(header, rows)], False)
    print("\n".join(map(str, save(result, page, RESULTS, "context_storage"))))


if __name__ == "__main__":
    main()
