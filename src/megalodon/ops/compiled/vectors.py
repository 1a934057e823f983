"""Vectors of the CPU for Numba's loops: what its language cannot say, written in LLVM's.

Numba turns plain loops into vector code where it can prove that order does not matter. A dot product of a few rows
with a matrix it cannot keep in registers, so the products here are spelled out. They sum a row's terms in one order
whatever the number of rows and the row's place among them: bits do not depend on the others.

Memory is given by its address, an int64, because the pieces of a model are passed as one table of addresses. Everything
here is inlined into its caller; nothing is checked.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from megalodon.ops.compiled.tables import BFLOAT16, FLOAT32, INT8

# Numba types these for its own inside alone.
intrinsic: Any = extending.intrinsic
float32: Any = numba.float32
int32: Any = numba.int32
int64: Any = numba.int64
uint16: Any = numba.uint16
uint32: Any = numba.uint32

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_STORED = {FLOAT32: _FLOAT, BFLOAT16: ir.IntType(16), INT8: ir.IntType(8)}
_BYTES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}
_CONTRACT = ("contract",)


def _width() -> int:
    """float32 numbers in a vector of this CPU."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8


WIDTH = _width()


def _pointer(builder: Any, address: Any, index: Any, kind: int) -> Any:
    """To element `index` of numbers that lie from `address` on."""
    base = builder.inttoptr(address, _STORED[kind].as_pointer())
    return builder.gep(base, [index], inbounds=True)


def _widened(builder: Any, stored: Any, kind: int) -> Any:
    """A vector as stored -> float32."""
    width = stored.type.count
    floats = ir.VectorType(_FLOAT, width)
    if kind == FLOAT32:
        return stored
    integers = ir.VectorType(_INT, width)
    if kind == INT8:
        return builder.sitofp(builder.sext(stored, integers), floats)
    sixteen = ir.Constant(integers, [16] * width)
    return builder.bitcast(builder.shl(builder.zext(stored, integers), sixteen), floats)


def _load(builder: Any, address: Any, index: Any, kind: int, width: int = WIDTH) -> Any:
    """float32 vector of `width` numbers from `index` on."""
    vector = ir.VectorType(_STORED[kind], width)
    pointer = builder.bitcast(_pointer(builder, address, index, kind), vector.as_pointer())
    load = builder.load(pointer)
    load.align = _BYTES[kind]
    return _widened(builder, load, kind)


def _load_some(builder: Any, address: Any, index: Any, count: Any, kind: int, width: int = WIDTH) -> Any:
    """The same of `count` numbers, less than `width`; the rest are zeros."""
    vector, name = ir.VectorType(_STORED[kind], width), {FLOAT32: "f32", BFLOAT16: "i16", INT8: "i8"}[kind]
    signature = ir.FunctionType(vector, [vector.as_pointer(), _INT, ir.VectorType(ir.IntType(1), width), vector])
    function = builder.module.declare_intrinsic(f"llvm.masked.load.v{width}{name}.p0", (), signature)
    pointer = builder.bitcast(_pointer(builder, address, index, kind), vector.as_pointer())
    align, zeros = ir.Constant(_INT, _BYTES[kind]), ir.Constant(vector, None)
    return _widened(builder, builder.call(function, [pointer, align, _first(builder, count, width), zeros]), kind)


def _store_some(builder: Any, value: Any, address: Any, index: Any, count: Any) -> None:
    """The first `count` lanes."""
    vector = value.type
    signature = ir.FunctionType(
        ir.VoidType(), [vector, vector.as_pointer(), _INT, ir.VectorType(ir.IntType(1), vector.count)]
    )
    function = builder.module.declare_intrinsic(f"llvm.masked.store.v{vector.count}f32.p0", (), signature)
    pointer = builder.bitcast(_pointer(builder, address, index, FLOAT32), vector.as_pointer())
    builder.call(function, [value, pointer, ir.Constant(_INT, 4), _first(builder, count, vector.count)])


def _first(builder: Any, count: Any, width: int) -> Any:
    """A mask of the first `count` lanes."""
    lanes = ir.Constant(ir.VectorType(_INT, width), list(range(width)))
    return builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(count, _INT), width))


def _spread(builder: Any, value: Any, width: int = WIDTH) -> Any:
    """One number in all lanes."""
    vector = ir.VectorType(value.type, width)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_INT, width), [0] * width))


def _multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), total, flags=_CONTRACT)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _halves(groups: int, size: int, second: bool, start: int = 0) -> list[int]:
    """Lanes of the first or second half of each of `groups` groups of `size` lanes."""
    half = size // 2
    return [start + g * size + (half if second else 0) + i for g in range(groups) for i in range(half)]


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums of all lanes of each vector, one vector: lane i is that of vector i. Their number is a power of two.

    Each sum is taken by halves: lane i with lane i + 8, then with i + 4, and so on, however many vectors there are.
    """
    size, groups = WIDTH, 1
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        lanes = [_halves(groups, size, second) + _halves(groups, size, second, WIDTH) for second in (False, True)]
        vectors = [builder.fadd(*(_shuffle(builder, a, b, wanted) for wanted in lanes)) for a, b in pairs]
        size, groups = size // 2, groups * 2
    (total,) = vectors
    while size > 1:
        total = builder.fadd(*(_shuffle(builder, total, total, _halves(groups, size, s)) for s in (False, True)))
        size //= 2
    return total


def _store(builder: Any, value: Any, address: Any, index: Any) -> None:
    pointer = builder.bitcast(_pointer(builder, address, index, FLOAT32), value.type.as_pointer())
    builder.store(value, pointer).align = 4


def _numbers(count: int) -> Any:
    return types.void(*[types.int64] * count)


def make_dots(rows: int, columns: int, kind: int) -> Any:
    """An intrinsic `dots(x, x_step, w, w_step, size, out, out_step)`: `out[r, c] = sum_i x[r, i] w[c, i]`.

    x float32 [rows, size], w [columns, size] of `kind`, out float32 [rows, columns]; x, w and out are addresses, steps
    the elements from one row to the next. `rows * columns` is a power of two and at most `WIDTH`.
    """
    assert rows * columns <= WIDTH

    @intrinsic
    def dots(typing: Any, x: Any, x_step: Any, w: Any, w_step: Any, size: Any, out: Any, out_step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_step, w, w_step, size, out, out_step = arguments
            integer, vector = size.type, ir.VectorType(_FLOAT, WIDTH)
            zero = ir.Constant(vector, [0.0] * WIDTH)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows * columns)]
            x_rows = [builder.mul(x_step, integer(r)) for r in range(rows)]
            w_rows = [builder.mul(w_step, integer(c)) for c in range(columns)]

            def add(i: Any, load: Any) -> None:
                left = [load(x, builder.add(row, i), FLOAT32) for row in x_rows]
                for c, row in enumerate(w_rows):
                    right = load(w, builder.add(row, i), kind)
                    for r in range(rows):
                        total = totals[r * columns + c]
                        builder.store(_multiply_add(builder, left[r], right, builder.load(total)), total)

            whole = builder.and_(size, integer(-WIDTH))
            with cgutils.for_range_slice(builder, integer(0), whole, integer(WIDTH), integer) as (i, _):
                add(i, lambda address, index, of: _load(builder, address, index, of))
            rest = builder.sub(size, whole)
            with builder.if_then(builder.icmp_signed(">", rest, integer(0))):
                add(whole, lambda address, index, of: _load_some(builder, address, index, rest, of))
            sums = _sums(builder, [builder.load(total) for total in totals])
            for r in range(rows):
                part = _shuffle(builder, sums, sums, [r * columns + c for c in range(columns)])
                _store(builder, part, out, builder.mul(out_step, integer(r)))
            return context.get_dummy_value()

        return _numbers(7), generate

    return dots


def make_weighted_sum(vectors: int, kind: int) -> Any:
    """An intrinsic `weighted_sum(weights, count, v, step, out)`: `out = sum_i weights[i] v[i, : vectors * WIDTH]`.

    weights float32 [count], v [count, ...] of `kind` with `step` elements from one row to the next, out float32.
    """

    @intrinsic
    def weighted_sum(typing: Any, weights: Any, count: Any, v: Any, step: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, count, v, step, out = arguments
            integer = count.type
            zero = ir.Constant(ir.VectorType(_FLOAT, WIDTH), [0.0] * WIDTH)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(vectors)]
            with cgutils.for_range_slice(builder, integer(0), count, integer(1), integer) as (i, _):
                weight = _spread(builder, builder.load(_pointer(builder, weights, i, FLOAT32)))
                row = builder.mul(step, i)
                for n, total in enumerate(totals):
                    values = _load(builder, v, builder.add(row, integer(n * WIDTH)), kind)
                    builder.store(_multiply_add(builder, weight, values, builder.load(total)), total)
            for n, total in enumerate(totals):
                _store(builder, builder.load(total), out, integer(n * WIDTH))
            return context.get_dummy_value()

        return _numbers(5), generate

    return weighted_sum


@intrinsic
def average_channel(typing: Any, value: Any, h_in: Any, h_out: Any, q: Any, p: Any, gamma: Any, size: Any) -> Any:
    """One channel of CEMA: `h = q h + p x`, and the sum of `Re(gamma h)`.

    `value` is x; h, q, gamma are addresses of complex [size], p of float32 [size]. `h_out` may be `h_in`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, h_in, h_out, q, p, gamma, size = arguments
        integer, vector, half = size.type, ir.VectorType(_FLOAT, WIDTH), WIDTH // 2
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * WIDTH))
        numbers = builder.mul(size, integer(2))
        evens = [i - i % 2 for i in range(WIDTH)]
        signs = ir.Constant(vector, [-1.0, 1.0] * half)
        x = _spread(builder, value)

        def advance(i: Any, count: Any) -> None:
            def load(address: Any, width: int = WIDTH) -> Any:
                at = i if width == WIDTH else builder.lshr(i, integer(1))
                if count is None:
                    return _load(builder, address, at, FLOAT32, width)
                some = count if width == WIDTH else builder.lshr(count, integer(1))
                return _load_some(builder, address, at, some, FLOAT32, width)

            h, decay, taps, gain = load(h_in), load(q), load(gamma), load(p, half)
            none = ir.Constant(ir.VectorType(_FLOAT, half), [0.0] * half)
            gain = _shuffle(builder, gain, none, [i // 2 if i % 2 == 0 else half for i in range(WIDTH)])
            real = _shuffle(builder, decay, decay, evens)
            imaginary = builder.fmul(_shuffle(builder, decay, decay, [i + 1 for i in evens]), signs)
            swapped = _shuffle(builder, h, h, [i ^ 1 for i in range(WIDTH)])
            new = _multiply_add(builder, imaginary, swapped, builder.fmul(gain, x, flags=_CONTRACT))
            new = _multiply_add(builder, real, h, new)
            if count is None:
                _store(builder, new, h_out, i)
            else:
                _store_some(builder, new, h_out, i, count)
            found = builder.fmul(taps, builder.fmul(new, ir.Constant(vector, [1.0, -1.0] * half)))
            builder.store(builder.fadd(builder.load(total), found, flags=_CONTRACT), total)

        whole = builder.and_(numbers, integer(-WIDTH))
        with cgutils.for_range_slice(builder, integer(0), whole, integer(WIDTH), integer) as (i, _):
            advance(i, None)
        rest = builder.sub(numbers, whole)
        with builder.if_then(builder.icmp_signed(">", rest, integer(0))):
            advance(whole, rest)
        return builder.extract_element(_sums(builder, [builder.load(total)]), ir.Constant(_INT, 0))

    return types.float32(types.float32, *[types.int64] * 6), generate


def _make_pointer(element: Any, llvm_type: Any) -> Any:
    """An intrinsic that makes a pointer of an address."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], llvm_type.as_pointer())

        return types.CPointer(element)(types.int64), generate

    return pointer


f32 = _make_pointer(types.float32, ir.FloatType())
f64 = _make_pointer(types.float64, ir.DoubleType())
i64 = _make_pointer(types.int64, ir.IntType(64))
u8 = _make_pointer(types.uint8, ir.IntType(8))
u16 = _make_pointer(types.uint16, ir.IntType(16))


@intrinsic
def bits_of(typing: Any, x: Any) -> Any:
    """float32 -> int32, the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _INT)

    return types.int32(types.float32), generate


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """int32 -> float32, the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def call(typing: Any, function: Any) -> Any:
    """Call the C function `int ()` or `void ()` at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_INT, [])
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), generate


loops = numba.njit(fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy", boundscheck=False)
"""Plain functions over vectors; sums may be taken in another order, always the same one."""

exact = numba.njit(fastmath={"contract"}, error_model="numpy", boundscheck=False)
"""The same, in the order as written."""


@exact
def exp(x: Any) -> Any:
    """e**x of a float32, to 2 units in the last place; inputs are held in -87.3 to 88."""
    x = min(max(x, float32(-87.3)), float32(88.0))
    shifted = x * float32(1.44269504) + float32(12582912.0)  # adding 1.5 * 2**23 rounds to a whole number
    n = shifted - float32(12582912.0)
    r = x - n * float32(0.693359375)
    r = r + n * float32(2.12194440e-4)
    y = float32(1.9875691500e-4)
    y = y * r + float32(1.3981999507e-3)
    y = y * r + float32(8.3334519073e-3)
    y = y * r + float32(4.1665795894e-2)
    y = y * r + float32(1.6666665459e-1)
    y = y * r + float32(5.0000001201e-1)
    y = y * r * r + r + float32(1.0)
    return y * float_of(int32((bits_of(shifted) + 127) << 23))


@exact
def silu(x: Any) -> Any:
    """x * sigmoid(x) of a float32."""
    return x / (float32(1.0) + exp(-x))
