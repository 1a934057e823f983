"""`megalodon explain`: what a model's layers attend to, and what a token was expected from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megalodon.choices import EntryWeights

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

MOST_TOKENS = 1024


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")],
    text: Annotated[str, typer.Argument(help="the text, or a file of it after @, such as @letter.txt")],
    token: Annotated[int | None, typer.Option(help="the place of the token to explain; the last if not given")] = None,
    output: Annotated[Path, typer.Option(help="the folder for explain.json, maps.npz and pictures")] = Path("explain"),
    weights: Annotated[
        EntryWeights, typer.Option(help="of the matrices' entries; gradient: what each does to the log probability")
    ] = "none",
    seed: Annotated[int, typer.Option(help="of the random orders that removal is compared with")] = 0,
    tokenizer_name: Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")] = None,
) -> None:
    """The implicit attention of every layer as heat maps, and the relevance of each token for a chosen one.

    Relevance is tested: the tokens before it are removed in its order, in the opposite one, and in random ones.
    """
    import numpy as np

    from megalodon.evaluation.explain import array_name, plot_maps, plot_relevance
    from megalodon.evaluation.explain import explain as explained
    from megalodon.files import write_file, write_text
    from megalodon.inference import load_model, load_tokenizer_for

    text = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
    model = load_model(folder, device)
    tokenizer = load_tokenizer_for(model, folder, tokenizer_name)
    ids = tokenizer.encode(text)
    if len(ids) > MOST_TOKENS:
        raise ValueError(f"text: it has {len(ids):,} tokens; maps are of {MOST_TOKENS:,} at most, give a part of it")
    found = explained(model, ids, token, seed, weights)
    texts = [tokenizer.decode([int(i)]) for i in ids]
    output.mkdir(parents=True, exist_ok=True)
    arrays = {array_name(m): m.map for m in found.maps}

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    write_file(output / "maps.npz", save)
    report = {
        "settings": {"model": str(folder), "tokenizer": tokenizer.name, "weights": weights, "seed": seed},
        **found.report(texts),
    }
    write_text(output / "explain.json", json.dumps(report, indent=1) + "\n")
    write_file(output / "maps.png", lambda path: plot_maps(found, path))
    write_file(output / "relevance.png", lambda path: plot_relevance(found, texts, path))
    typer.echo(f"token {found.target}, {texts[found.target]!r}: {found.log_probability:.4f} nats")
    for place in np.argsort(-found.relevance, kind="stable")[:10]:
        typer.echo(f"{found.relevance[place]:>8.1%}  token {place}, {texts[place]!r}")
    areas = ", ".join(f"{name.replace('_', ' ')} {area:.4f}" for name, area in found.areas().items())
    typer.echo(f"mean log probability while tokens are removed: {areas}")
    typer.echo(f"matrix times values differs from the outputs by {max(m.error for m in found.maps):.1e} at most")
    typer.echo(f"written: {output}/explain.json, maps.npz, maps.png, relevance.png")
