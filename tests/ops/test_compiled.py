"""Compiled kernels: equal to their definitions, the same bits whatever the rows and threads; what if they fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megalodon.models.layers.few_rows import PRODUCT, FusedProduct, can_fuse
from megalodon.ops import compiled
from megalodon.ops.backend import default_backend
from megalodon.ops.compiled import threads
from megalodon.ops.compiled.threads import ALONE, TEAM, Balance

CPU = torch.device("cpu")
needed = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has compiled nothing yet."""
    monkeypatch.setattr(compiled, "_FAILED", [])
    compiled._address.cache_clear()
    yield monkeypatch
    compiled._address.cache_clear()


def layer_of(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (5, 3), (16, 8), (33, 50), (384, 96), (1000, 7)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64])
@torch.no_grad()
def test_products_of_few_rows(dtype: torch.dtype, inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(inputs + rows)
    layer, x = layer_of(inputs, outputs, dtype, bias=rows % 2 == 0), torch.randn(rows, inputs)
    expected = nn.functional.linear(*(t if t is None else t.double() for t in (x, layer.weight, layer.bias)))
    torch.testing.assert_close(FusedProduct(layer)(x).double(), expected, rtol=1e-5, atol=1e-5)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bits_of_a_row_do_not_depend_on_rows_or_threads(dtype: torch.dtype) -> None:
    product, x = FusedProduct(layer_of(77, 45, dtype)), torch.randn(64, 77)
    whole, before = product(x), torch.get_num_threads()
    try:
        for threads_used in (1, 2, 3):
            torch.set_num_threads(threads_used)
            for rows in range(1, 65, 7):
                assert torch.equal(product(x[-rows:]), whole[-rows:])
    finally:
        torch.set_num_threads(before)


@needed
@torch.no_grad()
def test_weights_are_read_where_they_lie() -> None:
    layer = layer_of(8, 8, torch.float32, bias=False)
    product, x = FusedProduct(layer), torch.randn(2, 8)
    layer.weight.data.fill_(2.0)
    torch.testing.assert_close(product(x), 2 * x.sum(1, keepdim=True).expand(2, 8))


@needed
def test_layers_that_kernels_do_not_read() -> None:
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    plain = layer_of(4, 3, torch.float32)
    assert can_fuse([plain], torch.float32, PRODUCT)
    assert not can_fuse([plain, Adapted(4, 3)], torch.float32, PRODUCT)
    assert not can_fuse([plain, layer_of(4, 3, torch.bfloat16)], torch.float32, PRODUCT)
    assert not can_fuse([plain.double()], torch.float64, PRODUCT)
    strided = layer_of(4, 3, torch.float32)
    strided.weight = nn.Parameter(torch.randn(4, 3).t())
    assert not can_fuse([strided], torch.float32, PRODUCT)


@needed
def test_exp_and_silu_are_exact_to_a_few_units_in_the_last_place() -> None:
    import numba

    from megalodon.ops.compiled.vectors import exp, silu

    @numba.njit
    def apply(x, e, s):
        for i in range(len(x)):
            e[i], s[i] = exp(x[i]), silu(x[i])

    x = np.concatenate([np.linspace(-87, 87, 10001), [0.0, -0.0, 1e-30, -500.0]]).astype(np.float32)
    e, s = np.empty_like(x), np.empty_like(x)
    apply(x, e, s)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(e[:-1], np.exp(wide[:-1]), rtol=3e-7)
    np.testing.assert_allclose(s[:-1], wide[:-1] / (1 + np.exp(-wide[:-1])), rtol=5e-7)
    assert abs(s[-1]) < 1e-30


def test_the_default_on_a_cpu(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(compiled, "_MISSING", None)
    assert default_backend(CPU, torch.float32) == "numba"
    assert default_backend(CPU, torch.float64) == "blocked"
    fresh.setattr(compiled, "_MISSING", "Numba is not installed")
    assert default_backend(CPU, torch.float32) == "blocked"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert "pip install" in compiled._missing()
    monkeypatch.setattr(compiled, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert compiled._missing() == "this CPU has no AVX2"
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(threads, "pool", lambda: None)
    assert "OpenMP" in compiled._missing()


@needed
@pytest.mark.parametrize("broken", ["folder", "compiler"])
def test_a_failure_is_said_once_and_everything_goes_on(
    broken: str, fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "folder":
        (tmp_path / "file").write_text("")
        fresh.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    else:
        import numba

        def refuse(*arguments: object, **options: object) -> None:
            raise RuntimeError("no target\nfor this machine")

        fresh.setattr(numba, "cfunc", refuse)
    layer = layer_of(4, 3, torch.float32)
    with caplog.at_level(logging.WARNING, logger="megalodon"):
        assert not can_fuse([layer], torch.float32, PRODUCT)
        assert not can_fuse([layer], torch.float32, PRODUCT)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert ("NUMBA_CACHE_DIR" if broken == "folder" else "no target") in record.getMessage()
    assert default_backend(CPU, torch.float32) == "blocked"


@needed
def test_compiled_code_is_kept_and_found_again(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert compiled.address(PRODUCT) is not None
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert kept
    compiled._address.cache_clear()
    assert compiled.address(PRODUCT) is not None
    assert kept == {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@needed
def test_half_a_file_of_compiled_code_is_made_anew(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert compiled.address(PRODUCT) is not None
    sizes = {path: path.stat().st_size for path in tmp_path.rglob("*.nb[ci]")}
    for path in sizes:
        os.truncate(path, 100)
    compiled._address.cache_clear()
    assert compiled.address(PRODUCT) is not None
    assert sizes and all(path.stat().st_size == size for path, size in sizes.items())


def test_numba_is_not_imported_before_a_kernel_is_needed() -> None:
    code = "import sys, megalodon, megalodon.inference, megalodon.training; print('numba' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def run(balance: Balance, team: float, alone: float, calls: int) -> list[int]:
    ways = []
    for _ in range(calls):
        ways.append(balance.choose())
        balance.took(team if ways[-1] == TEAM else alone)
    return ways


def test_the_quicker_way_is_found_and_found_again() -> None:
    balance = Balance()
    idle = run(balance, 1.0, 2.0, 1000)
    assert idle.count(ALONE) < 20  # seldom tried
    busy = run(balance, 30.0, 2.0, 1000)
    assert busy[300:].count(TEAM) < 5  # 15 times as slow, and tried as much less often
    assert run(balance, 1.0, 2.0, 3000)[2500:].count(ALONE) < 20
