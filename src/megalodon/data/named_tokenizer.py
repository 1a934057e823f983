"""The tokenizer that a name, a file or a folder stands for."""

from __future__ import annotations

import os
from pathlib import Path

from megalodon.data.pretrained import tokenizer_from_file, tokenizer_from_pretrained
from megalodon.data.tokenizer import HUB_NAME, ByteTokenizer, Tokenizer


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names: `bytes`, a `tokenizer.json` of the tokenizers library, a folder that
    Transformers' AutoTokenizer loads (a model's folder, say), or a name on the Hugging Face hub.

    Raises FileNotFoundError or ValueError that say what would be right.
    """
    name = os.fspath(spec)
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_file():
        return tokenizer_from_file(path)
    if path.is_dir() or (HUB_NAME.fullmatch(name) and path.suffix != ".json"):
        return tokenizer_from_pretrained(path if path.is_dir() else name)
    raise FileNotFoundError(
        f"tokenizer {name!r}: no such file or folder (from folder {Path.cwd()}). Give `bytes`, a tokenizer.json, a "
        "folder with a tokenizer, or a name on the Hugging Face hub"
    )
