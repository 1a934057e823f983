#!/usr/bin/env bash
# Python 3.11's bz2 and lzma read files of several streams, as parallel compressors and `cat a.bz2 b.bz2` write them. Where
# the header of a later stream is damaged they take what follows for no part of the file, and give the text up to there
# as if it were whole. gzip raises for the same damage. A corpus is read by half without a word.
set -euo pipefail
folder=$(mktemp -d)  # nothing is installed: bz2 and lzma are the standard library's
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 - <<'PYTHON'
import bz2
import gzip
import io
import lzma
import platform
import sys

found = {}
for module in (gzip, bz2, lzma):
    streams = [module.compress(f"half {number} ".encode() * 1000) for number in (1, 2)]
    whole = b"".join(streams)
    damaged = streams[0] + bytes([whole[len(streams[0])] ^ 1]) + streams[1][1:]
    assert len(module.open(io.BytesIO(whole)).read()) == 14_000
    try:
        text = module.open(io.BytesIO(damaged)).read()
        found[module.__name__] = f"{len(text):,} of 14,000 bytes, no error"
    except Exception as error:
        found[module.__name__] = f"{type(error).__name__}: {error}"
print("Python", platform.python_version(), "- one bit of the second stream's header changed")
for name, what in found.items():
    print(f"{name}: {what}")
silent = [name for name, what in found.items() if what == "7,000 of 14,000 bytes, no error"]
as_found = silent == ["bz2", "lzma"] and "BadGzipFile" in found["gzip"]
print("as found" if as_found else "the behaviour has changed")
sys.exit(0 if as_found else 1)
PYTHON
