#!/usr/bin/env bash
# Numba 0.68.1 with NumPy 2.4.6: `sum` and `mean` of float32 numbers are not NumPy's inside a compiled function. Numba adds
# them one after another in float32, where NumPy adds in pairs: of 25,165,824 ones the sum is 16,777,216 and the mean
# 0.667, without a word, for the next one is lost beside the sum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "numba==0.68.1" "numpy==2.4.6"
cat > "$folder/sums.py" <<'PYTHON'
import sys

import numba
import numpy


@numba.njit
def compiled(values):
    return values.sum(), values.mean()


ones = numpy.ones(2**24 + 2**23, numpy.float32)
total, mean = compiled(ones)
print(f"numba {numba.__version__}, numpy {numpy.__version__}: {ones.size} ones")
print(f"compiled: sum {total:.0f}, mean {mean:.3f}; NumPy: sum {ones.sum():.0f}, mean {ones.mean():.3f}")
found = total == 2**24 and abs(mean - 2 / 3) < 1e-6 and ones.sum() == ones.size and ones.mean() == 1
print("as found" if found else "the behaviour has changed")
sys.exit(0 if found else 1)
PYTHON
"$folder/venv/bin/python" "$folder/sums.py"
