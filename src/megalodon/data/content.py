"""What files hold, as one number: so that caches follow content, not names and times.

Hashing a large corpus at every start would take minutes, so the number is remembered for files whose place, size and
times of change the system reports unaltered. The time of the last change of a file's entry cannot be set back, as the
time of its last writing can.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from megalodon.files import sha256, write_text

SETTLED = 2.0
"""Seconds after which another change of a file is sure to get another time, on any file system in use."""


def stamps(paths: Sequence[Path]) -> list[tuple]:
    """What the system says of files without reading them; the same as long as nobody changed them."""
    found = []
    for path in paths:
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append((os.path.realpath(path), status.st_dev, status.st_ino, status.st_size, *times))
    return found


def content_digest(paths: Sequence[Path], memory: Path | None = None) -> str:
    """SHA-256, in hexadecimal, over the contents of files in this order.

    Args:
        memory: a folder in which the number is kept; None to read the files in any case.
    """
    before = stamps(paths)
    kept = None
    if memory is not None:
        kept = memory / hashlib.sha256(json.dumps(before).encode()).hexdigest()[:32]
        with contextlib.suppress(OSError):
            if len(digest := kept.read_text()) == 64:
                return digest
    together = hashlib.sha256()
    for path in paths:
        together.update(bytes.fromhex(sha256(path)))
    digest = together.hexdigest()
    newest = max((time_ns for stamp in before for time_ns in stamp[-2:]), default=0)
    if kept is not None and time.time_ns() - newest > SETTLED * 1e9 and stamps(paths) == before:
        with contextlib.suppress(OSError):  # a full disk costs time at the next start, no more
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, digest)
    return digest
