"""The table of promises: what the state of every recurrent or hybrid class keeps, ours and the installed Transformers'.

Each class is a tiny model with random parameters, in float32 on a CPU. A promise is a difference of logits (or of
gradients) relative to the largest of them, between two ways of computing the same thing. Below 1e-4 it is kept;
otherwise the table shows the figure, or the exception that stopped the class. Writes docs/promises.md.

    python benchmarks/state_promises.py                    # all classes, about ten minutes on two cores; goes on
    python benchmarks/state_promises.py --only mamba,lfm2  # some, printed and not written
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from _recurrent_classes import recurrent_classes, tiny_model
from _report import write_atomically
from torch import Tensor, nn
from transformers import DynamicCache

import megalodon
from megalodon import KinConfig, KinForCausalLM, MegabyteConfig, MegabyteForCausalLM
from megalodon.models import ARCHITECTURES
from megalodon.models.kin.mixers import MIXERS, mixer_class

KEPT = 1e-4
CACHES = ("cache", "past_key_values", "state", "cache_params", "rnn_state")
LENGTH = 24
DOCS = Path(__file__).resolve().parent.parent / "docs" / "promises.md"


@dataclass
class Class:
    """A model under test, and what it calls its cache; None where there is none. `makes_none`: it fills one that it is
    given, but returns none."""

    name: str
    model: nn.Module
    cache: str | None = None
    makes_none: bool = False

    def __post_init__(self) -> None:
        out = self.model(text(1, 4), use_cache=True)
        self.cache = next((name for name in CACHES if getattr(out, name, None) is not None), None)
        if self.cache is None:
            takes = inspect.signature(self.model.forward).parameters
            self.cache = next((name for name in CACHES[:2] if name in takes), None)
            self.makes_none = self.cache is not None

    def read(self, ids: Tensor, cache: Any = None, **given: Any) -> tuple[Tensor, Any]:
        """(logits, the cache after them)."""
        if cache is None and self.makes_none:
            cache = DynamicCache(config=self.model.config)
        if cache is not None:
            assert self.cache is not None
            given[self.cache] = cache
        out = self.model(ids, use_cache=True, **given)
        if self.makes_none:
            return out.logits, cache
        return out.logits, None if self.cache is None else getattr(out, self.cache)

    def pieces(self, ids: Tensor, sizes: list[int]) -> Tensor:
        """Logits of a text read in pieces."""
        cache, logits = None, []
        for piece in ids.split(sizes, 1):
            if logits and cache is None:
                raise NoCache
            found, cache = self.read(piece, cache)
            logits.append(found)
        return torch.cat(logits, 1)


class NoCache(Exception):
    """The class returns no cache."""


class OtherShape(Exception):
    """Two ways to compute logits gave different numbers of them."""


WORDS: dict[type[Exception], str] = {NoCache: "no cache", OtherShape: "other shape"}


def apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; not a number counts as infinite."""
    if actual.shape != expected.shape:
        raise OtherShape
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    value = float(difference / expected.detach().double().abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def text(rows: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the promises ---------------------------------------------------------------------------------------------------


def rows_alone(c: Class) -> float:
    ids = text()
    together = c.read(ids)[0]
    return max(apart(together[row], c.read(ids[row : row + 1])[0][0]) for row in range(2))


def _in_pieces(c: Class, sizes: list[int]) -> float:
    ids = text(1)
    return apart(c.pieces(ids, sizes), c.read(ids)[0])


def single_tokens(c: Class) -> float:
    return _in_pieces(c, [1] * LENGTH)


def prompt_then_tokens(c: Class) -> float:
    return _in_pieces(c, [12, *[1] * 12])


def primes(c: Class) -> float:
    return _in_pieces(c, [2, 3, 5, 7, 7])


def rows_in_pieces(c: Class) -> float:
    """Two rows read on from a cache, against each read on alone."""
    ids, sizes = text(), [12, *[1] * 12]
    together = c.pieces(ids, sizes)
    return max(apart(together[row], c.pieces(ids[row : row + 1], sizes)[0]) for row in range(2))


def _padded(c: Class, left: bool) -> float:
    """Of a row of 15 tokens beside one of 24: its logits, and those of three more tokens."""
    ids, mask, following = text(), torch.ones(2, LENGTH, dtype=torch.long), text(2, 3, seed=4)
    real = slice(LENGTH - 15, LENGTH) if left else slice(0, 15)
    mask[1] = 0
    mask[1, real] = 1
    logits, cache = c.read(torch.where(mask.bool(), ids, 0), attention_mask=mask)
    alone, _ = c.read(ids[1:, real])
    first = apart(logits[1, real], alone[0])
    if cache is None:
        raise NoCache
    longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    found, going = [], cache
    for t in range(3):
        step, going = c.read(following[:, t : t + 1], going, attention_mask=longer[:, : LENGTH + 1 + t])
        found.append(step[1])
    whole = c.read(torch.cat([ids[1:, real], following[1:]], dim=1))[0]
    return max(first, apart(torch.cat(found), whole[0, 15:]))


def left_padding(c: Class) -> float:
    return _padded(c, left=True)


def right_padding(c: Class) -> float:
    return _padded(c, left=False)


def _flattened(c: Class, **told: Tensor | int) -> float:
    ids = text(1)
    logits = c.model(ids, use_cache=False, **told).logits
    alone = c.model(ids[:, 10:], use_cache=False).logits
    return apart(logits[:, 10:], alone)


def by_position_ids(c: Class) -> float:
    return _flattened(c, position_ids=torch.cat([torch.arange(10), torch.arange(14)])[None])


def by_seq_idx(c: Class) -> float:
    return _flattened(c, seq_idx=(torch.arange(LENGTH) >= 10).int()[None])


def by_cu_seqlens(c: Class) -> float:
    ends = torch.tensor([0, 10, LENGTH], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 14, "max_length_k": 14}
    return _flattened(c, position_ids=torch.cat([torch.arange(10), torch.arange(14)])[None], **lengths)


def used_twice(c: Class) -> float:
    ids = text(1)
    _, cache = c.read(ids[:, :12])
    if cache is None:
        raise NoCache
    first = c.read(ids[:, 12:13], cache)[0]
    c.read(ids[:, 13:14], cache)
    return apart(c.read(ids[:, 12:13], cache)[0], first)


def copied(c: Class) -> float:
    ids = text(1)
    _, cache = c.read(ids[:, :12])
    if cache is None:
        raise NoCache
    one, other = copy.deepcopy(cache), copy.deepcopy(cache)
    c.read(ids[:, 13:14], one)
    return apart(c.read(ids[:, 12:13], other)[0], c.read(ids[:, :13])[0][:, 12:])


def gradients(c: Class) -> float:
    """Of the loss on the last 12 tokens to the embeddings of the first 12, through the cache."""
    embed = c.model.get_input_embeddings()
    ids, found = text(1), []
    for sizes in ([LENGTH], [12, *[1] * 12]):
        x = embed(ids).detach().requires_grad_()
        cache, logits = None, []
        for piece in x.split(sizes, 1):
            if logits and cache is None:
                raise NoCache
            if cache is None and c.makes_none:
                cache = DynamicCache(config=c.model.config)
            given = {} if cache is None else {str(c.cache): cache}
            out = c.model(inputs_embeds=piece, use_cache=True, **given)
            cache = getattr(out, c.cache, cache) if c.cache else None
            logits.append(out.logits)
        total = torch.cat(logits, 1)[:, 12:].square().sum()
        (gradient,) = torch.autograd.grad(total, x)
        found.append(gradient[:, :12])
    return apart(found[1], found[0])


def beams(c: Class) -> float:
    """The share of tokens in which three beams with a cache differ from those without."""
    ids, options = text(2, 8), {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "min_new_tokens": 8}
    mask = torch.ones_like(ids)
    cached = c.model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    plain = c.model.generate(ids, attention_mask=mask, pad_token_id=0, use_cache=False, **options)
    return float((cached != plain).float().mean())


def second_turn(c: Class) -> float:
    """The share of tokens of a second turn, from the first one's cache, that differ from those without any."""
    ids, more = text(1, 8), text(1, 5, seed=4)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = c.model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
    cache = next((getattr(first, name) for name in CACHES if getattr(first, name, None) is not None), None)
    if cache is None:
        raise NoCache
    whole = torch.cat([first.sequences, more], dim=1)
    mask = torch.ones_like(whole)
    name = str(c.cache)
    second = c.model.generate(whole, attention_mask=mask, **{name: cache}, **options)
    expected = c.model.generate(whole, attention_mask=mask, use_cache=False, **options)
    return float((second != expected).float().mean())


PROMISES: dict[str, Callable[[Class], float]] = {
    "rows of a batch alone": rows_alone,
    "rows read on alone": rows_in_pieces,
    "token by token": single_tokens,
    "prompt, then tokens": prompt_then_tokens,
    "pieces of 2, 3, 5, 7, 7": primes,
    "left padding": left_padding,
    "right padding": right_padding,
    "documents by position_ids": by_position_ids,
    "documents by seq_idx": by_seq_idx,
    "documents by cu_seq_lens": by_cu_seqlens,
    "copied cache": copied,
    "cache used twice": used_twice,
    "gradients through it": gradients,
    "beams": beams,
    "second turn": second_turn,
}
WITH_GRADIENTS = {"gradients through it"}


# --- sizes ----------------------------------------------------------------------------------------------------------


def tensors_of(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that a cache holds, wherever they stand in it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_of(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors_of(vars(value), seen)


def bytes_of(cache: Any) -> int:
    """Bytes of a cache: what ours says of itself, and the storage of all tensors elsewhere."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(cache, set())}
    return sum(storages.values())


def size(c: Class) -> str:
    """Bytes after 64 tokens, and how many each of the next 64 adds."""
    found = []
    for length in (64, 128):
        _, cache = c.read(text(1, length))
        if cache is None:
            raise NoCache
        found.append(bytes_of(cache))
    more = (found[1] - found[0]) / 64
    return f"{found[0]:,} B" + (f" + {more:,.0f} a token" if more else "")


# --- all of them ----------------------------------------------------------------------------------------------------


def moved(model: nn.Module) -> nn.Module:
    """Every parameter away from its initial value, in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def our_classes() -> dict[str, Callable[[], nn.Module]]:
    """Our architectures, and each causal mixer of the kin."""
    common = {"vocab_size": 97, "num_layers": 2, "model_dim": 32, "num_heads": 4}
    found: dict[str, Callable[[], nn.Module]] = {}
    for name, kind in ARCHITECTURES.items():
        if name in ("megalodon-kin", "megalodon-megabyte"):
            continue
        preset = next(iter(kind.config.presets), None)
        found[name] = lambda kind=kind, preset=preset: moved(kind.causal_lm(tiny_config(kind.config, preset)))
    for mixer in sorted(MIXERS):
        if mixer_class(mixer).causal_mode:
            found[f"kin: {mixer}"] = lambda mixer=mixer: moved(KinForCausalLM(KinConfig(mixers=mixer, **common)))
    shape = {"model_dim": 16, "coarse_dims": [32], "depths": [2, 1], "patch_sizes": [4], "num_heads": 2, "head_dim": 8}
    found["megabyte"] = lambda: moved(MegabyteForCausalLM(MegabyteConfig(vocab_size=97, **shape)))
    return found


def tiny_config(kind: Any, preset: str | None) -> Any:
    """A config of few parameters of one of our own architectures."""
    small = {
        "vocab_size": 97,
        "num_layers": 2,
        "model_dim": 32,
        "z_dim": 16,
        "value_dim": 32,
        "num_heads": 2,
        "ffn_hidden_dim": 48,
        "cema_ndim": 4,
        "chunk_size": 8,
        "norm_num_groups": 4,
    }
    known = set(kind.__dataclass_fields__)
    return kind(**{name: value for name, value in small.items() if name in known})


def measure(name: str, make: Callable[[], nn.Module]) -> dict[str, str]:
    """One row: promise -> what to say of it."""
    try:
        model = make()
    except Exception as error:
        return {"(built)": f"cannot be built: {type(error).__name__}"}
    row = {}
    for promise, check in PROMISES.items():
        try:
            with torch.set_grad_enabled(promise in WITH_GRADIENTS):
                value = check(Class(name, model))
            row[promise] = "yes" if value < KEPT else f"**{value:.1e}**"
        except (NoCache, OtherShape) as error:
            row[promise] = WORDS[type(error)]
        except Exception as error:
            row[promise] = type(error).__name__
    try:
        with torch.no_grad():
            row["size"] = size(Class(name, model))
    except Exception as error:
        row["size"] = "no cache" if isinstance(error, NoCache) else type(error).__name__
    return row


def table(rows: dict[str, dict[str, str]]) -> list[str]:
    """Markdown: one line a class."""
    columns = [*PROMISES, "size"]
    lines = ["| class | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [row.get("(built)", "")] + [""] * (len(columns) - 1) if "(built)" in row else [row[c] for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def counts(rows: dict[str, dict[str, str]]) -> list[str]:
    """How many of the classes keep each promise."""
    return [
        f"- {promise}: {sum(row.get(promise) == 'yes' for row in rows.values())} of {len(rows)}" for promise in PROMISES
    ]


def versions() -> str:
    """Of what is measured."""
    return f"megalodon {megalodon.__version__}, Transformers {transformers.__version__}, PyTorch {torch.__version__}"


def page(ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> str:
    """docs/promises.md."""
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    return "\n".join(
        [
            "# What a state promises",
            "",
            f"Written by `python benchmarks/state_promises.py` on {today}: {versions()}, on a CPU.",
            "",
            "Every class is a tiny model with random parameters in float32. A cell says whether two ways of computing",
            f"the same logits agree: *yes* where they differ by less than {KEPT:g} of the largest, else the difference",
            "in bold, or the exception that stopped it. *no cache*: the class returns none. *other shape*: it gave",
            "more or fewer logits than tokens. For beams and second turns the figure is the share of tokens that",
            "differ from generating without a cache.",
            "",
            "- **pieces**: a text of 24 tokens read token by token, as a prompt and then tokens, and in pieces.",
            "- **padding**: a row of 15 tokens beside one of 24 against itself alone, and three tokens after it.",
            "- **documents**: two in one row, told by `position_ids` that start over, by `seq_idx`, or by",
            "  `cu_seq_lens_q` and its companions; the second against itself alone.",
            "- **copied**: two deep copies go on differently; **used twice**: one cache goes on twice.",
            "- **gradients**: of a loss on the last 12 tokens to the embeddings of the first 12, through the cache.",
            "- **size**: bytes of the cache after 64 tokens, and what each further token adds.",
            "",
            "## Ours",
            "",
            *table(ours),
            "",
            f"## The {len(theirs)} recurrent and hybrid classes of Transformers {transformers.__version__}",
            "",
            *table(theirs),
            "",
            "Of these classes keep it:",
            "",
            *counts(theirs),
            "",
        ]
    )


def main(
    only: Annotated[str, typer.Option(help="names of classes, by commas; prints instead of writing")] = "",
    out: Annotated[Path, typer.Option(help="the page to write")] = DOCS,
) -> None:
    """Measure every class and write the page."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    chosen = set(filter(None, only.split(",")))
    kept = Kept(out.with_name(f"{out.name}.rows.json"))
    groups: list[dict[str, dict[str, str]]] = []
    peers = {f"{name} ({kind})": kind for kind, name in recurrent_classes().items()}
    makers: list[dict[str, Callable[[], nn.Module]]] = [
        our_classes(),
        {name: (lambda kind=kind: tiny_model(kind)) for name, kind in sorted(peers.items())},
    ]
    for group in makers:
        rows = {}
        for name, make in group.items():
            if chosen and not any(part in name for part in chosen):
                continue
            rows[name] = measure(name, make) if chosen else kept.row(name, make)
            print(name, rows[name], flush=True)
        groups.append(rows)
    if not chosen:
        write_atomically(out, page(*groups))
        kept.remove()
        print(f"wrote {out}")


class Kept:
    """Rows as they are measured, in a file beside the page until it is written: a run that was ended goes on."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, dict[str, dict[str, str]]()
        if path.is_file():
            written = json.loads(path.read_text(encoding="utf-8"))
            self.rows = written["rows"] if written["versions"] == versions() else {}

    def row(self, name: str, make: Callable[[], nn.Module]) -> dict[str, str]:
        """The row of a class, measured if it is not there yet."""
        if name not in self.rows:
            self.rows[name] = measure(name, make)
            write_atomically(self.path, json.dumps({"versions": versions(), "rows": self.rows}, indent=1))
        return self.rows[name]

    def remove(self) -> None:
        """The page holds them all."""
        self.path.unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
