"""What an answer came from: maps of the implicit attention, relevance of each token, and the test of removing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from megalodon.choices import EntryWeights
from megalodon.models import CausalLM
from megalodon.models.implicit import Path

STEPS = 10
RANDOM_ORDERS = 3


@dataclass(frozen=True)
class LayerMap:
    """One path of a layer: `map` float32 [L, L], the mean over channels of the positive part of its matrix; `error`,
    the largest difference of matrix times values from the layer's outputs, over the largest output."""

    layer: int
    name: str
    map: np.ndarray
    error: float


@dataclass(frozen=True)
class Explanation:
    """Why a model expected token `target` of a text.

    Attributes:
        ids: [L], the text's. target: the place of the token that is explained; only the tokens before it count.
        log_probability: of that token after those before it, nats.
        maps: of every layer and path, over all tokens before `target`.
        relevance: float64 [target]; the rows add up to one.
        curves: by order of removal, the target's log probability when 0, 1/10, ... 9/10 of the tokens before it are
            gone. "most_relevant_first" should fall faster than "random", "least_relevant_first" slower.
    """

    ids: np.ndarray
    target: int
    log_probability: float
    maps: list[LayerMap]
    relevance: np.ndarray
    curves: dict[str, list[float]]

    def areas(self) -> dict[str, float]:
        """The mean of each curve."""
        return {name: float(np.mean(curve)) for name, curve in self.curves.items()}

    def report(self, texts: list[str]) -> dict[str, Any]:
        """A dict ready for JSON, with what each token reads as; maps are named as in the `.npz` file beside it."""
        maps = [{"layer": m.layer, "path": m.name, "array": array_name(m), "error": m.error} for m in self.maps]
        return {
            "tokens": [{"id": int(i), "text": text} for i, text in zip(self.ids, texts, strict=True)],
            "target": self.target,
            "log_probability": self.log_probability,
            "relevance": self.relevance.tolist(),
            "maps": maps,
            "perturbation": {
                "removed": [i / STEPS for i in range(STEPS)],
                "curves": self.curves,
                "areas": self.areas(),
            },
        }


def array_name(layer_map: LayerMap) -> str:
    """The name of a map in the `.npz` file."""
    return f"layer{layer_map.layer}.{layer_map.name}"


@torch.no_grad()
def explain(
    model: CausalLM, ids: np.ndarray, target: int | None = None, seed: int = 0, weights: EntryWeights = "none"
) -> Explanation:
    """Explain a token of a text by the tokens before it.

    Each layer's map, the mean over channels of the matrix' positive part, and the identity are normalised
    to rows that sum to one and multiplied over layers; the row that predicts the target is the relevance.
    With `weights="gradient"` a layer's map is scaled to a largest entry of one first.

    Args:
        model: in evaluation mode.
        ids: int64 [L].
        target: its place, 1 or more; None for the last.
        seed: of the random orders that removal is compared with.
        weights: of the matrices' entries.

    Raises:
        ValueError: target is none that there is, there are no such weights, or a layer is not written as an implicit
            attention matrix.
    """
    if weights not in get_args(EntryWeights):
        raise ValueError(f"weights={weights!r}: they are {' or '.join(get_args(EntryWeights))}")
    target = len(ids) - 1 if target is None else target
    if not 1 <= target < len(ids):
        raise ValueError(f"token: {target} must be from 1 to {len(ids) - 1}: the text has {len(ids)} tokens")
    before = torch.from_numpy(np.ascontiguousarray(ids[:target])).to(model.device)[None]
    layers = model.model.implicit_attention(before)
    gradients = None if weights == "none" else gradients_of(model, before, int(ids[target]), layers)
    maps: list[LayerMap] = []
    rollout = torch.eye(target, dtype=torch.float64)
    for number, paths in enumerate(layers):
        given = [None] * len(paths) if gradients is None else gradients[number]
        means = [path.mean_map(gradient)[0] for path, gradient in zip(paths, given, strict=True)]
        for path, mean in zip(paths, means, strict=True):
            error = (path.applied() - path.outputs).abs().max() / path.outputs.abs().max().clamp_min(1e-30)
            maps.append(LayerMap(number, path.name, mean.float().cpu().numpy(), float(error)))
        step = torch.stack(means).sum(0).double().cpu()
        if gradients is not None:
            step /= step.max().clamp_min(torch.finfo(step.dtype).tiny)
        step += torch.eye(target, dtype=torch.float64)
        rollout = step / step.sum(-1, keepdim=True) @ rollout
    relevance = rollout[-1].numpy()
    orders: dict[str, list[np.ndarray]] = {
        "most_relevant_first": [np.argsort(-relevance[:-1], kind="stable")],
        "least_relevant_first": [np.argsort(relevance[:-1], kind="stable")],
    }
    generator = np.random.RandomState(seed)
    orders["random"] = [generator.permutation(target - 1) for _ in range(RANDOM_ORDERS)]
    curves = {
        name: np.mean([_curve(model, ids[:target], int(ids[target]), order) for order in each], axis=0).tolist()
        for name, each in orders.items()
    }
    whole = curves["random"][0]
    return Explanation(np.asarray(ids), target, whole, maps, relevance, curves)


def gradients_of(model: CausalLM, before: Tensor, wanted: int, layers: Sequence[Sequence[Path]]) -> list[list[Tensor]]:
    """The gradients [1, L, H, e] of log p(wanted), after `before` [1, L], with respect to every path's outputs.

    A path ends in a linear layer: what its result does to the rest of the model, carried back through its weight.
    """
    linear = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
    ends = [[linear[id(path.weight)] for path in paths] for paths in layers]
    results: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, result: Tensor) -> Tensor:
        results[module] = result = result if result.requires_grad else result.requires_grad_()
        return result

    handles = [module.register_forward_hook(keep) for module in {module for each in ends for module in each}]
    try:
        with torch.enable_grad():
            logits: Tensor = model(before, use_cache=False, logits_to_keep=1).logits[0, -1]
            found = torch.autograd.grad(logits.log_softmax(-1)[wanted], list(results.values()))
    finally:
        for handle in handles:
            handle.remove()
    of = dict(zip(results, found, strict=True))
    return [
        [
            (of[module].to(path.weight.dtype) @ path.weight).reshape(path.outputs.shape)
            for path, module in zip(paths, each, strict=True)
        ]
        for paths, each in zip(layers, ends, strict=True)
    ]


def _curve(model: CausalLM, before: np.ndarray, wanted: int, order: np.ndarray) -> list[float]:
    """log p(wanted) with the first tenths of `order` taken out of the text; its last token always stays."""
    found = []
    for step in range(STEPS):
        kept = np.ones(len(before), dtype=bool)
        kept[order[: len(order) * step // STEPS]] = False
        tokens = torch.from_numpy(before[kept]).to(model.device)
        logits: Tensor = model(tokens[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[wanted]))
    return found


def plot_maps(explanation: Explanation, path: Any) -> None:
    """Every layer's maps as heat maps, each row scaled to its largest value, into a PNG file."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(m.name for m in explanation.maps))
    layers = max(m.layer for m in explanation.maps) + 1
    figure = Figure(figsize=(3 * layers + 1, 3 * len(names) + 0.5), layout="constrained")
    grid = figure.subplots(len(names), layers, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for m in explanation.maps:
        axes = grid[names.index(m.name), m.layer]
        axes.set_axis_on()
        axes.imshow(m.map / np.maximum(m.map.max(-1, keepdims=True), 1e-30), cmap="viridis", interpolation="nearest")
        axes.set_title(f"layer {m.layer}: {m.name}", fontsize="small")
        axes.tick_params(labelsize="x-small")
    figure.supxlabel("from token")
    figure.supylabel("to token")
    figure.savefig(path, dpi=120, format="png")


def plot_relevance(explanation: Explanation, texts: list[str], path: Any) -> None:
    """The relevance of every token, and the curves of removal, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2)
    places = np.arange(explanation.target)
    above.bar(places, explanation.relevance)
    if explanation.target <= 80:
        shown = [text if text.isprintable() and "$" not in text else "·" for text in texts[: explanation.target]]
        above.set_xticks(places, shown, fontsize="x-small")
    above.set_title(f"relevance for token {explanation.target}, {texts[explanation.target]!r}".replace("$", r"\$"))
    for name, curve in explanation.curves.items():
        below.plot(np.arange(STEPS) / STEPS, curve, marker="o", label=name.replace("_", " "))
    below.set_xlabel("share of the tokens before it that are removed")
    below.set_ylabel("log probability (nats)")
    below.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
