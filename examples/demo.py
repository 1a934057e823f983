"""The demo: train on the standard library's source, measure beside gzip and xz, continue held-out code.

Run it with `make demo`, or `python examples/demo.py [KEY=VALUE ...]` to change configs/demo.yaml. It takes a few
minutes on two CPU cores, needs no network, and resumes where it was if it is interrupted.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import megalodon
from megalodon.data import ByteTokenizer, Document, DocumentSet, Tokenizer, prepare_documents
from megalodon.data.bpe import train_bpe_folder
from megalodon.evaluation import evaluate_perplexity, plot_by_position
from megalodon.inference import Sampling, Session, generate_text, load_model
from megalodon.training import TrainConfig, load_config, resolve, train

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
HELD_OUT = "data.held_out={documents: 25}"
"""A number, not a fraction of the tokens: which files these are must not depend on how they are cut into tokens."""
VOCABULARY = 2048
"""Tokens to learn. Each stands for more than three bytes, so that as much more text is seen in the same minutes."""
MOST_BYTES = 400_000
"""Held-out text that is measured: enough for two digits, little enough for half a minute."""


def split(config: TrainConfig, tokenizer: Tokenizer) -> tuple[DocumentSet, DocumentSet]:
    """(training, held-out) documents; which they are does not depend on the tokenizer."""
    data = config.data
    return prepare_documents(
        data.corpus, data.held_out, tokenizer, data.sequence_length, config.run.seed, data.cache_folder
    )


def texts(documents: DocumentSet, tokenizer: Tokenizer, indices: Iterable[int]) -> Iterator[tuple[str, str]]:
    """(name, text) of these documents."""
    for i in indices:
        yield documents.name(i), tokenizer.decode(documents.tokens(i))


def learn_tokens(config: TrainConfig, folder: Path) -> None:
    """Byte-pair encoding of the training documents; those held out have no part in it."""
    training, _ = split(config, ByteTokenizer())
    documents = ([text] for _, text in texts(training, ByteTokenizer(), range(len(training))))
    learned = train_bpe_folder(documents, folder, VOCABULARY)
    print(f"learned {learned.vocab_size} tokens from {len(training)} files: {folder}")


def held_out_texts(config: TrainConfig, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(name, text) of the held-out files, the longest first, until `MOST_BYTES`."""
    _, held_out = split(config, tokenizer)
    total, chosen = 0, []
    for name, text in texts(held_out, tokenizer, sorted(range(len(held_out)), key=lambda i: -held_out.lengths[i])):
        if total + len(text) <= MOST_BYTES:
            total += len(text)
            chosen.append((name, text))
    return chosen


def compressors(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte of general compressors, each file alone, as the model reads them."""
    size = sum(map(len, texts))
    made = {"gzip -9": [gzip.compress(t, 9) for t in texts], "xz -9": [lzma.compress(t, preset=9) for t in texts]}
    return {name: 8 * sum(map(len, parts)) / size for name, parts in made.items()}


def main() -> None:
    """Train, measure, generate, and say where everything is."""
    config = load_config(CONFIG, [HELD_OUT, *sys.argv[1:]])
    print(f"megalodon {megalodon.__version__}: training on the Python standard library's source\n")
    folder = Path(config.run.folder or "runs/demo")
    if config.tokenizer is None:
        tokens = folder.with_name(f"{folder.name}-tokenizer")
        if not tokens.exists():
            learn_tokens(config, tokens)
        config = config.model_copy(update={"tokenizer": str(tokens)})
    resolved = resolve(config, folder.name)
    stopped = train(resolved)
    if stopped:
        raise SystemExit("interrupted and saved: `make demo` goes on from here")
    model, tokenizer = load_model(folder / "model"), resolved.tokenizer

    kept = held_out_texts(config, tokenizer)
    print(f"\nmeasuring on {len(kept)} held-out files ...", flush=True)
    report = evaluate_perplexity(model, tokenizer, [Document(name, [text]) for name, text in kept])
    (folder / "perplexity.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_by_position(report, folder / "perplexity.png")
    rates = {"megalodon": report["overall"]["bits_per_byte"], **compressors([t.encode() for _, t in kept])}
    print("bits per byte of held-out code, each file alone (smaller is better):")
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        print(f"  {name:<10} {rate:.3f}")

    name, text = kept[len(kept) // 2]
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
