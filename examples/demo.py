"""The demo: train on the standard library's source, measure beside gzip and xz, continue held-out code.

Run it with `make demo`, or `python examples/demo.py [KEY=VALUE ...]` to change configs/demo.yaml. It takes a few
minutes on two CPU cores, needs no network, and resumes where it was if it is interrupted.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

import megalodon
from megalodon.data import Document, DocumentSet, prepare_documents
from megalodon.evaluation import evaluate_perplexity, plot_by_position
from megalodon.inference import Sampling, Session, generate_text, load_model
from megalodon.training import load_config, resolve, train

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
MOST_BYTES = 400_000
"""Held-out text that is measured: enough for two digits, little enough for half a minute."""


def held_out_texts(resolved) -> list[tuple[str, str]]:
    """(name, text) of the held-out files, the longest first, until `MOST_BYTES`."""
    data, tokenizer = resolved.config.data, resolved.tokenizer
    _, held_out = prepare_documents(
        data.corpus, data.held_out, tokenizer, data.sequence_length, resolved.config.run.seed, data.cache_folder
    )
    return [*_until_enough(held_out, tokenizer)]


def _until_enough(documents: DocumentSet, tokenizer):
    total = 0
    for index in sorted(range(len(documents)), key=lambda i: -documents.lengths[i]):
        text = tokenizer.decode(documents.tokens(index)).removesuffix("\0")
        if total + len(text) <= MOST_BYTES:
            total += len(text)
            yield documents.name(index), text


def compressors(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte of general compressors, each file alone, as the model reads them."""
    size = sum(map(len, texts))
    made = {"gzip -9": [gzip.compress(t, 9) for t in texts], "xz -9": [lzma.compress(t, preset=9) for t in texts]}
    return {name: 8 * sum(map(len, parts)) / size for name, parts in made.items()}


def main() -> None:
    """Train, measure, generate, and say where everything is."""
    resolved = resolve(load_config(CONFIG, sys.argv[1:]), CONFIG.stem)
    folder = Path(resolved.config.run.folder)
    print(f"megalodon {megalodon.__version__}: training on the Python standard library's source\n")
    stopped = train(resolved)
    if stopped:
        raise SystemExit("interrupted and saved: `make demo` goes on from here")
    model, tokenizer = load_model(folder / "model"), resolved.tokenizer

    texts = held_out_texts(resolved)
    print(f"\nmeasuring on {len(texts)} held-out files ...", flush=True)
    report = evaluate_perplexity(model, tokenizer, [Document(name, [text]) for name, text in texts])
    (folder / "perplexity.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_by_position(report, folder / "perplexity.png")
    rates = {"megalodon": report["overall"]["bits_per_byte"], **compressors([t.encode() for _, t in texts])}
    print("bits per byte of held-out code, each file alone (smaller is better):")
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        print(f"  {name:<10} {rate:.3f}")

    name, text = texts[len(texts) // 2]
    prompt = text[:1200]
    print(f"\nheld-out {Path(name).name}, continued from its first {len(prompt)} characters:\n")
    print("\n".join("  | " + line for line in prompt.splitlines()[-6:]))
    session = Session(model, seed=0)
    session.read(tokenizer.encode(prompt))
    continuation = "".join(generate_text(session, tokenizer, 400, Sampling(temperature=0.7, top_p=0.9)))
    print("\n".join("  > " + line for line in continuation.splitlines()))
    print(
        f"\nloss curve {folder / 'loss.png'}\nmetrics    {folder / 'metrics.jsonl'}\n"
        f"by position {folder / 'perplexity.png'}\nmodel      {folder / 'model'}\n\n"
        f"next: megalodon generate {folder / 'model'} 'import '"
    )


if __name__ == "__main__":
    main()
