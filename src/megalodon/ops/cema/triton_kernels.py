"""The device code of CEMA; docs/kernels.md derives the algorithm. `triton.py` beside this launches it.

A program takes DC channels and M = 16 pieces of documents side by side, and walks the pieces in blocks of T tokens. A
block is a few products of T x T and T x N matrices for each channel, batched over channels, so that every warp
multiplies for its own channels; states stay in registers in float32.

The adjoint of the map is the map itself with time reversed and p and gamma exchanged, so the same kernels run both
ways: REVERSE reads a piece from its end, and its states are those of the conjugated adjoint, one turn of q ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalodon.ops.triton_dot import dot


@triton.jit
def power(re, im, exponent, BITS: tl.constexpr):
    """(re + i im) ** exponent by binary powering; exponent int32, broadcast against the base."""
    out_re = re * 0 + 1.0 + exponent * 0
    out_im = im * 0 + exponent * 0.0
    for bit in tl.static_range(BITS):
        take = ((exponent >> bit) & 1) == 1
        next_re = out_re * re - out_im * im
        next_im = out_re * im + out_im * re
        out_re = tl.where(take, next_re, out_re)
        out_im = tl.where(take, next_im, out_im)
        squared = re * re - im * im
        im = 2 * re * im
        re = squared
    return out_re, out_im


@triton.jit
def product(data, coefficients, accumulator):
    """accumulator + data @ coefficients, per channel. bfloat16 data are exact in tensor cores; their float32
    coefficients are split into two bfloat16 parts, which keeps 16 bits of them. float32 data take three tf32 products.
    """
    if data.dtype == tl.bfloat16:
        high = coefficients.to(tl.bfloat16)
        low = (coefficients - high.to(tl.float32)).to(tl.bfloat16)
        out = dot(data, high, dot(data, low, accumulator))
    else:
        out = dot(data, coefficients, accumulator)
    return out


@triton.jit
def taps_kernel(p, q, gamma, omega, taps, D, N, HAS_OMEGA: tl.constexpr, DC: tl.constexpr, T: tl.constexpr,
                NP: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """taps[d, t] = Re(sum_j gamma p q^t), omega added at t = 0: the impulse response of a block."""
    d = tl.program_id(0) * DC + tl.arange(0, DC)
    n = tl.arange(0, NP)
    t = tl.arange(0, T)
    at = d[:, None] * N + n[None, :]
    inside = (d < D)[:, None] & (n < N)[None, :]
    p_ = tl.load(p + at, mask=inside, other=0.0)
    q_re = tl.load(q + 2 * at, mask=inside, other=0.0)
    q_im = tl.load(q + 2 * at + 1, mask=inside, other=0.0)
    w_re = p_ * tl.load(gamma + 2 * at, mask=inside, other=0.0)
    w_im = p_ * tl.load(gamma + 2 * at + 1, mask=inside, other=0.0)
    power_re, power_im = power(q_re[:, None, :], q_im[:, None, :], t[None, :, None], BITS)
    out = tl.sum(w_re[:, None, :] * power_re - w_im[:, None, :] * power_im, axis=2)
    if HAS_OMEGA:
        out += tl.where(t[None, :] == 0, tl.load(omega + d, mask=d < D, other=0.0)[:, None], 0.0)
    tl.store(taps + d[:, None] * T + t[None, :], out, mask=(d < D)[:, None])


@triton.jit
def complex_rows(pointer, d, D, n, N):
    """A complex [D, N] as (re, im) at broadcast indices d and n, zero outside."""
    inside = (d < D) & (n < N)
    at = (d * N + n) * 2
    return tl.load(pointer + at, mask=inside, other=0.0), tl.load(pointer + at + 1, mask=inside, other=0.0)


@triton.jit
def pieces_at(order, runs, group, M: tl.constexpr):
    """(piece, first token, tokens) of the M pieces of a group; no tokens where there is no piece."""
    piece = tl.load(order + group * M + tl.arange(0, M))
    there = piece >= 0
    start = tl.load(runs + piece * 4, mask=there, other=0)
    length = tl.load(runs + piece * 4 + 1, mask=there, other=0)
    return piece, start.to(tl.int64), length


@triton.jit
def states_kernel(x, runs, order, p, q, local, D, N, REVERSE: tl.constexpr, DC: tl.constexpr, M: tl.constexpr,
                  T: tl.constexpr, NP: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """local[piece] = sum_s p q^(length - 1 - s) x_s: the state that each piece leaves when none enters it.

    With REVERSE, x is dy and local[piece] = sum_t q^(t + 1) dy_t: what a state that enters a piece does to the loss.
    """
    d = (tl.program_id(0) * DC + tl.arange(0, DC))[:, None, None]
    t = tl.arange(0, T)
    n = tl.arange(0, NP)[None, None, :]
    piece, start, length = pieces_at(order, runs, tl.program_id(1), M)
    q_re, q_im = complex_rows(q, d, D, n, N)
    write_re, write_im = power(q_re, q_im, (T - 1 - t + REVERSE)[None, :, None], BITS + 1)
    if not REVERSE:
        p_ = tl.load(p + d * N + n, mask=(d < D) & (n < N), other=0.0)
        write_re, write_im = write_re * p_, write_im * p_
    decay_re, decay_im = power(q_re, q_im, tl.full([1, 1, 1], T, tl.int32), BITS + 1)
    h_re = tl.zeros([DC, M, NP], tl.float32)
    h_im = tl.zeros([DC, M, NP], tl.float32)
    blocks = tl.cdiv(tl.max(length, axis=0), T)
    lead = length - blocks * T  # all pieces of the group end together
    for block in range(blocks):
        at = (lead + block * T)[None, :, None] + t[None, None, :]
        token = start[None, :, None] + (length[None, :, None] - 1 - at if REVERSE else at)
        u = tl.load(x + token * D + d, mask=(at >= 0) & (d < D), other=0.0)
        kept_re = decay_re * h_re - decay_im * h_im
        kept_im = decay_re * h_im + decay_im * h_re
        h_re = product(u, write_re, kept_re)
        h_im = product(u, write_im, kept_im)
    target = (piece.to(tl.int64)[None, :, None] * D + d) * N + n
    there = (piece >= 0)[None, :, None] & (d < D) & (n < N)
    tl.store(local + 2 * target, h_re, mask=there)
    tl.store(local + 2 * target + 1, h_im, mask=there)


@triton.jit
def scan_kernel(runs, rows, q, local, initial, entering, last, DN, HAS_INITIAL: tl.constexpr, LENGTH_BITS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """From the states that pieces leave on their own to those that enter them, and the state after each row."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = i < DN
    q_re, q_im = tl.load(q + 2 * i, mask=inside, other=0.0), tl.load(q + 2 * i + 1, mask=inside, other=0.0)
    h_re = tl.zeros([BLOCK], tl.float32)
    h_im = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        h_re = tl.load(initial + 2 * (row * DN + i), mask=inside, other=0.0)
        h_im = tl.load(initial + 2 * (row * DN + i) + 1, mask=inside, other=0.0)
    first, count = tl.load(rows + 2 * row), tl.load(rows + 2 * row + 1)
    for piece in range(first, first + count):
        if tl.load(runs + piece * 4 + 2) != 0:
            h_re = tl.zeros([BLOCK], tl.float32)
            h_im = tl.zeros([BLOCK], tl.float32)
        at = 2 * (tl.cast(piece, tl.int64) * DN + i)
        tl.store(entering + at, h_re, mask=inside)
        tl.store(entering + at + 1, h_im, mask=inside)
        length = tl.load(runs + piece * 4 + 1)
        decay_re, decay_im = power(q_re, q_im, length + i * 0, LENGTH_BITS)
        next_re = decay_re * h_re - decay_im * h_im + tl.load(local + at, mask=inside, other=0.0)
        h_im = decay_re * h_im + decay_im * h_re + tl.load(local + at + 1, mask=inside, other=0.0)
        h_re = next_re
    tl.store(last + 2 * (row * DN + i), h_re, mask=inside)
    tl.store(last + 2 * (row * DN + i) + 1, h_im, mask=inside)


@triton.jit
def outputs_kernel(x, runs, order, taps, p, q, gamma, entering, y, D, N, REVERSE: tl.constexpr, DC: tl.constexpr,
                   M: tl.constexpr, T: tl.constexpr, NP: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """y of every token, from the states that enter the pieces; with REVERSE dx from dy and adjoint states."""
    d = (tl.program_id(0) * DC + tl.arange(0, DC))[:, None, None]
    t = tl.arange(0, T)
    n = tl.arange(0, NP)
    piece, start, length = pieces_at(order, runs, tl.program_id(1), M)
    lag = t[None, None, :] - t[None, :, None]
    kernel = tl.load(taps + d * T + lag, mask=(lag >= 0) & (d < D), other=0.0)

    q_re, q_im = complex_rows(q, d, D, n[None, None, :], N)
    p_ = tl.load(p + d * N + n[None, None, :], mask=(d < D) & (n < N)[None, None, :], other=0.0)
    decay_re, decay_im = power(q_re, q_im, tl.full([1, 1, 1], T, tl.int32), BITS + 1)
    write_re, write_im = power(q_re, q_im, (T - 1 - t + REVERSE)[None, :, None], BITS + 1)
    turned_re, turned_im = complex_rows(q, d, D, n[None, :, None], N)
    read_re, read_im = power(turned_re, turned_im, (t + 1 - REVERSE)[None, None, :], BITS + 1)
    if REVERSE:
        g_re, g_im = complex_rows(gamma, d, D, n[None, None, :], N)
        write_re, write_im = write_re * g_re - write_im * g_im, write_re * g_im + write_im * g_re
        p_turned = tl.load(p + d * N + n[None, :, None], mask=(d < D) & (n < N)[None, :, None], other=0.0)
        read_re, read_im = read_re * p_turned, -read_im * p_turned
    else:
        write_re, write_im = write_re * p_, write_im * p_
        g_re, g_im = complex_rows(gamma, d, D, n[None, :, None], N)
        read_re, read_im = read_re * g_re - read_im * g_im, -(read_re * g_im + read_im * g_re)

    at_state = 2 * ((piece.to(tl.int64)[None, :, None] * D + d) * N + n[None, None, :])
    there = (piece >= 0)[None, :, None] & (d < D) & (n < N)[None, None, :]
    h_re = tl.load(entering + at_state, mask=there, other=0.0)
    h_im = tl.load(entering + at_state + 1, mask=there, other=0.0)
    for block in range(tl.cdiv(tl.max(length, axis=0), T)):
        at = (block * T + t)[None, None, :]
        inside = (at < length[None, :, None]) & (d < D)
        token = start[None, :, None] + (length[None, :, None] - 1 - at if REVERSE else at)
        u = tl.load(x + token * D + d, mask=inside, other=0.0)
        if x.dtype.element_ty == tl.bfloat16:
            out = tl.dot(h_re, read_re, input_precision="tf32")
            out = tl.dot(h_im, read_im, out, input_precision="tf32")
        else:
            out = tl.dot(h_re, read_re, input_precision="tf32x3")
            out = tl.dot(h_im, read_im, out, input_precision="tf32x3")
        out = product(u, kernel, out)
        tl.store(y + token * D + d, out.to(y.dtype.element_ty), mask=inside)
        kept_re = decay_re * h_re - decay_im * h_im
        kept_im = decay_re * h_im + decay_im * h_re
        h_re = product(u, write_re, kept_re)
        h_im = product(u, write_im, kept_im)


@triton.jit
def correlate_kernel(x, dy, runs, order, p, q, entering, ends, correlation, sums, D, N, DC: tl.constexpr,
                     M: tl.constexpr, T: tl.constexpr, NP: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """All that the gradients of the coefficients need from the tokens: NP components of DC channels in a program.

    Three states run along a piece: e, of unit input weights, from zero; h, of p and of the state that entered; and
    u = dh/dq, from zero. The results:
    ends[piece] = (e, u) after the piece, complex [n, D, N, 2]; undefined for a piece shorter than a block;
    sums[group] = (sum_t dy_t e_t, sum_t dy_t u_t) without the lags inside blocks, complex [groups, D, N, 2];
    correlation[group][d, s, r] = sum over blocks of x at place s times dy at place T - 1 - r.

    In a block, a = sum_t q^(t + 1) dy_t is what the state before it does to the loss, b = da/dq. Every product has a
    matrix of its own, made once, which leaves the fewest operations between them.
    """
    parts = tl.cdiv(N, NP)  # neighbours take the same tokens: the second finds them in the cache
    part = tl.program_id(0) % parts
    d = (tl.program_id(0) // parts * DC + tl.arange(0, DC))[:, None, None]
    t = tl.arange(0, T)
    n = (part * NP + tl.arange(0, NP))[None, None, :]
    group = tl.program_id(1)
    piece, start, length = pieces_at(order, runs, group, M)
    q_re, q_im = complex_rows(q, d, D, n, N)
    p_ = tl.load(p + d * N + n, mask=(d < D) & (n < N), other=0.0)
    places = (T - 1 - t)[None, :, None]  # of x in a block, and of dy, which is read from the block's end
    write_re, write_im = power(q_re, q_im, places, BITS)
    slope_re, slope_im = power(q_re, q_im, tl.maximum(places - 1, 0), BITS)
    slope_re, slope_im = slope_re * places, slope_im * places
    read_re, read_im = q_re * write_re - q_im * write_im, q_re * write_im + q_im * write_re
    turn_re, turn_im = write_re * (places + 1), write_im * (places + 1)
    before_re, before_im = power(q_re, q_im, tl.full([1, 1, 1], T - 1, tl.int32), BITS)
    decay_re = before_re * q_re - before_im * q_im
    decay_im = before_re * q_im + before_im * q_re
    before_re, before_im = before_re * T, before_im * T

    there = (piece >= 0)[None, :, None] & (d < D) & (n < N)
    at = (piece.to(tl.int64)[None, :, None] * D + d) * N + n
    h_re = tl.load(entering + 2 * at, mask=there, other=0.0)
    h_im = tl.load(entering + 2 * at + 1, mask=there, other=0.0)
    zero = tl.zeros([DC, M, NP], tl.float32)
    e_re, e_im, u_re, u_im = zero, zero, zero, zero
    s_re, s_im, v_re, v_im = zero, zero, zero, zero
    c = tl.zeros([DC, T, T], tl.float32)
    ahead, behind = t[None, None, :], (T - 1 - t)[None, None, :]
    left = tl.where(d < D, length[None, :, None], 0)  # tokens of each piece that are still to come
    from_x = x + start[None, :, None] * D + d + ahead * D
    from_dy = dy + start[None, :, None] * D + d + behind * D
    next_value = tl.load(from_x, mask=ahead < left, other=0.0)
    next_grad = tl.load(from_dy, mask=behind < left, other=0.0)
    for _ in range(tl.cdiv(tl.max(length, axis=0), T)):
        value, grad = next_value, next_grad
        active = left > 0
        left -= T
        from_x += T * D
        from_dy += T * D
        next_value = tl.load(from_x, mask=ahead < left, other=0.0)
        next_grad = tl.load(from_dy, mask=behind < left, other=0.0)
        a_re, a_im = product(grad, read_re, zero), product(grad, read_im, zero)
        s_re = s_re + a_re * e_re - a_im * e_im  # from the left: two multiply-adds
        s_im = s_im + a_re * e_im + a_im * e_re
        v_re = v_re + a_re * u_re - a_im * u_im
        v_im = v_im + a_re * u_im + a_im * u_re
        b_re, b_im = product(grad, turn_re, zero), product(grad, turn_im, zero)
        v_re = v_re + b_re * h_re - b_im * h_im
        v_im = v_im + b_re * h_im + b_im * h_re

        kept_re = decay_re * u_re - decay_im * u_im + before_re * h_re - before_im * h_im
        kept_im = decay_re * u_im + decay_im * u_re + before_re * h_im + before_im * h_re
        u_re = tl.where(active, product(value, slope_re * p_, kept_re), u_re)
        u_im = tl.where(active, product(value, slope_im * p_, kept_im), u_im)
        kept_re = decay_re * h_re - decay_im * h_im
        kept_im = decay_re * h_im + decay_im * h_re
        h_re = product(value, write_re * p_, kept_re)
        h_im = product(value, write_im * p_, kept_im)
        kept_re = decay_re * e_re - decay_im * e_im
        kept_im = decay_re * e_im + decay_im * e_re
        e_re = tl.where(active, product(value, write_re, kept_re), e_re)
        e_im = tl.where(active, product(value, write_im, kept_im), e_im)
        c = dot(tl.permute(value, (0, 2, 1)), grad, c)

    tl.store(ends + 4 * at, e_re, mask=there)
    tl.store(ends + 4 * at + 1, e_im, mask=there)
    tl.store(ends + 4 * at + 2, u_re, mask=there)
    tl.store(ends + 4 * at + 3, u_im, mask=there)
    at = 4 * ((tl.cast(group, tl.int64) * D + d) * N + n)
    there = (d < D) & (n < N)
    tl.store(sums + at, tl.sum(s_re, axis=1, keep_dims=True), mask=there)
    tl.store(sums + at + 1, tl.sum(s_im, axis=1, keep_dims=True), mask=there)
    tl.store(sums + at + 2, tl.sum(v_re, axis=1, keep_dims=True), mask=there)
    tl.store(sums + at + 3, tl.sum(v_im, axis=1, keep_dims=True), mask=there)
    at = ((tl.cast(group, tl.int64) * D + d) * T + t[None, :, None]) * T + t[None, None, :]
    tl.store(correlation + at, c, mask=(d < D) & (part == 0) & (t[None, :, None] < T))


@triton.jit
def adjoint_scan_kernel(x, runs, rows, p, q, gamma, entering, ends, local, d_last, leaving, d_initial, partial, D, N,
                        HAS_LAST: tl.constexpr, LENGTH_BITS: tl.constexpr, T: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """Chains the pieces of a row from last to first: the adjoint of the state that leaves each (conjugated).

    partial[row] = [D, N, 5], the sums for the gradients of p (real), q and gamma; d_initial the adjoint before the row.
    `ends` comes from `correlate_kernel`, `local` from `states_kernel` run in reverse on dy.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    DN = D * N
    inside = i < DN
    q_re, q_im = tl.load(q + 2 * i, mask=inside, other=0.0), tl.load(q + 2 * i + 1, mask=inside, other=0.0)
    g_re, g_im = tl.load(gamma + 2 * i, mask=inside, other=0.0), tl.load(gamma + 2 * i + 1, mask=inside, other=0.0)
    p_ = tl.load(p + i, mask=inside, other=0.0)
    zero = tl.zeros([BLOCK], tl.float32)
    m_re, m_im = zero, zero
    if HAS_LAST:
        m_re = tl.load(d_last + 2 * (row * DN + i), mask=inside, other=0.0)
        m_im = -tl.load(d_last + 2 * (row * DN + i) + 1, mask=inside, other=0.0)
    dp, dq_re, dq_im, dg_re, dg_im = zero, zero, zero, zero, zero
    first, count = tl.load(rows + 2 * row), tl.load(rows + 2 * row + 1)
    for back in range(count):
        piece = first + count - 1 - back
        at = tl.cast(piece, tl.int64) * DN + i
        tl.store(leaving + 2 * at, m_re, mask=inside)
        tl.store(leaving + 2 * at + 1, m_im, mask=inside)
        start = tl.cast(tl.load(runs + piece * 4), tl.int64)
        length = tl.load(runs + piece * 4 + 1)
        fresh = tl.load(runs + piece * 4 + 2) != 0
        h_re = tl.load(entering + 2 * at, mask=inside, other=0.0)
        h_im = tl.load(entering + 2 * at + 1, mask=inside, other=0.0)
        z_re = tl.load(local + 2 * at, mask=inside, other=0.0)
        z_im = tl.load(local + 2 * at + 1, mask=inside, other=0.0)
        e_re = tl.load(ends + 4 * at, mask=inside, other=0.0)
        e_im = tl.load(ends + 4 * at + 1, mask=inside, other=0.0)
        u_re = tl.load(ends + 4 * at + 2, mask=inside, other=0.0)
        u_im = tl.load(ends + 4 * at + 3, mask=inside, other=0.0)
        if length % T != 0:  # shorter than a block: its few tokens one by one
            e_re, e_im, u_re, u_im = zero, zero, zero, zero
            k_re, k_im = h_re, h_im
            for t in range(length):
                value = tl.load(x + (start + t) * D + i // N, mask=inside, other=0.0).to(tl.float32)
                next_re = q_re * u_re - q_im * u_im + p_ * e_re + k_re
                u_im = q_re * u_im + q_im * u_re + p_ * e_im + k_im
                u_re = next_re
                next_re = q_re * e_re - q_im * e_im + value
                e_im = q_re * e_im + q_im * e_re
                e_re = next_re
                next_re = q_re * k_re - q_im * k_im
                k_im = q_re * k_im + q_im * k_re
                k_re = next_re
        dp += m_re * e_re - m_im * e_im
        dg_re += h_re * z_re - h_im * z_im
        dg_im += h_re * z_im + h_im * z_re
        dq_re += m_re * u_re - m_im * u_im
        dq_im += m_re * u_im + m_im * u_re
        decay_re, decay_im = power(q_re, q_im, length + i * 0, LENGTH_BITS)
        next_re = decay_re * m_re - decay_im * m_im + g_re * z_re - g_im * z_im
        m_im = decay_re * m_im + decay_im * m_re + g_re * z_im + g_im * z_re
        m_re = next_re
        if fresh:
            m_re = tl.zeros([BLOCK], tl.float32)
            m_im = tl.zeros([BLOCK], tl.float32)
    tl.store(d_initial + 2 * (row * DN + i), m_re, mask=inside)
    tl.store(d_initial + 2 * (row * DN + i) + 1, -m_im, mask=inside)
    at = 5 * (row * DN + i)
    tl.store(partial + at, dp, mask=inside)
    tl.store(partial + at + 1, dq_re, mask=inside)
    tl.store(partial + at + 2, -dq_im, mask=inside)
    tl.store(partial + at + 3, dg_re, mask=inside)
    tl.store(partial + at + 4, -dg_im, mask=inside)


@triton.jit
def gradients_kernel(p, q, gamma, correlation, sums, partial, d_p, d_q, d_gamma, d_omega, D, N, GROUPS, BATCH,
                     T: tl.constexpr, NP: tl.constexpr):  # fmt: skip
    """One channel: adds up groups and rows, and the lags inside blocks, into the gradients of the coefficients."""
    d = tl.program_id(0)
    n = tl.arange(0, NP)
    t = tl.arange(0, T)
    inside = n < N
    at = d * N + n
    s_re = tl.zeros([NP], tl.float32)
    s_im, v_re, v_im = s_re, s_re, s_re
    c = tl.zeros([T, T], tl.float32)
    for group in range(GROUPS):
        base = tl.cast(group, tl.int64) * D
        s_re += tl.load(sums + 4 * (base * N + at), mask=inside, other=0.0)
        s_im += tl.load(sums + 4 * (base * N + at) + 1, mask=inside, other=0.0)
        v_re += tl.load(sums + 4 * (base * N + at) + 2, mask=inside, other=0.0)
        v_im += tl.load(sums + 4 * (base * N + at) + 3, mask=inside, other=0.0)
        c += tl.load(correlation + ((base + d) * T + t[:, None]) * T + t[None, :])
    p_ = tl.load(p + at, mask=inside, other=0.0)
    q_re, q_im = tl.load(q + 2 * at, mask=inside, other=0.0), tl.load(q + 2 * at + 1, mask=inside, other=0.0)
    g_re, g_im = tl.load(gamma + 2 * at, mask=inside, other=0.0), tl.load(gamma + 2 * at + 1, mask=inside, other=0.0)
    lags = T - 1 - t[:, None] - t[None, :]
    power_re, power_im = tl.full([NP], 1.0, tl.float32), tl.zeros([NP], tl.float32)
    slope_re, slope_im = tl.zeros([NP], tl.float32), tl.zeros([NP], tl.float32)
    for lag in range(T):
        at_lag = tl.sum(tl.sum(tl.where(lags == lag, c, 0.0), axis=1), axis=0)
        if lag == 0:
            tl.store(d_omega + d, at_lag)
        s_re += at_lag * power_re
        s_im += at_lag * power_im
        v_re += at_lag * p_ * slope_re
        v_im += at_lag * p_ * slope_im
        slope_new = slope_re * q_re - slope_im * q_im + power_re
        slope_im = slope_re * q_im + slope_im * q_re + power_im
        slope_re = slope_new
        power_new = power_re * q_re - power_im * q_im
        power_im = power_re * q_im + power_im * q_re
        power_re = power_new
    dp = g_re * s_re - g_im * s_im
    dq_re, dq_im = g_re * v_re - g_im * v_im, -(g_re * v_im + g_im * v_re)
    dg_re, dg_im = p_ * s_re, -p_ * s_im
    for row in range(BATCH):
        base = 5 * (tl.cast(row, tl.int64) * D * N + at)
        dp += tl.load(partial + base, mask=inside, other=0.0)
        dq_re += tl.load(partial + base + 1, mask=inside, other=0.0)
        dq_im += tl.load(partial + base + 2, mask=inside, other=0.0)
        dg_re += tl.load(partial + base + 3, mask=inside, other=0.0)
        dg_im += tl.load(partial + base + 4, mask=inside, other=0.0)
    tl.store(d_p + at, dp, mask=inside)
    tl.store(d_q + 2 * at, dq_re, mask=inside)
    tl.store(d_q + 2 * at + 1, dq_im, mask=inside)
    tl.store(d_gamma + 2 * at, dg_re, mask=inside)
    tl.store(d_gamma + 2 * at + 1, dg_im, mask=inside)


@triton.jit
def step_kernel(x, p, q, gamma, omega, initial, y, last, D, N, HAS_OMEGA: tl.constexpr, HAS_INITIAL: tl.constexpr,
                DC: tl.constexpr, NP: tl.constexpr):  # fmt: skip
    """One token a row: the recurrence itself."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * DC + tl.arange(0, DC)
    n = tl.arange(0, NP)[None, :]
    q_re, q_im = complex_rows(q, d[:, None], D, n, N)
    g_re, g_im = complex_rows(gamma, d[:, None], D, n, N)
    inside = (d < D)[:, None] & (n < N)
    p_ = tl.load(p + d[:, None] * N + n, mask=inside, other=0.0)
    u = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    h_re = p_ * u[:, None]
    h_im = h_re * 0
    at = 2 * ((row * D + d[:, None]) * N + n)
    if HAS_INITIAL:
        old_re = tl.load(initial + at, mask=inside, other=0.0)
        old_im = tl.load(initial + at + 1, mask=inside, other=0.0)
        h_re += q_re * old_re - q_im * old_im
        h_im += q_re * old_im + q_im * old_re
    out = tl.sum(g_re * h_re - g_im * h_im, axis=1)
    if HAS_OMEGA:
        out += tl.load(omega + d, mask=d < D, other=0.0) * u
    tl.store(y + row * D + d, out.to(y.dtype.element_ty), mask=d < D)
    tl.store(last + at, h_re, mask=inside)
    tl.store(last + at + 1, h_im, mask=inside)
