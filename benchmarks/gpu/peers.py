"""One layer of width 4096 of ours, of Llama and of linear-time peers: forward and backward, bfloat16, in one run.

- Llama-2-7B's layer, from Transformers.
- Mamba-2 and gated linear attention, from flash-linear-attention, where `fla` can be imported.
- The PyTorch port of Megalodon (pszemraj/megalodon-hf) in `--port FOLDER`, a checkout.
- The authors' code (XuezheMax/megalodon) in `--authors FOLDER`, a checkout, where its CUDA extension can be imported.

Ours, Llama and both Megalodons are whole blocks with their feed-forward part; Mamba-2 and gated linear attention are
mixing layers, as their packages offer them. Hence the counts of parameters, and `of matrix rate`, which relates a time
to them. A peer that is not there has a row that says what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from _gpu import DEVICE, REHEARSAL, LeftOut, Output, Rehearse, Report, attempt
from _layers import Layer, forward_backward, llama_config, llama_layer, our_layer, randomize, to_bfloat16
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon import MegalodonConfig


@dataclass(frozen=True)
class Sizes:
    """The layers, all of one width; shapes are (rows, tokens)."""

    shapes: tuple[tuple[int, int], ...] = ((8, 4096), (1, 32768))
    llama: tuple[int, int, int] = (4096, 11008, 32)  # width, hidden width, heads
    changes: tuple[tuple[str, int], ...] = ()  # to the 7B preset
    mamba: tuple[tuple[str, int], ...] = (("head_dim", 64), ("state_size", 128))
    gla_heads: int = 4

    @property
    def config(self) -> MegalodonConfig:
        """Of our block, and of the port's and the authors'."""
        return MegalodonConfig.from_preset("paper-7b", **dict(self.changes))


TINY = Sizes(
    ((2, 16), (1, 32)), (32, 48, 2),
    (
        ("model_dim", 32), ("z_dim", 16), ("value_dim", 32), ("num_heads", 1), ("ffn_hidden_dim", 48),
        ("chunk_size", 16), ("norm_num_groups", 2), ("cema_ndim", 2),
    ),
    (("head_dim", 16), ("state_size", 16)), 2,
)  # fmt: skip


# flash-linear-attention ----------------------------------------------------------------------------------------------


def fla(name: str) -> Any:
    """A module of the package.

    Raises:
        LeftOut: it, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise LeftOut(f"not installed: {reason}") from None


def of_fla(name: str, module: Any, forward: Callable[[Tensor], Any]) -> Layer:
    """A layer whose kernels need a GPU: without one it is built, its call is checked by its signature, and no more."""
    to_bfloat16(module).train()
    if REHEARSAL:
        inspect.signature(module.forward).bind(torch.empty(1, 1, 1))
        count = sum(parameter.numel() for parameter in module.parameters())
        raise LeftOut(f"built, {count} parameters; its kernels need a GPU")
    return Layer(name, module, int(module.hidden_size), lambda batch, length: forward)


def mamba(sizes: Sizes) -> Layer:
    """Mamba-2 with `mamba_ssm`'s kernels where they are installed, else with those of simple gated linear attention."""
    found = fla("fla.layers.mamba2")
    module = found.Mamba2(hidden_size=sizes.llama[0], **dict(sizes.mamba))
    if found.is_fast_path_available:
        return of_fla("mamba-2", module, lambda x: module(x)[0])
    scan = partial(fla("fla.ops.simple_gla").chunk_simple_gla, scale=1.0)
    return of_fla("mamba-2, fla's kernels", module, partial(mamba_by, scan, module))


def mamba_by(scan: Callable[..., tuple[Tensor, Any]], module: Any, x: Tensor) -> Tensor:
    """Mamba-2's forward pass with its recurrence h = exp(A dt) h + dt B x, y = C h as linear attention with a scalar
    decay: x [B, L, D] -> [B, L, D]. The package alone would fall back to plain PyTorch with tensors of terabytes.

    Args:
        scan: (q, k, v [B, L, H, .], g [B, L, H]: the decay's logarithm) -> (output, state).
        module: an `fla.layers.Mamba2` with one group.
    """
    inner, states, heads = module.intermediate_size, module.ssm_state_size, module.num_heads
    gate, mixed, dt = module.in_proj(x).split([inner, inner + 2 * states, heads], dim=-1)
    mixed = F.silu(module.conv1d(mixed.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
    values, keys, queries = mixed.split([inner, states, states], dim=-1)
    values = values.unflatten(-1, (heads, -1))
    dt = F.softplus(dt.float() + module.dt_bias.float())
    spread = (*values.shape[:3], states)
    y, _ = scan(
        q=queries[..., None, :].expand(spread).contiguous(),
        k=keys[..., None, :].expand(spread).contiguous(),
        v=values * dt[..., None].to(values.dtype),
        g=dt * -module.A_log.float().exp(),
    )
    y = (y + module.D[:, None] * values).flatten(-2)
    return module.out_proj(module.norm(y, gate))


def gated_linear_attention(sizes: Sizes) -> Layer:
    """The layer as the package has it by default: keys of half the width, values of the width."""
    module = fla("fla.layers").GatedLinearAttention(hidden_size=sizes.llama[0], num_heads=sizes.gla_heads)
    return of_fla("gated linear attention", module, lambda x: module(x)[0])


# Other Megalodons ----------------------------------------------------------------------------------------------------


def port_layer(folder: Path | None, sizes: Sizes) -> Layer:
    """The block of the PyTorch port, which is a package of our own name: imported under another."""
    path = checkout(folder, "--port", "src/megalodon/modeling_megalodon.py").parent
    spec = importlib.util.spec_from_file_location(
        "megalodon_port", path / "__init__.py", submodule_search_locations=[str(path)]
    )
    assert spec is not None and spec.loader is not None
    package = sys.modules["megalodon_port"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    block = package.modeling_megalodon.MegalodonBlock(package.MegalodonConfig(**reference_sizes(sizes.config)), 0)
    block.to(DEVICE, torch.bfloat16).train()  # which leaves some of its CEMA in float32, as it means to
    return Layer("the port", block, sizes.config.model_dim, lambda batch, length: lambda x: block(x)[0])


def reference_sizes(config: MegalodonConfig) -> dict[str, Any]:
    """What the port and the authors' code call by the same names as we do."""
    names = (
        "model_dim", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim", "cema_ndim", "chunk_size", "norm_num_groups",
        "swiglu", "rope_base",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def checkout(folder: Path | None, option: str, holds: str) -> Path:
    """The path of a file in a checkout.

    Raises:
        LeftOut: none is given, or it has no such file.
    """
    if folder is None:
        raise LeftOut(f"no {option} given")
    if not (folder / holds).is_file():
        raise LeftOut(f"{folder} has no {holds}")
    return folder / holds


def authors_layer(folder: Path | None, sizes: Sizes) -> Layer:
    """The authors' block with their kernels, chunk attention by the fused form ("swift").

    Raises:
        LeftOut: no checkout is given, or its extension is not compiled for this Python and PyTorch.
    """
    checkout(folder, "--authors", "megalodon/models/mega.py")
    assert folder is not None
    with in_place_of_ours(folder):
        try:
            importlib.import_module("megalodon_extension.ops")
        except ImportError as reason:
            raise LeftOut(f"its CUDA extension cannot be imported ({reason}): build it with its setup.py") from None
        stand_ins()
        config = importlib.import_module("megalodon.config").ModelConf
        model = importlib.import_module("megalodon.models.mega")
        distributed = importlib.import_module("megalodon.distributed")
    one_process()
    distributed.initialize_model_parallel(1, 1)
    settings = config(efficient_attn="swift", **reference_sizes(sizes.config))
    with DEVICE:
        block = model.MegaBlock(settings, 0)
    block.to(torch.bfloat16).train()
    randomize(block)
    rotary = model.RotaryEmbedding(sizes.config.head_dim, settings.chunk_size, base=settings.rope_base).to(DEVICE)

    def prepare(batch: int, length: int) -> Callable[[Tensor], Tensor]:
        turns = rotary.get_freqs_cis(0, min(length, settings.chunk_size))
        return lambda x: block(x, turns)[0]

    return Layer("the authors'", block, sizes.config.model_dim, prepare)


@contextmanager
def in_place_of_ours(folder: Path) -> Iterator[None]:
    """Imports of `megalodon` find the package in `folder`; ours, of the same name, is back in its place afterwards."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "megalodon"}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "megalodon"]:
            del sys.modules[name]
        sys.modules.update(ours)


def stand_ins() -> None:
    """What the authors' package imports beside its extension, where that is missing: apex's norms are PyTorch's, fused
    too, and of fairscale a single block uses nothing."""
    if importlib.util.find_spec("apex") is None:
        norms = {
            "fused_layer_norm_affine": lambda x, weight, bias, shape, eps: F.layer_norm(x, shape, weight, bias, eps),
            "fused_layer_norm": lambda x, shape, eps: F.layer_norm(x, shape, eps=eps),
            "fused_rms_norm_affine": lambda x, weight, shape, eps: F.rms_norm(x, shape, weight, eps),
            "fused_rms_norm": lambda x, shape, eps: F.rms_norm(x, shape, eps=eps),
            "manual_rms_norm": lambda x, shape, weight, eps: F.rms_norm(x, shape, weight, eps),
        }
        put_modules("apex.normalization.fused_layer_norm", norms)
        put_modules("fused_layer_norm_cuda", {})
    if importlib.util.find_spec("fairscale") is None:
        put_modules("fairscale.nn.checkpoint", {"checkpoint_wrapper": None})
        put_modules("fairscale.nn.wrap.auto_wrap", {"wrap": None, "enable_wrap": None})
        put_modules("fairscale.nn.data_parallel", {"TrainingState": None})
        put_modules(
            "fairscale.utils.parallel",
            {"ProcessGroupName": type("ProcessGroupName", (), dict.fromkeys(("default", "reduce_scatter")))},
        )
        put_modules("fairscale.utils.params", {"calc_grad_norm": None})
        sys.modules["fairscale.nn"].FullyShardedDataParallel = nn.Module  # type: ignore[attr-defined]  # a made-up module


def put_modules(name: str, contents: dict[str, Any]) -> None:
    """Makes `name` and the packages above it importable."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            sys.modules[path] = ModuleType(path)
            sys.modules[path].__path__ = []
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path])
    vars(sys.modules[name]).update(contents)


def one_process() -> None:
    """A process group of this process alone, which the authors' modules ask for their place in it."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


# Rows ----------------------------------------------------------------------------------------------------------------


def built(make: Callable[[], Layer]) -> dict[str, Layer]:
    """A layer, which may be missing for as many reasons as a row."""
    return {"built": make()}


def main(
    rehearse: Rehearse = False,
    output: Output = None,
    port: Annotated[Path | None, typer.Option(help="A checkout of pszemraj/megalodon-hf.")] = None,
    authors: Annotated[Path | None, typer.Option(help="A checkout of XuezheMax/megalodon.")] = None,
) -> None:
    """Times every layer at every shape, writes JSON and a table; exit status 1 if a row failed."""
    sizes = TINY if rehearse else Sizes()
    report = Report("peers", "A layer of width 4096 beside its peers, forward and backward", vars(sizes), output)
    makers: dict[str, Callable[[], Layer]] = {
        "ours": lambda: our_layer(sizes.config),
        "llama": lambda: llama_layer(llama_config(*sizes.llama)),
        "mamba-2": partial(mamba, sizes),
        "gated linear attention": partial(gated_linear_attention, sizes),
        "the port": partial(port_layer, port, sizes),
        "the authors'": partial(authors_layer, authors, sizes),
    }
    for name, make in makers.items():
        made = attempt(partial(built, make), layer=name)
        layer = made.get("built")
        if layer is None:
            report.add("peers", made)
            continue
        for batch, length in sizes.shapes:
            run = partial(forward_backward, layer, batch, length)
            report.add("peers", attempt(run, layer=layer.name, batch=batch, length=length))
    if not report.finish():
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
