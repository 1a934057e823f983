"""What the compiled kernels depend on, so that they are compiled again when it has changed, and only then."""

from __future__ import annotations

import hashlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPS = HERE.parent.parent / "src" / "megalodon" / "ops"
FOLDERS = {
    "cema": ("cema",),
    "timestep_norm": ("timestep_norm",),
    "timestep_decay_norm": ("timestep_decay_norm", "timestep_norm"),
    "attention": ("chunk_attention",),
    "window": ("sliding_chunk_attention", "chunk_attention"),
}
"""By what the names of an operator's cases in `compile_kernels.py` begin with."""
SHARED = ("launch.py", "layout.py", "pieces.py", "prefix.py", "segments.py", "triton_dot.py")

NOT_COMPILED = ("__init__.py", "blocked.py", "causal.py", "reference.py")
"""Files of an operator that say which form runs, or are other forms: no kernel is made of them."""


def digests() -> dict[str, str]:
    """SHA-256 of the sources of each operator, what it shares with others and the cases included."""
    found = {}
    for operator, folders in FOLDERS.items():
        paths = [HERE / "compile_kernels.py", *(OPS / name for name in SHARED)]
        files = (path for folder in folders for path in sorted((OPS / folder).glob("*.py")))
        paths += [path for path in files if path.name not in NOT_COMPILED]
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
        found[operator] = digest.hexdigest()
    return found
