"""Times layers and models on a GPU, bfloat16, beside Llama and, where their packages are installed, linear peers.

Sections: `layer` (one 7B layer against a Llama-2-7B layer with FlashAttention through SDPA, forward and backward),
`training` (a step of the 1.3B preset at 32K tokens with AdamW), `small` (a 12 M-parameter byte model against Llama of
its width) and `decode` (the 7B preset, one token at a time, at several context lengths).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from _gpu import finish, markdown_table, milliseconds, start
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from megalodon import MegalodonConfig, MegalodonForCausalLM, ops
from megalodon.model.block import MegalodonBlock
from megalodon.ops import Layout

SECTIONS = ("layer", "training", "small", "decode")


def attempt(run: Callable[[], dict[str, Any]], **names: Any) -> dict[str, Any]:
    """A result, or what prevented it: memory that is too small is a finding."""
    try:
        return {**names, **run()}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**names, "failed": "out of memory"}


def forward_backward(call: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> dict[str, float]:
    """Milliseconds and tokens per second of one pass there and back."""
    upstream = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(call(x), [x, *parameters], upstream)

    time, spread = milliseconds(step, 10)
    return {"ms": time, "spread": spread, "tokens_per_second": x.shape[0] * x.shape[1] / time * 1e3}


def our_layer(config: MegalodonConfig, compiled: bool) -> Callable[[int, int], dict[str, float]]:
    block = MegalodonBlock(config, 0).to("cuda", torch.bfloat16).train()
    block.cema.float()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.02)

    def run(batch: int, length: int) -> dict[str, float]:
        layout = Layout(batch, length, "cuda", chunk_size=config.chunk_size)
        turns = ops.rotations(layout.chunk_positions, config.head_dim, config.rope_base)
        call = torch.compile(block) if compiled else block
        x = torch.randn(batch, length, config.model_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        return forward_backward(lambda x: call(x, None, turns, layout, False)[0], list(block.parameters()), x)

    return run


def llama_layer(compiled: bool) -> Callable[[int, int], dict[str, float]]:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(config, 0).to("cuda", torch.bfloat16).train()
    rotary = LlamaRotaryEmbedding(config).to("cuda")

    def run(batch: int, length: int) -> dict[str, float]:
        x = torch.randn(batch, length, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        turns = rotary(x, torch.arange(length, device="cuda")[None])
        call = torch.compile(layer) if compiled else layer

        def forward(x: Tensor) -> Tensor:
            out = call(x, position_embeddings=turns)
            return out[0] if isinstance(out, tuple) else out

        return forward_backward(forward, list(layer.parameters()), x)

    return run


def time_layers(lengths: list[int], tokens: int) -> list[dict[str, Any]]:
    """Both layers in turn at each length; a ratio compares two figures of this run."""
    results = []
    for length in lengths:
        batch = max(tokens // length, 1)
        for compiled in (False, True):
            ways = {
                "ours": our_layer(MegalodonConfig.from_preset("paper-7b"), compiled),
                "llama": llama_layer(compiled),
            }
            found = {
                name: attempt(partial(run, batch, length), layer=name, length=length, batch=batch, compiled=compiled)
                for name, run in ways.items()
            }
            if all("ms" in r for r in found.values()):
                found["ours"]["over_llama"] = found["ours"]["tokens_per_second"] / found["llama"]["tokens_per_second"]
            results.extend(found.values())
    return results


def train_step(model: nn.Module, vocabulary: int, batch: int, length: int) -> dict[str, float]:
    """One step: forward with loss, backward, fused AdamW."""
    model.to("cuda", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocabulary, (batch, length), device="cuda")
    extra = {"return_logits": False} if isinstance(model, MegalodonForCausalLM) else {}

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    time, spread = milliseconds(step, 5)
    return {"ms": time, "spread": spread, "tokens_per_second": batch * length / time * 1e3}


def time_training(ceilings: Any, length: int) -> list[dict[str, Any]]:
    config = MegalodonConfig.from_preset("1.3b")

    def run() -> dict[str, Any]:
        model = MegalodonForCausalLM(config)
        model.gradient_checkpointing_enable()
        found = train_step(model, config.vocab_size, 1, length)
        pairs = min(length, config.chunk_size) / 2
        attention = 6 * config.num_layers * pairs * (config.z_dim + config.value_dim)
        flops = length * (6 * model.num_parameters() + attention)
        return {**found, "of_matrix_rate": ceilings.matrix_floor(flops) / found["ms"]}

    return [attempt(run, model="1.3b", length=length, checkpointing=True)]


def time_small() -> list[dict[str, Any]]:
    """A byte model of 12 M parameters at length 512, batch 128, beside Llama of that width."""
    ours = MegalodonConfig(
        vocab_size=256, num_layers=6, model_dim=384, z_dim=192, value_dim=768, num_heads=3, ffn_hidden_dim=1024,
        chunk_size=512, norm_num_groups=6, swiglu=True,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=256, num_hidden_layers=6, hidden_size=384, intermediate_size=1408, num_attention_heads=6
    )
    results = []
    for compiled in (False, True):
        for name, make in (("ours", lambda: MegalodonForCausalLM(ours)), ("llama", lambda: LlamaForCausalLM(llama))):
            model = make()
            if compiled:
                model.compile()
            size = {"parameters": sum(p.numel() for p in model.parameters()), "compiled": compiled}
            results.append(attempt(lambda m=model: train_step(m, 256, 128, 512), model=name, **size))
    return results


@torch.inference_mode()
def time_decode(ceilings: Any, preset: str, batches: list[int], contexts: list[int]) -> list[dict[str, Any]]:
    """Milliseconds for a token after contexts that were really read, in pieces; the floor reads every weight once."""
    config = MegalodonConfig.from_preset(preset)
    with torch.device("cuda"):
        model = MegalodonForCausalLM(config).to(torch.bfloat16).eval()
    floor = ceilings.memory_floor(sum(p.nbytes for p in model.parameters()))
    results = []
    for batch in batches:
        state, read = None, 0
        for context in contexts:
            while read < context:
                piece = torch.randint(config.vocab_size, (batch, min(4096, context - read)), device="cuda")
                state = model(piece, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
                read += piece.shape[1]
            token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
            time, spread = milliseconds(lambda s=state, t=token: model(t, past_key_values=s, use_cache=True), 20)
            results.append(
                {
                    "batch": batch,
                    "context": context,
                    "ms": time,
                    "spread": spread,
                    "floor": floor,
                    "over_floor": time / floor,
                }
            )
    return results


def main(
    section: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}; can be repeated. All by default.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes: shows that the script works.")] = False,
) -> None:
    """Times, writes JSON and a table."""
    section = section or list(SECTIONS)
    if unknown := set(section) - set(SECTIONS):
        raise typer.BadParameter(f"--section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    result, ceilings = start("models", {"sections": section, "quick": quick})
    tables = []
    for name in section:
        match name:
            case "layer":
                rows = time_layers([4096] if quick else [4096, 32768, 131072], 4096 if quick else 32768)
            case "training":
                rows = time_training(ceilings, 4096 if quick else 32768)
            case "small":
                rows = time_small()
            case _:
                contexts = [1024] if quick else [1024, 100 * 1024, 1 << 20]
                rows = time_decode(ceilings, "1.3b" if quick else "paper-7b", [1] if quick else [1, 32], contexts)
        result[name] = rows
        columns = list(dict.fromkeys(key for r in rows for key in r))
        cells = [[_cell(r.get(column, "")) for column in columns] for r in rows]
        tables += [f"## {name}", "", markdown_table([f"{column} " for column in columns], cells), ""]
    finish(result, "models-quick" if quick else "models", "Layers and models on a GPU", tables)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
