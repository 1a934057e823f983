"""How kernels are told what to work on: tables of int64 numbers, most of them addresses of float32 tensors.

No Numba here: callers fill these tables before a kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""Kinds of stored numbers."""

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}
"""By dtype; of weights all three, of all else but int8."""


class _Call(NamedTuple):
    """Of one step. Tensors are float32 unless said otherwise; M rows, as many as tokens."""

    barrier: int  # functions of the pool, see `threads.Kernel`; 0 where one thread does all
    number: int
    team: int
    rows: int  # M
    layers: int
    model_dim: int
    z_dim: int
    value_dim: int
    ffn_dim: int
    heads: int
    components: int
    groups: int
    capacity: int  # places that scores have for a row and head
    weights: int  # int64 [layers + 1, len(Weights)]
    memory: int  # int64 [layers + 1, len(Memory)]
    weight_kind: int
    key_kind: int
    x: int  # [M, D]; changed in place
    out: int  # [M, D]: the final hidden states
    share: int  # float64 [M]: 1 / (tokens seen)
    offsets: int  # int64 [M]: places taken in the open chunk
    slots: int  # int64 [M]: the row of the memory
    turns: int  # complex [C, d / 2]
    eps: int  # float64 [4]: TimestepNorm, memory norm, queries and keys, feed-forward
    scratch: int  # `scratch_size` numbers
    # Gecko's alone
    before: int  # places that are taken in the chunk before: C or 0
    turns_before: int  # complex [C, d / 2]: those of queries for the chunk before
    rotated_heads: int
    corrections: int  # float64 [M, 2]: 1 / (1 - beta**count), of mean and variance
    betas: int  # float64 [2]
    reads: int  # whether there is something in the working memory
    two_hop: int  # whether the second residual adds the block's input


class _Weights(NamedTuple):
    """Of one block, and in a last row of the final norm; 0 where there is none.

    Products: weights, the scales of int8, the bias.
    """

    v: int
    v_scale: int
    v_bias: int
    z: int
    z_scale: int
    z_bias: int
    r: int
    r_scale: int
    r_bias: int
    h: int
    h_scale: int
    h_bias: int
    o: int
    o_scale: int
    o_bias: int
    up: int
    up_scale: int
    up_bias: int
    gate: int
    gate_scale: int
    gate_bias: int
    down: int
    down_scale: int
    down_bias: int
    norm_scale: int  # [D]
    norm_bias: int
    q: int  # complex [D, N]
    p: int  # [D, N]
    gamma: int  # complex [D, N]
    omega: int  # [D]
    memory_scale: int  # [D]
    qk_scale: int  # [2, Z]; Gecko's [4, Z]
    qk_bias: int
    ffn_scale: int  # [D]
    ffn_bias: int
    alpha: int  # [D]


class _Memory(NamedTuple):
    """Of one block's sequences, by slot, and in a last row of the final norm's."""

    mean_in: int  # float64 [slots, G]
    var_in: int
    mean_out: int
    var_out: int
    h_in: int  # complex [slots, D, N]
    h_out: int
    keys: int
    values: int
    key_row: int  # elements from one slot, place and head to the next
    key_place: int
    key_head: int
    value_row: int
    value_place: int
    value_head: int


class _GeckoMemory(NamedTuple):
    """The same of Gecko's."""

    mean_in: int  # those of `Memory` come first
    var_in: int
    mean_out: int
    var_out: int
    h_in: int
    h_out: int
    keys: int
    values: int
    key_row: int
    key_place: int
    key_head: int
    value_row: int
    value_place: int
    value_head: int
    before_keys: int
    before_values: int
    before_key_row: int
    before_key_place: int
    before_key_head: int
    before_value_row: int
    before_value_place: int
    before_value_head: int
    matrix: int  # float32 [slots, H, d, e]: the working memory


Call = _Call(*range(len(_Call._fields)))
"""Where each number of a call stands."""
Weights = _Weights(*range(len(_Weights._fields)))
"""Where each number of a block stands."""
Memory = _Memory(*range(len(_Memory._fields)))
"""Where each number of a block's memory stands."""
GeckoMemory = _GeckoMemory(*range(len(_GeckoMemory._fields)))
"""Where each number of a Gecko block's memory stands."""


def scratch_size(rows: int, dim: int, z_dim: int, value_dim: int, ffn_dim: int, heads: int, capacity: int) -> int:
    """float32 numbers that a step needs to work with."""
    return rows * (5 * dim + 2 * z_dim + 4 * value_dim + 3 * ffn_dim + heads * capacity)


def gecko_scratch_size(rows: int, dim: int, z_dim: int, value_dim: int, ffn_dim: int, heads: int, capacity: int) -> int:
    """The same for Gecko's step."""
    return rows * (5 * dim + 4 * z_dim + 6 * value_dim + 3 * ffn_dim + heads * capacity)


class _Product(NamedTuple):
    """A product of a few rows with a matrix: `out = x @ w.T`."""

    barrier: int  # as in a call
    number: int
    team: int
    x: int  # [M, K]
    rows: int
    inputs: int
    weight: int  # [width, K] of `kind`
    kind: int
    scale: int
    bias: int
    width: int
    out: int


Product = _Product(*range(len(_Product._fields)))
"""Where each number of a product stands."""


class _Average(NamedTuple):
    """CEMA of whole texts. Channels come in parts of a vector's width W; states are [B, D / W, N, 2, W]."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int  # B
    length: int
    dim: int
    components: int
    runs: int  # int64 [B, most_runs, AVERAGED]: first token, tokens, 1 where they begin a document
    counts: int  # int64 [B]: runs of each row
    most_runs: int
    longest: int  # tokens of a run
    x: int  # [B, L, D]
    y: int  # [B, L, D]; the gradient of x in the backward pass
    dy: int  # [B, L, D]
    coefficients: int  # [D / W, N, 5, W]: q and gamma, re and im each, p
    omega: int  # [D]
    states: int  # before the first token, then after the last; in the backward pass their gradients, the other way
    entering: int  # before the first token, in the backward pass
    sums: int  # [B, D / W, N, 5, W]: gradients of the coefficients
    d_omega: int  # [B, D]
    scratch: int  # [threads, (longest + 1 + most_runs) * 2 N W]


Average = _Average(*range(len(_Average._fields)))
"""Where each number of CEMA stands."""
AVERAGED = 3
"""Numbers of a run."""


class _Gate(NamedTuple):
    """`out = silu(a) * b`, all tensors of one size and `kind`."""

    barrier: int  # as in a call
    number: int
    team: int
    size: int
    kind: int
    a: int
    b: int
    out: int  # the gradient of b in the backward pass
    grad: int
    da: int


Gate = _Gate(*range(len(_Gate._fields)))
"""Where each number of a gate stands."""


class _Norm(NamedTuple):
    """TimestepNorm of whole texts."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int  # B
    length: int
    dim: int
    groups: int
    x: int  # [B, L, D]
    y: int  # [B, L, D]; the gradient of x in the backward pass
    weight: int  # [D]; the effective scale
    bias: int  # [D]
    before: int  # int64 [B, L]: tokens of the document, the prior's included, before each
    fresh: int  # uint8 [B, L]: 1 where a token begins a document and t > 0
    real: int  # uint8 [B, L]: 0 where a token is padding
    means: int  # float64 [B, L, G]: after each token
    scales: int  # [B, L, G]: 1 / sqrt(var + eps)
    mean: int  # float64 [B, G]: before the first token, then after the last; gradients the other way
    var: int
    initial: int  # float64 [B, G]: the mean before the first token, in the backward pass
    prior_mean: int  # float64 [G]
    prior_var: int
    eps: int  # float64 [1]
    dy: int  # [B, L, D]
    d_weight: int  # [B, D]; these four are added to
    d_bias: int
    d_prior_mean: int  # float64 [B, G]
    d_prior_var: int


Norm = _Norm(*range(len(_Norm._fields)))
"""Where each number of a norm stands."""


class _DecayNorm(NamedTuple):
    """TimestepDecayNorm of whole texts."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int  # B
    length: int
    dim: int
    groups: int
    x: int  # [B, L, D]
    y: int  # [B, L, D]; the gradient of x in the backward pass
    weight: int  # [D]; the effective scale
    bias: int  # [D]
    restart: int  # uint8 [B, L]: 1 where all before a token is forgotten
    real: int  # uint8 [B, L]: 0 where a token is padding
    corrections: int  # float64 [B, L, 2]: what mean and variance are multiplied by, 1 / (1 - beta**count)
    betas: int  # float64 [2]
    centres: int  # [B, L, G]: corrected means
    scales: int  # [B, L, G]: 1 / sqrt(corrected var + eps)
    mean: int  # float64 [B, G]: before the first token, then after the last; gradients the other way
    var: int
    eps: int  # float64 [1]
    dy: int  # [B, L, D]
    d_weight: int  # [B, D]; these two are added to
    d_bias: int


DecayNorm = _DecayNorm(*range(len(_DecayNorm._fields)))
"""Where each number of a decaying norm stands."""


class _RootMeanSquare(NamedTuple):
    """The norm of each row of a matrix by its root mean square, times a scale."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int
    dim: int
    x: int  # [rows, D]
    weight: int  # [D]; the scale
    eps: int  # float64 [1]
    y: int  # [rows, D]; the gradient of x in the backward pass
    factors: int  # [rows]: 1 / root mean square
    dy: int  # [rows, D]
    sums: int  # [parts, D]: what each part of `PART` rows adds to the gradient of the scale


RootMeanSquare = _RootMeanSquare(*range(len(_RootMeanSquare._fields)))
"""Where each number of such a norm stands."""


class _Queries(NamedTuple):
    """Queries and keys made of one normalised z, scaled, shifted and rotated."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int
    heads: int
    head_dim: int
    z: int  # [rows, H, d]
    scale: int  # [2, H, d]: of queries, of keys
    bias: int
    turns: int  # complex [places, d / 2]
    places: int  # row i is turned by number `i % places`
    eps: int  # float64 [1]
    q: int  # [rows, H, d]; gradients in the backward pass
    k: int
    dz: int  # [rows, H, d]
    sums: int  # [parts, 5, H, d]: what each part of `PART` rows adds to the gradients of scale [2, H, d] and bias
    # [2, H, d], and space to work in


Queries = _Queries(*range(len(_Queries._fields)))
"""Where each number of queries and keys stands."""


class _CausalSoftmax(NamedTuple):
    """The softmax of scores whose later keys are hidden."""

    barrier: int  # as in a call
    number: int
    team: int
    matrices: int
    queries: int
    keys: int
    seen: int  # keys that the first query of each matrix sees; each next one sees one more
    scores: int  # [matrices, queries, keys]; changed in place


CausalSoftmax = _CausalSoftmax(*range(len(_CausalSoftmax._fields)))
"""Where each number of such a softmax stands."""

PART = 64
"""Rows whose share of a weight's gradient is summed by one thread: sums do not depend on the number of threads."""


class _Convolution(NamedTuple):
    """A short convolution of whole texts. Steps are elements from one token, or row, to the next."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int  # B
    length: int
    dim: int
    taps: int  # K
    silu: int  # 1 where it follows
    x: int  # [B, L, D]
    token_step: int
    row_step: int
    recent: int  # [B, K - 1, D]
    weight: int  # [K, D]
    bias: int  # [D], or 0
    y: int  # [B, L, D]
    dy: int  # [B, L, D]
    d_joined: int  # [B, K - 1 + L, D]: of recent, then of x
    totals: int  # float64 [K + 1, D]: gradients of the taps and of the bias; added to
    scratch: int  # [K + 2, D], zeros


Convolution = _Convolution(*range(len(_Convolution._fields)))
"""Where each number of a short convolution stands."""


class _GatedNorm(NamedTuple):
    """`rms_norm(y * silu(z)) * weight`."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int
    dim: int
    groups: int
    y: int  # [n, D]
    z: int  # [n, D]
    z_step: int  # elements from one row to the next
    weight: int  # [D]
    eps: int  # float64 [1]
    out: int  # [n, D]; its gradient in the backward pass
    dy: int  # [n, D]
    dz: int
    totals: int  # float64 [threads, D]: gradients of the weight; added to
    scratch: int  # [threads, D], zeros


GatedNorm = _GatedNorm(*range(len(_GatedNorm._fields)))
"""Where each number of a gated norm stands."""


class _Scan(NamedTuple):
    """What stands between the products of a span of Mamba-2's scan: n chunks of T tokens in each of B rows."""

    barrier: int  # as in a call
    number: int
    team: int
    rows: int  # B
    chunks: int  # n
    size: int  # T
    heads: int  # H
    groups: int  # G
    width: int  # P
    state: int  # P N, numbers of a head's state
    x: int  # [B, n, T, H, P]
    token_step: int  # elements from one token of x to the next
    row_step: int
    weight: int  # [B, n, T, H], or 0
    entering: int  # [B, n, T, H]
    leaving: int
    decay: int  # [B, n, H]
    sums: int  # float64 [B, n, H, T]
    document: int  # int64 [B, n, T], or 0
    skip: int  # [H], or 0
    written: int  # [B, n, H, T, P]
    kept: int  # [B, n, T, H, P]
    scores: int  # [B, n, G, T, T]; their gradients in the backward pass of weights
    weights: int  # [B, n, H, T, T]; their gradients in the backward pass
    known: int  # [B, n, H, T, T]: weights, in the backward pass
    inter: int  # [B, n, T, H, P]: read from states; y afterwards
    intra: int  # [B, n, H, T, P]: read inside chunks
    added: int  # [B, n, H, P N]; gradients of states before chunks, then of what is added
    before: int  # [B, n, H, P N]
    last: int  # [B, H, P N]; the state before, then after, or its gradient the other way
    dy: int  # [B, n, T, H, P]
    scaled: int  # [B, n, T, H, P]: dy times entering
    heads_first: int  # [B, n, H, T, P]: dy
    dx: int  # [B, n, T, H, P]
    d_weight: int  # [B, n, T, H]
    d_entering: int
    d_leaving: int
    d_skip: int  # [B, n, T, H]
    d_decay: int  # [B, n, H], of the logarithm
    d_sums: int  # float64 [B, n, H, T]: what tokens receive less what they give, inside chunks


Scan = _Scan(*range(len(_Scan._fields)))
"""Where each number of a scan stands."""
