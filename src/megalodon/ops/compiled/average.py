"""CEMA token by token, both passes: channels side by side in a vector, their states in the nearest cache.

The recurrence itself, `h_t = q h_{t-1} + p x_t`, `y_t = Re(sum_j gamma_j h_t) + omega x_t`, costs about a hundredth of
what a block's matrix products do, once nothing but x and y touches memory. The backward pass keeps no state: it runs
forward again, keeps the states between runs of `TOKENS` tokens, and makes those of one run anew.
"""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types

from megalodon.ops.compiled.rows import clear, share_of, whose
from megalodon.ops.compiled.tables import AVERAGED, FLOAT32, Average
from megalodon.ops.compiled.vectors import (
    _CONTRACT,
    WIDTH,
    _load,
    _multiply_add,
    _store,
    f32,
    i64,
    intrinsic,
    loops,
)


def _negative(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total - a b."""
    return builder.fsub(total, builder.fmul(a, b, flags=_CONTRACT), flags=_CONTRACT)


class _Component:
    """One component of the channels side by side: its numbers in registers while the tokens pass."""

    def __init__(self, builder: Any, j: Any, coefficients: Any) -> None:
        self.builder, self.j = builder, j
        self.q_re, self.q_im, self.g_re, self.g_im, self.p = (self.load(coefficients, 5, i) for i in range(5))

    def _at(self, vectors: int, which: int, start: Any) -> Any:
        integer = self.j.type
        place = self.builder.mul(self.j, integer(vectors * WIDTH))
        place = self.builder.add(place, integer(which * WIDTH))
        return place if start is None else self.builder.add(place, start)

    def load(self, address: Any, vectors: int, which: int, start: Any = None) -> Any:
        """Vector `which` of the component's `vectors`, behind `start` numbers."""
        return _load(self.builder, address, self._at(vectors, which, start), FLOAT32)

    def store(self, value: Any, address: Any, vectors: int, which: int, start: Any = None) -> None:
        _store(self.builder, value, address, self._at(vectors, which, start))

    def variables(self, address: Any, vectors: int) -> list[Any]:
        """The component's vectors, as variables that begin with what is in memory."""
        return [cgutils.alloca_once_value(self.builder, self.load(address, vectors, i)) for i in range(vectors)]

    def write(self, variables: list[Any], address: Any) -> None:
        for i, variable in enumerate(variables):
            self.store(self.builder.load(variable), address, len(variables), i)


def _each_component(builder: Any, N: Any, coefficients: Any, work: Any) -> None:
    """`work` on two components at a time, whose recurrences wait for themselves and not for each other."""
    integer = N.type
    pairs = builder.and_(N, integer(-2))
    for begin, end, together in ((integer(0), pairs, 2), (pairs, N, 1)):
        with cgutils.for_range_slice(builder, begin, end, integer(together), integer) as (j, _):
            work([_Component(builder, builder.add(j, integer(i)), coefficients) for i in range(together)])


def _make_forward(writes_y: bool, keeps: bool) -> Any:
    """`forward(x, step, tokens, h, coefficients, N, omega, y, history)` for WIDTH channels.

    h [N, 2, WIDTH] is moved on in place. y is written if `writes_y`; history [tokens, N, 2, WIDTH] if `keeps`.
    """

    @intrinsic
    def forward(
        typing: Any, x: Any, step: Any, tokens: Any, h: Any, coefficients: Any, N: Any, omega: Any, y: Any, history: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, step, tokens, h, coefficients, N, omega, y, history = arguments
            integer = step.type
            row = builder.mul(N, integer(2 * WIDTH))

            def advance(components: list[_Component]) -> None:
                states = [one.variables(h, 2) for one in components]
                with cgutils.for_range_slice(builder, integer(0), tokens, integer(1), integer) as (t, _):
                    at, kept = builder.mul(t, step), builder.mul(t, row)
                    value = _load(builder, x, at, FLOAT32)
                    total = _load(builder, y, at, FLOAT32) if writes_y else None
                    for one, (re, im) in zip(components, states, strict=True):
                        old_re, old_im = builder.load(re), builder.load(im)
                        new_re = _multiply_add(builder, one.q_re, old_re, builder.fmul(one.p, value, flags=_CONTRACT))
                        new_re = _negative(builder, one.q_im, old_im, new_re)
                        new_im = builder.fmul(one.q_im, old_re, flags=_CONTRACT)
                        new_im = _multiply_add(builder, one.q_re, old_im, new_im)
                        for which, (variable, new) in enumerate(((re, new_re), (im, new_im))):
                            builder.store(new, variable)
                            if keeps:
                                one.store(new, history, 2, which, kept)
                        if writes_y:
                            total = _negative(
                                builder, one.g_im, new_im, _multiply_add(builder, one.g_re, new_re, total)
                            )
                    if writes_y:
                        _store(builder, total, y, at)
                for one, variables in zip(components, states, strict=True):
                    one.write(variables, h)

            if writes_y:
                residual = _load(builder, omega, integer(0), FLOAT32)
                with cgutils.for_range_slice(builder, integer(0), tokens, integer(1), integer) as (t, _):
                    at = builder.mul(t, step)
                    _store(builder, builder.fmul(residual, _load(builder, x, at, FLOAT32)), y, at)
            _each_component(builder, N, coefficients, advance)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return forward


_run, _states, _history = _make_forward(True, False), _make_forward(False, False), _make_forward(False, True)


@intrinsic
def _backward(
    typing: Any, x: Any, dy: Any, step: Any, tokens: Any, history: Any, adjoint: Any, coefficients: Any, N: Any,
    omega: Any, dx: Any, sums: Any, d_omega: Any,
) -> Any:  # fmt: skip
    """Gradients through `tokens` tokens, the last first.

    history [tokens + 1, N, 2, WIDTH]: the state before the first token, then those after each. adjoint [N, 2, WIDTH]:
    the gradient of the last state, turned into that of the first. sums [N, 5, WIDTH], laid out as the coefficients,
    and d_omega [WIDTH] are added to.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, dy, step, tokens, history, adjoint, coefficients, N, omega, dx, sums, d_omega = arguments
        integer = step.type
        row = builder.mul(N, integer(2 * WIDTH))

        def through(one: _Component, value: Any, grad: Any, before: Any, variables: Any, total: Any) -> Any:
            (adjoint_re, adjoint_im), (d_q_re, d_q_im, d_g_re, d_g_im, d_p), (new_re, new_im) = variables

            def add(variable: Any, a: Any, b: Any, form: Any = _multiply_add) -> None:
                builder.store(form(builder, a, b, builder.load(variable)), variable)

            a_re = _multiply_add(builder, one.g_re, grad, builder.load(adjoint_re))
            a_im = _negative(builder, one.g_im, grad, builder.load(adjoint_im))
            add(d_g_re, grad, builder.load(new_re))
            add(d_g_im, grad, builder.load(new_im), _negative)
            old_re, old_im = one.load(history, 2, 0, before), one.load(history, 2, 1, before)
            for variable, a, b in ((d_q_re, a_re, old_re), (d_q_re, a_im, old_im), (d_q_im, a_im, old_re)):
                add(variable, a, b)
            add(d_q_im, a_re, old_im, _negative)
            add(d_p, value, a_re)
            builder.store(old_re, new_re)
            builder.store(old_im, new_im)
            back = builder.fmul(one.q_im, a_im, flags=_CONTRACT)
            builder.store(_multiply_add(builder, one.q_re, a_re, back), adjoint_re)
            back = builder.fmul(one.q_re, a_im, flags=_CONTRACT)
            builder.store(_negative(builder, one.q_im, a_re, back), adjoint_im)
            return _multiply_add(builder, one.p, a_re, total)

        def retreat(components: list[_Component]) -> None:
            last = builder.mul(tokens, row)
            variables = [
                (
                    one.variables(adjoint, 2),
                    one.variables(sums, 5),
                    [cgutils.alloca_once_value(builder, one.load(history, 2, i, last)) for i in range(2)],
                )
                for one in components
            ]
            with cgutils.for_range_slice(builder, integer(0), tokens, integer(1), integer) as (i, _):
                t = builder.sub(builder.sub(tokens, i), integer(1))
                at, before = builder.mul(t, step), builder.mul(t, row)
                value, grad = _load(builder, x, at, FLOAT32), _load(builder, dy, at, FLOAT32)
                total = _load(builder, dx, at, FLOAT32)
                for one, own in zip(components, variables, strict=True):
                    total = through(one, value, grad, before, own, total)
                _store(builder, total, dx, at)
            for one, (adjoints, totals, _) in zip(components, variables, strict=True):
                one.write(adjoints, adjoint)
                one.write(totals, sums)

        residual = _load(builder, omega, integer(0), FLOAT32)
        summed = cgutils.alloca_once_value(builder, _load(builder, d_omega, integer(0), FLOAT32))
        with cgutils.for_range_slice(builder, integer(0), tokens, integer(1), integer) as (t, _):
            at = builder.mul(t, step)
            grad = _load(builder, dy, at, FLOAT32)
            _store(builder, builder.fmul(residual, grad), dx, at)
            builder.store(_multiply_add(builder, _load(builder, x, at, FLOAT32), grad, builder.load(summed)), summed)
        _store(builder, builder.load(summed), d_omega, integer(0))
        _each_component(builder, N, coefficients, retreat)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), generate


@loops
def _copy(source: Any, target: Any, count: Any) -> Any:
    u, v = f32(source), f32(target)
    for i in range(count):
        v[i] = u[i]


@loops
def forward(a: Any) -> Any:
    """y and the last states, on every thread of the pool: `a` int64, laid out as `Average`."""
    thread, threads = whose(a[Average.number], a[Average.team])
    D, N, parts = a[Average.dim], a[Average.components], a[Average.dim] // WIDTH
    state = 2 * N * WIDTH
    first, last = share_of(a[Average.rows] * parts, thread, threads, 1)
    for task in range(first, last):
        row, part = task // parts, task % parts
        h = a[Average.states] + 4 * task * state
        runs = a[Average.runs] + 8 * AVERAGED * a[Average.most_runs] * row
        for run in range(i64(a[Average.counts])[row]):
            begin, tokens, fresh = (
                i64(runs)[AVERAGED * run],
                i64(runs)[AVERAGED * run + 1],
                i64(runs)[AVERAGED * run + 2],
            )
            if fresh != 0:
                clear(h, state)
            at = 4 * ((row * a[Average.length] + begin) * D + part * WIDTH)
            _run(
                a[Average.x] + at, D, tokens, h, a[Average.coefficients] + 4 * part * N * 5 * WIDTH, N,
                a[Average.omega] + 4 * part * WIDTH, a[Average.y] + at, 0,
            )  # fmt: skip


@loops
def backward(a: Any) -> Any:
    """All gradients, on every thread of the pool: `states` become the gradients of the first states."""
    thread, threads = whose(a[Average.number], a[Average.team])
    D, N, parts = a[Average.dim], a[Average.components], a[Average.dim] // WIDTH
    state = 2 * N * WIDTH
    first, last = share_of(a[Average.rows] * parts, thread, threads, 1)
    history = a[Average.scratch] + 4 * thread * state * (a[Average.longest] + 1 + a[Average.most_runs])
    kept = history + 4 * state * (a[Average.longest] + 1)
    for task in range(first, last):
        row, part = task // parts, task % parts
        entering, adjoint = a[Average.entering] + 4 * task * state, a[Average.states] + 4 * task * state
        runs = i64(a[Average.runs] + 8 * AVERAGED * a[Average.most_runs] * row)
        count = i64(a[Average.counts])[row]
        coefficients = a[Average.coefficients] + 4 * part * N * 5 * WIDTH
        omega, here = a[Average.omega] + 4 * part * WIDTH, 4 * (row * a[Average.length] * D + part * WIDTH)
        for run in range(count):
            begin, tokens, fresh = runs[AVERAGED * run], runs[AVERAGED * run + 1], runs[AVERAGED * run + 2]
            target = kept + 4 * run * state
            if fresh != 0:
                clear(target, state)
            else:
                _copy(entering if run == 0 else history, target, state)
            _copy(target, history, state)
            _states(a[Average.x] + here + 4 * begin * D, D, tokens, history, coefficients, N, omega, 0, 0)
        sums, d_omega = a[Average.sums] + 4 * task * N * 5 * WIDTH, a[Average.d_omega] + 4 * task * WIDTH
        clear(sums, N * 5 * WIDTH)
        clear(d_omega, WIDTH)
        for run in range(count - 1, -1, -1):
            begin, tokens, fresh = runs[AVERAGED * run], runs[AVERAGED * run + 1], runs[AVERAGED * run + 2]
            at = here + 4 * begin * D
            source = kept + 4 * run * state
            _copy(source, history, state)
            _history(a[Average.x] + at, D, tokens, source, coefficients, N, omega, 0, history + 4 * state)
            _backward(
                a[Average.x] + at, a[Average.dy] + at, D, tokens, history, adjoint, coefficients, N, omega,
                a[Average.y] + at, sums, d_omega,
            )  # fmt: skip
            if fresh != 0:
                clear(adjoint, state)
